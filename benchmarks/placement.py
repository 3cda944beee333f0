"""Placement by itself, and a cluster of 100,000 shards in a real ensemble: part of `sharded`.

Placement is measured on one core, in CPU seconds, beside minima that follow from the scenario and
not from what was placed: after the loss of a zone all replicas that lay in it have to move, and
nodes that are added are due their share by weight. In `zookeeper_scale` the nodes are one hand that
writes what each would write; the controller and the spectator are the real ones, in this process.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks._harness import Figure, Metric, Settings
from benchmarks._zookeeper import zookeeper
from sharding import layout
from sharding.connection import Connection, Create, Operation, Set, ZooKeeperConfig
from sharding.controller import Controller
from sharding.model import ClusterConfig, CurrentState, LiveNode, ReplicaState, ShardMap
from sharding.placement import NO_NODE, PlacementNode, count_moves, place
from sharding.spectator import Spectator

__all__ = ["METRICS", "measure", "small_cluster_moves_over_minimum"]

_ZONES = 20
_REPLICAS = 3
_SESSION_S = 4.0  # the longest that the servers give
_COMMIT_MAX = 200  # operations
_PATIENCE_S = 120.0

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "placement_s",
            "100,000 shards x 3 on 5,000 nodes in 20 zones, one core: the slowest of a first "
            "placement, one after the loss of a zone, one after 500 nodes more",
            limit=10.0,
        ),
        Metric(
            "placement_balance", "the fullest node over its share, the worst of these", limit=1.05
        ),
        Metric(
            "placement_moves_over_minimum",
            "replicas moved over the least possible, the worse of loss and growth",
            limit=1.1,
        ),
        Metric(
            "zookeeper_scale",
            "as many shards in an ensemble of three: from the loss of a node to a map without it",
            limit=5.0,
        ),
    )
}
_OF_PLACEMENT = ("placement_s", "placement_balance", "placement_moves_over_minimum")


@dataclass(frozen=True)
class _Size:
    shards: int
    nodes: int
    added: int


_FULL = _Size(100_000, 5_000, 500)
_QUICK = _Size(10_000, 500, 50)


def measure(metrics: Sequence[str], settings: Settings, bench: str = "sharded") -> Iterator[Figure]:
    """The named ones of `METRICS`, as figures of `bench`.

    Raises RuntimeError where ZooKeeper is missing or the cluster does not do what it should.
    """
    size = _QUICK if settings.quick else _FULL
    if any(name in metrics for name in _OF_PLACEMENT):
        yield from (f for f in _placement(size, bench) if f.metric in metrics)
    if "zookeeper_scale" in metrics:
        with tempfile.TemporaryDirectory(prefix="fc-scale-") as folder:
            yield _scale(size, Path(folder), bench)


def small_cluster_moves_over_minimum(shards: int = 256, nodes: int = 3, replicas: int = 2) -> float:
    """Replicas that placement moves when a node is added, over the share that is due to it."""
    before = _nodes(nodes, nodes)
    placed = place(before, shards, replicas).assignment
    after = place([*before, *_nodes(1, nodes, nodes)], shards, replicas, placed).assignment
    return count_moves(placed, after) / (shards * replicas // (nodes + 1))


def _figure(bench: str, name: str, value: float, unit: str, extra: Mapping[str, object]) -> Figure:
    return Figure(
        bench=bench,
        metric=name,
        value=value,
        unit=unit,
        lower_is_better=True,
        limit=METRICS[name].limit,
        extra=extra,
    )


# ---- placement -----------------------------------------------------------------------------------


def _nodes(count: int, zones: int, first: int = 0) -> list[PlacementNode]:
    return [PlacementNode(f"n{i:05}", f"z{i % zones:02}") for i in range(first, first + count)]


def _placement(size: _Size, bench: str) -> Iterator[Figure]:
    nodes = _nodes(size.nodes, _ZONES)
    lost = [replace(node, usable=node.zone != "z07") for node in nodes]
    grown = nodes + _nodes(size.added, _ZONES, size.nodes)
    taken: dict[str, float] = {}
    balance: dict[str, float] = {}

    def timed(
        name: str, cluster: list[PlacementNode], previous: npt.NDArray[np.int32] | None
    ) -> npt.NDArray[np.int32]:
        begin = time.process_time()
        placed = place(cluster, size.shards, _REPLICAS, previous)
        taken[name] = time.process_time() - begin
        if placed.problems:
            raise RuntimeError(f"{name}: {placed.problems[0].text}")
        _check_legal(cluster, placed.assignment)
        usable = sum(node.usable for node in cluster)
        load = np.bincount(placed.assignment.ravel(), minlength=len(cluster))
        balance[name] = float(load.max()) / (size.shards * _REPLICAS / usable)
        return placed.assignment

    first = timed("first", nodes, None)
    after_loss = timed("zone_lost", lost, first)
    after_growth = timed("nodes_added", grown, first)
    on_lost = sum(not lost[node].usable for node in first.ravel().tolist())
    due = size.shards * _REPLICAS * size.added / len(grown)
    moves = {
        "zone_lost": count_moves(first, after_loss) / on_lost,
        "nodes_added": count_moves(first, after_growth) / due,
    }
    what = {"shards": size.shards, "nodes": size.nodes}
    yield _figure(bench, "placement_s", max(taken.values()), "s", what | _rounded(taken))
    yield _figure(bench, "placement_balance", max(balance.values()), "x", what | _rounded(balance))
    yield _figure(
        bench,
        "placement_moves_over_minimum",
        max(moves.values()),
        "x",
        what | _rounded(moves | {"three_to_four_nodes": small_cluster_moves_over_minimum()}),
    )


def _check_legal(nodes: Sequence[PlacementNode], placed: npt.NDArray[np.int32]) -> None:
    """All replicas are there, and those of a shard in distinct zones."""
    zone = np.array([int(node.zone[1:]) for node in nodes])
    zones = np.sort(zone[placed], axis=1)
    if (placed == NO_NODE).any() or (zones[:, 1:] == zones[:, :-1]).any():
        raise RuntimeError("a placement is not what was asked for")


def _rounded(values: Mapping[str, float]) -> dict[str, object]:
    return {name: float(f"{value:.4g}") for name, value in values.items()}


# ---- a large cluster in ZooKeeper ----------------------------------------------------------------


class _Hand:
    """All nodes of a cluster, written by one client: registered, and holding what they are told."""

    def __init__(self, connection: Connection, count: int) -> None:
        self._connection = connection
        self.names = [f"n{i:05}" for i in range(count)]
        for root in (layout.LIVE, layout.CURRENT, layout.NODES):
            connection.ensure(root)

    def register(self) -> None:
        self._write(
            Create(
                layout.live_path(name),
                layout.encode_live(
                    LiveNode(
                        name=name,
                        address=f"{name}.example:7000",
                        zone=f"z{number % _ZONES:02}",
                        cluster="scale",
                        instance_id=f"instance-of-{name}",
                    )
                ),
                ephemeral=True,
            )
            for number, name in enumerate(self.names)
        )

    def hold(self, state: ReplicaState, first: bool) -> None:
        """Every node says of all that it was told to hold that it is in `state`."""
        paths = [layout.target_path(name) for name in self.names]
        operations: list[Operation] = []
        for name, path, znode in zip(
            self.names, paths, self._connection.get_many(paths), strict=True
        ):
            if znode is None:
                raise RuntimeError(f"{name} was told nothing")
            target = layout.decode_target(path, znode.data)
            states = np.full(len(target.shards), int(state), np.uint8)
            current = CurrentState(f"instance-of-{name}", target.version, target.shards, states)
            data, own = layout.encode_current(current), layout.current_path(name)
            operations.append(Create(own, data) if first else Set(own, data))
        self._write(operations)

    def lose(self, name: str) -> None:
        self._connection.delete(layout.live_path(name))

    def _write(self, operations: Iterator[Operation] | Sequence[Operation]) -> None:
        waiting = list(operations)
        for at in range(0, len(waiting), _COMMIT_MAX):
            self._connection.commit(waiting[at : at + _COMMIT_MAX])


class _Watcher:
    """A spectator that tells when it has a map that satisfies a condition."""

    def __init__(self, connection: Connection) -> None:
        self._came = threading.Condition()
        self._spectator = Spectator(connection, self._take)
        self._spectator.start()

    def _take(self, view: ShardMap) -> None:
        del view
        with self._came:
            self._came.notify_all()

    def wait(self, what: str, condition: Callable[[ShardMap], bool]) -> float:
        """Seconds until the map is so."""
        begin = time.monotonic()
        with self._came:
            while (view := self._spectator.map) is None or not condition(view):
                if time.monotonic() - begin > _PATIENCE_S:
                    raise RuntimeError(f"not within {_PATIENCE_S:g} s: {what}")
                self._came.wait(0.05)
        return time.monotonic() - begin

    def stop(self) -> None:
        self._spectator.stop()


def _scale(size: _Size, folder: Path, bench: str) -> Figure:
    config = ClusterConfig(
        cluster="scale", shard_count=size.shards, replicas=_REPLICAS, rebalance_delay_seconds=600
    )
    total = size.shards * _REPLICAS
    made: list[Connection] = []
    with zookeeper(folder, 3) as ensemble:

        def connect() -> Connection:
            connection = Connection(ZooKeeperConfig(f"{ensemble.hosts}/scale", _SESSION_S))
            made.append(connection)
            connection.start()
            if not connection.wait_connected(20):
                raise RuntimeError(f"no ZooKeeper: {connection.problem}")
            return connection

        try:
            return _scale_with(size, bench, config, total, connect)
        finally:
            for connection in reversed(made):
                connection.close()


def _scale_with(
    size: _Size,
    bench: str,
    config: ClusterConfig,
    total: int,
    connect: Callable[[], Connection],
) -> Figure:
    online = int(ReplicaState.ONLINE)
    hand = _Hand(connect(), size.nodes)
    hand.register()
    watcher = _Watcher(connect())
    controller = Controller(connect(), config, "first")
    times: dict[str, float] = {}

    begin = time.monotonic()
    controller.start()
    _wait("a first placement", lambda: controller.status().steps > 0)
    times["first_placement_s"] = time.monotonic() - begin
    hand.hold(ReplicaState.WARMING, first=True)
    watcher.wait("all to be warming", lambda view: len(view.leaf) == total)
    hand.hold(ReplicaState.ONLINE, first=False)
    times["all_online_s"] = watcher.wait(
        "all to be online", lambda view: int((view.state == online).sum()) == total
    )
    written = controller.status().bytes_written

    lost = hand.names[size.nodes // 2]
    hand.lose(lost)
    current_s = watcher.wait("a map without it", lambda view: not len(view.held_by(lost)[0]))
    loss_bytes = controller.status().bytes_written - written

    begin = time.monotonic()
    late = _Watcher(connect())
    late.wait("a map", lambda view: len(view.leaf) > 0)
    times["spectator_start_s"] = time.monotonic() - begin

    controller.stop()
    successor = Controller(connect(), config, "second")
    begin = time.monotonic()
    successor.start()
    _wait("the next leader's first step", lambda: successor.status().steps > 0)
    times["restart_s"] = time.monotonic() - begin
    restart_bytes = successor.status().bytes_written
    for one in (watcher, late):
        one.stop()
    successor.stop()
    largest, state_bytes = _stored(connect())
    return _figure(
        bench,
        "zookeeper_scale",
        current_s,
        "s",
        {
            "shards": size.shards,
            "nodes": size.nodes,
            **_rounded(times),
            "published_bytes": written,
            "loss_bytes": loss_bytes,
            "restart_bytes": restart_bytes,
            "state_bytes": state_bytes,
            "largest_znode_bytes": largest,
        },
    )


def _stored(connection: Connection) -> tuple[int, int]:
    """The largest znode that a leader wrote, and all of them together."""
    sizes = []
    for root in (
        layout.TARGET,
        *(f"{base}/{kind}" for base in (layout.IDEAL, layout.VIEW) for kind in ("nodes", "chunks")),
    ):
        names = connection.children(root) or []
        znodes = connection.get_many([f"{root}/{name}" for name in names])
        sizes += [len(znode.data) for znode in znodes if znode is not None]
    return max(sizes), sum(sizes)


def _wait(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {_PATIENCE_S:g} s: {what}")
        time.sleep(0.01)
