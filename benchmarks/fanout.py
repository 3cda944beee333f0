"""A node of four instances beside one of one: the same data, the same memory, in one process.

The measuring is native (`native/bench/engine_bench.cpp`): both take turns of some batches each, and
what counts is the time that the thread had a processor, since cores are shared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks._harness import Figure, Metric, Settings, median
from benchmarks._native import build, free_memory_bytes, rounds_by_metric

__all__ = ["BENCH", "FanOutBench"]

_PROGRAM = "fc_engine_bench"
_ITEMS = 10_000_000
_QUICK_ITEMS = 2_000_000
_BYTES_PER_ITEM = 550  # of both engines


@dataclass(frozen=True)
class _Plan:
    metric: Metric
    native: str
    unit: str


_PLANS = (
    _Plan(
        Metric("fanout_4_over_1", "batches of 1,000, uniform keys, all hits, copied out", 0.95),
        "fanout_uniform",
        "keys/s",
    ),
    _Plan(
        Metric("fanout_4_over_1_zipf", "the same, Zipf 0.99", 0.95),
        "fanout_zipf",
        "keys/s",
    ),
    _Plan(
        Metric("fanout_put_4_over_1", "new items into a full cache, evicting"),
        "fanout_put",
        "puts/s",
    ),
)


class FanOutBench:
    """The `fanout` benchmark."""

    name = "fanout"

    @property
    def metrics(self) -> Sequence[Metric]:
        return [plan.metric for plan in _PLANS]

    def run(self, metrics: Sequence[str], settings: Settings) -> Iterator[Figure]:
        """Measures the named metrics. Raises RuntimeError when the program cannot be built."""
        program = build(_PROGRAM)
        items = _QUICK_ITEMS if settings.quick else _ITEMS
        if free_memory_bytes() < items * _BYTES_PER_ITEM:
            needed = items * _BYTES_PER_ITEM >> 30
            raise RuntimeError(f"{items:,} items need {needed} GiB of free memory")
        seconds, rounds = ("0.1", "9") if settings.quick else ("0.5", "11")
        for plan in _PLANS:
            if plan.metric.name not in metrics:
                continue
            command = (
                *(program, plan.native, "--items", str(items)),
                *("--seconds", seconds, "--rounds", rounds),
            )
            [(_, lines)] = rounds_by_metric(command)
            ratios = [line["value"] / line["peer_value"] for line in lines]
            # Of the median ratio: a round's two sides are of the same moment, medians are not.
            peer_value = median([line["peer_value"] for line in lines])
            yield Figure(
                bench=self.name,
                metric=plan.metric.name,
                value=median(ratios) * peer_value,
                unit=plan.unit,
                peer="one instance",
                peer_value=peer_value,
                bar=plan.metric.bar,
                extra={
                    "items": items,
                    "ratio_min": round(min(ratios), 3),
                    "ratio_max": round(max(ratios), 3),
                },
            )


BENCH = FanOutBench()
