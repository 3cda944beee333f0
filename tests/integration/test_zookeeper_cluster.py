"""Leaves, controllers, a root's spectator and an operator together on one real ZooKeeper: whatever
happens, no map is published that leaves a shard without an owner."""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from kazoo.exceptions import KazooException
from kazoo.handlers.threading import KazooTimeoutError

from sharding.cluster_admin import ClusterAdmin
from sharding.connection import Connection, ZooKeeperConfig
from sharding.controller import Controller
from sharding.model import ClusterConfig, LiveNode, ReplicaState, ShardMap, Shards
from sharding.participant import Participant
from sharding.spectator import Spectator
from tests.cluster import connected_to
from tests.proxy import TcpProxy
from tests.servers import wait_until
from tests.zookeeper import end_session

SHARDS = 60
CONFIG = ClusterConfig(
    cluster="test",
    shard_count=SHARDS,
    replicas=2,
    rebalance_delay_seconds=2.0,
    drop_grace_seconds=0.3,
    max_moves=20,
    freeze_below=0.5,
)


class Root:
    """Keeps every map, and what was wrong with it."""

    def __init__(self) -> None:
        self.maps: list[ShardMap] = []
        self.wrong: list[str] = []
        self.is_up = False  # from the first map in which all is online

    def take(self, view: ShardMap) -> None:
        if self.maps and view.version <= self.maps[-1].version:
            self.wrong.append(f"version {view.version} after {self.maps[-1].version}")
        self.maps.append(view)
        online = self.online(view)
        if self.is_up and not online.all():
            self.wrong.append(f"map {view.version} without {np.flatnonzero(online == 0).tolist()}")
        self.is_up = self.is_up or bool((online >= CONFIG.replicas).all())

    @staticmethod
    def online(view: ShardMap) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Online replicas of each shard."""
        shards = view.shard_of_replica()[view.state == ReplicaState.ONLINE]
        return np.bincount(shards, minlength=view.shard_count)

    def all_online(self, replicas: int = 2) -> bool:
        return bool(self.maps) and bool((self.online(self.maps[-1]) == replicas).all())

    def shards_of(self, name: str) -> int:
        return len(self.maps[-1].held_by(name)[0])


class Leaf:
    """A participant, a controller that may lead, and a node that notices what is wrong."""

    def __init__(self, hosts: str, name: str, root: Root, timeout_s: float) -> None:
        self.name = name
        self.wrong: list[str] = []
        self.owned: set[int] = set()
        self._root = root
        self._lock = threading.Lock()
        self.connection = Connection(ZooKeeperConfig(hosts, timeout_s))
        live = LiveNode(name=name, address=f"{name}:1", zone=f"zone-{name}", cluster="test")
        self.participant = Participant(self.connection, CONFIG, live, self)
        self.controller = Controller(self.connection, CONFIG, name)
        self.connection.start()
        self.participant.start()
        self.controller.start()

    def own(self, version: int, shard_count: int, shards: Shards) -> None:  # noqa: ARG002
        with self._lock:
            self.owned = set(shards.tolist())

    def warm(self, shards: Shards, view: ShardMap, away_seconds: float | None) -> None:  # noqa: ARG002
        named = set(view.held_by(self.name)[0].tolist())
        if not set(shards.tolist()) <= named:
            self.wrong.append("warms what the view does not give it")
        time.sleep(0.02)

    def drop(self, shards: Shards) -> None:
        named = set(self._root.maps[-1].held_by(self.name)[0].tolist())
        if set(shards.tolist()) & named:
            self.wrong.append(f"drops {set(shards.tolist()) & named}, which roots send it")

    def session_lost(self, away_seconds: float) -> None:
        pass

    def end_session(self, hosts: str) -> None:
        client = self.connection._client
        identity = client.client_id if client is not None else None
        if identity and identity[0]:
            with contextlib.suppress(KazooException, KazooTimeoutError):
                end_session(hosts, identity)

    def stop(self) -> None:
        self.controller.stop()
        self.participant.stop()
        self.connection.close()


class World:
    def __init__(self, hosts: str, stack: ExitStack) -> None:
        self.hosts = hosts
        self.root = Root()
        self.leaves: dict[str, Leaf] = {}
        connection = stack.enter_context(connected_to(hosts, 4.0))
        self.spectator = Spectator(connection, self.root.take)
        self.spectator.start()
        stack.callback(self.spectator.stop)
        stack.callback(self._stop_all)
        self.admin = ClusterAdmin(connection)
        self.admin.init(CONFIG)

    def start(self, name: str, hosts: str | None = None, timeout_s: float = 4.0) -> Leaf:
        self.leaves[name] = Leaf(hosts or self.hosts, name, self.root, timeout_s)
        return self.leaves[name]

    def stop(self, name: str) -> None:
        self.leaves.pop(name).stop()

    def up(self, *names: str) -> None:
        for name in names:
            self.start(name)
        wait_until(lambda: self.root.is_up, 30, "all shards online")

    def settled(self, timeout_s: float = 30.0) -> None:
        """Everything is where it belongs, and everybody says the same of it."""

        def holds() -> bool:
            return (
                self.root.all_online()
                and not self.admin.moves()
                and all(
                    leaf.owned == set(self.root.maps[-1].held_by(name)[0].tolist())
                    for name, leaf in self.leaves.items()
                )
            )

        wait_until(holds, timeout_s, "a settled cluster")

    def check(self) -> None:
        assert self.root.wrong == []
        for leaf in self.leaves.values():
            assert leaf.wrong == []
            assert leaf.participant.status().problems == ()

    def _stop_all(self) -> None:
        for name in list(self.leaves):
            self.stop(name)


@pytest.fixture
def world(zookeeper_hosts: str) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(zookeeper_hosts, stack)


def test_a_cluster_comes_up_and_says_so(world: World) -> None:
    world.up("a", "b", "c")
    world.settled()
    assert sum(leaf.controller.status().leader for leaf in world.leaves.values()) == 1
    infos = world.admin.nodes()
    assert [(info.name, info.state, info.online) for info in infos] == [
        ("a", "live", 40),
        ("b", "live", 40),
        ("c", "live", 40),
    ]
    assert world.admin.shards().by_online == {2: SHARDS}
    assert world.admin.explain(7).notes == ()
    world.check()


def test_all_sessions_end_at_once(world: World, zookeeper_hosts: str) -> None:
    world.up("a", "b", "c")
    world.settled()
    before = {name: set(leaf.owned) for name, leaf in world.leaves.items()}
    for leaf in world.leaves.values():
        leaf.end_session(zookeeper_hosts)
    wait_until(lambda: all(leaf.connection.sessions >= 2 for leaf in world.leaves.values()), 15)
    world.settled()
    assert {name: leaf.owned for name, leaf in world.leaves.items()} == before, "nothing moved"
    world.check()


def test_a_node_is_drained_forgotten_and_nothing_is_ever_unowned(world: World) -> None:
    world.up("a", "b", "c", "d")
    world.settled()
    world.admin.drain("b")
    wait_until(lambda: world.root.shards_of("b") == 0 and not world.leaves["b"].owned, 30)
    world.settled()
    assert {info.name: info.state for info in world.admin.nodes()}["b"] == "drained"
    world.stop("b")
    wait_until(lambda: {info.name: info.live for info in world.admin.nodes()}["b"] is None)
    world.admin.forget("b")
    time.sleep(3)  # past the delay after a loss
    world.settled()
    assert [info.name for info in world.admin.nodes()] == ["a", "c", "d"]
    world.check()


def test_the_number_of_replicas_is_changed_while_it_serves(world: World) -> None:
    world.up("a", "b", "c")
    world.admin.set_replicas(3)
    wait_until(lambda: world.root.all_online(3), 30)
    world.admin.set_replicas(2)
    wait_until(lambda: world.root.all_online(2), 30)
    world.settled()
    world.check()


def test_a_leaf_that_restarts_within_the_delay_gets_its_shards_back(world: World) -> None:
    world.up("a", "b", "c")
    world.settled()
    held = set(world.leaves["b"].owned)
    world.stop("b")
    wait_until(lambda: world.root.shards_of("b") == 0, 10, "roots to hear of it")
    world.start("b")
    world.settled()
    assert world.leaves["b"].owned == held
    world.check()


def test_a_leaf_that_is_parted_from_zookeeper_is_replaced_and_comes_back(
    world: World, zookeeper_hosts: str, start_proxy: Callable[[int], TcpProxy]
) -> None:
    address, _, chroot = zookeeper_hosts.partition("/")
    proxy = start_proxy(int(address.rpartition(":")[2]))
    parted = world.start("p", f"{proxy.address}/{chroot}", 1.0)
    world.up("a", "b", "c")
    world.settled()
    held = set(parted.owned)
    proxy.black_hole()
    wait_until(lambda: world.root.shards_of("p") == 0, 10)
    wait_until(world.root.all_online, 30, "others to have taken its place")
    assert parted.owned == held, "it serves who still asks it"
    proxy.forward()
    wait_until(lambda: world.root.shards_of("p") > 0, 30, "it to get shards again")
    world.settled()
    world.check()


def test_any_mix_of_events(world: World, zookeeper_hosts: str) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    names = ["a", "b", "c", "d", "e"]
    world.up(*names)
    # One at a time is away, drained or disabled: of two replicas one is always there.
    away: str | None = None
    said: str | None = None
    ending = time.monotonic() + 25
    while time.monotonic() < ending:
        match rng.randrange(5):
            case 0 if away is None and said is None:
                # Roots may lose a shard whose other replica is just being made.
                world.settled()
                away = rng.choice(names)
                world.stop(away)
            case 1 if away is not None:
                world.start(away)
                away = None
            case 2 if away is None and said is None:
                world.settled()
                said = rng.choice(names)
                world.admin.drain(said)
            case 3 if said is not None:
                world.admin.undrain(said)
                said = None
            case 4:
                some = rng.choice(sorted(world.leaves))
                if away is None and said is None:
                    world.settled()
                    world.leaves[some].end_session(zookeeper_hosts)
        time.sleep(rng.random())
    if away is not None:
        world.start(away)
    if said is not None:
        world.admin.undrain(said)
    time.sleep(2.5)
    world.settled(60)
    world.check()
