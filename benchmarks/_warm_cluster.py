"""What a hand-over costs: a leaf joins a cluster whose keys are being read."""

import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks._cluster import NAMESPACE, ClusterError, ShardedCluster
from benchmarks._cluster_view import View
from benchmarks._harness import Figure, Metric, Settings
from benchmarks._zookeeper import zookeeper
from cache_daemon._native import shard_of
from cache_daemon.client import Client, Status
from sharding.model import ReplicaState, ShardMap

__all__ = ["METRICS", "measure"]

METRICS: Sequence[Metric] = (
    Metric("handover_hit_ratio", "hits of keys whose shard was handed over, against before", 0.9),
)
_SHARDS = 64
_BATCH = 1000
_AFTER_S = 3.0  # of a shard's time at its new leaf
_HITS = np.array([Status.HIT_DRAM, Status.HIT_NVM], np.uint8)


@dataclass(frozen=True)
class _Read:
    at: float
    ids: npt.NDArray[np.int64]
    hits: npt.NDArray[np.bool_]


class _Reader(threading.Thread):
    """Reads random ids below `items`, of which it keeps all that became of them."""

    def __init__(self, client: Client, items: int) -> None:
        super().__init__(daemon=True)
        self._client = client
        self._items = items
        self._stop_asked = threading.Event()
        self.failure: BaseException | None = None
        self.reads: list[_Read] = []

    def run(self) -> None:
        rng = np.random.default_rng(5)
        try:
            while not self._stop_asked.wait(0.01):
                ids = rng.integers(0, self._items, _BATCH)
                at = time.monotonic()
                column = self._client.batch_get({NAMESPACE: ids.astype(np.uint64)})[NAMESPACE]
                if not column.found.all():
                    raise ClusterError("a cell has no value while a leaf joins")
                self.reads.append(_Read(at, ids, np.isin(column.statuses, _HITS)))
        except BaseException as error:
            self.failure = error

    def end(self) -> None:
        self._stop_asked.set()
        self.join()
        if self.failure is not None:
            raise self.failure


def measure(bench: str, metrics: Sequence[str], settings: Settings) -> Iterator[Figure]:
    """Measures the named ones of `METRICS`.

    Raises RuntimeError where ZooKeeper is missing, or the cluster does not do what it should.
    """
    if METRICS[0].name not in metrics:
        return
    items = 8_000 if settings.quick else 60_000
    # One replica: whoever gets a shard is the only one that is asked from then on.
    warmup = {"warmup": {"plan": "auto", "max_duration": "60s"}}
    with (
        tempfile.TemporaryDirectory(prefix="fc-handover-") as name,
        zookeeper(Path(name)) as ensemble,
        ShardedCluster(
            Path(name),
            ensemble.hosts,
            leaves=2,
            shard_count=_SHARDS,
            replicas=1,
            of_leaves=warmup,
        ) as cluster,
    ):
        cluster.start()
        with cluster.root.client() as client, View(ensemble.hosts) as view:
            for first in range(0, items, _BATCH):  # every key is in the cache once
                ids = np.arange(first, first + _BATCH, dtype=np.uint64)
                client.batch_get({NAMESPACE: ids})
            reader = _Reader(client, items)
            reader.start()
            time.sleep(2.0)
            added_at = time.monotonic()
            new = cluster.add_leaf()
            cluster.wait_settled(new)
            settled_s = time.monotonic() - added_at
            time.sleep(_AFTER_S)
            reader.end()
            came_at = _online_since(view.maps(), new.name)
    shards = np.array(
        [shard_of(NAMESPACE, int(n).to_bytes(8, "little"), _SHARDS) for n in range(items)]
    )
    moved = ~np.isnan(came_at)
    if not moved.any():
        raise ClusterError("the new leaf got no shard")
    before, after = [0, 0], [0, 0]
    for read in reader.reads:
        of = shards[read.ids]
        ours = moved[of]
        if read.at < added_at:
            before[0] += int(read.hits[ours].sum())
            before[1] += int(ours.sum())
            continue
        just_came = ours & (read.at >= came_at[of]) & (read.at < came_at[of] + _AFTER_S)
        after[0] += int(read.hits[just_came].sum())
        after[1] += int(just_came.sum())
    yield Figure(
        bench=bench,
        metric=METRICS[0].name,
        value=after[0] / after[1],
        unit="hit ratio",
        peer="the leaf before it",
        peer_value=before[0] / before[1],
        bar=METRICS[0].bar,
        extra={
            "shards": int(moved.sum()),
            "keys_read": after[1],
            "seconds_after": _AFTER_S,
            "settled_s": round(settled_s, 1),
        },
    )


def _online_since(maps: Sequence[tuple[float, ShardMap]], leaf: str) -> npt.NDArray[np.float64]:
    """When each shard was first seen online at a leaf; NaN: never."""
    since = np.full(_SHARDS, np.nan)
    for at, map in maps:
        names = np.array([each.name for each in map.leaves])
        here = (names[map.leaf] == leaf) & (map.state == ReplicaState.ONLINE)
        shards = map.shard_of_replica()[here]
        since[shards] = np.fmin(since[shards], at)
    return since
