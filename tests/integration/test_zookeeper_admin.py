"""What operators see of a cluster and tell it, by what lies in a real ZooKeeper."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from sharding import layout
from sharding.cluster_admin import ClusterAdmin, Move
from sharding.errors import CorruptState, Disconnected, NotInitialised, Refused, UnknownNode
from sharding.model import (
    ClusterConfig,
    CurrentState,
    IdealState,
    Leaf,
    LiveNode,
    NodeOverride,
    ReplicaState,
    ShardMap,
    shards_array,
)
from tests.cluster import Board, connected_to, make_map
from tests.zookeeper import ZooKeeperServer

CONFIG = ClusterConfig(cluster="test", shard_count=6, replicas=2)
ONLINE, WARMING = ReplicaState.ONLINE, ReplicaState.WARMING
NAMES = ("leaf-a", "leaf-b", "leaf-c")


class Cluster(Board):
    """A board with nodes on it, as they would have written themselves down."""

    def node(self, name: str, held: dict[int, ReplicaState], target: list[int]) -> None:
        live = LiveNode(
            name=name, address=f"{name}:1", zone="z", cluster="test", instance_id=f"id-{name}"
        )
        self.connection.put(layout.live_path(name), layout.encode_live(live))
        self.connection.put(layout.override_path(name), layout.encode_override(NodeOverride()))
        shards = shards_array(list(held))
        states = np.array([held[shard] for shard in shards.tolist()], dtype=np.uint8)
        current = CurrentState(f"id-{name}", 1, shards, states)
        self.connection.put(layout.current_path(name), layout.encode_current(current))
        self.target(name, target)

    def ideal(self, rows: list[list[str]]) -> None:
        counts = [0, *(len(row) for row in rows)]
        numbers = [NAMES.index(name) for row in rows for name in row]
        state = IdealState(
            1, NAMES, np.cumsum(counts, dtype=np.uint32), np.array(numbers, dtype=np.uint32)
        )
        for path, data in layout.encode_ideal(state, None)[1]:
            self.connection.put(path, data)


@pytest.fixture
def cluster(zookeeper_hosts: str) -> Iterator[Cluster]:
    """Three nodes. Shard 2 moves from leaf-a to leaf-c, and shard 5 has left leaf-b."""
    with connected_to(zookeeper_hosts, 10.0) as connection:
        made = Cluster(connection, CONFIG)
        made.node("leaf-a", dict.fromkeys([0, 1, 2], ONLINE), [0, 1, 2])
        made.node("leaf-b", {**dict.fromkeys([0, 1, 2], ONLINE), 5: ONLINE}, [0, 1, 2])
        made.node("leaf-c", {2: WARMING}, [2])
        made.ideal([["leaf-a", "leaf-b"], ["leaf-b", "leaf-a"], ["leaf-b", "leaf-c"], [], [], []])
        leaves = [Leaf(name, f"{name}:1", "z", f"id-{name}") for name in NAMES]
        rows = {
            0: {"leaf-a": ONLINE, "leaf-b": ONLINE},
            1: {"leaf-b": ONLINE},
            2: {"leaf-a": ONLINE, "leaf-b": ONLINE, "leaf-c": WARMING},
        }
        made.publish(make_map(4, 6, leaves, rows))
        yield made


@pytest.fixture
def admin(cluster: Cluster) -> ClusterAdmin:
    return ClusterAdmin(cluster.connection)


def override(cluster: Cluster, name: str) -> NodeOverride:
    znode = cluster.connection.get(layout.override_path(name))
    assert znode is not None
    return layout.decode_override("x", znode.data)


# ---- the cluster ---------------------------------------------------------------------------------


def test_a_cluster_is_made_once(zookeeper_hosts: str) -> None:
    with connected_to(zookeeper_hosts) as connection:
        admin = ClusterAdmin(connection)
        with pytest.raises(NotInitialised, match="cachectl cluster init"):
            admin.nodes()
        assert admin.init(CONFIG)
        assert not admin.init(CONFIG), "again, and nothing is different"
        assert admin.config() == CONFIG
        with pytest.raises(Refused, match=r"replicas is 2, not 3\. Change it by the other"):
            admin.init(CONFIG.model_copy(update={"replicas": 3}))
        assert admin.nodes() == []
        assert admin.moves() == []
        assert admin.shards().by_online == {0: 6}
        assert admin.explain(0).notes[:2] == (
            "nothing is placed yet: is a controller running?",
            "nothing is published yet: is a controller running?",
        )


def test_replicas_are_changed_where_there_are_nodes_for_them(
    cluster: Cluster, admin: ClusterAdmin
) -> None:
    assert admin.set_replicas(3).replicas == 3
    with pytest.raises(Refused, match="4 replicas need as many nodes, and 3 may hold shards"):
        admin.set_replicas(4)
    assert admin.set_replicas(4, force=True).replicas == 4
    for wrong in (0, 17):
        with pytest.raises(Refused, match="1 to 16 are possible"):
            admin.set_replicas(wrong, force=True)
    znode = cluster.connection.get(layout.CONFIG)
    assert znode is not None
    assert layout.decode_config(znode.data).replicas == 4


def test_other_fields_are_checked(admin: ClusterAdmin) -> None:
    assert admin.change_config(max_moves=3, rebalance_delay_seconds=0.5).max_moves == 3
    with pytest.raises(Refused, match="shard_count of a cluster cannot be changed"):
        admin.change_config(shard_count=9)
    with pytest.raises(Refused, match="a cluster has no colour"):
        admin.change_config(colour=9)
    with pytest.raises(Refused, match="freeze_below"):
        admin.change_config(freeze_below=2)


def test_two_operators_at_once_lose_nothing(
    cluster: Cluster, admin: ClusterAdmin, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = admin._read_config
    others = iter([5, 6])

    def read_and_be_overtaken() -> tuple[ClusterConfig, int]:
        found = read()
        if (moves := next(others, None)) is not None:
            changed = found[0].model_copy(update={"max_moves": moves})
            cluster.connection.set(layout.CONFIG, layout.encode_config(changed))
        return found

    monkeypatch.setattr(admin, "_read_config", read_and_be_overtaken)
    changed = admin.change_config(freeze_below=0.5)
    assert (changed.max_moves, changed.freeze_below) == (6, 0.5)


# ---- nodes ---------------------------------------------------------------------------------------


def test_nodes_are_shown_with_what_they_have(cluster: Cluster, admin: ClusterAdmin) -> None:
    infos = {info.name: info for info in admin.nodes()}
    assert list(infos) == list(NAMES)
    b, c = infos["leaf-b"], infos["leaf-c"]
    assert (b.ideal, b.target, b.online, b.warming, b.state) == (3, 3, 4, 0, "live")
    assert (c.ideal, c.target, c.online, c.warming) == (1, 1, 0, 1)
    assert b.live is not None
    assert b.live.address == "leaf-b:1"
    assert b.weight == 1.0
    cluster.connection.delete(layout.live_path("leaf-c"))
    cluster.connection.put(layout.target_path("leaf-b"), b"garbage")
    infos = {info.name: info for info in admin.nodes()}
    c = infos["leaf-c"]
    assert (c.state, c.online, c.warming, c.weight) == ("away", 0, 0, None)
    assert "/target/leaf-b: 7 bytes that this software did not write" in infos["leaf-b"].problems


def test_a_state_of_a_former_life_is_not_counted(cluster: Cluster, admin: ClusterAdmin) -> None:
    path = layout.current_path("leaf-a")
    old = CurrentState("former", 1, shards_array([0, 1]), np.ones(2, dtype=np.uint8))
    cluster.connection.put(path, layout.encode_current(old))
    (a, *_) = admin.nodes()
    assert (a.online, a.warming) == (0, 0)


def test_draining_disabling_and_weights(cluster: Cluster, admin: ClusterAdmin) -> None:
    assert admin.drain("leaf-a").draining
    assert override(cluster, "leaf-a") == NodeOverride(draining=True)
    assert admin.nodes()[0].state == "draining"
    with pytest.raises(Refused, match=r"without leaf-b there are 1 nodes \(leaf-c\) for 2 repl"):
        admin.disable("leaf-b")
    assert override(cluster, "leaf-b") == NodeOverride()
    assert not admin.disable("leaf-b", force=True).enabled
    assert admin.nodes()[1].state == "disabled"
    assert admin.enable("leaf-b").enabled
    assert not admin.undrain("leaf-a").draining
    assert admin.set_weight("leaf-a", 2.5).weight == 2.5
    assert admin.nodes()[0].weight == 2.5
    assert admin.set_weight("leaf-a", None).weight is None
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(Refused, match="leaf-a: "):
            admin.set_weight("leaf-a", wrong)


def test_unknown_nodes_name_those_that_are_near(cluster: Cluster, admin: ClusterAdmin) -> None:
    with pytest.raises(UnknownNode, match="no node is called 'leaf-x'; did you mean leaf-"):
        admin.drain("leaf-x")
    with pytest.raises(UnknownNode, match="there are leaf-a, leaf-b, leaf-c"):
        admin.disable("zzz")
    with pytest.raises(UnknownNode):
        admin.forget("leaf-x")
    assert cluster.connection.children(layout.NODES) == list(NAMES)


def test_garbage_of_an_override_is_written_over(cluster: Cluster, admin: ClusterAdmin) -> None:
    cluster.connection.put(layout.override_path("leaf-a"), b"\xff")
    assert "/nodes/leaf-a" in admin.nodes()[0].problems[0]
    admin.drain("leaf-a")
    assert override(cluster, "leaf-a") == NodeOverride(draining=True)


def test_a_node_is_forgotten_when_nothing_is_on_it(cluster: Cluster, admin: ClusterAdmin) -> None:
    with pytest.raises(Refused, match="leaf-c is registered at leaf-c:1; stop it first"):
        admin.forget("leaf-c")
    cluster.connection.delete(layout.live_path("leaf-c"))
    with pytest.raises(Refused, match="still to hold 1 shards; disable it and wait"):
        admin.forget("leaf-c")
    cluster.target("leaf-c", [])
    cluster.ideal([["leaf-a", "leaf-b"]] * 3 + [[]] * 3)
    admin.forget("leaf-c")
    assert [info.name for info in admin.nodes()] == ["leaf-a", "leaf-b"]


# ---- shards --------------------------------------------------------------------------------------


def test_shards_are_summed_up(admin: ClusterAdmin) -> None:
    summary = admin.shards()
    assert (summary.view_version, summary.shard_count, summary.replicas) == (4, 6, 2)
    assert summary.by_online == {0: 3, 1: 1, 2: 2}
    assert summary.without_online == (3, 4, 5)
    assert summary.short == (1, 3, 4, 5)


def test_moves_are_named_with_what_they_wait_for(cluster: Cluster, admin: ClusterAdmin) -> None:
    assert admin.moves() == [
        Move(2, "leaf-c", "comes", "is warmed"),
        Move(2, "leaf-a", "goes", "serves until its successor is online"),
        Move(5, "leaf-b", "goes", "is dropped by the node"),
    ]
    cluster.ideal([["leaf-c", "leaf-b"], ["leaf-b", "leaf-a"], ["leaf-b", "leaf-c"], [], [], []])
    assert Move(0, "leaf-c", "comes", "waits for its turn") in admin.moves()
    cluster.target("leaf-c", [0, 2])
    assert Move(0, "leaf-c", "comes", "waits for the node to take it") in admin.moves()
    cluster.connection.delete(layout.live_path("leaf-c"))
    assert Move(0, "leaf-c", "comes", "waits for the node to come back") in admin.moves()


def test_a_shard_is_explained(cluster: Cluster, admin: ClusterAdmin) -> None:
    info = admin.explain(2)
    assert info.ideal == ("leaf-b", "leaf-c")
    assert [(leaf.name, state) for leaf, state in info.view] == [
        ("leaf-a", ONLINE),
        ("leaf-b", ONLINE),
        ("leaf-c", WARMING),
    ]
    assert info.target == NAMES
    assert info.current == (("leaf-a", ONLINE), ("leaf-b", ONLINE), ("leaf-c", WARMING))
    assert info.notes == ("leaf-a holds it only until others do",)
    assert admin.explain(5).notes == (
        "no replica is online: its keys come from the store",
        "placed on 0 of 2 nodes: there are not enough",
    )
    admin.drain("leaf-c", force=True)
    cluster.connection.delete(layout.live_path("leaf-b"))
    assert admin.explain(2).notes == (
        "leaf-b is away",
        "leaf-c is draining, and will lose it",
        "leaf-a holds it only until others do",
    )
    for wrong in (-1, 6):
        with pytest.raises(Refused, match=f"no shard {wrong}; this cluster has 0 to 5"):
            admin.explain(wrong)


def test_a_view_or_ideal_state_that_nobody_can_read_is_said(
    cluster: Cluster, admin: ClusterAdmin
) -> None:
    cluster.connection.set("/view/head", b"garbage")
    assert any("/view/head: " in note for note in admin.explain(2).notes)
    with pytest.raises(CorruptState, match="/view/head"):
        admin.shards()
    cluster.connection.set("/ideal/head", b"garbage")
    assert any("/ideal/head: " in note for note in admin.explain(2).notes)
    assert len(admin.nodes()) == 3


def test_without_zookeeper_it_says_so(start_zookeeper: Callable[..., ZooKeeperServer]) -> None:
    server = start_zookeeper()
    with connected_to(server.address) as connection:
        server.kill()
        with pytest.raises(Disconnected):
            ClusterAdmin(connection).config()


def test_a_large_cluster_is_looked_through_in_seconds(zookeeper_hosts: str) -> None:
    shards, nodes = 100_000, 200
    names = [f"leaf-{index:03}" for index in range(nodes)]
    leaf = ((np.arange(shards)[:, None] + [0, 67, 133]) % nodes).astype(np.uint32)
    first = np.arange(shards + 1, dtype=np.uint32) * 3
    with connected_to(zookeeper_hosts, 20.0) as connection:
        board = Cluster(connection, ClusterConfig(cluster="big", shard_count=shards, replicas=3))
        for index, name in enumerate(names):
            held = np.flatnonzero((leaf == index).any(axis=1)).tolist()
            board.node(name, dict.fromkeys(held, ONLINE), held)
        ideal = IdealState(1, tuple(names), first, leaf.ravel())
        for path, data in layout.encode_ideal(ideal, None)[1]:
            connection.put(path, data)
        leaves = tuple(Leaf(name, f"{name}:1", "z", f"id-{name}") for name in names)
        states = np.ones(3 * shards, dtype=np.uint8)
        board.publish(ShardMap(1, leaves, first, leaf.ravel(), states))
        admin = ClusterAdmin(connection)
        started = time.monotonic()
        assert admin.moves() == []
        assert len(admin.nodes()) == nodes
        assert admin.shards().by_online == {3: shards}
        assert admin.explain(777).notes == ()
        assert time.monotonic() - started < 8
