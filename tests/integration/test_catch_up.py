"""A leaf that was away asks its peers over their real data service, and drops what it missed."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from cache_daemon._native import (
    DomainConfig,
    LeafConfig,
    NamespaceConfig,
    Node,
    NodeConfig,
    Server,
    shard_of,
)
from cache_daemon.catch_up import CatchUp
from cache_daemon.client import Client
from sharding.model import Leaf, ReplicaState, ShardMap
from tests.servers import free_port

_SHARDS = 8
_ALL = np.arange(_SHARDS, dtype=np.uint32)
_VERSION = 7
_KEYS = [b"key %d" % number for number in range(2500)]


class Peer:
    """A leaf's node with its data service."""

    def __init__(self, folder: Path, name: str, stack: ExitStack, *more: str) -> None:
        namespaces = [
            NamespaceConfig(
                name=namespace,
                domains=[DomainConfig(name="all", budget_bytes=1 << 20)],
                default_domain="all",
            )
            for namespace in ("pin", *more)
        ]
        self.node = Node(
            NodeConfig(
                memory_bytes=8 << 20, namespaces=namespaces, leaf=LeafConfig(), shard_count=_SHARDS
            )
        )
        stack.callback(self.node.stop)
        self.leaf = Leaf(name, f"unix:{folder}/{name}.sock", "z")
        server = Server(self.node, [self.leaf.address])
        stack.callback(server.stop)
        server.set_serving(True)
        self.client = stack.enter_context(Client(self.leaf.address, timeout=5.0))
        self.own(_VERSION)

    def own(self, version: int, shards: np.ndarray = _ALL) -> None:
        self.node.set_owned(version, _SHARDS, shards, np.zeros(len(shards), np.uint64))

    def put(self, keys: list[bytes], namespace: str = "pin") -> None:
        for first in range(0, len(keys), 1000):
            part = keys[first : first + 1000]
            assert self.client.batch_put({namespace: (part, part)}).all_stored

    def has(self, keys: list[bytes]) -> list[bool]:
        found: list[bool] = []
        for first in range(0, len(keys), 1000):
            found += self.client.batch_get({"pin": keys[first : first + 1000]})[
                "pin"
            ].found.tolist()
        return found


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def ours(tmp_path: Path, stack: ExitStack) -> Peer:
    return Peer(tmp_path, "ours", stack)


@pytest.fixture
def other(tmp_path: Path, stack: ExitStack) -> Peer:
    return Peer(tmp_path, "other", stack, "text")


def _view(*replicas: tuple[Leaf, ReplicaState], version: int = _VERSION) -> ShardMap:
    """Every shard is on all of these."""
    return ShardMap(
        version=version,
        leaves=tuple(leaf for leaf, _ in replicas),
        first=np.arange(_SHARDS + 1, dtype=np.uint32) * len(replicas),
        leaf=np.tile(np.arange(len(replicas), dtype=np.uint32), _SHARDS),
        state=np.tile(np.array([state for _, state in replicas], np.uint8), _SHARDS),
    )


def _run(ours: Peer, view: ShardMap, away_s: float = 0.2) -> list[int]:
    return CatchUp(ours.node, "ours", ["pin"]).run(_ALL, view, away_s)


_WARMING, _ONLINE = ReplicaState.WARMING, ReplicaState.ONLINE
# Longer than the margin that is added to the time away, so that the peer's log reaches back.
_OLD_S = 1.5


def test_what_was_written_meanwhile_goes_and_the_rest_stays(ours: Peer, other: Peer) -> None:
    ours.put(_KEYS)
    time.sleep(_OLD_S)
    other.put(_KEYS[:1200])
    other.client.batch_delete({"pin": _KEYS[1200:1300]})
    other.put([b"key 2000"], "text")  # of a namespace that we do not have
    lost = _run(ours, _view((ours.leaf, _WARMING), (other.leaf, _ONLINE)))
    assert lost == []
    assert ours.has(_KEYS) == [False] * 1300 + [True] * 1200


def test_only_the_shards_that_were_asked_for_lose_keys(ours: Peer, other: Peer) -> None:
    ours.put(_KEYS[:100])
    time.sleep(_OLD_S)
    other.put(_KEYS[:100])
    view = _view((ours.leaf, _WARMING), (other.leaf, _ONLINE))
    asked = np.array([2, 3], np.uint32)
    assert CatchUp(ours.node, "ours", ["pin"]).run(asked, view, 0.2) == []
    expected = [shard_of("pin", key, _SHARDS) not in (2, 3) for key in _KEYS[:100]]
    assert ours.has(_KEYS[:100]) == expected


def test_a_peer_that_does_not_know_all_the_time_is_no_help(ours: Peer, other: Peer) -> None:
    view = _view((ours.leaf, _WARMING), (other.leaf, _ONLINE))
    assert _run(ours, view, away_s=3600) == list(range(_SHARDS)), "it is younger than that"
    time.sleep(_OLD_S)
    other.own(_VERSION, np.array([0, 1, 2, 3], np.uint32))
    other.own(_VERSION)
    assert _run(ours, view) == [4, 5, 6, 7], "these were not its own for a moment"


def test_the_next_peer_helps_where_the_first_cannot(
    ours: Peer, other: Peer, tmp_path: Path
) -> None:
    gone = Leaf("gone", f"unix:{tmp_path}/nobody.sock", "z")
    ours.put(_KEYS[:10])
    time.sleep(_OLD_S)
    other.put(_KEYS[:5])
    view = _view((ours.leaf, _WARMING), (gone, _ONLINE), (other.leaf, _ONLINE))
    assert _run(ours, view) == []
    assert ours.has(_KEYS[:10]) == [False] * 5 + [True] * 5


def test_without_anybody_to_ask_all_is_lost(ours: Peer) -> None:
    assert _run(ours, _view((ours.leaf, _WARMING))) == list(range(_SHARDS))
    nobody = Leaf("gone", f"127.0.0.1:{free_port()}", "z")
    assert _run(ours, _view((ours.leaf, _WARMING), (nobody, _ONLINE))) == list(range(_SHARDS))


def test_where_nobody_is_online_each_may_know_of_other_writes(
    ours: Peer, other: Peer, stack: ExitStack, tmp_path: Path
) -> None:
    third = Peer(tmp_path, "third", stack)
    ours.put(_KEYS[:30])
    time.sleep(_OLD_S)
    other.put(_KEYS[:10])
    third.put(_KEYS[10:20])
    view = _view((ours.leaf, _WARMING), (other.leaf, _WARMING), (third.leaf, _WARMING))
    assert _run(ours, view) == []
    assert ours.has(_KEYS[:30]) == [False] * 20 + [True] * 10
    gone = Leaf("gone", f"unix:{tmp_path}/nobody.sock", "z")
    view = _view((ours.leaf, _WARMING), (other.leaf, _WARMING), (gone, _WARMING))
    assert _run(ours, view) == list(range(_SHARDS)), "what the third knows nobody else does"


def test_a_peer_that_has_an_older_map_is_waited_for(ours: Peer, other: Peer) -> None:
    """By it writes do not come here yet, so that the list would not be all."""
    time.sleep(_OLD_S)
    view = _view((ours.leaf, _WARMING), (other.leaf, _ONLINE), version=_VERSION + 1)
    began = time.monotonic()
    assert _run(ours, view) == list(range(_SHARDS))
    assert time.monotonic() - began > 4
    other.own(_VERSION + 1)
    assert _run(ours, view) == []
