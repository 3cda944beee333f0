"""The end of the demo: what a run came to, as a table or as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table

from benchmarks.demo.daemon_stats import DaemonStats
from benchmarks.demo.replay import NAMESPACES, Progress

__all__ = ["Outcome", "as_dict", "summary_table"]


@dataclass(frozen=True)
class Outcome:
    """How a run of the demo went; ratios are hits per key asked, latencies of whole requests."""

    progress: Progress
    stats: DaemonStats
    p50_s: float
    p99_s: float
    cold_hit_ratio: float
    warm_hit_ratio: float
    data_bytes: int
    nvm_bytes: int
    checked_values: int
    problems: tuple[str, ...]


def as_dict(outcome: Outcome) -> Mapping[str, object]:
    """The outcome for machines; `ok` is false exactly when there are problems."""
    progress, stats = outcome.progress, outcome.stats
    return {
        "ok": not outcome.problems,
        "requests": progress.requests,
        "seconds": round(progress.elapsed_s, 3),
        "keys": progress.keys,
        "requests_per_second": round(progress.requests / progress.elapsed_s, 1),
        "p50_ms": round(outcome.p50_s * 1e3, 3),
        "p99_ms": round(outcome.p99_s * 1e3, 3),
        "hit_ratio": round(progress.overall_hit_ratio, 4),
        "cold_hit_ratio": round(outcome.cold_hit_ratio, 4),
        "warm_hit_ratio": round(outcome.warm_hit_ratio, 4),
        "namespace_hit_ratio": {k: round(v, 4) for k, v in progress.hit_ratio.items()},
        "domain_hits": {
            f"{name}.{domain.name}": domain.hits
            for name in NAMESPACES
            for domain in stats.domains(name)
        },
        "nvm_hits": progress.nvm_hits,
        "evictions": sum(domain.evictions for name in NAMESPACES for domain in stats.domains(name)),
        "store_calls": stats.store_calls,
        "store_keys": stats.store_keys,
        "store_keys_saved": stats.reads_saved(progress.keys),
        "store_calls_without_cache": progress.requests,
        "checked_values": outcome.checked_values,
        "data_bytes": outcome.data_bytes,
        "dram_budget_bytes": stats.dram_budget_bytes,
        "nvm_bytes": outcome.nvm_bytes,
        "nvm_regions": stats.nvm_regions,
        "nvm_region_bytes": stats.nvm.region_bytes,
        "nvm_written_bytes": sum(device.written_bytes for device in stats.nvm.devices),
        "speculative_lookups": sum(s.speculative.launched for s in stats.nvm.namespaces),
        "failures": progress.failure_count,
        "problems": list(outcome.problems),
    }


def summary_table(outcome: Outcome) -> Table:
    """The outcome for people."""
    progress, stats = outcome.progress, outcome.stats
    table = Table(title="summary", title_justify="left", show_header=False)
    rows = {
        "requests": f"{progress.requests:,} in {progress.elapsed_s:.0f} s, "
        f"{progress.keys / max(1, progress.requests):,.0f} keys each",
        "requests/s": f"{progress.requests / progress.elapsed_s:,.0f}",
        "latency": f"p50 {outcome.p50_s * 1e3:.2f} ms, p99 {outcome.p99_s * 1e3:.2f} ms",
        "hit ratio": f"{outcome.cold_hit_ratio:.1%} at first → {outcome.warm_hit_ratio:.1%} at "
        f"last ({progress.overall_hit_ratio:.1%} over all)",
        **{
            f"  {name}": f"{ratio:.1%}  "
            + ", ".join(
                f"{domain.name} {domain.hits / max(1, stats.hits(name)):.0%} of hits"
                for domain in stats.domains(name)
            )
            + _nvm_share(stats, name)
            for name, ratio in progress.hit_ratio.items()
        },
        "store keys": f"{stats.store_keys:,} read, {stats.reads_saved(progress.keys):,} saved",
        "store calls": f"{stats.store_calls:,} (without a cache {progress.requests:,} at least)",
        "from NVM": f"{progress.nvm_hits:,} hits; "
        f"{sum(d.written_bytes for d in stats.nvm.devices) / (1 << 20):.1f} MiB written, "
        f"{sum(s.speculative.launched for s in stats.nvm.namespaces):,} speculative lookups",
        "memory": f"{stats.dram_budget_bytes / (1 << 20):.1f} MiB of DRAM and "
        f"{outcome.nvm_bytes / (1 << 20):.1f} MiB of NVM ({stats.nvm_regions} regions) for "
        f"{outcome.data_bytes / (1 << 20):.1f} MiB of features",
        "values checked": f"{outcome.checked_values:,}",
        "failures": str(max(progress.failure_count, len(outcome.problems))),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _nvm_share(stats: DaemonStats, name: str) -> str:
    nvm = stats.nvm_of(name)
    return "" if nvm is None else f", NVM {nvm.hits / max(1, stats.hits(name)):.0%}"
