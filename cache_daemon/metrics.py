"""Prometheus metrics over the counters that the rooms keep anyway.

The only module that knows prometheus_client. Nothing is counted here: at each scrape a collector
asks its sources (the native node, the guards of the stores) for their samples and histograms.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

__all__ = [
    "DAEMON_STATES",
    "HistogramLike",
    "Metrics",
    "NodeCollector",
    "SampleLike",
    "SampleSource",
    "StateCollector",
]

DAEMON_STATES = ("STARTING", "RECOVERING", "WARMING", "SERVING", "DRAINING", "STOPPED")

_log = logging.getLogger(__name__)


class SampleLike(Protocol):
    """One counter or gauge. A counter's name ends in `_total`."""

    @property
    def name(self) -> str: ...
    @property
    def help(self) -> str: ...
    @property
    def kind(self) -> str: ...  # counter | gauge
    @property
    def labels(self) -> Mapping[str, str]: ...
    @property
    def value(self) -> float: ...


class HistogramLike(Protocol):
    """One latency histogram; `counts` has one more entry than `bounds` (the overflow)."""

    @property
    def name(self) -> str: ...
    @property
    def help(self) -> str: ...
    @property
    def labels(self) -> Mapping[str, str]: ...
    @property
    def bounds(self) -> Sequence[float]: ...  # seconds, rising
    @property
    def counts(self) -> Sequence[int]: ...  # a bucket, not cumulative
    @property
    def sum(self) -> float: ...  # seconds


class SampleSource(Protocol):
    """Whatever keeps counters: the native Node is one, the guard of a store is another."""

    def samples(self) -> Sequence[SampleLike]: ...
    def histograms(self) -> Sequence[HistogramLike]: ...


class _Families:
    """Groups what several sources report into families, in order of first appearance.

    Prometheus refuses a whole scrape in which one series occurs twice or one name has two types, so
    the later of such samples is left out and counted instead.
    """

    def __init__(self) -> None:
        self._families: dict[str, Metric] = {}
        self._series: set[tuple[str, frozenset[tuple[str, str]]]] = set()
        self.conflicts = 0

    def add_sample(self, sample: SampleLike) -> None:
        counter = sample.kind == "counter"
        make: Callable[[str, str], Metric] = CounterMetricFamily if counter else GaugeMetricFamily
        family = self._family(sample.name, sample.labels, lambda: make(sample.name, sample.help))
        if family is None or family.type != ("counter" if counter else "gauge"):
            self.conflicts += 1
            return
        # A counter family's own name has lost `_total`; its samples must have it.
        name = f"{family.name}_total" if counter else family.name
        family.add_sample(name, dict(sample.labels), sample.value)

    def add_histogram(self, histogram: HistogramLike) -> None:
        bounds, counts = histogram.bounds, histogram.counts
        family = self._family(
            histogram.name,
            histogram.labels,
            lambda: HistogramMetricFamily(histogram.name, histogram.help),
        )
        if family is None or family.type != "histogram" or len(counts) != len(bounds) + 1:
            self.conflicts += 1
            return
        labels = dict(histogram.labels)
        total = 0
        for bound, count in zip((*bounds, math.inf), counts, strict=True):
            total += count
            edge = {**labels, "le": "+Inf" if bound == math.inf else repr(float(bound))}
            family.add_sample(f"{family.name}_bucket", edge, total)
        family.add_sample(f"{family.name}_count", labels, total)
        family.add_sample(f"{family.name}_sum", labels, histogram.sum)

    def _family(
        self, name: str, labels: Mapping[str, str], make: Callable[[], Metric]
    ) -> Metric | None:
        """The family of this series; None where the series has been added before."""
        series = (name, frozenset(labels.items()))
        if series in self._series:
            return None
        self._series.add(series)
        if name not in self._families:
            self._families[name] = make()
        return self._families[name]

    def __iter__(self) -> Iterator[Metric]:
        return (family for family in self._families.values() if family.samples)


class NodeCollector(Collector):
    """Turns the samples and histograms of `sources` into metric families at each scrape.

    A source that fails does not hide the others: its samples are absent, the failure is logged and
    counted in `feature_cache_scrape_errors_total`. Thread safe.
    """

    def __init__(self, sources: Sequence[SampleSource]) -> None:
        self._sources = tuple(sources)
        self._lock = threading.Lock()
        self._errors = 0

    def describe(self) -> Iterable[Metric]:
        # Without this the registry would run a whole collection when the collector is registered,
        # before the node serves.
        return ()

    def collect(self) -> Iterable[Metric]:
        families = _Families()
        for source in self._sources:
            try:
                samples, histograms = source.samples(), source.histograms()
            except Exception:
                _log.exception("metrics: %s gave no samples", type(source).__name__)
                with self._lock:
                    self._errors += 1
                continue
            for sample in samples:
                families.add_sample(sample)
            for histogram in histograms:
                families.add_histogram(histogram)
        yield from families
        yield CounterMetricFamily(
            "feature_cache_scrape_errors_total",
            "Times that a source of samples failed during a scrape.",
            value=self._errors,
        )
        yield GaugeMetricFamily(
            "feature_cache_scrape_conflicts",
            "Samples left out of this scrape since a series of the same name was there already.",
            value=families.conflicts,
        )


class StateCollector(Collector):
    """The life-cycle state as one gauge a state, and what was built, as constant labels."""

    def __init__(self, state: Callable[[], str], build_info: Mapping[str, str]) -> None:
        self._state = state
        self._build_info = dict(build_info)

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        now = self._state()
        states = GaugeMetricFamily(
            "feature_cache_state",
            "1 for the daemon's state of life, 0 for the others.",
            None,
            ["state"],
        )
        for state in DAEMON_STATES:
            states.add_metric([state], float(state == now))
        yield states
        info = GaugeMetricFamily(
            "feature_cache_build_info", "Versions and switches of this build; always 1."
        )
        info.add_sample(info.name, self._build_info, 1.0)
        yield info


class Metrics:
    """A registry of its own (never the global one) and its text form.

    Parameters
    ----------
    sources
        Where the counters come from, asked in this order at each scrape.
    state
        Gives one of `DAEMON_STATES`.
    build_info
        Labels of `feature_cache_build_info`.
    """

    def __init__(
        self,
        sources: Sequence[SampleSource],
        *,
        state: Callable[[], str],
        build_info: Mapping[str, str],
    ) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(NodeCollector(sources))
        self._registry.register(StateCollector(state, build_info))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def render(self, accept: str = "") -> tuple[str, bytes]:
        """Returns (content type, body) in the format that the Accept header asks for."""
        encode, content_type = choose_encoder(accept)
        return content_type, encode(self._registry)
