"""The NVM tier on a real file: reads, space, late devices, what it brings.

The measuring itself is native (`native/bench/nvm_bench*.cpp`): the engine and its peers work on the
same file in one process, in alternating rounds. The file lies in the checkout (`.cache/`), is read
and written past the page cache, and removed afterwards.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks._harness import Figure, Metric, Settings, median
from benchmarks._native import ROOT, build, free_memory_bytes, rounds_by_metric

__all__ = ["BENCH", "NvmBench"]

_PROGRAM = "fc_nvm_bench"
_FOLDER = ROOT / ".cache"
_MIB = 1 << 20
_MEMORY_BYTES = 1024 * _MIB  # the engine, the lists of keys, the program


@dataclass(frozen=True)
class _Plan:
    """How one metric reads."""

    metric: Metric
    unit: str
    peer: str | None = None
    lower_is_better: bool = False


_PLANS = (
    _Plan(
        Metric(
            "index_bytes_per_item", "index and region table for each item of a full tier", limit=10
        ),
        "B",
    ),
    _Plan(
        Metric(
            "write_amplification",
            "bytes written for each byte admitted, items of 300 B",
            limit=1.12,
        ),
        "x",
    ),
    _Plan(
        Metric("write_amplification_4_kib", "the same, items of 4 KiB", limit=1.03),
        "x",
    ),
    _Plan(
        Metric("random_read", "random NVM keys in batches of 1,000, four batches under way", 0.85),
        "keys/s",
        "bare io_uring, random blocks of the same file, depth 128",
    ),
    _Plan(
        Metric("batch_latency", "p50 of one batch of 500 NVM keys", 5.0),
        "µs",
        "the same reads one after another with pread",
        lower_is_better=True,
    ),
    _Plan(
        Metric(
            "dram_under_saturation",
            "p50 of DRAM batches while others keep the SSD busy, over p50 alone",
            limit=1.3,
        ),
        "x",
    ),
    _Plan(
        Metric(
            "slow_reads_p99_ms",
            "BatchGets of 100 NVM keys at half load, 2 % of reads 50 ms late, with speculation",
            limit=8,
        ),
        "ms",
        "without speculation",
        lower_is_better=True,
    ),
    _Plan(
        Metric("slow_reads_p99_ms_plain", "that peer alone: above 50 ms, or nothing was shown"),
        "ms",
    ),
    _Plan(
        Metric("healthy_launch_share", "of NVM keys, no delay, late from p99 on", limit=0.01),
        "of keys",
    ),
    _Plan(
        Metric(
            "brownout_extra_load",
            "every read 50 ms late: more keys asked of the store, the worst second's share",
            limit=0.05,
        ),
        "of keys",
    ),
    _Plan(
        Metric("hybrid_hit_ratio", "Zipf 0.9, keys of 4x the hybrid's size, NVM 8x DRAM"),
        "% hits",
        "DRAM alone, of the same memory",
    ),
    _Plan(
        Metric("mixed_10_percent_puts", "the hybrid, two threads, every tenth batch of puts"),
        "keys/s",
    ),
)


@dataclass(frozen=True)
class _Size:
    """How much a run does."""

    data_mib: int
    seconds: float
    rounds: int
    outage_seconds: float


_FULL = _Size(data_mib=8192, seconds=3.0, rounds=5, outage_seconds=30.0)
_QUICK = _Size(data_mib=1024, seconds=0.6, rounds=3, outage_seconds=6.0)


class NvmBench:
    """The `nvm` benchmark."""

    name = "nvm"

    @property
    def metrics(self) -> Sequence[Metric]:
        return [plan.metric for plan in _PLANS]

    def run(self, metrics: Sequence[str], settings: Settings) -> Iterator[Figure]:
        """Measures the named metrics.

        Raises RuntimeError when the program cannot be built or fails, or when there is no room.
        """
        program = build(_PROGRAM)
        size = _QUICK if settings.quick else _FULL
        _FOLDER.mkdir(exist_ok=True)
        _check_room(size)
        plans = {plan.metric.name: plan for plan in _PLANS}
        with tempfile.TemporaryDirectory(prefix="nvm-bench-", dir=_FOLDER) as folder:
            command: tuple[str | Path, ...] = (
                *(program, folder, "--data-mib", str(size.data_mib)),
                *("--seconds", str(size.seconds), "--rounds", str(size.rounds)),
                *("--outage-seconds", str(size.outage_seconds), *metrics),
            )
            for metric, rounds in rounds_by_metric(command):
                yield self._figure(plans[metric], rounds)

    def _figure(self, plan: _Plan, rounds: Sequence[Mapping[str, float]]) -> Figure:
        medians = {
            name: median([one[name] for one in rounds]) for name in rounds[0] if name != "metric"
        }
        value, peer_value = medians.pop("value"), medians.pop("peer_value", None)
        values = [one["value"] for one in rounds]
        spread = {"least": min(values), "most": max(values)} if len(rounds) > 1 else {}
        return Figure(
            bench=self.name,
            metric=plan.metric.name,
            value=value,
            unit=plan.unit,
            peer=plan.peer,
            peer_value=peer_value,
            lower_is_better=plan.lower_is_better,
            bar=plan.metric.bar,
            limit=plan.metric.limit,
            extra={name: float(f"{number:.4g}") for name, number in (medians | spread).items()},
        )


def _check_room(size: _Size) -> None:
    """Raises RuntimeError when disk or memory do not suffice."""
    wanted = (size.data_mib + 1024) * _MIB
    free = shutil.disk_usage(_FOLDER).free
    if free < wanted:
        raise RuntimeError(
            f"nvm needs {wanted / _MIB:,.0f} MiB of disk in {_FOLDER}, {free / _MIB:,.0f} are free"
        )
    if free_memory_bytes() < _MEMORY_BYTES:
        raise RuntimeError(f"nvm needs {_MEMORY_BYTES // _MIB:,} MiB of free memory")


BENCH = NvmBench()
