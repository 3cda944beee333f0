"""Leaves and their views through what an ensemble, a network and operators do to them, mixed."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from kazoo.exceptions import KazooException
from kazoo.handlers.threading import KazooTimeoutError

from sharding.connection import Connection, Credentials, ZooKeeperConfig
from sharding.errors import ClusterError, Disconnected
from sharding.model import ClusterConfig, LiveNode, ReplicaState, ShardMap, Shards
from sharding.participant import Participant
from sharding.spectator import Spectator
from tests.cluster import Board, connected_to
from tests.proxy import TcpProxy
from tests.servers import wait_until
from tests.zookeeper import ZooKeeperEnsemble, end_session, new_chroot

_ROOT = Path(__file__).resolve().parents[2]
CONFIG = ClusterConfig(cluster="test", shard_count=40)


class StrictHooks:
    """A node that notices what must never be asked of it."""

    def __init__(self) -> None:
        self.owned: set[int] = set()
        self.dropped: list[int] = []
        self.wrong: list[str] = []
        self.warming: set[int] = set()
        self.version = 0
        self.slow_s = 0.0
        self._lock = threading.Lock()

    def own(self, version: int, shard_count: int, shards: Shards) -> None:
        with self._lock:
            if version < self.version:
                self.wrong.append(f"view {version} after {self.version}")
            if shard_count != CONFIG.shard_count:
                self.wrong.append(f"{shard_count} shards")
            self.version = version
            self.owned = set(shards.tolist())

    def warm(self, shards: Shards, view: ShardMap, away_seconds: float | None) -> None:
        some = set(shards.tolist())
        with self._lock:
            if self.warming:
                self.wrong.append("two warm at once")
            if not some <= self.owned:
                self.wrong.append(f"warms {some - self.owned}, which it does not own")
            if away_seconds is not None and not 0 <= away_seconds < 120:
                self.wrong.append(f"away for {away_seconds} s")
            if view.version > self.version:
                self.wrong.append("warms by a view that it was not told of")
            self.warming = some
        time.sleep(self.slow_s)
        with self._lock:
            self.warming = set()

    def drop(self, shards: Shards) -> None:
        some = set(shards.tolist())
        with self._lock:
            if some & self.owned:
                self.wrong.append(f"drops {some & self.owned}, which it owns")
            if some & self.warming:
                self.wrong.append(f"drops {some & self.warming} while they are warmed")
            self.dropped += sorted(some)

    def session_lost(self, away_seconds: float) -> None:
        if not 0 <= away_seconds < 120:
            self.wrong.append(f"lost for {away_seconds} s")


class Leaf:
    def __init__(self, hosts: str, name: str, timeout_s: float) -> None:
        self.name = name
        self.hooks = StrictHooks()
        self.connection = Connection(ZooKeeperConfig(hosts, timeout_s))
        live = LiveNode(
            name=name, address=f"{name}:1", zone="z", cluster="test", instance_id="none"
        )
        self.participant = Participant(self.connection, CONFIG, live, self.hooks)
        self.connection.start()
        self.participant.start()

    def end(self) -> None:
        self.participant.stop()
        self.connection.close()


class Follower:
    """Publishes all the time what leaves say, as a controller that moves nothing would."""

    def __init__(self, hosts: str, names: list[str]) -> None:
        self._names = names
        self._stop = threading.Event()
        self._connection = Connection(ZooKeeperConfig(hosts, 4.0))
        self._connection.start()
        assert self._connection.wait_connected(15)
        self.board = Board(self._connection, CONFIG)
        self._version = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def target(self, name: str, shards: set[int]) -> None:
        """Until it is written, whatever ZooKeeper does."""
        while not self._wrote(name, shards):
            time.sleep(0.05)

    def _wrote(self, name: str, shards: set[int]) -> bool:
        try:
            self.board.target(name, shards)
        except Disconnected:
            return False
        return True

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            self._version += 1
            try:
                self.board.follow(self._version, *self._names)
            except ClusterError:
                # What was half written is written again, whole.
                before = self.board._before
                self.board._before = (before[0], None) if before else None

    def end(self) -> None:
        self._stop.set()
        self._thread.join(10)
        self._connection.close()


def online(board: Board, name: str) -> set[int]:
    try:
        live, current = board.live(name), board.current(name)
    except Disconnected:
        return set()
    if live is None or current is None or live.instance_id != current.instance_id:
        return set()
    return set(current.of(ReplicaState.ONLINE).tolist())


def test_leaves_end_where_their_targets_say_after_any_mix_of_faults(
    zookeeper_ensemble: ZooKeeperEnsemble, start_proxy: Callable[[int], TcpProxy]
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    hosts = new_chroot(zookeeper_ensemble.hosts)
    chroot = hosts[hosts.index("/") :]
    proxies = [start_proxy(member.port) for member in zookeeper_ensemble.members]
    through = ",".join(proxy.address for proxy in proxies) + chroot
    names = ["leaf-0", "leaf-1", "leaf-2"]
    kept = {name: {index} for index, name in enumerate(names)}  # in each of its targets
    with ExitStack() as stack:
        follower = Follower(hosts, names)
        stack.callback(follower.end)
        leaves = [Leaf(through, name, 2.0) for name in names]
        for leaf in leaves:
            stack.callback(leaf.end)
            leaf.hooks.slow_s = 0.05
        spectator_connection = stack.enter_context(connected_to(through, 2.0))
        versions: list[int] = []
        spectator = Spectator(spectator_connection, lambda view: versions.append(view.version))
        spectator.start()
        stack.callback(spectator.stop)
        targets = {name: set(kept[name]) for name in names}
        ending = time.monotonic() + 20
        killed = None
        while time.monotonic() < ending:
            match rng.randrange(7):
                case 0 | 1:
                    name = rng.choice(names)
                    some = rng.sample(range(3, CONFIG.shard_count), rng.randrange(8))
                    targets[name] = kept[name] | set(some)
                    follower.target(name, targets[name])
                case 2:
                    rng.choice(proxies).reset()
                case 3:
                    for proxy in proxies:
                        proxy.black_hole()
                    time.sleep(rng.choice((0.3, 3.0)))
                    for proxy in proxies:
                        proxy.forward()
                case 4:
                    client = rng.choice(leaves).connection._client
                    identity = client.client_id if client is not None else None
                    if identity and identity[0]:
                        # It may meet a member that is just being killed.
                        with contextlib.suppress(KazooException, KazooTimeoutError):
                            end_session(hosts, identity)
                case 5:
                    if killed is None:
                        killed = rng.choice(zookeeper_ensemble.members)
                        killed.kill()
                case _:
                    if killed is not None:
                        killed.start()
                        killed = None
            time.sleep(rng.random() * 0.5)
        if killed is not None:
            killed.start()
        for name in names:
            follower.target(name, targets[name])
        for leaf in leaves:
            wanted = targets[leaf.name]
            wait_until(
                lambda leaf=leaf, wanted=wanted: (  # type: ignore[misc]
                    online(follower.board, leaf.name) == wanted == leaf.hooks.owned
                ),
                30,
                f"{leaf.name} to hold {wanted}: {leaf.participant.status()}",
            )
            assert leaf.hooks.wrong == []
            assert not kept[leaf.name] & set(leaf.hooks.dropped)
            assert leaf.participant.status().problems == ()
        assert versions == sorted(set(versions))
        wait_until(lambda: spectator.map is not None and spectator.map == follower.board._before[1])  # type: ignore[index]


def test_the_ensembles_leader_is_killed_while_a_leaf_changes(
    zookeeper_ensemble: ZooKeeperEnsemble,
) -> None:
    hosts = new_chroot(zookeeper_ensemble.hosts)
    with ExitStack() as stack:
        follower = Follower(hosts, ["leaf-0"])
        stack.callback(follower.end)
        leaf = Leaf(hosts, "leaf-0", 6.0)
        stack.callback(leaf.end)
        follower.target("leaf-0", {1, 2})
        wait_until(lambda: online(follower.board, "leaf-0") == {1, 2}, 10)
        zookeeper_ensemble.leader().kill()
        follower.target("leaf-0", {2, 3})
        wait_until(lambda: online(follower.board, "leaf-0") == {2, 3}, 15)
        assert leaf.connection.sessions == 1, "the session lives on"
        assert leaf.hooks.dropped == [1]
        assert leaf.hooks.wrong == []


def test_a_whole_ensemble_away_for_long(zookeeper_ensemble: ZooKeeperEnsemble) -> None:
    hosts = new_chroot(zookeeper_ensemble.hosts)
    with ExitStack() as stack:
        follower = Follower(hosts, ["leaf-0"])
        stack.callback(follower.end)
        leaf = Leaf(hosts, "leaf-0", 4.0)
        stack.callback(leaf.end)
        follower.target("leaf-0", {1, 2})
        wait_until(lambda: online(follower.board, "leaf-0") == {1, 2}, 10)
        zookeeper_ensemble.kill()
        time.sleep(12)
        assert leaf.hooks.owned == {1, 2}
        assert leaf.hooks.dropped == []
        assert not leaf.participant.status().registered
        zookeeper_ensemble.start()
        follower.target("leaf-0", {2, 3})
        wait_until(lambda: online(follower.board, "leaf-0") == {2, 3}, 20)
        assert leaf.hooks.wrong == []


_PROCESS = """
import sys, time
from sharding.connection import Connection, ZooKeeperConfig
from sharding.model import ClusterConfig, LiveNode
from sharding.participant import Participant

class Hooks:
    def own(self, version, shard_count, shards): print("own", shards.tolist(), flush=True)
    def warm(self, shards, view, away): print("warm", shards.tolist(), away is None, flush=True)
    def drop(self, shards): print("drop", shards.tolist(), flush=True)
    def session_lost(self, away): print("lost", flush=True)

connection = Connection(ZooKeeperConfig(sys.argv[1], 1.0))
node = LiveNode(name="leaf-0", address="leaf-0:1", zone="z", cluster="test", instance_id="none")
participant = Participant(
    connection, ClusterConfig(cluster="test", shard_count=40), node, Hooks()
)
connection.start()
participant.start()
time.sleep(120)
"""


def test_a_leaf_that_was_stopped_comes_back_as_another_instance(
    zookeeper_ensemble: ZooKeeperEnsemble,
) -> None:
    hosts = new_chroot(zookeeper_ensemble.hosts)
    with ExitStack() as stack:
        follower = Follower(hosts, ["leaf-0"])
        stack.callback(follower.end)
        process = subprocess.Popen(
            [sys.executable, "-c", _PROCESS, hosts], stdout=subprocess.PIPE, text=True, cwd=_ROOT
        )
        stack.callback(process.wait, 10)
        stack.callback(process.kill)
        follower.target("leaf-0", {1, 2})
        wait_until(lambda: online(follower.board, "leaf-0") == {1, 2}, 15)
        before = follower.board.live("leaf-0")
        os.kill(process.pid, signal.SIGSTOP)
        wait_until(lambda: follower.board.live("leaf-0") is None, 10)
        follower.target("leaf-0", {2, 3})
        os.kill(process.pid, signal.SIGCONT)
        wait_until(lambda: online(follower.board, "leaf-0") == {2, 3}, 15)
        assert follower.board.live("leaf-0") != before
        process.kill()
        assert process.stdout is not None
        said = process.stdout.read().splitlines()
        assert said.count("lost") == 1
        after = said[said.index("lost") + 1 :]
        assert "drop [1]" in after
        assert "warm [2] False" in after, "what it held may lack writes of a known time"
        assert "warm [3] True" in after


def test_a_leaf_with_a_wrong_password_says_so(zookeeper_hosts: str) -> None:
    right = Credentials("digest", "cluster", "right-password")
    wrong = Credentials("digest", "cluster", "wrong-password")
    hooks = StrictHooks()
    with (
        connected_to(zookeeper_hosts, credentials=right, acl="creator") as owner,
        connected_to(zookeeper_hosts, credentials=wrong, acl="creator") as other,
    ):
        Board(owner, CONFIG)
        node = LiveNode(name="x", address="x:1", zone="z", cluster="test", instance_id="none")
        participant = Participant(other, CONFIG, node, hooks)
        participant.start()
        try:
            wait_until(
                lambda: "denies user 'cluster' access" in " ".join(participant.status().problems)
            )
            assert not participant.status().registered
            assert "password" not in repr(participant.status()).replace("user and password", "")
        finally:
            participant.stop()


@pytest.mark.parametrize("leave", [True, False])
def test_stop_is_quick_while_zookeeper_is_silent(
    zookeeper_hosts: str, start_proxy: Callable[[int], TcpProxy], leave: bool
) -> None:
    address, _, chroot = zookeeper_hosts.partition("/")
    proxy = start_proxy(int(address.rpartition(":")[2]))
    leaf = Leaf(f"{proxy.address}/{chroot}", "leaf-0", 2.0)
    wait_until(lambda: leaf.participant.status().registered)
    proxy.black_hole()
    started = time.monotonic()
    leaf.participant.stop(leave=leave)
    assert time.monotonic() - started < 5
    proxy.refuse()
    leaf.connection.close()
