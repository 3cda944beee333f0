"""A whole cluster for tests, on a real ZooKeeper: controllers, and leaves with trivial hooks, each
with a session of its own; and a watcher that notes how long any shard had no online owner."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np

from sharding import layout
from sharding.cluster_admin import ClusterAdmin
from sharding.connection import Connection, ZooKeeperConfig
from sharding.controller import Controller
from sharding.model import ClusterConfig, LiveNode, ReplicaState, ShardMap, Shards
from sharding.participant import Participant
from sharding.spectator import Spectator
from tests.servers import wait_until

__all__ = ["Cluster", "TestLeaf", "cluster_on"]

SESSION_S = 2.0


class TestLeaf:
    """A participant whose hooks take `warm_s` seconds a call, and do nothing."""

    __test__ = False

    def __init__(self, hosts: str, config: ClusterConfig, name: str, zone: str) -> None:
        self.name = name
        self.warm_s = 0.0
        self.connection = Connection(ZooKeeperConfig(hosts, SESSION_S))
        node = LiveNode(
            name=name, address=f"{name}:1", zone=zone, cluster=config.cluster, instance_id="-"
        )
        self.participant = Participant(self.connection, config, node, self)
        self.connection.start()
        self.participant.start()

    def own(self, version: int, shard_count: int, shards: Shards) -> None:
        pass

    def warm(self, shards: Shards, view: ShardMap, away_seconds: float | None) -> None:
        del shards, view, away_seconds
        time.sleep(self.warm_s)

    def drop(self, shards: Shards) -> None:
        pass

    def session_lost(self, away_seconds: float) -> None:
        pass

    def stop(self, leave: bool = True) -> None:
        """`leave=False`: its registration stays until the session ends."""
        self.participant.stop(leave)
        self.connection.close()


class Cluster:
    """See `cluster_on`."""

    def __init__(self, hosts: str, config: ClusterConfig, stack: ExitStack) -> None:
        self.hosts = hosts
        self.config = config
        self.leaves: dict[str, TestLeaf] = {}
        self.controllers: list[Controller] = []
        self._stack = stack
        self.connection = self._connect()
        self.admin = ClusterAdmin(self.connection)
        self._lock = threading.Lock()
        self._ownerless_since: dict[int, float] = {}
        self.max_ownerless_s = 0.0
        self.versions: list[int] = []
        self.spectator = Spectator(self.connection, self._take)
        self.spectator.start()
        stack.callback(self.spectator.stop)

    def _connect(self) -> Connection:
        made = Connection(ZooKeeperConfig(self.hosts, SESSION_S))
        made.start()
        self._stack.callback(made.close)
        assert made.wait_connected(20), made.problem
        return made

    def add_controller(self, name: str = "", config: ClusterConfig | None = None) -> Controller:
        name = name or f"controller-{len(self.controllers)}"
        made = Controller(self._connect(), config or self.config, name, first_settle_seconds=0.5)
        made.start()
        self._stack.callback(made.stop)
        self.controllers.append(made)
        return made

    def add_leaf(self, name: str, zone: str) -> TestLeaf:
        made = TestLeaf(self.hosts, self.config, name, zone)
        self._stack.callback(made.stop)
        self.leaves[name] = made
        return made

    def leader(self) -> Controller:
        """The controller that leads, waiting for an election to end."""
        found: list[Controller] = []

        def leads() -> bool:
            found[:] = [one for one in self.controllers if one.status().leader]
            return len(found) == 1

        wait_until(leads, 20, "a controller that leads")
        return found[0]

    # ---- what the spectator sees -----------------------------------------------------------------

    def _take(self, view: ShardMap) -> None:
        online = np.zeros(view.shard_count, bool)
        online[view.shard_of_replica()[view.state == ReplicaState.ONLINE]] = True
        now = time.monotonic()
        with self._lock:
            self.versions.append(view.version)
            for shard in [s for s in self._ownerless_since if online[s]]:
                since = self._ownerless_since.pop(shard)
                self.max_ownerless_s = max(self.max_ownerless_s, now - since)
            for shard in np.flatnonzero(~online).tolist():
                self._ownerless_since.setdefault(shard, now)

    def forget_ownerless(self) -> None:
        """Begins to measure; all shards must have an owner now."""
        with self._lock:
            assert not self._ownerless_since
            self.max_ownerless_s = 0.0

    def longest_ownerless_s(self) -> float:
        """The longest that any shard was in no map as online, until now."""
        with self._lock:
            now = time.monotonic()
            return max(
                [self.max_ownerless_s, *(now - since for since in self._ownerless_since.values())]
            )

    def view(self) -> ShardMap:
        view = self.spectator.map
        assert view is not None, "no view yet"
        return view

    def load(self, name: str) -> int:
        return len(self.view().held_by(name)[0])

    def rows(self) -> list[dict[str, ReplicaState]]:
        view = self.view()
        return [
            {leaf.name: state for leaf, state in view.replicas(shard)}
            for shard in range(view.shard_count)
        ]

    def all_online(self, replicas: int | None = None) -> bool:
        """Whether each shard has its replicas, all of them online, and nothing is on its way."""
        view = self.spectator.map
        if view is None:
            return False
        wanted = self.config.replicas if replicas is None else replicas
        counts = np.diff(view.first.astype(np.int64))
        return (
            bool((counts == wanted).all() and (view.state == ReplicaState.ONLINE).all())
            and not self.admin.moves()
        )

    def wait_loaded(self, name: str) -> None:
        """Until a node that is new has its first shard, and then until all has settled."""
        wait_until(lambda: self.load(name) > 0, 20, f"shards of {name}")
        self.wait_settled()

    def wait_settled(self, timeout_s: float = 30.0, replicas: int | None = None) -> None:
        wait_until(
            lambda: _calmly(lambda: self.all_online(replicas)), timeout_s, "all shards to be online"
        )

    def targets(self) -> dict[str, bytes]:
        names = self.connection.children(layout.TARGET) or []
        paths = [layout.target_path(name) for name in names]
        znodes = self.connection.get_many(paths)
        return {name: z.data for name, z in zip(names, znodes, strict=True) if z is not None}


def _calmly(test: Callable[[], bool]) -> bool:
    """A test that fails while ZooKeeper is away."""
    try:
        return test()
    except Exception:
        return False


@contextmanager
def cluster_on(
    hosts: str, leaves: int = 3, controllers: int = 1, **config: object
) -> Iterator[Cluster]:
    """A settled cluster of leaves `n0`… in as many zones; `config` are fields of ClusterConfig."""
    values: dict[str, object] = {
        "cluster": "test",
        "shard_count": 64,
        "replicas": 2,
        "rebalance_delay_seconds": 3.0,
        "max_moves": 16,
        "drop_grace_seconds": 0.3,
    }
    made_config = ClusterConfig.model_validate(values | config)
    with ExitStack() as stack:
        cluster = Cluster(hosts, made_config, stack)
        for _ in range(controllers):
            cluster.add_controller()
        for number in range(leaves):
            cluster.add_leaf(f"n{number}", f"z{number}")
        if leaves and controllers:
            cluster.wait_settled(replicas=min(leaves, made_config.replicas))
            cluster.forget_ownerless()
        yield cluster
