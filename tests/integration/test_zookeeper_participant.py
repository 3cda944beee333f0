"""A leaf takes and drops shards as its target says, whatever happens to ZooKeeper or its znodes."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from sharding import layout
from sharding.connection import Connection, ZooKeeperConfig
from sharding.model import (
    ClusterConfig,
    LiveNode,
    NodeOverride,
    ReplicaState,
    ShardMap,
    Shards,
)
from sharding.participant import Participant
from tests.cluster import Board, connected_to
from tests.proxy import TcpProxy
from tests.servers import wait_until
from tests.zookeeper import ZooKeeperServer, client_of, end_session

CONFIG = ClusterConfig(cluster="test", shard_count=64)
ONLINE, WARMING = ReplicaState.ONLINE, ReplicaState.WARMING


def node(name: str = "leaf-1", cluster: str = "test") -> LiveNode:
    return LiveNode(
        name=name, address=f"{name}:7070", zone="a", cluster=cluster, instance_id="none"
    )


class RecordingHooks:
    """Writes down what is asked; a test may hold warming back or make it fail."""

    def __init__(self) -> None:
        self.events: list[tuple[str, tuple[int, ...]]] = []
        self.away: dict[tuple[int, ...], list[float | None]] = {}
        self.views: list[ShardMap] = []
        self.lost: list[float] = []
        self.owned: tuple[int, ...] = ()
        self.owned_version = -1
        self.shard_count = 0
        self.may_warm = threading.Event()
        self.may_warm.set()
        self.warming = threading.Event()
        self.failure: Exception | None = None

    def own(self, version: int, shard_count: int, shards: Shards) -> None:
        self.owned = tuple(shards.tolist())
        self.owned_version = version
        self.shard_count = shard_count
        self.events.append(("own", self.owned))

    def warm(self, shards: Shards, view: ShardMap, away_seconds: float | None) -> None:
        some = tuple(shards.tolist())
        self.warming.set()
        assert self.may_warm.wait(30)
        self.events.append(("warm", some))
        if self.failure is not None:
            raise self.failure
        self.away.setdefault(some, []).append(away_seconds)
        self.views.append(view)

    def drop(self, shards: Shards) -> None:
        self.events.append(("drop", tuple(shards.tolist())))

    def session_lost(self, away_seconds: float) -> None:
        self.lost.append(away_seconds)

    def count(self, kind: str) -> int:
        return sum(event[0] == kind for event in self.events)


class LeafUnderTest:
    def __init__(self, hosts: str, name: str, timeout_s: float, config: ClusterConfig) -> None:
        self.name = name
        self.hooks = RecordingHooks()
        self.connection = Connection(ZooKeeperConfig(hosts, timeout_s))
        self.participant = Participant(
            self.connection, config, node(name, config.cluster), self.hooks
        )
        self.connection.start()
        self.participant.start()

    def end(self) -> None:
        self.hooks.may_warm.set()
        self.participant.stop()
        self.connection.close()

    @property
    def registered(self) -> bool:
        return self.participant.status().registered

    def end_session(self, hosts: str) -> None:
        client = self.connection._client
        assert client is not None
        end_session(hosts, client.client_id)

    def has(self, *, warming: int, online: int) -> bool:
        status = self.participant.status()
        return (status.warming, status.online) == (warming, online)

    def problems(self) -> str:
        return " ".join(self.participant.status().problems)


StartLeaf = Callable[..., LeafUnderTest]


@pytest.fixture
def start_leaf(zookeeper_hosts: str) -> Iterator[StartLeaf]:
    with ExitStack() as stack:

        def start(
            name: str = "leaf-1",
            timeout_s: float = 2.0,
            hosts: str = zookeeper_hosts,
            config: ClusterConfig = CONFIG,
        ) -> LeafUnderTest:
            leaf = LeafUnderTest(hosts, name, timeout_s, config)
            stack.callback(leaf.end)
            return leaf

        yield start


@pytest.fixture
def board(zookeeper_hosts: str) -> Iterator[Board]:
    with connected_to(zookeeper_hosts, 10.0) as connection:
        yield Board(connection, CONFIG)


def states(board: Board, name: str = "leaf-1") -> dict[int, int]:
    current, live = board.current(name), board.live(name)
    if current is None or live is None or current.instance_id != live.instance_id:
        return {}
    return dict(zip(current.shards.tolist(), current.states.tolist(), strict=True))


def bring_online(board: Board, leaf: LeafUnderTest, shards: list[int], version: int) -> None:
    """Target, view with it warming, view with it online, as a controller does."""
    board.target(leaf.name, shards)
    wait_until(lambda: set(states(board, leaf.name)) == set(shards), 10)
    board.follow(version, leaf.name)
    wait_until(lambda: states(board, leaf.name) == dict.fromkeys(shards, int(ONLINE)), 10)
    board.follow(version + 1, leaf.name)
    wait_until(lambda: leaf.hooks.owned_version == version + 1)


# ---- the way of a shard --------------------------------------------------------------------------


def test_a_shard_comes_and_goes_in_order(board: Board, start_leaf: StartLeaf) -> None:
    leaf = start_leaf()
    wait_until(lambda: leaf.registered)
    live = board.live("leaf-1")
    assert live is not None
    assert live.address == "leaf-1:7070"
    assert live.instance_id not in ("", "none")
    override = board.connection.get("/nodes/leaf-1")
    assert override is not None
    assert layout.decode_override("/nodes/leaf-1", override.data) == NodeOverride()
    board.target("leaf-1", [3, 7])
    wait_until(lambda: states(board) == {3: WARMING, 7: WARMING})
    assert leaf.hooks.events[-1] == ("own", (3, 7)), "it answers before it says so"
    time.sleep(0.3)
    assert leaf.hooks.count("warm") == 0, "nobody sends it writes yet"
    view = board.follow(1, "leaf-1")
    wait_until(lambda: states(board) == {3: ONLINE, 7: ONLINE})
    assert ("warm", (3, 7)) in leaf.hooks.events
    assert leaf.hooks.away == {(3, 7): [None]}
    assert leaf.hooks.views == [view]
    assert (leaf.hooks.owned_version, leaf.hooks.shard_count) == (1, 64)
    leaf.hooks.events.clear()
    board.target("leaf-1", [7, 9])
    wait_until(lambda: states(board) == {7: ONLINE, 9: WARMING})
    assert leaf.hooks.events == [("own", (7, 9)), ("drop", (3,))]


def test_a_process_that_starts_again_warms_what_its_target_names(
    board: Board, start_leaf: StartLeaf
) -> None:
    leaf = start_leaf()
    bring_online(board, leaf, [1, 2], 1)
    former = board.live("leaf-1")
    leaf.end()
    assert board.live("leaf-1") is None, "it left at once"
    assert leaf.hooks.count("drop") == 0
    assert leaf.hooks.owned == (1, 2)
    again = start_leaf()
    wait_until(lambda: again.hooks.owned == (1, 2))
    live = board.live("leaf-1")
    assert former is not None
    assert live is not None
    assert live.instance_id != former.instance_id
    time.sleep(0.3)
    assert states(board) == {1: WARMING, 2: WARMING}, "the view still names its former life"
    board.follow(3, "leaf-1")
    wait_until(lambda: states(board) == {1: ONLINE, 2: ONLINE})


def test_warming_that_fails_is_tried_again(board: Board, start_leaf: StartLeaf) -> None:
    leaf = start_leaf()
    leaf.hooks.failure = RuntimeError("no peer answers")
    board.target("leaf-1", [5])
    wait_until(lambda: states(board) == {5: WARMING})
    board.follow(1, "leaf-1")
    wait_until(lambda: "no peer answers" in leaf.problems())
    assert states(board) == {5: WARMING}
    leaf.hooks.failure = None
    wait_until(lambda: states(board) == {5: ONLINE}, 5)
    wait_until(lambda: leaf.problems() == "")


def test_sessions_do_not_wait_for_warming_and_a_shard_is_not_dropped_under_it(
    board: Board, start_leaf: StartLeaf, zookeeper_hosts: str
) -> None:
    leaf = start_leaf()
    leaf.hooks.may_warm.clear()
    board.target("leaf-1", [5])
    wait_until(lambda: states(board) == {5: WARMING})
    board.follow(1, "leaf-1")
    assert leaf.hooks.warming.wait(5)
    board.target("leaf-1", [6])
    wait_until(lambda: states(board) == {5: WARMING, 6: WARMING})
    leaf.end_session(zookeeper_hosts)
    wait_until(lambda: leaf.connection.sessions == 2 and leaf.registered, 10)
    wait_until(lambda: states(board) == {5: WARMING, 6: WARMING})
    assert leaf.hooks.count("drop") == 0
    leaf.hooks.may_warm.set()
    wait_until(lambda: states(board) == {6: WARMING})
    order = [event for event in leaf.hooks.events if event[0] != "own"]
    assert order == [("warm", (5,)), ("drop", (5,))]
    assert leaf.hooks.owned == (6,)


def test_many_shards_go_online_a_part_at_a_time(start_leaf: StartLeaf, board: Board) -> None:
    leaf = start_leaf(config=CONFIG)
    bring_online(board, leaf, list(range(64)), 1)
    assert leaf.hooks.owned == tuple(range(64))
    assert leaf.has(warming=0, online=64)


# ---- faults of ZooKeeper -------------------------------------------------------------------------


def test_a_session_that_is_ended_makes_all_warming_again(
    board: Board, start_leaf: StartLeaf, zookeeper_hosts: str
) -> None:
    leaf = start_leaf()
    bring_online(board, leaf, [1, 2], 1)
    before = board.live("leaf-1")
    leaf.hooks.events.clear()
    leaf.hooks.away.clear()
    leaf.end_session(zookeeper_hosts)
    wait_until(lambda: states(board) == {1: WARMING, 2: WARMING}, 10)
    live = board.live("leaf-1")
    assert before is not None
    assert live is not None
    assert live.instance_id != before.instance_id
    assert leaf.hooks.owned == (1, 2)
    assert len(leaf.hooks.lost) == 1
    time.sleep(0.5)
    assert leaf.hooks.count("warm") == 0, "the view names its former registration"
    board.follow(3, "leaf-1")
    wait_until(lambda: states(board) == {1: ONLINE, 2: ONLINE})
    (away,) = leaf.hooks.away[(1, 2)]
    assert away is not None
    assert 0.4 < away < 5, "since the last answer in the former session"
    assert leaf.hooks.count("drop") == 0


def test_a_partition_of_one_leaf(
    board: Board,
    start_leaf: StartLeaf,
    zookeeper_hosts: str,
    start_proxy: Callable[[int], TcpProxy],
) -> None:
    address, _, chroot = zookeeper_hosts.partition("/")
    proxy = start_proxy(int(address.rpartition(":")[2]))
    leaf = start_leaf(hosts=f"{proxy.address}/{chroot}", timeout_s=1.0)
    bring_online(board, leaf, [1, 2], 1)
    leaf.hooks.events.clear()
    proxy.black_hole()
    wait_until(lambda: len(leaf.hooks.lost) == 1, 5)
    assert 0.9 < leaf.hooks.lost[0] < 3
    wait_until(lambda: board.live("leaf-1") is None, 5)
    board.follow(3, "leaf-1")  # without it
    board.target("leaf-1", [2, 3])
    time.sleep(1)
    assert leaf.hooks.events == [], "it serves what it has"
    assert not leaf.registered
    assert "no answer from" in leaf.problems()
    proxy.forward()
    wait_until(lambda: states(board) == {2: WARMING, 3: WARMING}, 10)
    assert ("drop", (1,)) in leaf.hooks.events
    board.follow(4, "leaf-1")
    wait_until(lambda: states(board) == {2: ONLINE, 3: ONLINE})
    (away,) = leaf.hooks.away[(2,)]
    assert away is not None
    assert away > 1.5
    assert leaf.hooks.away[(3,)] == [None]
    assert len(leaf.hooks.lost) == 1


def test_zookeeper_away_changes_nothing_that_is_served(
    start_zookeeper: Callable[..., ZooKeeperServer], start_leaf: StartLeaf
) -> None:
    server = start_zookeeper()
    hosts = f"{server.address}/c"
    with connected_to(hosts, 10.0) as connection:
        board = Board(connection, CONFIG)
        leaf = start_leaf(hosts=hosts, timeout_s=4.0)
        bring_online(board, leaf, [1, 2], 1)
        before = board.live("leaf-1")
        leaf.hooks.events.clear()
        server.kill()
        wait_until(lambda: len(leaf.hooks.lost) == 1, 10)
        time.sleep(6)
        assert leaf.hooks.events == []
        assert leaf.has(warming=0, online=2)
        server.start()
        wait_until(lambda: leaf.connection.connected and connection.connected, 20)
        # ZooKeeper counts sessions from its start: it has not ended, and nobody saw the leaf go.
        assert board.live("leaf-1") == before
        board.target("leaf-1", [1, 2, 3])
        wait_until(lambda: states(board) == {1: ONLINE, 2: ONLINE, 3: WARMING}, 10)
        assert leaf.hooks.count("drop") == 0
        assert leaf.hooks.owned == (1, 2, 3)


def test_a_leaf_starts_while_zookeeper_is_away(
    start_zookeeper: Callable[..., ZooKeeperServer], start_leaf: StartLeaf
) -> None:
    server = start_zookeeper()
    server.stop()
    leaf = start_leaf(hosts=f"{server.address}/a/b")
    wait_until(lambda: "nobody has answered" in leaf.problems())
    server.start()
    wait_until(lambda: leaf.registered, 15)
    with connected_to(f"{server.address}/a/b") as connection:
        znode = connection.get(layout.CONFIG)
        assert znode is not None
        assert layout.decode_config(znode.data) == CONFIG, "it found none and wrote its own"


# ---- two of one name, another cluster ------------------------------------------------------------


def test_the_second_of_one_name_waits_for_the_first_to_end(
    board: Board, start_leaf: StartLeaf
) -> None:
    first = start_leaf()
    bring_online(board, first, [1], 1)
    second = start_leaf()
    wait_until(lambda: "another process is registered as 'leaf-1'" in second.problems())
    assert "leaf-1:7070" in second.problems()
    assert not second.registered
    board.target("leaf-1", [1, 2])
    wait_until(lambda: states(board) == {1: ONLINE, 2: WARMING})
    assert second.hooks.owned == ()
    first.end()
    wait_until(lambda: second.registered, 10)
    wait_until(lambda: second.problems() == "")
    wait_until(lambda: states(board) == {1: WARMING, 2: WARMING})


def test_a_zombie_does_not_write_over_its_successor(
    board: Board, start_leaf: StartLeaf, zookeeper_hosts: str
) -> None:
    leaf = start_leaf()
    bring_online(board, leaf, [1], 1)
    registration = leaf.participant._registration
    with client_of(zookeeper_hosts) as other:
        theirs = other.get("/current/leaf-1")[0]
        other.set("/current/leaf-1", theirs)  # as a successor does
        mine = leaf.participant._holdings.current("zombie", 99)
        with pytest.raises(Exception, match="was changed by another"):
            registration.write_current(mine)
        assert other.get("/current/leaf-1")[0] == theirs


def test_another_cluster_is_refused(
    board: Board, start_leaf: StartLeaf, caplog: pytest.LogCaptureFixture
) -> None:
    leaf = start_leaf("leaf-9", config=CONFIG.model_copy(update={"cluster": "other"}))
    wait_until(lambda: "belongs to cluster 'test'" in leaf.problems())
    assert "says 'other'" in leaf.problems()
    assert "give one of them another chroot" in leaf.problems()
    time.sleep(0.5)
    assert board.live("leaf-9") is None
    assert leaf.hooks.events == []
    # An operator puts it right.
    fixed = layout.encode_config(CONFIG.model_copy(update={"cluster": "other"}))
    board.connection.set(layout.CONFIG, fixed)
    wait_until(lambda: leaf.registered, 5)
    assert caplog.text.count("belongs to cluster") == 1


def test_the_clusters_own_numbers_hold(board: Board, start_leaf: StartLeaf) -> None:
    leaf = start_leaf(config=CONFIG.model_copy(update={"shard_count": 8}))
    wait_until(lambda: leaf.hooks.shard_count == 64)
    board.connection.set(
        layout.CONFIG, layout.encode_config(CONFIG.model_copy(update={"shard_count": 32}))
    )
    wait_until(lambda: "shard_count went from 64 to 32" in leaf.problems())
    assert leaf.hooks.shard_count == 64
    board.connection.set(layout.CONFIG, layout.encode_config(CONFIG))
    wait_until(lambda: leaf.problems() == "")


# ---- garbage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/target/leaf-1", "/view/head", "/config"])
def test_garbage_changes_nothing_and_is_told_once(
    board: Board, start_leaf: StartLeaf, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    leaf = start_leaf()
    bring_online(board, leaf, [1, 2], 1)
    leaf.hooks.events.clear()
    good = board.connection.get(path)
    assert good is not None
    board.connection.set(path, b"\x00garbage")
    wait_until(lambda: f"{path}: " in leaf.problems())
    leaf.participant._wake.set()
    time.sleep(0.3)
    assert leaf.hooks.events == []
    assert states(board) == {1: ONLINE, 2: ONLINE}
    assert leaf.participant.status().corrupt_reads >= 1
    assert leaf.registered
    assert caplog.text.count("going on with what was read before") == 1
    board.connection.set(path, good.data)
    wait_until(lambda: leaf.problems() == "")
    board.target("leaf-1", [2])
    wait_until(lambda: states(board) == {2: ONLINE})


@pytest.mark.parametrize("path", ["/target/leaf-1", "/view", "/config"])
def test_znodes_that_are_deleted_change_nothing(
    board: Board, start_leaf: StartLeaf, zookeeper_hosts: str, path: str
) -> None:
    leaf = start_leaf()
    bring_online(board, leaf, [1, 2], 1)
    leaf.hooks.events.clear()
    with client_of(zookeeper_hosts) as client:
        client.delete(path, recursive=True)
    time.sleep(0.5)
    assert leaf.hooks.events == []
    assert states(board) == {1: ONLINE, 2: ONLINE}
    if path == "/config":
        znode = board.connection.get(path)
        assert znode is not None, "written again, as it was"
        assert layout.decode_config(znode.data) == CONFIG


def test_a_target_that_goes_back_is_ignored(board: Board, start_leaf: StartLeaf) -> None:
    leaf = start_leaf()
    board._version = 10
    bring_online(board, leaf, [1, 2], 1)
    board._version = 3
    board.target("leaf-1", [9])
    wait_until(lambda: "went back from version 11 to 4" in leaf.problems())
    assert states(board) == {1: ONLINE, 2: ONLINE}


def test_shards_that_the_cluster_does_not_have_are_left_out(
    board: Board, start_leaf: StartLeaf
) -> None:
    leaf = start_leaf()
    board.target("leaf-1", [5, 64, 900])
    wait_until(lambda: states(board) == {5: WARMING})
    assert "/target/leaf-1: 2 shards that a cluster of 64 does not have (64, 900)" in (
        leaf.problems()
    )
    assert leaf.hooks.owned == (5,)


def test_a_registration_that_is_deleted_or_overwritten_comes_back(
    board: Board, start_leaf: StartLeaf, zookeeper_hosts: str
) -> None:
    leaf = start_leaf()
    bring_online(board, leaf, [1], 1)
    before = board.live("leaf-1")
    with client_of(zookeeper_hosts) as client:
        client.set("/live/leaf-1", b"garbage")
        wait_until(lambda: client.get("/live/leaf-1")[0] != b"garbage")
        assert board.live("leaf-1") == before
        assert states(board) == {1: ONLINE}
        client.delete("/live/leaf-1")
        wait_until(lambda: states(board) == {1: WARMING})
    live = board.live("leaf-1")
    assert live != before
    # A view in between may have been without it, and writes were missed.
    board.follow(3, "leaf-1")
    wait_until(lambda: states(board) == {1: ONLINE})
    assert leaf.hooks.away[(1,)][-1] is not None
    assert leaf.hooks.lost == []


def test_hooks_that_raise_do_not_end_it(board: Board, start_leaf: StartLeaf) -> None:
    leaf = start_leaf()
    own = leaf.hooks.own
    calls: list[int] = []

    def fail_once(version: int, shard_count: int, shards: Shards) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("not yet")
        own(version, shard_count, shards)

    wait_until(lambda: leaf.registered)
    leaf.hooks.own = fail_once  # type: ignore[method-assign]
    board.target("leaf-1", [4])
    wait_until(lambda: states(board) == {4: WARMING}, 5)
    assert len(calls) >= 2
    assert leaf.hooks.owned == (4,)


def test_a_view_without_instances_is_believed_for_what_is_warming(
    board: Board, start_leaf: StartLeaf
) -> None:
    leaf = start_leaf()
    board.target("leaf-1", [1, 2])
    wait_until(lambda: states(board) == {1: WARMING, 2: WARMING})
    view = board.follow(1, "leaf-1")
    bare = tuple(type(one)(one.name, one.address, one.zone) for one in view.leaves)
    mixed = ShardMap(2, bare, view.first, view.leaf, np.array([0, 1], dtype=np.uint8))
    wait_until(lambda: states(board) == {1: ONLINE, 2: ONLINE})
    leaf.end()
    again = start_leaf()
    wait_until(lambda: states(board) == {1: WARMING, 2: WARMING})
    board.publish(mixed)
    wait_until(lambda: states(board) == {1: ONLINE, 2: WARMING})
    time.sleep(0.3)
    assert again.hooks.count("warm") == 1
