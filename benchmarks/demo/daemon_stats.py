"""Readings of the daemon's own counters, through its admin service."""

from collections.abc import Sequence
from typing import Any

from cache_daemon.cachectl_admin import AdminClient
from cache_daemon.cachectl_nvm import NvmNamespaceView, NvmView, nvm_view

__all__ = ["DaemonStats", "StatsReader"]

_STORE_CALLS = "feature_cache_store_calls_total"
_STORE_KEYS = "feature_cache_store_asked_keys_total"


class DaemonStats:
    """One reading. Namespaces and domains that the daemon does not have are empty."""

    def __init__(self, response: Any) -> None:
        """`response` is a GetStatsResponse of the admin service."""
        self.nvm: NvmView = nvm_view(response)
        self._namespaces = {namespace.name: namespace for namespace in response.namespaces}
        self._samples: dict[str, float] = {}
        for sample in response.samples:
            self._samples[sample.name] = self._samples.get(sample.name, 0.0) + sample.value

    @property
    def store_calls(self) -> int:
        """Calls of the feature stores so far, attempts that were repeated included."""
        return int(self._samples[_STORE_CALLS])

    @property
    def store_keys(self) -> int:
        """Keys that the feature stores were asked for so far."""
        return int(self._samples[_STORE_KEYS])

    def reads_saved(self, keys_asked: int) -> int:
        """How many of `keys_asked` never reached a store.

        Keys of requests that are on their way may be counted as read already, but not as asked.
        """
        return max(0, keys_asked - self.store_keys)

    def hits(self, namespace: str) -> int:
        found = self._namespaces.get(namespace)
        return int(found.hits) if found is not None else 0

    def domains(self, namespace: str) -> Sequence[Any]:
        """The `DomainStats` of a namespace, in the order of the config."""
        found = self._namespaces.get(namespace)
        return list(found.domains) if found is not None else []

    @property
    def dram_budget_bytes(self) -> int:
        """What all eviction domains may hold together."""
        domains = (domain for name in self._namespaces for domain in self.domains(name))
        return sum(int(domain.budget_bytes) for domain in domains)

    def nvm_of(self, namespace: str) -> NvmNamespaceView | None:
        """What a namespace has on NVM; None where it has none."""
        return next((found for found in self.nvm.namespaces if found.name == namespace), None)

    @property
    def nvm_regions(self) -> int:
        """Regions of all NVM devices."""
        return sum(sum(device.regions.values()) for device in self.nvm.devices)


class StatsReader:
    """Reads the counters of the daemon whose admin service listens at `address`."""

    def __init__(self, address: str) -> None:
        self._client = AdminClient(address, timeout_s=5.0)

    def __enter__(self) -> "StatsReader":
        self._client.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._client.__exit__(*error)

    def read(self) -> DaemonStats:
        """Raises what `AdminClient` raises when the daemon does not answer."""
        return DaemonStats(self._client.stats())
