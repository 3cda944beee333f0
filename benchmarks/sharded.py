"""A cluster: what a killed leaf, a dead ZooKeeper and a new leaf cost, and what the root adds.

Every figure is of leaves, a root and ZooKeeper as processes on this machine. What is lost is
counted at a client of the root that repeats no call; who holds what is read from the external view.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks import placement
from benchmarks._cluster import NAMESPACE, ClusterError, ShardedCluster
from benchmarks._cluster_load import Load, by_second, wrong_values
from benchmarks._cluster_view import SESSION_S, View
from benchmarks._daemon import Daemon
from benchmarks._harness import Figure, Metric, Settings, alternate, median
from benchmarks._servers import cpu_seconds
from benchmarks._zookeeper import zookeeper
from cache_daemon.client import Client
from sharding.model import ReplicaState, ShardMap

__all__ = ["BENCH", "ShardedBench"]

_BATCH = 1000
_MOVED_SHARDS = 250
_MOVED_REPLICAS = 2

_METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "leaf_kill_failed_batches",
            "batches that fail when one of three leaves is killed, 2 replicas",
            limit=0,
        ),
        Metric(
            "leaf_kill_missing_cells",
            "cells without a value meanwhile, outside the first second",
            limit=0.001,
        ),
        Metric(
            "zookeeper_down_failed",
            "batches that fail, or lack a value, with the whole ensemble down",
            limit=0,
        ),
        Metric(
            "leader_kill_max_ownerless_s",
            "longest that a shard had no owner; ZooKeeper's leader is killed during a rebalance",
            limit=SESSION_S,
        ),
        Metric(
            "node_added_moves_over_minimum",
            "replicas that move when a fifth leaf is added",
            limit=1.05,
        ),
        Metric(
            "root_added_p50_ms",
            "a root over four leaves, 1,000 x 200 B, above one node asked the same",
            limit=0.6,
        ),
    )
}


@dataclass(frozen=True)
class _Size:
    """How much a run does."""

    items: int
    warm_s: float
    after_kill_s: float
    zookeeper_down_s: float
    rounds: int
    calls: int  # a round


_FULL = _Size(40_000, 6.0, 20.0, 60.0, 21, 200)
_QUICK = _Size(8_000, 2.0, 6.0, 10.0, 7, 60)


class ShardedBench:
    """The `sharded` benchmark."""

    name = "sharded"
    metrics: Sequence[Metric] = (*_METRICS.values(), *placement.METRICS.values())

    def run(self, metrics: Sequence[str], settings: Settings) -> Iterator[Figure]:
        """Measures the named metrics.

        Raises RuntimeError where ZooKeeper is missing, or the cluster does not do what it should.
        """
        size = _QUICK if settings.quick else _FULL
        parts: tuple[tuple[Callable[[_Size, Path], Iterator[Figure]], tuple[str, ...]], ...] = (
            (_leaf_killed, ("leaf_kill_failed_batches", "leaf_kill_missing_cells")),
            (_zookeeper_down, ("zookeeper_down_failed",)),
            (_leader_killed, ("leader_kill_max_ownerless_s",)),
            (_leaf_added, ("node_added_moves_over_minimum",)),
            (_root_added, ("root_added_p50_ms",)),
        )
        for part, names in parts:
            if any(name in metrics for name in names):
                with tempfile.TemporaryDirectory(prefix="fc-sharded-") as folder:
                    yield from (f for f in part(size, Path(folder)) if f.metric in metrics)
        yield from placement.measure(metrics, settings)


def _figure(
    name: str,
    value: float,
    unit: str,
    extra: Mapping[str, object],
    peer: tuple[str, float] | None = None,
) -> Figure:
    return Figure(
        bench=ShardedBench.name,
        metric=name,
        value=value,
        unit=unit,
        peer=peer[0] if peer else None,
        peer_value=peer[1] if peer else None,
        lower_is_better=True,
        limit=_METRICS[name].limit,
        extra=extra,
    )


# ---- what is lost --------------------------------------------------------------------------------


def _leaf_killed(size: _Size, folder: Path) -> Iterator[Figure]:
    with (
        zookeeper(folder) as ensemble,
        ShardedCluster(folder, ensemble.hosts, leaves=3, rebalance_delay="4s") as cluster,
    ):
        cluster.start()
        with Load(cluster.root.client, items=size.items) as load:
            time.sleep(size.warm_s)
            killed_at = time.monotonic()
            cluster.leaves[1].kill()
            time.sleep(size.after_kill_s)
        _check_values(load)
        after = by_second(load.batches(), killed_at)
    outside = after[1:]
    keys = sum(second.keys for second in outside)
    missing = sum(second.missing for second in outside)
    failed = sum(second.failed for second in after)
    common: dict[str, object] = {"batches": sum(second.batches for second in after)}
    slowest = max(second.seconds_max for second in after)
    yield _figure(
        "leaf_kill_failed_batches",
        failed,
        "batches",
        common | {"slowest_ms": round(slowest * 1e3, 1)},
    )
    yield _figure(
        "leaf_kill_missing_cells",
        missing / keys,
        "of cells",
        common
        | {
            "first_second": after[0].missing,
            "later": missing,
            "hit_ratio_first_second": round(after[0].hit_ratio, 4),
            "hit_ratio_last_second": round(after[-2].hit_ratio, 4),
        },
    )


def _zookeeper_down(size: _Size, folder: Path) -> Iterator[Figure]:
    with (
        zookeeper(folder, 3) as ensemble,
        ShardedCluster(folder, ensemble.hosts, leaves=3) as cluster,
    ):
        cluster.start()
        with Load(cluster.root.client, items=size.items) as load:
            time.sleep(size.warm_s)
            down_at = time.monotonic()
            ensemble.kill()
            time.sleep(size.zookeeper_down_s)
            up_at = time.monotonic()
            ensemble.start()
            # Changes resume: a new leaf gets shards.
            cluster.wait_settled(cluster.add_leaf())
            resumed_s = time.monotonic() - up_at
            time.sleep(size.warm_s)
        _check_values(load)
        after = [batch for batch in load.batches() if batch.at >= down_at]
        shards = cluster.leaves[-1].status().cluster.shards_online
    if not shards:
        raise ClusterError("the leaf that was added got no shards")
    yield _figure(
        "zookeeper_down_failed",
        sum(bool(batch.failure or batch.missing) for batch in after),
        "batches",
        {
            "batches": len(after),
            "down_s": round(up_at - down_at, 1),
            "failed": sum(bool(batch.failure) for batch in after),
            "missing_cells": sum(batch.missing for batch in after),
            "slowest_ms": round(max(batch.seconds for batch in after) * 1e3, 1),
            "resumed_after_s": round(resumed_s, 2),
            "shards_of_a_new_leaf": shards,
        },
    )


def _check_values(load: Load) -> None:
    wrong = sum(batch.wrong for batch in load.batches())
    if wrong:
        raise ClusterError(f"{wrong} values were wrong")


# ---- who holds what ------------------------------------------------------------------------------


def _owners(map: ShardMap) -> npt.NDArray[np.int64]:
    """Online replicas of each shard."""
    online = map.state == ReplicaState.ONLINE
    return np.bincount(map.shard_of_replica()[online], minlength=map.shard_count)


def _longest_ownerless(maps: Sequence[tuple[float, ShardMap]]) -> float:
    """Seconds that a shard had no online replica, at most."""
    longest = 0.0
    since = np.full(maps[0][1].shard_count, np.nan)
    for at, map in maps:
        none = _owners(map) == 0
        ended = ~np.isnan(since) & ~none
        longest = max(longest, float((at - since[ended]).max(initial=0.0)))
        since = np.where(none, np.where(np.isnan(since), at, since), np.nan)
    if not np.isnan(since).all():
        longest = max(longest, float(np.nanmax(maps[-1][0] - since)))
    return longest


def _pairs(map: ShardMap) -> set[tuple[int, str]]:
    """Shard and leaf of every replica."""
    names = [leaf.name for leaf in map.leaves]
    shards = map.shard_of_replica().tolist()
    return {(shard, names[leaf]) for shard, leaf in zip(shards, map.leaf.tolist(), strict=True)}


def _leader_killed(_size: _Size, folder: Path) -> Iterator[Figure]:
    with (
        zookeeper(folder, 3) as ensemble,
        ShardedCluster(
            folder,
            ensemble.hosts,
            leaves=3,
            shard_count=_MOVED_SHARDS,
            session_timeout=f"{SESSION_S:g}s",
        ) as cluster,
    ):
        cluster.start()
        with View(ensemble.hosts) as view:
            before = view.latest()
            first = len(view.maps())
            new = cluster.add_leaf()
            deadline = time.monotonic() + 20
            while len(view.maps()) == first:  # until moves are under way
                if time.monotonic() > deadline:
                    raise ClusterError("nothing moves to the leaf that was added")
                time.sleep(0.005)
            leader = ensemble.leader()
            ensemble.kill(leader)
            killed_at = time.monotonic()
            cluster.wait_settled(new)
            settled_s = time.monotonic() - killed_at
            ensemble.start(leader)
            shards = new.status().cluster.shards_online
            time.sleep(1.0)
            maps = view.maps()
    if not shards:
        raise ClusterError("the rebalance did not complete: the new leaf has no shards")
    at_kill = sum(at < killed_at for at, _ in maps[first:])
    yield _figure(
        "leader_kill_max_ownerless_s",
        _longest_ownerless(maps),
        "s",
        {
            "moved": len(_pairs(maps[-1][1]) - _pairs(before)),
            "maps": len(maps),
            "maps_before_the_kill": at_kill,
            "completed_after_s": round(settled_s, 2),
        },
    )


def _leaf_added(_size: _Size, folder: Path) -> Iterator[Figure]:
    with (
        zookeeper(folder) as ensemble,
        ShardedCluster(
            folder,
            ensemble.hosts,
            leaves=4,
            shard_count=_MOVED_SHARDS,
            replicas=_MOVED_REPLICAS,
            memory="32MiB",
        ) as cluster,
    ):
        cluster.start()
        with View(ensemble.hosts) as view:
            before = _pairs(view.latest())
            began = time.monotonic()
            cluster.wait_settled(cluster.add_leaf())
            seconds = time.monotonic() - began
            time.sleep(0.5)
            after = _pairs(view.latest())
    moved = len(after - before)
    least = _MOVED_SHARDS * _MOVED_REPLICAS // 5
    yield _figure(
        "node_added_moves_over_minimum",
        moved / least,
        "x",
        {"moved": moved, "minimum": least, "seconds": round(seconds, 2)},
    )


# ---- what the root adds --------------------------------------------------------------------------


def _root_added(size: _Size, folder: Path) -> Iterator[Figure]:
    ids = np.arange(20 * _BATCH, dtype=np.uint64)
    rng = np.random.default_rng(1)
    with ExitStack() as stack:
        ensemble = stack.enter_context(zookeeper(folder))
        cluster = stack.enter_context(
            ShardedCluster(folder, ensemble.hosts, leaves=4, replicas=1, memory="32MiB")
        )
        cluster.start()
        alone = stack.enter_context(Daemon(folder / "alone", cluster.values_sections("32MiB")))
        alone.start()
        alone.wait()
        through_root = stack.enter_context(cluster.root.client())
        direct = stack.enter_context(alone.client())
        for client in (through_root, direct):
            _fill(client, ids)

        times: dict[int, list[float]] = {id(through_root): [], id(direct): []}

        def ask(client: Client) -> float:
            """p50 of a round, in ms."""
            batches = [rng.choice(ids, _BATCH, replace=False) for _ in range(size.calls)]
            seconds = []
            for batch in batches:
                began = time.perf_counter()
                column = client.batch_get({NAMESPACE: batch}, cache_only=True)[NAMESPACE]
                seconds.append(time.perf_counter() - began)
                if column.hits != _BATCH:
                    raise ClusterError(f"{_BATCH - column.hits} of {_BATCH} keys were no hits")
            times[id(client)] += seconds
            return median(seconds) * 1e3

        ask(through_root)
        ask(direct)
        cpu = cpu_seconds(cluster.root.pid)
        ours, peers = alternate(lambda: ask(through_root), lambda: ask(direct), size.rounds)
        cpu = cpu_seconds(cluster.root.pid) - cpu
    asked = size.rounds * size.calls
    added = [our - peer for our, peer in zip(ours, peers, strict=True)]
    yield _figure(
        "root_added_p50_ms",
        median(added),
        "ms",
        {
            "root_p50_ms": round(median(ours), 3),
            "alone_p50_ms": round(median(peers), 3),
            "root_p99_ms": round(float(np.quantile(times[id(through_root)], 0.99)) * 1e3, 3),
            "alone_p99_ms": round(float(np.quantile(times[id(direct)], 0.99)) * 1e3, 3),
            "root_cpu_us_per_1000_keys": round(cpu / asked * 1e6, 1),
            "leaves": 4,
        },
    )


def _fill(client: Client, ids: npt.NDArray[np.uint64]) -> None:
    """Reads all of them, so that they are cached; ClusterError for a value that is not right."""
    for first in range(0, ids.size, _BATCH):
        batch = ids[first : first + _BATCH]
        column = client.batch_get({NAMESPACE: batch})[NAMESPACE]
        if not column.found.all() or wrong_values(batch, column.values):
            raise ClusterError(f"values of ids from {first} on are missing or wrong")


BENCH = ShardedBench()
