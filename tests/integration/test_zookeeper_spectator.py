"""A spectator follows the view: every change, only forwards, and through faults."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from sharding import layout
from sharding.connection import Connection, Watch, ZooKeeperConfig
from sharding.model import ClusterConfig, Leaf, ReplicaState, ShardMap
from sharding.spectator import Spectator
from tests.cluster import Board, connected_to, make_map
from tests.proxy import TcpProxy
from tests.servers import wait_until
from tests.zookeeper import ZooKeeperEnsemble, client_of, new_chroot

CONFIG = ClusterConfig(cluster="test", shard_count=2500)
LEAVES = tuple(Leaf(f"leaf-{i}", f"h{i}:1", "z", f"id-{i}") for i in range(3))
ONLINE, WARMING = ReplicaState.ONLINE, ReplicaState.WARMING


def view(version: int, moved: int = 0) -> ShardMap:
    rows = {s: {f"leaf-{(s + (s < moved)) % 3}": ONLINE} for s in range(CONFIG.shard_count)}
    return make_map(version, CONFIG.shard_count, LEAVES, rows)


class Maps:
    """What a spectator handed on."""

    def __init__(self) -> None:
        self.seen: list[ShardMap] = []

    def __call__(self, found: ShardMap) -> None:
        self.seen.append(found)

    @property
    def versions(self) -> list[int]:
        return [found.version for found in self.seen]


@contextmanager
def spectating(hosts: str, timeout_s: float = 2.0) -> Iterator[tuple[Spectator, Maps]]:
    maps = Maps()
    with connected_to(hosts, timeout_s) as connection:
        spectator = Spectator(connection, maps)
        spectator.start()
        try:
            yield spectator, maps
        finally:
            spectator.stop()


@pytest.fixture
def board(zookeeper_hosts: str) -> Iterator[Board]:
    with connected_to(zookeeper_hosts, 10.0) as connection:
        yield Board(connection, CONFIG)


def test_each_map_is_handed_on_and_only_what_changed_is_read(
    zookeeper_hosts: str, board: Board
) -> None:
    with spectating(zookeeper_hosts) as (spectator, maps):
        assert spectator.map is None
        assert spectator.age_seconds is None
        first = view(5)
        board.publish(first)
        wait_until(lambda: spectator.map == first)
        assert spectator._reader.chunks_read == 4, "three of shards and one of nodes"
        second = view(6, moved=10)
        started = time.monotonic()
        board.publish(second)
        wait_until(lambda: spectator.map == second)
        assert time.monotonic() - started < 1
        assert spectator._reader.chunks_read == 5
        board.publish(view(9, moved=10))
        wait_until(lambda: maps.versions == [5, 6, 9])
        assert spectator._reader.chunks_read == 5, "nothing but the version has changed"


def test_it_starts_before_zookeeper_and_before_there_is_a_view(zookeeper_hosts: str) -> None:
    connection = Connection(ZooKeeperConfig(zookeeper_hosts, 2.0))
    maps = Maps()
    spectator = Spectator(connection, maps)
    spectator.start()
    connection.start()
    try:
        with connected_to(zookeeper_hosts) as other:
            board = Board(other, CONFIG)
            board.publish(view(1))
            wait_until(lambda: maps.versions == [1])
    finally:
        spectator.stop()
        connection.close()


def test_a_version_never_goes_back(
    zookeeper_hosts: str, board: Board, caplog: pytest.LogCaptureFixture
) -> None:
    with spectating(zookeeper_hosts) as (spectator, maps):
        board.publish(view(7))
        wait_until(lambda: maps.versions == [7])
        board._before = None
        board.publish(view(3, moved=5))
        wait_until(lambda: "went back from version 7 to 3" in (spectator.problem or ""))
        assert spectator.map == view(7)
        board.publish(view(8, moved=5))
        wait_until(lambda: maps.versions == [7, 8])
        assert spectator.problem is None
    assert caplog.text.count("went back") == 1


@pytest.mark.parametrize("path", ["/view/head", "/view/chunks/1b", "/view/nodes/0b"])
@pytest.mark.parametrize(
    "garbage", [b"", b"garbage", b"FCH\x02" + bytes(40)], ids=["empty", "garbage", "newer"]
)
def test_garbage_leaves_the_last_map(
    zookeeper_hosts: str, board: Board, path: str, garbage: bytes
) -> None:
    board.publish(view(1))
    with spectating(zookeeper_hosts) as (spectator, maps):
        wait_until(lambda: maps.versions == [1])
        # Another table of leaves and other owners: every znode is written again.
        leaves = tuple(Leaf(leaf.name, leaf.address, "other", "x") for leaf in LEAVES)
        rows = {shard: {"leaf-0": WARMING} for shard in range(CONFIG.shard_count)}
        head, writes = layout.encode_view(make_map(2, 2500, leaves, rows), board._before)
        written = dict(writes)
        assert path in written
        written[path] = garbage
        for each, data in written.items():
            board.connection.put(each, data)
        wait_until(lambda: f"{path}: " in (spectator.problem or ""))
        assert spectator.map == view(1)
        assert spectator.corrupt_reads >= 1
        board._before = (head, None)
        board.publish(view(3))
        wait_until(lambda: maps.versions == [1, 3])
        assert spectator.map == view(3)
        assert spectator.problem is None


def test_a_view_that_is_deleted_is_kept(zookeeper_hosts: str, board: Board) -> None:
    board.publish(view(1))
    with spectating(zookeeper_hosts) as (spectator, maps):
        wait_until(lambda: maps.versions == [1])
        with client_of(zookeeper_hosts) as client:
            client.delete("/view", recursive=True)
        wait_until(lambda: "/view/head: is gone" in (spectator.problem or ""))
        assert spectator.map == view(1)


def test_a_newcomer_reads_the_old_map_while_a_new_one_is_half_written(
    zookeeper_hosts: str, board: Board
) -> None:
    board.publish(view(1))
    _, writes = layout.encode_view(view(2, moved=2400), board._before)
    for path, data in writes[:-1]:
        board.connection.put(path, data)
    with spectating(zookeeper_hosts) as (spectator, _):
        wait_until(lambda: spectator.map == view(1))


def test_maps_that_come_fast_end_in_the_newest(zookeeper_hosts: str, board: Board) -> None:
    board.publish(view(1))
    with spectating(zookeeper_hosts) as (spectator, maps):
        for version in range(2, 60):
            board.publish(view(version, moved=version * 40))
        wait_until(lambda: spectator.map == view(59, moved=59 * 40))
        assert maps.versions == sorted(set(maps.versions))


def test_a_refresh_looks_at_once_and_not_too_often(zookeeper_hosts: str, board: Board) -> None:
    board.publish(view(1))
    with spectating(zookeeper_hosts) as (spectator, maps):
        wait_until(lambda: maps.versions == [1])
        reads: list[float] = []
        read = spectator._reader.read

        def counted(watch: Watch | None) -> ShardMap | None:
            reads.append(time.monotonic())
            return read(watch)

        spectator._reader.read = counted  # type: ignore[method-assign]
        spectator.refresh(1)
        time.sleep(0.2)
        assert reads == [], "it has that version"
        # A version that nobody has published, asked for as often as a leaf may answer.
        ending = time.monotonic() + 1.5
        version = 100
        while time.monotonic() < ending:
            version += 1
            spectator.refresh(version)
            time.sleep(0.001)
        assert 1 <= len(reads) <= 1.5 / 0.05 + 2
        board.publish(view(2))
        wait_until(lambda: maps.versions == [1, 2])


def test_a_refresh_finds_what_no_watch_told(
    zookeeper_hosts: str, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    board.publish(view(1))
    with spectating(zookeeper_hosts) as (spectator, maps):
        wait_until(lambda: maps.versions == [1])
        read = spectator._reader.read
        unwatched: list[int] = []

        def read_unwatched(_watch: Callable[[], None]) -> ShardMap | None:
            unwatched.append(1)
            return read(lambda: None)

        monkeypatch.setattr(spectator._reader, "read", read_unwatched)
        head = board.connection.get("/view/head")
        assert head is not None
        board.connection.set("/view/head", head.data)  # fires the watch that there is
        wait_until(lambda: unwatched == [1])
        board.publish(view(2))
        time.sleep(0.3)
        assert maps.versions == [1]
        spectator.refresh(2)
        wait_until(lambda: maps.versions == [1, 2], 5)


def test_an_error_of_the_receiver_does_not_end_it(zookeeper_hosts: str, board: Board) -> None:
    seen: list[int] = []
    board.publish(view(1))

    def fail(found: ShardMap) -> None:
        seen.append(found.version)
        raise RuntimeError("no room")

    with connected_to(zookeeper_hosts) as connection:
        spectator = Spectator(connection, fail)
        spectator.start()
        try:
            wait_until(lambda: seen == [1])
            board.publish(view(2))
            wait_until(lambda: seen == [1, 2])
        finally:
            spectator.stop()


def test_age_grows_only_while_zookeeper_is_away(
    zookeeper_hosts: str, board: Board, start_proxy: Callable[[int], TcpProxy]
) -> None:
    address, _, chroot = zookeeper_hosts.partition("/")
    proxy = start_proxy(int(address.rpartition(":")[2]))
    board.publish(view(1))
    with spectating(f"{proxy.address}/{chroot}", 1.0) as (spectator, maps):
        wait_until(lambda: maps.versions == [1])

        def age() -> float:
            seconds = spectator.age_seconds
            assert seconds is not None
            return seconds

        time.sleep(1.5)
        assert age() < 0.9
        proxy.black_hole()
        wait_until(lambda: age() > 2.0, 5)
        board.publish(view(2))
        assert spectator.map == view(1)
        proxy.forward()
        wait_until(lambda: maps.versions == [1, 2], 10)
        wait_until(lambda: age() < 0.9)


def test_a_whole_ensemble_away(zookeeper_ensemble: ZooKeeperEnsemble) -> None:
    hosts = new_chroot(zookeeper_ensemble.hosts)
    with connected_to(hosts, 10.0) as connection, spectating(hosts, 2.0) as (spectator, maps):
        board = Board(connection, CONFIG)
        board.publish(view(1))
        wait_until(lambda: maps.versions == [1])
        zookeeper_ensemble.kill()
        time.sleep(10)
        age = spectator.age_seconds
        assert age is not None
        assert age > 9
        assert spectator.map == view(1)
        zookeeper_ensemble.start()
        wait_until(lambda: connection.connected, 20)
        board.publish(view(2, moved=7))
        wait_until(lambda: spectator.map == view(2, moved=7), 20)


def test_a_large_view_is_read_and_followed_fast(zookeeper_ensemble: ZooKeeperEnsemble) -> None:
    shards, replicas, nodes = 100_000, 3, 5000
    leaves = tuple(
        Leaf(f"leaf-{i:05}", f"10.0.{i // 250}.{i % 250}:7070", "z", f"{i:016x}")
        for i in range(nodes)
    )
    leaf = (np.arange(shards)[:, None] * 7 + np.arange(replicas) * 11) % nodes
    states = np.ones(shards * replicas, dtype=np.uint8)
    first = np.arange(shards + 1, dtype=np.uint32) * replicas
    big = ShardMap(1, leaves, first, leaf.ravel().astype(np.uint32), states)
    hosts = new_chroot(zookeeper_ensemble.hosts)
    with connected_to(hosts, 10.0) as connection:
        board = Board(connection, ClusterConfig(cluster="big", shard_count=shards))
        board.publish(big)
        started = time.monotonic()
        with spectating(hosts, 10.0) as (_, maps):
            wait_until(lambda: maps.versions == [1], 20)
            first_read_s = time.monotonic() - started
            states = states.copy()
            states[:6] = 0
            started = time.monotonic()
            board.publish(ShardMap(2, leaves, first, big.leaf, states))
            wait_until(lambda: maps.versions == [1, 2], 20)
            change_s = time.monotonic() - started
    print(f"first map after {first_read_s:.2f} s, a change after {change_s:.2f} s")
    assert first_read_s < 10
    assert change_s < 5


def test_stop_is_quick_while_zookeeper_is_silent(
    zookeeper_hosts: str, board: Board, start_proxy: Callable[[int], TcpProxy]
) -> None:
    address, _, chroot = zookeeper_hosts.partition("/")
    proxy = start_proxy(int(address.rpartition(":")[2]))
    board.publish(view(1))
    with spectating(f"{proxy.address}/{chroot}", 2.0) as (spectator, maps):
        wait_until(lambda: maps.versions == [1])
        proxy.black_hole()
        spectator.refresh(99)
        started = time.monotonic()
        spectator.stop()
        assert time.monotonic() - started < 3
        assert not any(thread.name == "spectator" for thread in threading.enumerate())
        proxy.refuse()
