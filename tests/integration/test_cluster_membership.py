"""The glue between a node and its cluster, against a real ZooKeeper; the node itself is a stand-in.

With real nodes it is in tests/e2e/test_sharded.py.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cache_daemon import _native
from cache_daemon.cluster import LeafMembership, RootMembership, make_membership
from cache_daemon.cluster_status import Fill
from cache_daemon.config_sharded import (
    AuthSettings,
    SecretError,
    ShardingSettings,
)
from tests.proxy import TcpProxy
from tests.servers import wait_until
from tests.zookeeper import ZooKeeperServer, new_chroot

_SHARDS = 16


class StandIn:
    """Notes down what a node is told."""

    def __init__(self) -> None:
        self.maps: list[_native.ShardMap] = []
        self.owned: list[tuple[int, int, list[int], list[int]]] = []
        self.unread: list[list[int]] = []  # as in owned, those that are not to be read
        self.dropped: list[int] = []
        self.held: list[list[int]] = []
        self.kept: list[int] = []
        self.away_ms = 0
        self.newest = 0

    def set_shard_map(self, shard_map: _native.ShardMap) -> None:
        self.maps.append(shard_map)

    def newest_map_version(self) -> int:
        return self.newest

    def set_owned(
        self, version: int, shard_count: int, shards: Any, written_since: Any, readable: Any
    ) -> None:
        assert len(shards) == len(written_since) == len(readable)
        self.unread.append(shards[readable == 0].tolist())
        self.owned.append((version, shard_count, shards.tolist(), written_since.tolist()))

    def drop_shards(self, shard_count: int, shards: Any) -> None:
        assert shard_count == _SHARDS
        self.dropped += shards.tolist()

    def hold_shards(self, shard_count: int, shards: Any) -> None:
        assert shard_count == _SHARDS
        self.held.append(shards.tolist())

    def kept_shards(self) -> Any:
        return SimpleNamespace(shard_count=_SHARDS, shards=self.kept, away_ms=self.away_ms)


def _settings(hosts: str, role: str, name: str = "root", **more: Any) -> ShardingSettings:
    return ShardingSettings.model_validate(
        {
            "role": role,
            "zookeeper": {"hosts": hosts, "session_timeout": "1s"},
            "cluster": "test",
            "shard_count": _SHARDS,
            "replicas": 1,
            "drop_grace": "500ms",
            "rebalance_delay": "1s",
            **({"leaf": {"name": name, "zone": name}} if role == "leaf" else {}),
            **more,
        }
    )


class Members:
    """Memberships of one cluster, each with a stand-in for its node."""

    def __init__(self, hosts: str, stack: ExitStack) -> None:
        self.hosts = hosts
        self._stack = stack

    def leaf(
        self,
        name: str,
        node: StandIn | None = None,
        doubt: Path | None = None,
        fill: Fill | None = None,
        **more: Any,
    ) -> tuple[LeafMembership, StandIn]:
        node = node or StandIn()
        settings = _settings(self.hosts, "leaf", name, **more)
        member = LeafMembership(settings, ["pin"], "1.0", doubt)
        self._stack.callback(member.stop)
        member.start(self._as_node(node), [f"127.0.0.1:{1000 + len(name)}"], fill=fill)
        return member, node

    def root(
        self, on_routed: Callable[[], None] | None = None, **more: Any
    ) -> tuple[RootMembership, StandIn]:
        member, node = RootMembership(_settings(self.hosts, "root", **more)), StandIn()
        self._stack.callback(member.stop)
        member.start(self._as_node(node), [], on_routed)
        return member, node

    @staticmethod
    def _as_node(node: StandIn) -> Any:
        return node


@pytest.fixture
def members(zookeeper_hosts: str) -> Iterator[Members]:
    with ExitStack() as stack:
        yield Members(zookeeper_hosts, stack)


class Filler:
    """Notes what is to be filled, and takes its time."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.goes_on = threading.Event()

    def __call__(self, shards: Any, view: Any) -> None:
        assert view.shard_count == _SHARDS
        self.asked.append(shards.tolist())
        assert self.goes_on.wait(20)


def _online(member: LeafMembership) -> int:
    return member.status().shards_online


def test_a_leaf_is_told_what_to_answer_for(members: Members) -> None:
    member, node = members.leaf("leaf-1")
    assert member.status().registration != ""
    wait_until(lambda: _online(member) == _SHARDS, 20, "all shards online")
    wait_until(lambda: bool(node.owned) and node.owned[-1][0] == member.status().map_version)
    version, shard_count, shards, since = node.owned[-1]
    assert (shard_count, shards) == (_SHARDS, list(range(_SHARDS)))
    assert all(0 < one <= version for one in since), "a map names the leaf for every shard"
    # What it held of an unknown past is forgotten before it is asked for values.
    assert sorted(node.dropped) == list(range(_SHARDS))
    status = member.status()
    assert (status.role, status.node, status.session) == ("leaf", "leaf-1", "connected")
    assert status.registration == ""
    assert status.leader
    assert (status.shard_count, status.leaves) == (_SHARDS, 1)
    names = {sample.name for sample in member.samples()}
    assert "feature_cache_cluster_map_version" in names


def test_a_new_replica_makes_a_leaf_refuse_older_maps(members: Members) -> None:
    first, node = members.leaf("leaf-1", replicas=2)
    wait_until(lambda: _online(first) == _SHARDS, 20, "all shards online")
    before = first.status().map_version
    second, _ = members.leaf("leaf-22", replicas=2)
    wait_until(lambda: _online(second) == _SHARDS, 20, "the second has them, too")
    wait_until(lambda: min(node.owned[-1][3]) > before, 10, "maps without it are too old")


def test_a_root_routes_by_the_newest_map(members: Members) -> None:
    routed = threading.Event()
    root, node = members.root(routed.set)
    time.sleep(0.5)
    assert not routed.is_set(), "there is no map yet"
    assert root.status().map_version == 0
    leaf, _ = members.leaf("leaf-1")
    assert routed.wait(20)
    wait_until(lambda: root.status().shards_online == _SHARDS, 20, "all shards have a leaf")
    assert node.maps[-1].version == root.status().map_version
    assert node.maps[-1].shard_count == _SHARDS
    assert [shard_map.version for shard_map in node.maps] == sorted(
        shard_map.version for shard_map in node.maps
    )
    assert root.status().node == ""
    assert not root.status().leader
    node.newest = root.status().map_version + 1_000  # a leaf says so, and nobody has published it
    time.sleep(0.5)
    assert root.status().problems == ()
    assert leaf.status().leader


def test_what_is_held_is_what_the_next_process_may_take_over(members: Members) -> None:
    member, node = members.leaf("leaf-1")
    wait_until(lambda: _online(member) == _SHARDS, 20, "all shards online")
    assert node.held[-1] == list(range(_SHARDS))


def test_what_an_earlier_process_held_goes_where_nobody_can_tell_what_it_missed(
    members: Members,
) -> None:
    node = StandIn()
    node.kept, node.away_ms = [0, 1, 2, 3], 5000
    member, _ = members.leaf("leaf-1", node)
    wait_until(lambda: _online(member) == _SHARDS, 20, "all shards online")
    assert sorted(node.dropped) == list(range(_SHARDS)), "there is no other replica"
    assert node.held == [list(range(_SHARDS))], "nothing is held before it is known what was missed"


def test_a_process_that_was_parted_leaves_nothing_to_the_next(
    members: Members, tmp_path: Path
) -> None:
    doubt = tmp_path / "cache.doubt"
    doubt.touch()
    node = StandIn()
    node.kept = [0, 1, 2, 3]
    member, _ = members.leaf("leaf-1", node, doubt)
    assert node.held[0] == []
    assert not doubt.exists()
    wait_until(lambda: _online(member) == _SHARDS, 20, "all shards online")
    assert node.held[-1] == list(range(_SHARDS))


def test_what_a_process_left_is_not_read_before_it_is_made_up_for(members: Members) -> None:
    node = StandIn()
    node.kept = [1, 3]
    member, _ = members.leaf("leaf-1", node)
    wait_until(lambda: _online(member) == _SHARDS, 20, "all shards online")
    first = next(i for i, owned in enumerate(node.owned) if {1, 3} <= set(owned[2]))
    assert node.unread[first] == [1, 3]
    assert node.unread[-1] == []
    # No peer knows what was missed, so it goes before it is read.
    assert set(node.dropped) >= {1, 3}


def test_a_leaf_that_is_parted_marks_its_memory_until_all_is_made_up(
    zookeeper_hosts: str, tmp_path: Path
) -> None:
    port, _, chroot = zookeeper_hosts.rpartition(":")[2].partition("/")
    doubt = tmp_path / "cache.doubt"
    with ExitStack() as stack:
        proxy = stack.enter_context(TcpProxy(int(port)))
        leaf, node = Members(f"{proxy.address}/{chroot}", stack).leaf("leaf-1", None, doubt)
        wait_until(lambda: _online(leaf) == _SHARDS, 20, "all shards online")
        assert not doubt.exists()
        proxy.black_hole()
        wait_until(doubt.exists, 10, "it may miss writes from now on")
        assert _online(leaf) == _SHARDS
        held = len(node.held)
        time.sleep(1.5)  # ZooKeeper has ended the session, too
        assert len(node.held) == held, "nothing goes"
        proxy.forward()
        proxy.reset()
        wait_until(lambda: not doubt.exists(), 20, "all is made up for, or dropped")
        wait_until(lambda: _online(leaf) == _SHARDS, 20, "all shards online again")


def test_a_leaf_that_leaves_is_out_of_the_map_when_it_returns(members: Members) -> None:
    root, _ = members.root()
    patient: dict[str, Any] = {"drop_grace": "5s", "freeze_below": 0, "rebalance_delay": "10s"}
    first, _ = members.leaf("leaf-1", **patient)
    second, _ = members.leaf("leaf-22", **patient)
    wait_until(lambda: _online(first) + _online(second) == _SHARDS, 20, "all shards online")
    wait_until(lambda: root.status().leaves == 2, 10)
    leaver = second if first.status().leader else first
    began = time.monotonic()
    leaver.leave()
    assert time.monotonic() - began < 4, "it does not wait for all of drop_grace"
    wait_until(lambda: root.status().leaves == 1, 1, "roots ask it no more")
    assert root.status().shards_online == _SHARDS, "another one stands in for it"
    leaver.stop()
    leaver.stop()


def test_without_zookeeper_a_leaf_waits_for_nobody(
    start_zookeeper: Callable[..., ZooKeeperServer],
) -> None:
    server = start_zookeeper()
    with ExitStack() as stack:
        members = Members(new_chroot(server.address), stack)
        root, _ = members.root()
        leaf, node = members.leaf("leaf-1")
        wait_until(lambda: _online(leaf) == _SHARDS, 20, "all shards online")
        wait_until(lambda: root.status().shards_online == _SHARDS, 20, "the root knows")
        server.kill()
        wait_until(lambda: leaf.status().session == "lost", 10, "the loss is noticed")
        assert _online(leaf) == _SHARDS
        assert node.owned[-1][2] == list(range(_SHARDS))
        assert root.status().shards_online == _SHARDS
        assert root.status().problems
        began = time.monotonic()
        leaf.leave()
        leaf.stop()
        root.stop()
        assert time.monotonic() - began < 8


def test_a_stranger_takes_no_part_and_says_why(members: Members) -> None:
    leaf, _ = members.leaf("leaf-1")
    wait_until(lambda: _online(leaf) == _SHARDS, 20, "all shards online")
    root, root_node = members.root(cluster="other")
    stranger, node = members.leaf("leaf-22", cluster="other")
    wait_until(lambda: "'test'" in stranger.status().registration, 10, "the leaf says whose it is")
    wait_until(lambda: "'test'" in " ".join(root.status().problems), 10, "so does the root")
    assert root_node.maps == []
    assert not any(shards for _, _, shards, _ in node.owned)
    assert not stranger.status().leader


def test_a_password_that_is_not_to_be_had_is_told_at_once(
    zookeeper_hosts: str, tmp_path: Path
) -> None:
    auth = AuthSettings(user="u", password_file=str(tmp_path / "missing"))
    settings = _settings(zookeeper_hosts, "root")
    zookeeper = settings.zookeeper.model_copy(update={"auth": auth})
    with pytest.raises(SecretError, match="No such file"):
        make_membership(settings.model_copy(update={"zookeeper": zookeeper}), [], "1.0")


def test_roles_are_made_by_the_config(zookeeper_hosts: str) -> None:
    assert isinstance(make_membership(_settings(zookeeper_hosts, "root"), [], "1"), RootMembership)
    leaf = make_membership(_settings(zookeeper_hosts, "leaf", "l"), [], "1")
    assert isinstance(leaf, LeafMembership)
    assert leaf.status().registration == "the daemon does not serve yet"
    leaf.stop()  # it was not started
    assert np.isfinite([sample.value for sample in leaf.samples()]).all()


def test_shards_that_begin_empty_are_filled_before_they_go_online(members: Members) -> None:
    filler = Filler()
    member, node = members.leaf("leaf-1", fill=filler)
    wait_until(lambda: bool(filler.asked), 20, "it is asked to fill")
    assert filler.asked == [list(range(_SHARDS))]
    # Whatever the node held of them is gone, and it answers for them: as it fetches, it fills.
    assert sorted(node.dropped) == list(range(_SHARDS))
    assert node.owned[-1][2] == list(range(_SHARDS))
    assert node.unread[-1] == []
    assert member.owned()[0].tolist() == list(range(_SHARDS))
    time.sleep(0.3)
    assert _online(member) == 0
    filler.goes_on.set()
    wait_until(lambda: _online(member) == _SHARDS, 20, "all shards online")


def test_what_a_leaf_kept_is_filled_where_it_cannot_be_made_up_for(members: Members) -> None:
    filler = Filler()
    filler.goes_on.set()
    kept = StandIn()
    kept.kept = list(range(_SHARDS))
    member, _ = members.leaf("leaf-1", kept, fill=filler)
    wait_until(lambda: _online(member) == _SHARDS, 20, "all shards online")
    # Nobody knows what was written meanwhile: so nothing could be made up for, and it begins empty.
    assert filler.asked == [list(range(_SHARDS))]


def test_a_leaf_that_leaves_fills_nothing(members: Members) -> None:
    filler = Filler()
    member, _ = members.leaf("leaf-1", fill=filler)
    wait_until(lambda: bool(filler.asked), 20, "it is asked to fill")
    member.leave()  # while it fills
    filler.goes_on.set()
    member.stop()
    assert len(filler.asked) == 1
