"""Which replica a leaf copies which shard from, and what happens when one does not give."""

from collections.abc import Sequence

import numpy as np
import pytest

from cache_daemon._native import RpcError
from cache_daemon.warm_peers import NativePeer, ReplicaPeers, online_replicas
from sharding.model import Leaf, ReplicaState, ShardMap, Shards, shards_array
from warmup.protocols import CopyRefused, PeerDomain

_DOMAINS = [("pin", "main")]


class Leaves:
    """Stand-ins for the leaves of a cluster: each gives ten items a shard, or refuses."""

    def __init__(self) -> None:
        self.refusing: set[str] = set()
        self.asked: list[tuple[str, list[int]]] = []
        self.slow: set[str] = set()

    def peer(self, address: str, shards: Shards | None) -> NativePeer:
        return NativePeer(address, self._make, self._describe, shards)

    def _make(
        self, address: str, domains: Sequence[tuple[str, str]], shards: Shards | None
    ) -> "Copy":
        assert list(domains) == _DOMAINS
        numbers = [] if shards is None else shards.tolist()
        self.asked.append((address, numbers))
        return Copy(self, address, len(numbers))

    def _describe(self, address: str, timeout_s: float) -> Sequence[PeerDomain]:
        assert timeout_s > 0
        if address in self.refusing:
            raise RpcError("down")
        return []


class Copy:
    def __init__(self, leaves: Leaves, address: str, shards: int) -> None:
        self._leaves = leaves
        self._address = address
        self._shards = shards
        self.items = 0
        self.stopped = False

    @property
    def bytes(self) -> int:
        return 100 * self.items

    def run(self, seconds: float) -> bool:
        assert seconds > 0
        if self._address in self._leaves.refusing:
            raise RpcError("down")
        if self._address in self._leaves.slow:
            self.items = min(self.items + 1, 10 * self._shards)
            return self.items == 10 * self._shards
        self.items = 10 * self._shards
        return True

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def leaves() -> Leaves:
    return Leaves()


def peers(leaves: Leaves, replicas: dict[int, list[str]]) -> ReplicaPeers:
    return ReplicaPeers(replicas, leaves.peer, sleep=lambda _: None)


def test_each_leaf_is_asked_for_its_own_shards(leaves: Leaves) -> None:
    all_of_them = peers(leaves, {1: ["a"], 2: ["b"], 5: ["a"], 7: ["b"]})
    assert all_of_them.describe() == []
    assert all_of_them.copy(_DOMAINS, 1.0)
    assert sorted(leaves.asked) == [("a", [1, 5]), ("b", [2, 7])]
    assert (all_of_them.items, all_of_them.bytes) == (40, 4000)


def test_another_replica_is_asked_where_one_does_not_give(leaves: Leaves) -> None:
    leaves.refusing = {"a"}
    all_of_them = peers(leaves, {1: ["a", "b"], 2: ["b"], 5: ["a", "c"]})
    assert all_of_them.copy(_DOMAINS, 1.0)
    assert ("b", [1]) in leaves.asked
    assert ("c", [5]) in leaves.asked
    assert all_of_them.items == 30


def test_shards_that_nobody_gives_are_told_and_the_others_come(leaves: Leaves) -> None:
    leaves.refusing = {"a"}
    all_of_them = peers(leaves, {1: ["a"], 2: ["b"], 3: []})
    with pytest.raises(CopyRefused, match="2 shards cannot be copied: a: down"):
        all_of_them.copy(_DOMAINS, 1.0)
    assert all_of_them.items == 10


def test_without_any_replica_it_says_so(leaves: Leaves) -> None:
    nobody = peers(leaves, {1: [], 2: []})
    with pytest.raises(CopyRefused, match="no replica is online"):
        nobody.describe()
    with pytest.raises(CopyRefused, match="2 shards cannot be copied: no replica is online"):
        nobody.copy(_DOMAINS, 1.0)


def test_a_leaf_that_does_not_answer_lets_another_describe(leaves: Leaves) -> None:
    leaves.refusing = {"a"}
    assert peers(leaves, {1: ["a"], 2: ["b"]}).describe() == []
    leaves.refusing = {"a", "b"}
    with pytest.raises(CopyRefused, match="down"):
        peers(leaves, {1: ["a"], 2: ["b"]}).describe()


def test_a_copy_that_takes_longer_goes_on_where_it_was(leaves: Leaves) -> None:
    leaves.slow = {"a"}
    all_of_them = peers(leaves, {1: ["a"], 2: ["b"]})
    assert not all_of_them.copy(_DOMAINS, 0.0)
    rounds = 0
    while not all_of_them.copy(_DOMAINS, 0.001):
        rounds += 1
        assert rounds < 10_000
    assert all_of_them.items == 20
    assert len(leaves.asked) == 2, "no copy began anew"


def test_it_can_be_ended(leaves: Leaves) -> None:
    leaves.slow = {"a"}
    all_of_them = peers(leaves, {1: ["a"]})
    all_of_them.copy(_DOMAINS, 0.0)
    all_of_them.stop()
    assert not all_of_them.copy(_DOMAINS, 1.0)
    one = leaves.peer("b", None)
    one.stop()
    assert not one.copy(_DOMAINS, 1.0)
    assert one.items == 0


def test_replicas_are_those_online_and_take_turns() -> None:
    online, warming = int(ReplicaState.ONLINE), int(ReplicaState.WARMING)
    view = ShardMap(
        version=7,
        leaves=tuple(Leaf(name, f"{name}:1", "z") for name in "abc"),
        first=np.array([0, 2, 4, 6, 7], np.uint32),
        leaf=np.array([0, 1, 0, 1, 1, 2, 0], np.uint32),
        state=np.array([online, online, online, online, warming, online, warming], np.uint8),
    )
    assert online_replicas(shards_array([0, 1, 2, 3]), view, "a") == {
        0: ["b:1"],
        1: ["b:1"],
        2: ["c:1"],
        3: [],
    }
    both = online_replicas(np.array([0, 1], np.uint32), view, "x")
    assert both == {0: ["a:1", "b:1"], 1: ["b:1", "a:1"]}
