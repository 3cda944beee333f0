"""A daemon that ends and is started again on the memory that it left: how soon it serves, and what.

Start, survivors and hit ratio are of a real daemon process over gRPC; what persistence costs while
serving, and the rebuild of the NVM tier, are native (`native/bench/restart_bench*.cpp`). Memory
lies on a tmpfs (`shared_memory`), the NVM file in the checkout (`.cache/`); both are removed.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks._harness import Figure, Metric, Settings, median
from benchmarks._native import ROOT, build, free_memory_bytes, rounds_by_metric
from benchmarks._restart_daemon import (
    NAMESPACE,
    VALUE_BYTES,
    Ids,
    RestartedDaemon,
    SharedMemory,
    fill,
    hits,
    load,
    shared_memory,
)

__all__ = ["BENCH", "RestartBench"]

_PROGRAM = "fc_restart_bench"
_FOLDER = ROOT / ".cache"
_MIB = 1 << 20
_KEY_BYTES = 8
# Header, index slot, segment table and what is never full, over the content of small items.
_MEMORY_FACTOR = 1.28
_BATCH = 1000
_RESTARTS = 3

_METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "exec_to_first_hit_s",
            "a clean stop, then from exec to the first hit over gRPC, 4 GiB of content",
            limit=1.5,
        ),
        Metric("adopt_clean_ms", "the part of it that adopts the memory", limit=200),
        Metric(
            "adopt_killed_ms", "the same after kill -9 under puts, deletes and gets", limit=1000
        ),
        Metric("survivors", "published items that hit after that", bar=0.999),
        Metric(
            "hit_ratio_after_over_before",
            "Zipf trace through a store: the first 10 s after a restart, the worse of both kinds",
            bar=0.99,
        ),
        Metric("nvm_rebuild", "index entries from the regions' lists, one core; 4 M/s, or 0.5x"),
        Metric(
            "persist_cost", "batches of 1,000 gets, Zipf 0.99, from memory that persists", bar=0.97
        ),
        Metric("persist_cost_put", "batches of 1,000 puts into it, when it is full", bar=0.97),
    )
}
_OF_CONTENT = ("exec_to_first_hit_s", "adopt_clean_ms", "adopt_killed_ms", "survivors")
_NATIVE = ("persist_cost", "persist_cost_put", "nvm_rebuild")
# Of the rebuild: enough, whatever a bare loop does; below it, the share of that loop which must be.
_REBUILT_A_SECOND = 4_000_000
_REBUILT_SHARE = 0.5
_NATIVE_UNITS = {
    "persist_cost": ("keys/s", "the same engine on memory of its own"),
    "persist_cost_put": ("puts/s", "the same engine on memory of its own"),
    "nvm_rebuild": ("items/s", "a bare loop: the same reads, each listed record touched"),
}


@dataclass(frozen=True)
class _Size:
    """How much a run does."""

    content_mib: int
    trace_keys: int
    warm_s: float
    window_s: float
    items: int  # of the native program
    data_mib: int
    seconds: float
    rounds: int


_FULL = _Size(4096, 2_000_000, 30.0, 10.0, 10_000_000, 4096, 0.15, 101)
_QUICK = _Size(512, 400_000, 4.0, 2.0, 1_000_000, 512, 0.05, 61)


class RestartBench:
    """The `restart` benchmark."""

    name = "restart"
    metrics: Sequence[Metric] = tuple(_METRICS.values())

    def run(self, metrics: Sequence[str], settings: Settings) -> Iterator[Figure]:
        """Measures the named metrics.

        Raises RuntimeError when there is no room, when the program cannot be built, or when a
        daemon does not do what it should.
        """
        size = _QUICK if settings.quick else _FULL
        _FOLDER.mkdir(exist_ok=True)
        with shared_memory() as shared:
            if not shared.large_pages:
                print(f"restart: {shared.path} gives no huge pages", file=sys.stderr)
            if any(name in metrics for name in _OF_CONTENT):
                yield from (f for f in _content(size, shared.path) if f.metric in metrics)
            if "hit_ratio_after_over_before" in metrics:
                yield _hit_ratio(size, shared.path)
            native = [name for name in _NATIVE if name in metrics]
            if native:
                yield from _native(native, size, shared)


def _figure(
    name: str,
    value: float,
    unit: str,
    extra: Mapping[str, object],
    peer: tuple[str, float] | None = None,
) -> Figure:
    metric = _METRICS[name]
    return Figure(
        bench=RestartBench.name,
        metric=name,
        value=value,
        unit=unit,
        peer=peer[0] if peer else None,
        peer_value=peer[1] if peer else None,
        lower_is_better=metric.limit is not None,
        bar=metric.bar,
        limit=metric.limit,
        extra=extra,
    )


# ---- content that survives -----------------------------------------------------------------------


def _content(size: _Size, shared: Path) -> Iterator[Figure]:
    items = size.content_mib * _MIB // (_KEY_BYTES + VALUE_BYTES)
    memory = int(size.content_mib * _MIB * _MEMORY_FACTOR)
    _check_memory(2 * memory if size is _QUICK else memory + 2048 * _MIB)
    sections = {
        "memory": {"size": memory, "expected_item_size": _KEY_BYTES + VALUE_BYTES},
        "namespaces": {NAMESPACE: {"domains": {"all": {"budget": "100%"}}}},
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fc-restart-")))
        daemon = stack.enter_context(RestartedDaemon(folder, shared, sections))
        daemon.start()
        fill(daemon, items)
        there = hits(daemon, items)
        content = daemon.sample("feature_cache_domain_payload_bytes")

        first_hits, adoptions, stops, kept = [], [], [], []
        probe = int(np.flatnonzero(there)[0])
        for _ in range(_RESTARTS):
            stops.append(daemon.stop())
            first_hits.append(daemon.start(probe))
            adoptions.append(daemon.adoption_ms())
            kept.append(_share(hits(daemon, items), there))
        common: dict[str, object] = {"content_gib": round(content / (1 << 30), 3), "items": items}
        extra = {"most": round(max(first_hits), 3), "stop_s": round(median(stops), 3)}
        extra["kept_share"] = min(kept)
        yield _figure("exec_to_first_hit_s", median(first_hits), "s", common | extra)
        extra = {"most": round(max(adoptions), 1)}
        yield _figure("adopt_clean_ms", median(adoptions), "ms", common | extra)

        killed = [_killed(daemon, items, seed) for seed in range(_RESTARTS)]
        adoptions = [one.adoption_ms for one in killed]
        first_hits = [one.first_hit_s for one in killed]
        extra = {"most": round(max(adoptions), 1)}
        extra["exec_to_first_hit_s"] = round(median(first_hits), 3)
        yield _figure("adopt_killed_ms", median(adoptions), "ms", common | extra)
        worst = min(killed, key=lambda one: one.survivors / one.published)
        yield _figure(
            "survivors",
            worst.survivors,
            "items",
            {"kills": len(killed), "keys_written_and_read": sum(worst.load.values())},
            peer=("published before", worst.published),
        )


@dataclass(frozen=True)
class _Killed:
    adoption_ms: float
    first_hit_s: float
    published: int
    survivors: int
    load: Mapping[str, int]


def _killed(daemon: RestartedDaemon, items: int, seed: int) -> _Killed:
    """Kills under a load that overwrites a tenth of a tenth, deletes a hundredth, and reads."""
    rng = np.random.default_rng(seed)
    there = hits(daemon, items)
    ids: Ids = rng.permutation(np.flatnonzero(there)).astype(np.uint64)
    # No more than memory has room for beyond its content, or items would be evicted.
    deleted, overwritten = ids[: items // 100], ids[items // 100 : items // 40]
    evicted = daemon.sample("feature_cache_domain_evictions_total")
    with load(daemon, overwritten, deleted) as done:
        # In the middle of it, wherever that is.
        while done["puts"] < overwritten.size * rng.uniform(0.4, 0.7):
            time.sleep(0.001)
        if daemon.sample("feature_cache_domain_evictions_total") != evicted:
            raise RuntimeError("the load evicts items: survivors cannot be told from those")
        daemon.kill()
    there[deleted] = False
    published = np.flatnonzero(there)
    first_hit_s = daemon.start(int(published[0]))
    adoption_ms = daemon.adoption_ms()
    survivors = int(hits(daemon, items)[published].sum())
    return _Killed(adoption_ms, first_hit_s, published.size, survivors, done)


def _share(found: npt.NDArray[np.bool_], before: npt.NDArray[np.bool_]) -> float:
    return round(float((found & before).sum() / before.sum()), 5)


# ---- hit ratio -----------------------------------------------------------------------------------


def _hit_ratio(size: _Size, shared: Path) -> Figure:
    """Ours is the ratio after, the peer the same daemon's before; the worse of both restarts."""
    # A tenth of the keys fits.
    content = size.trace_keys // 10 * (_KEY_BYTES + VALUE_BYTES)
    sections = {
        "memory": {
            "size": int(content * _MEMORY_FACTOR) + 2 * _MIB,
            "expected_item_size": _KEY_BYTES + VALUE_BYTES,
        },
        "namespaces": {NAMESPACE: {"store": "all", "domains": {"all": {"budget": "100%"}}}},
        "stores": {"all": {"type": "benchmarks._restart_store:AllValues"}},
    }
    ratios: dict[str, tuple[float, float]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fc-restart-")))
        daemon = stack.enter_context(RestartedDaemon(folder, shared, sections))
        trace = _Trace(size.trace_keys)
        daemon.start()
        trace.hit_ratio(daemon, size.warm_s)
        for end in ("clean", "killed"):
            before = trace.hit_ratio(daemon, size.window_s)
            if end == "clean":
                daemon.stop()
            else:
                daemon.kill()
            daemon.start()
            ratios[end] = (trace.hit_ratio(daemon, size.window_s), before)
    after, before = min(ratios.values(), key=lambda pair: pair[0] / pair[1])
    return _figure(
        "hit_ratio_after_over_before",
        after * 100,
        "% hits",
        {f"ratio_{end}": round(a / b, 4) for end, (a, b) in ratios.items()},
        peer=("the same daemon before it ended", before * 100),
    )


class _Trace:
    """Ids by Zipf 0.9, drawn as they are asked for."""

    def __init__(self, keys: int) -> None:
        self._rng = np.random.default_rng(5)
        weights = np.arange(1, keys + 1, dtype=np.float64) ** -0.9
        self._cumulated = np.cumsum(weights / weights.sum())

    def hit_ratio(self, daemon: RestartedDaemon, seconds: float) -> float:
        """The share of keys that hit in the `seconds` that begin with the first request."""
        asked = found = 0
        until = time.monotonic() + seconds
        with daemon.client() as client:
            while time.monotonic() < until:
                drawn = np.searchsorted(self._cumulated, self._rng.random(_BATCH))
                column = client.batch_get({NAMESPACE: drawn.astype(np.uint64)})[NAMESPACE]
                asked += len(column)
                found += column.hits
        return found / asked


# ---- native --------------------------------------------------------------------------------------


def _native(metrics: Sequence[str], size: _Size, shared: SharedMemory) -> Iterator[Figure]:
    if "nvm_rebuild" in metrics:
        wanted = (size.data_mib + 1024) * _MIB
        free = shutil.disk_usage(_FOLDER).free
        if free < wanted:
            raise RuntimeError(f"restart needs {wanted >> 20:,} MiB of disk in {_FOLDER}")
    _check_memory(2 * size.items * 260)
    program = build(_PROGRAM)
    with tempfile.TemporaryDirectory(prefix="restart-bench-", dir=_FOLDER) as folder:
        command: tuple[str, ...] = (
            *(str(program), *metrics, "--dir", str(shared.path), "--folder", folder),
            *("--items", str(size.items), "--data-mib", str(size.data_mib)),
            *("--seconds", str(size.seconds), "--rounds", str(size.rounds)),
            *(("--huge-pages",) if shared.large_pages else ()),
        )
        for name, rounds in rounds_by_metric(command):
            medians = {
                key: median([one[key] for one in rounds]) for key in rounds[0] if key != "metric"
            }
            ratios = [one["value"] / one["peer_value"] for one in rounds]
            unit, peer = _NATIVE_UNITS[name]
            value, peer_value = medians.pop("value"), medians.pop("peer_value")
            extra: dict[str, object] = {
                key: float(f"{number:.4g}") for key, number in medians.items()
            }
            extra |= {"ratio_min": round(min(ratios), 3), "ratio_max": round(max(ratios), 3)}
            figure = _figure(name, value, unit, extra, peer=(peer, peer_value))
            if name == "nvm_rebuild" and value < _REBUILT_A_SECOND:
                figure = replace(figure, bar=_REBUILT_SHARE)
            yield figure


def _check_memory(wanted: int) -> None:
    """Raises RuntimeError when memory does not suffice; whether its mount does, the engine says."""
    if free_memory_bytes() < wanted:
        raise RuntimeError(f"restart needs {wanted >> 20:,} MiB of free memory")


BENCH = RestartBench()
