"""The engine in process: batched lookups, scaling, puts and memory, beside a plain map.

The measuring itself is native (`native/bench/engine_bench.cpp`): both sides run in one process, in
alternating rounds, and print one JSON object a round. This module builds it, takes medians, and
says what the figures mean.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks._harness import Figure, Metric, Settings, median
from benchmarks._native import build, free_memory_bytes, rounds_by_metric

__all__ = ["BENCH", "EngineBench"]

_PROGRAM = "fc_engine_bench"
_ITEMS = 10_000_000
_QUICK_ITEMS = 2_000_000
_PLAIN_MAP = "plain open-addressing map, one thread"


@dataclass(frozen=True)
class _Plan:
    """How one metric runs and reads."""

    metric: Metric
    unit: str
    peer: str | None
    seconds: float = 1.0
    rounds: int = 7
    sized: bool = True  # takes --items


_PLANS = (
    _Plan(
        Metric("batch_get_zipf", "batches of 1,000, Zipf 0.99, all hits, values copied out", 1.8),
        "keys/s",
        _PLAIN_MAP,
    ),
    _Plan(
        Metric("batch_get_uniform", "the same, uniform keys", 1.8),
        "keys/s",
        _PLAIN_MAP,
    ),
    _Plan(
        Metric("two_threads", "batch_get_zipf with two threads", 1.8),
        "keys/s",
        "one thread of ours",
    ),
    _Plan(
        Metric("ten_percent_puts", "batch_get_zipf with every tenth batch a batch of puts", 0.7),
        "keys/s",
        "read only",
    ),
    _Plan(
        Metric("put", "new items into a full cache (evicting); the plain map overwrites"),
        "puts/s",
        _PLAIN_MAP,
    ),
    _Plan(
        Metric("overhead_bytes_per_item", "memory beyond key and value, all of it; at most 24 B"),
        "B",
        None,
        rounds=1,
    ),
    _Plan(
        Metric("same_key_get_ns", "one key 10,000 times (1 KiB; other sizes beside it)"),
        "ns",
        None,
        sized=False,
    ),
    _Plan(
        Metric("same_key_put_ns", "the same key put 10,000 times"),
        "ns",
        None,
        sized=False,
    ),
)


class EngineBench:
    """The `engine` benchmark."""

    name = "engine"

    @property
    def metrics(self) -> Sequence[Metric]:
        return [plan.metric for plan in _PLANS]

    def run(self, metrics: Sequence[str], settings: Settings) -> Iterator[Figure]:
        """Measures the named metrics. Raises RuntimeError when the program cannot be built."""
        program = build(_PROGRAM)
        items = _QUICK_ITEMS if settings.quick else _ITEMS
        for plan in _PLANS:
            if plan.metric.name in metrics:
                yield self._measure(program, plan, items, settings)

    def _measure(self, program: Path, plan: _Plan, items: int, settings: Settings) -> Figure:
        # The plain map takes 450 B an item, ours 240.
        if plan.sized and free_memory_bytes() < items * 800:
            raise RuntimeError(f"{items:,} items need {items * 800 >> 30} GiB of free memory")
        seconds = 0.2 if settings.quick else plan.seconds
        rounds = min(plan.rounds, 5) if settings.quick else plan.rounds
        sizes = ("--items", str(items)) if plan.sized else ()
        command = (
            *(program, plan.metric.name, "--seconds", str(seconds), "--rounds", str(rounds)),
            *sizes,
        )
        [(_, lines)] = rounds_by_metric(command)
        if plan.metric.name.startswith("same_key"):
            return self._same_key(plan, lines)
        ratios = [line["value"] / line["peer_value"] for line in lines if line["peer_value"]]
        extra: dict[str, object] = {"items": items} if plan.sized else {}
        if ratios:
            extra |= {"ratio_min": round(min(ratios), 3), "ratio_max": round(max(ratios), 3)}
        for name in ("hit_share", "resident_overhead"):
            if name in lines[0]:
                extra[name] = median([line[name] for line in lines])
        return Figure(
            bench=self.name,
            metric=plan.metric.name,
            value=median([line["value"] for line in lines]),
            unit=plan.unit,
            peer=plan.peer,
            peer_value=median([line["peer_value"] for line in lines]) if plan.peer else None,
            bar=plan.metric.bar,
            extra=extra,
        )

    def _same_key(self, plan: _Plan, lines: Sequence[Mapping[str, float]]) -> Figure:
        by_size: dict[int, list[float]] = {}
        for line in lines:
            by_size.setdefault(int(line["value_bytes"]), []).append(line["value"])
        medians = {size: median(values) for size, values in by_size.items()}
        return Figure(
            bench=self.name,
            metric=plan.metric.name,
            value=medians[1024],
            unit=plan.unit,
            peer=None,
            lower_is_better=True,
            extra={f"ns_{size}_bytes": round(value, 1) for size, value in medians.items()},
        )


BENCH = EngineBench()
