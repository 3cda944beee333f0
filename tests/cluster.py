"""A controller's hand for tests: writes config, targets and views as a real one would, on order."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from sharding import layout
from sharding.connection import Connection, ZooKeeperConfig
from sharding.model import (
    ClusterConfig,
    CurrentState,
    Leaf,
    LiveNode,
    ReplicaState,
    ShardMap,
    Target,
    shards_array,
)

__all__ = ["Board", "connected_to", "make_map"]

Rows = Mapping[int, Mapping[str, ReplicaState]]
"""By shard: who holds it how."""


@contextmanager
def connected_to(hosts: str, timeout_s: float = 2.0, **options: Any) -> Iterator[Connection]:
    """A connection that is up; closed at the end."""
    made = Connection(ZooKeeperConfig(hosts, timeout_s, **options))
    made.start()
    try:
        assert made.wait_connected(15), made.problem
        yield made
    finally:
        made.close()


def make_map(version: int, shard_count: int, leaves: Iterable[Leaf], rows: Rows) -> ShardMap:
    """A map of the shards in `rows`; the others have no replica."""
    table = tuple(leaves)
    number = {leaf.name: index for index, leaf in enumerate(table)}
    replicas = [
        (shard, number[name], int(state))
        for shard in sorted(rows)
        for name, state in rows[shard].items()
    ]
    counts = np.bincount([row[0] for row in replicas] or [0], minlength=shard_count)
    if not replicas:
        counts[0] = 0
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32)
    return ShardMap(
        version,
        table,
        first,
        np.array([row[1] for row in replicas], dtype=np.uint32),
        np.array([row[2] for row in replicas], dtype=np.uint8),
    )


class Board:
    """Writes what a controller writes, and reads what participants wrote."""

    def __init__(self, connection: Connection, config: ClusterConfig) -> None:
        self.connection = connection
        self.config = config
        self._before: tuple[layout.Head, ShardMap | None] | None = None
        self._version = 0
        connection.put(layout.CONFIG, layout.encode_config(config))

    def target(self, name: str, shards: Iterable[int]) -> int:
        """Gives a node shards; the version of the target."""
        self._version += 1
        target = Target(self._version, shards_array(list(shards)))
        self.connection.put(layout.target_path(name), layout.encode_target(target))
        return self._version

    def publish(self, view: ShardMap) -> None:
        head, writes = layout.encode_view(view, self._before)
        for path, data in writes:
            self.connection.put(path, data)
        self._before = (head, view)

    def live(self, name: str) -> LiveNode | None:
        znode = self.connection.get(layout.live_path(name))
        return layout.decode_live(layout.live_path(name), znode.data) if znode else None

    def current(self, name: str) -> CurrentState | None:
        path = layout.current_path(name)
        znode = self.connection.get(path)
        return layout.decode_current(path, znode.data) if znode else None

    def follow(self, version: int, *names: str) -> ShardMap:
        """Publishes what the nodes say they hold, as they say it, and returns it."""
        leaves = []
        rows: dict[int, dict[str, ReplicaState]] = {}
        for name in names:
            live, current = self.live(name), self.current(name)
            if live is None:
                continue
            leaves.append(Leaf(name, live.address, live.zone, live.instance_id))
            if current is None or current.instance_id != live.instance_id:
                continue
            for shard, state in zip(current.shards.tolist(), current.states.tolist(), strict=True):
                rows.setdefault(shard, {})[name] = ReplicaState(state)
        view = make_map(version, self.config.shard_count, leaves, rows)
        self.publish(view)
        return view
