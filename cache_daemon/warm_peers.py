"""Warm nodes as a warm-up asks them: one, or on a leaf all replicas of its shards together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cache_daemon._native import RpcError
from sharding.model import ReplicaState, ShardMap, Shards
from warmup.protocols import CopyRefused, PeerDomain

__all__ = ["Copier", "Describe", "MakeCopier", "NativePeer", "ReplicaPeers", "online_replicas"]

_DESCRIBE_S = 5.0
_PART_S = 0.5  # of a copy from one replica, before the next has its turn
_TRIES = 5  # of one replica, each time that it brought nothing
_RETRY_S = 0.5


class Copier(Protocol):
    """A copy from one node; `cache_daemon._native.PeerCopy` is one. Raises RpcError."""

    def run(self, seconds: float) -> bool: ...
    def stop(self) -> None: ...
    @property
    def items(self) -> int: ...
    @property
    def bytes(self) -> int: ...


MakeCopier = Callable[[str, Sequence[tuple[str, str]], "Shards | None"], Copier]
Describe = Callable[[str, float], Sequence[PeerDomain]]


class NativePeer:
    """See `Peer`: one warm node, of which the items of some shards are wanted, or all."""

    def __init__(
        self, address: str, make: MakeCopier, describe: Describe, shards: Shards | None = None
    ) -> None:
        self.shards = shards
        self._address = address
        self._make = make
        self._describe = describe
        self._copier: Copier | None = None
        self._stopped = False

    @property
    def address(self) -> str:
        return self._address

    @property
    def items(self) -> int:
        return self._copier.items if self._copier is not None else 0

    @property
    def bytes(self) -> int:
        return self._copier.bytes if self._copier is not None else 0

    def describe(self) -> Sequence[PeerDomain]:
        try:
            return self._describe(self._address, _DESCRIBE_S)
        except RpcError as error:
            raise CopyRefused(_told(error)) from error

    def copy(self, domains: Sequence[tuple[str, str]], seconds: float) -> bool:
        if self._copier is None:
            self._copier = self._make(self._address, domains, self.shards)
        if self._stopped:
            return False
        try:
            return self._copier.run(seconds)
        except RpcError as error:
            raise CopyRefused(_told(error)) from error

    def stop(self) -> None:
        self._stopped = True
        if self._copier is not None:
            self._copier.stop()


@dataclass
class _Part:
    """What one replica is asked for."""

    peer: NativePeer
    rank: int  # which choice of its shards it is
    tries: int = 0
    done: bool = False


class ReplicaPeers:
    """See `Peer`: the leaves that have some shards, together, each for its own.

    A shard whose replica cannot be copied from is asked of the next one that is online.
    """

    def __init__(
        self,
        replicas: dict[int, list[str]],
        make_peer: Callable[[str, Shards], NativePeer],
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`replicas` are the addresses by shard, the first choice first."""
        self._replicas = replicas
        self._make_peer = make_peer
        self._sleep = sleep
        self._stopped = False
        self._missing = sum(not addresses for addresses in replicas.values())
        self._why = "no replica is online"
        self._parts = self._group([s for s, addresses in replicas.items() if addresses], 0)

    @property
    def address(self) -> str:
        return f"{len(self._replicas)} shards on {len(self._parts)} leaves"

    @property
    def items(self) -> int:
        return sum(part.peer.items for part in self._parts)

    @property
    def bytes(self) -> int:
        return sum(part.peer.bytes for part in self._parts)

    def describe(self) -> Sequence[PeerDomain]:
        """What the first leaf that answers says: the others have alike."""
        for part in self._parts:
            try:
                return part.peer.describe()
            except CopyRefused as error:  # noqa: PERF203 - one after the other, until one answers
                self._why = str(error)
        raise CopyRefused(self._why)

    def copy(self, domains: Sequence[tuple[str, str]], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not self._stopped:
            left = [part for part in self._parts if not part.done]
            if not left:
                break
            brought = False
            for part in left:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or self._stopped:
                    return False
                brought |= self._copy_part(part, domains, min(_PART_S, left_s))
            if not brought:
                self._sleep(min(_RETRY_S, max(deadline - time.monotonic(), 0.0)))
        if self._missing and not self._stopped:
            raise CopyRefused(f"{self._missing} shards cannot be copied: {self._why}")
        return not self._stopped

    def stop(self) -> None:
        self._stopped = True
        for part in self._parts:
            part.peer.stop()

    def _copy_part(self, part: _Part, domains: Sequence[tuple[str, str]], seconds: float) -> bool:
        """Whether it got on."""
        before = part.peer.items
        try:
            part.done = part.peer.copy(domains, seconds)
        except CopyRefused as error:
            part.tries = 0 if part.peer.items != before else part.tries + 1
            if part.tries >= _TRIES:
                part.done, self._why = True, f"{part.peer.address}: {error}"
                self._ask_next(part)
            return part.peer.items != before
        part.tries = 0
        return True

    def _ask_next(self, part: _Part) -> None:
        shards = part.peer.shards.tolist() if part.peer.shards is not None else []
        others = [shard for shard in shards if len(self._replicas[shard]) > part.rank + 1]
        self._missing += len(shards) - len(others)
        self._parts += self._group(others, part.rank + 1)

    def _group(self, shards: Sequence[int], rank: int) -> list[_Part]:
        """Shards by the replica of that rank."""
        by_address: dict[str, list[int]] = {}
        for shard in sorted(shards):
            by_address.setdefault(self._replicas[shard][rank], []).append(shard)
        return [
            _Part(self._make_peer(address, np.array(numbers, np.uint32)), rank)
            for address, numbers in by_address.items()
        ]


def online_replicas(shards: Shards, view: ShardMap, but: str) -> dict[int, list[str]]:
    """Addresses of the leaves that are online for each shard, except the one named `but`.

    Which comes first differs from shard to shard, so that one leaf does not give all.
    """
    found: dict[int, list[str]] = {}
    for shard in shards.tolist():
        addresses = [
            leaf.address
            for leaf, state in view.replicas(shard)
            if state is ReplicaState.ONLINE and leaf.name != but
        ]
        turn = shard % len(addresses) if addresses else 0
        found[shard] = addresses[turn:] + addresses[:turn]
    return found


def _told(error: RpcError) -> str:
    return str(error) or type(error).__name__
