"""The counters of a GetStats reply, by name and labels."""

from __future__ import annotations

from collections.abc import Mapping

from cache_daemon._proto.feature_cache.v1 import admin_pb2

__all__ = ["Samples", "since"]


class Samples:
    """Looks counters up. One that the daemon does not have is 0, so an older one can be shown."""

    def __init__(self, reply: admin_pb2.GetStatsResponse | None) -> None:
        """`reply` may be None: then everything is 0."""
        self._series: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
        for sample in reply.samples if reply is not None else ():
            series = self._series.setdefault(sample.name, {})
            series[frozenset(sample.labels.items())] = sample.value

    def value(self, name: str, **labels: str) -> int:
        """The value of the one series with exactly these labels."""
        return int(self._series.get(name, {}).get(frozenset(labels.items()), 0))

    def by(self, label: str, name: str, **labels: str) -> dict[str, int]:
        """The values of the series with these labels and one more, by the value of that one."""
        wanted = labels.items()
        return {
            found[label]: int(value)
            for series, value in self._series.get(name, {}).items()
            if (found := dict(series)).keys() == {label, *labels} and wanted <= found.items()
        }

    def labels(self, name: str) -> list[Mapping[str, str]]:
        """The labels of each series of a metric."""
        return [dict(series) for series in self._series.get(name, {})]


def since(now: int, before: int) -> int:
    """What a counter grew by; one that went backwards, as after a restart, counts from zero."""
    return now - before if now >= before else now
