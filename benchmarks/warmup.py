"""Warm-up: how warm a new node is, what it asks of the store, what recording and copying cost.

The nodes are daemons, the store is Redis (the demo's trace has its own LMDB store), snapshots lie
in a `file://` store. What the store is asked for is counted by Redis. The parts that are native
alone (the size of a log, decoding it, peer copy) are programs of `native/bench/`.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from redis import Redis

from benchmarks import _warm_cluster, _warm_native
from benchmarks._daemon import Daemon, DaemonError
from benchmarks._harness import Figure, Metric, Settings, alternate, median
from benchmarks._load_clients import Clients
from benchmarks._servers import RunningServer, redis_server
from benchmarks._store_meter import StoreMeter
from benchmarks._warm_nodes import (
    Ids,
    ask,
    fill_redis,
    wait_for_snapshots,
)
from benchmarks._warm_traces import Trace, demo_trace, random_ids, zipf_trace
from benchmarks.demo.server import derive_config
from cache_daemon.client import Client

__all__ = ["BENCH", "WarmupBench"]

_METRICS = {
    metric.name: metric
    for metric in (
        Metric("first_minute_hit_ratio_zipf", "a warmed node against the one recorded, Zipf", 0.97),
        Metric("first_minute_hit_ratio_demo", "a warmed node against the one recorded, demo", 0.97),
        Metric(
            "replay_rate_over_limit",
            "keys asked of the store in the busiest second of a replay, over the rate",
            limit=1.02,
        ),
        Metric(
            "fleet_rate_over_limit",
            "the same of eight nodes that warm at once, over fleet_rate",
            limit=1.02,
        ),
        Metric("recording_cost", "BatchGet rate of a node that records 10 % of requests", 0.98),
        *_warm_native.METRICS,
        *_warm_cluster.METRICS,
    )
}
_NAMESPACE = "pin"
_BATCH = 1000
_WARM_LIMIT = "240s"
_FLEET = 8
_BUSY_SECONDS_MIN = 1.5  # a shorter replay says nothing of a rate a second
_RECORDED_ITEMS = 100_000
_DEMO_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"


@dataclass(frozen=True)
class _Size:
    """How much a run does."""

    items: int  # of the Zipf trace
    recorded_s: float
    window_s: int
    measured_s: float
    rate: int  # keys/s of a replay
    fleet_rate: int
    rounds: int
    round_s: float


_FULL = _Size(300_000, 40.0, 5, 60.0, 20_000, 40_000, 15, 2.0)
_QUICK = _Size(60_000, 8.0, 2, 5.0, 10_000, 10_000, 5, 0.5)


class WarmupBench:
    """The `warmup` benchmark."""

    name = "warmup"
    metrics: Sequence[Metric] = tuple(_METRICS.values())

    def run(self, metrics: Sequence[str], settings: Settings) -> Iterator[Figure]:
        """Measures the named metrics.

        Raises RuntimeError where a server is missing, or a daemon does not do what it should.
        """
        size = _QUICK if settings.quick else _FULL
        parts: tuple[tuple[Callable[[_Size, Path], Iterator[Figure]], tuple[str, ...]], ...] = (
            (
                _zipf,
                ("first_minute_hit_ratio_zipf", "replay_rate_over_limit", "fleet_rate_over_limit"),
            ),
            (_demo, ("first_minute_hit_ratio_demo",)),
            (_recording, ("recording_cost",)),
        )
        for part, names in parts:
            if any(name in metrics for name in names):
                with tempfile.TemporaryDirectory(prefix="fc-warmup-") as folder:
                    yield from (f for f in part(size, Path(folder)) if f.metric in metrics)
        yield from _warm_native.measure(self.name, metrics, settings)
        yield from _warm_cluster.measure(self.name, metrics, settings)


def _figure(name: str, value: float, unit: str, extra: Mapping[str, object], **peer: Any) -> Figure:
    metric = _METRICS[name]
    return Figure(
        bench=WarmupBench.name,
        metric=name,
        value=value,
        unit=unit,
        bar=metric.bar,
        limit=metric.limit,
        extra=extra,
        **peer,
    )


# ---- nodes that warm ----------------------------------------------------------------------------


def _warmup_section(folder: Path, **section: Any) -> dict[str, Any]:
    return {
        "warmup": {
            "name": "bench",
            "snapshots": {"url": f"file://{folder}/snapshots", "upload": "record" in section},
            "plan": "none",
            "max_duration": _WARM_LIMIT,
            "on_failure": "fail",
            **section,
        }
    }


def _recorder(folder: Path, size: _Size, **section: Any) -> dict[str, Any]:
    record = {
        "dir": f"{folder}/request-log",
        "sample": "10%",
        "window": f"{size.window_s}s",
        **section,
    }
    return _warmup_section(folder, record=record)


def _replaying(folder: Path, size: _Size, **replay: Any) -> dict[str, Any]:
    settings = {"rate": size.rate, "windows": 100, **replay}
    # All of the plan, so that the figure is of what replay can do and not of a target.
    return _warmup_section(folder, plan="replay", replay=settings, target_hit_ratio="100%")


def _record(
    folder: Path, size: _Size, sections: dict[str, Any], trace: Trace
) -> tuple[Daemon, int]:
    """A warm node that has recorded the first part of the trace; returns the bytes of its logs."""
    node = Daemon(folder / "warm", sections | _recorder(folder, size))
    try:
        node.start().wait()
        with node.client() as client:
            until = time.monotonic() + size.recorded_s
            while time.monotonic() < until:
                ask(client, next(trace.requests))
        return node, wait_for_snapshots(folder / "snapshots", 6.0 * size.window_s)
    except BaseException:
        node.kill()
        raise


def _hit_ratios(nodes: Sequence[Daemon], trace: Trace, seconds: float) -> list[float]:
    """Of all nodes, asked for the same requests at the trace's pace."""
    hits, cells = [0] * len(nodes), 0
    with ExitStack() as stack:
        clients = [stack.enter_context(node.client()) for node in nodes]
        began = time.monotonic()
        for number, request in enumerate(islice(trace.requests, int(seconds * trace.per_second))):
            time.sleep(max(0.0, began + number / trace.per_second - time.monotonic()))
            for which, client in enumerate(clients):
                hit, asked = ask(client, request)
                hits[which] += hit
            cells += asked
    return [hit / cells for hit in hits]


_Sections = Callable[[str], dict[str, Any]]


def _first_minute(
    name: str,
    folder: Path,
    size: _Size,
    sections: _Sections,
    trace: Trace,
    meter: Callable[[], StoreMeter] | None = None,
) -> Iterator[Figure]:
    """Leaves the snapshots in `folder`. `sections(name)`: of the config of a node."""
    with ExitStack() as stack:
        warm, log_bytes = _record(folder, size, sections("warm"), trace)
        stack.enter_context(warm)
        with ExitStack() as measured:
            reads = measured.enter_context(meter()) if meter else None
            warmed = stack.enter_context(
                Daemon(folder / "warmed", sections("warmed") | _replaying(folder, size))
            )
            warming_s = warmed.start().wait(180.0)
        cold = stack.enter_context(Daemon(folder / "cold", sections("cold")))
        cold.start().wait()
        of_warm, of_warmed, of_cold = _hit_ratios([warm, warmed, cold], trace, size.measured_s)
        asked = int(warmed.sample("feature_cache_warmed_keys_total"))
    yield _figure(
        name,
        of_warmed,
        "hit ratio",
        {
            "cold": round(of_cold, 4),
            "warming_s": round(warming_s, 1),
            "keys_replayed": asked,
            "log_bytes": log_bytes,
            "seconds": size.measured_s,
        },
        peer="the node that was recorded",
        peer_value=of_warm,
    )
    if reads is not None:
        yield _rate_figure("replay_rate_over_limit", reads, size.rate, 1)


def _rate_figure(name: str, reads: StoreMeter, limit: int, nodes: int) -> Figure:
    busy_s = reads.seconds_busy()
    if busy_s < _BUSY_SECONDS_MIN:
        raise DaemonError(f"{name}: only {reads.keys} keys were asked for in {busy_s:.1f} s")
    return _figure(
        name,
        reads.busiest_second() / limit,
        "of the limit",
        {
            "keys_per_second": limit,
            "mean_of_limit": round(reads.keys / busy_s / limit, 3),
            "keys": reads.keys,
            "seconds": round(busy_s, 1),
            "nodes": nodes,
        },
        lower_is_better=True,
    )


def _zipf(size: _Size, folder: Path) -> Iterator[Figure]:
    ids = random_ids(size.items)
    trace = zipf_trace(_NAMESPACE, ids, _BATCH, per_second=20)
    with redis_server(folder) as redis:
        fill_redis(redis, _NAMESPACE, ids)

        def sections(name: str) -> dict[str, Any]:
            del name  # they are all alike
            store = {"type": "redis", "options": {"port": redis.port}}
            domains = {"all": {"budget": "100%"}}
            return {
                "topology": "separate",
                # About a quarter of the items fit.
                "memory": {"size": 2_000_000 + size.items * 60, "expected_item_size": 208},
                "namespaces": {_NAMESPACE: {"store": "features", "domains": domains}},
                "stores": {"features": store},
            }

        yield from _first_minute(
            "first_minute_hit_ratio_zipf",
            folder,
            size,
            sections,
            trace,
            lambda: StoreMeter(Redis(port=redis.port)),
        )
        yield _fleet(folder, size, sections, redis)


def _fleet(folder: Path, size: _Size, sections: _Sections, redis: RunningServer) -> Figure:
    """Eight nodes warm at once from what the last part has recorded."""
    with ExitStack() as stack:
        reads = StoreMeter(Redis(port=redis.port))
        with reads:
            nodes = [
                stack.enter_context(
                    Daemon(
                        folder / f"fleet-{number}",
                        sections("fleet") | _replaying(folder, size, fleet_rate=size.fleet_rate),
                    )
                ).start()
                for number in range(_FLEET)
            ]
            for node in nodes:
                node.wait(300.0)
    return _rate_figure("fleet_rate_over_limit", reads, size.fleet_rate, _FLEET)


def _demo(size: _Size, folder: Path) -> Iterator[Figure]:
    trace, total_bytes = demo_trace(folder, per_second=40)

    def sections(name: str) -> dict[str, Any]:
        own = folder / f"nvm-{name}"
        own.mkdir()
        config = derive_config(
            _DEMO_CONFIG, own, dram_bytes=int(total_bytes / 4.5), nvm_bytes=total_bytes // 2
        )
        config["stores"]["features"]["options"]["path"] = str(folder / "features")
        del config["listen"]
        return config

    yield from _first_minute("first_minute_hit_ratio_demo", folder, size, sections, trace)


# ---- what recording costs ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batches:
    """Two client processes that draw batches of ids, all of them cached."""

    form: str = ""
    clients: int = 2

    def batches(self, seed: int) -> list[Ids]:
        rng = np.random.default_rng(seed)
        ids = random_ids(_RECORDED_ITEMS)
        return [rng.choice(ids, _BATCH) for _ in range(256)]


def _call(server: RunningServer, form: str) -> Callable[[Ids], object]:
    del form
    client = Client(server.target, timeout=10.0)
    return lambda ids: client.batch_get({_NAMESPACE: ids})


def _recording(size: _Size, folder: Path) -> Iterator[Figure]:
    ids = random_ids(_RECORDED_ITEMS)
    domains = {"all": {"budget": "100%"}}
    sections = {
        "topology": "separate",
        "memory": {"size": "128MiB", "expected_item_size": 208},
        "namespaces": {_NAMESPACE: {"domains": domains}},
    }
    with ExitStack() as stack:
        nodes = []
        for name, warmup in (
            ("recording", _recorder(folder, size, window="10m")),
            ("plain", {}),
        ):
            node = stack.enter_context(Daemon(folder / name, sections | warmup))
            nodes.append(node)
            node.start().wait()
            with node.client() as client:
                for first in range(0, ids.size, _BATCH):
                    part = ids[first : first + _BATCH]
                    values = np.repeat(part[:, None], 25, axis=1).view(np.uint8)
                    if not client.batch_put({_NAMESPACE: (part, values)}).all_stored:
                        raise DaemonError("no room for the items")
        ours, peer = (Clients(stack, _call, node.server, _Batches()) for node in nodes)
        rates, peer_rates = alternate(
            lambda: ours.round(size.round_s), lambda: peer.round(size.round_s), size.rounds
        )
        recorded = nodes[0].sample("feature_cache_record_keys_total")
        dropped = nodes[0].sample("feature_cache_record_dropped_keys_total")
    if not recorded:
        raise DaemonError("nothing was recorded")
    yield _figure(
        "recording_cost",
        median(rates),
        "requests/s",
        {"keys_recorded": int(recorded), "keys_dropped": int(dropped)}
        | ours.extra("")
        | peer.extra("peer_"),
        peer="the same node without recording",
        peer_value=median(peer_rates),
    )


BENCH = WarmupBench()
