"""How a leaf that was away makes up for what it missed: it asks its peers, and drops those keys.

What it holds of a key that was written meanwhile is stale, so it goes: the next read fetches it.
A shard of which no peer knows all of the time cannot be made up for; it is for the caller to drop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import grpc
import numpy as np
import numpy.typing as npt

from cache_daemon import _native
from cache_daemon._proto.feature_cache.v1 import feature_cache_pb2 as pb2
from cache_daemon._proto.feature_cache.v1 import feature_cache_pb2_grpc as pb2_grpc
from sharding.model import Leaf, ReplicaState, ShardMap

__all__ = ["CatchUp", "Deletes"]

_log = logging.getLogger(__name__)

_CALL_S = 5.0
_MAP_WAIT_S = 5.0  # for a peer to take the map by which writes come here, too
_MAP_POLL_S = 0.1
_MARGIN_S = 1.0  # beyond the time away: clocks of two machines, and what was on its way
_DELETE_KEYS = 1000  # a call
_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 1 << 30),  # a peer's whole log is not larger
]

_Shards = npt.NDArray[np.uint32]


class Deletes(Protocol):
    """What is asked of the leaf's own node; `cache_daemon._native.Node` is one."""

    def batch_delete(self, request: bytes, timeout_s: float) -> _native.WriteReply: ...


class _Behind(Exception):
    """A peer has not taken the map by which writes come here."""


class CatchUp:
    """Of one leaf. `name` is its own in the cluster, `namespaces` are those that it has."""

    def __init__(self, node: Deletes, name: str, namespaces: Sequence[str]) -> None:
        self._node = node
        self._name = name
        self._namespaces = frozenset(namespaces)

    def run(self, shards: _Shards, view: ShardMap, away_s: float) -> list[int]:
        """Drops the keys of `shards` that were written in the last `away_s` seconds.

        Blocks for as long as peers take. Returns the shards that nobody knows all about.
        """
        clock = time.monotonic
        began = clock()
        lost: list[int] = []
        left = {shard: self._peers(shard, view) for shard in shards.tolist()}
        while left:
            lost += [shard for shard, rounds in left.items() if not rounds]
            left = {shard: rounds for shard, rounds in left.items() if rounds}
            asked: dict[Leaf, list[int]] = {}
            for shard, rounds in left.items():
                for leaf in rounds[0]:
                    asked.setdefault(leaf, []).append(shard)
            failed: set[int] = set()
            for leaf, theirs in asked.items():
                failed.update(self._ask(leaf, theirs, view, lambda: away_s + clock() - began))
            left = {shard: left[shard][1:] for shard in failed}
        return sorted(lost)

    def _peers(self, shard: int, view: ShardMap) -> list[tuple[Leaf, ...]]:
        """Whom to ask, one tuple after the other until all of one have answered."""
        others = [(leaf, state) for leaf, state in view.replicas(shard) if leaf.name != self._name]
        # One that is online has all writes. Where nobody is, each may have some of them.
        online = [leaf for leaf, state in others if state is ReplicaState.ONLINE]
        if online:
            return [(leaf,) for leaf in online]
        return [tuple(leaf for leaf, _ in others)] if others else []

    def _ask(
        self, leaf: Leaf, shards: list[int], view: ShardMap, away_s: Callable[[], float]
    ) -> list[int]:
        """Drops the keys of which one peer knows; the shards of which it does not know all."""
        lost: list[int] = []
        try:
            with grpc.insecure_channel(leaf.address, _OPTIONS) as channel:
                stub = pb2_grpc.FeatureCacheStub(channel)
                parts = [shards]
                while parts:
                    part = parts.pop()
                    reply = _recent_writes(stub, part, view, away_s)
                    for column in reply.columns if reply.complete else ():
                        if column.namespace in self._namespaces:
                            self._drop(column)
                    if not reply.complete and len(part) > 1:
                        # One that is new there spoils the answer for all.
                        parts += [part[: len(part) // 2], part[len(part) // 2 :]]
                    elif not reply.complete:
                        lost += part
        except (grpc.RpcError, _native.RpcError, _Behind) as error:
            details = getattr(error, "details", None)
            why = details() if callable(details) else error
            _log.info("%s cannot help with %d shards: %s", leaf.name, len(shards), why)
            return shards
        if lost:
            _log.info(
                "%s does not know all writes of the last %.1f s of %d shards",
                *(leaf.name, away_s(), len(lost)),
            )
        return lost

    def _drop(self, column: pb2.KeyColumn) -> None:
        for part in _parts(column):
            request = pb2.BatchDeleteRequest(columns=[part])
            self._node.batch_delete(request.SerializeToString(), _CALL_S)


def _recent_writes(
    stub: pb2_grpc.FeatureCacheStub, shards: list[int], view: ShardMap, away_s: Callable[[], float]
) -> pb2.RecentWritesResponse:
    """What a peer knows, once it takes no write any more that does not come here, too."""
    deadline = time.monotonic() + _MAP_WAIT_S
    while True:
        age_ms = int((away_s() + _MARGIN_S) * 1000)
        request = pb2.RecentWritesRequest(
            shard_count=view.shard_count, shards=shards, age_ms=age_ms
        )
        reply: pb2.RecentWritesResponse = stub.RecentWrites(request, timeout=_CALL_S)
        if reply.map_version >= view.version:
            return reply
        if time.monotonic() > deadline:
            raise _Behind(f"it still goes by map {reply.map_version}, not {view.version}")
        time.sleep(_MAP_POLL_S)


def _parts(column: pb2.KeyColumn) -> Iterator[pb2.KeyColumn]:
    """The same keys in columns of bounded length."""
    lengths = np.fromiter(column.key_lengths, np.int64, len(column.key_lengths))
    ends = np.concatenate([[0], np.cumsum(lengths)])
    for first in range(0, len(lengths), _DELETE_KEYS):
        last = min(first + _DELETE_KEYS, len(lengths))
        yield pb2.KeyColumn(
            namespace=column.namespace,
            keys=column.keys[ends[first] : ends[last]],
            key_lengths=lengths[first:last].tolist(),
        )
