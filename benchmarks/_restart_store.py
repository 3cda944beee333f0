"""A feature store that has every value, at once: the daemon under the hit-ratio trace reads it."""

from collections.abc import Sequence

__all__ = ["AllValues"]


class AllValues:
    """Named by a config as `benchmarks._restart_store:AllValues`; takes no options."""

    def get_many(
        self, groups: Sequence[tuple[str, Sequence[bytes]]], timeout_s: float
    ) -> list[list[bytes]]:
        """See `cache_daemon.stores.Store`."""
        del timeout_s  # it never waits
        return [[key * 25 for key in keys] for _, keys in groups]

    def close(self) -> None:
        """Nothing is open."""
