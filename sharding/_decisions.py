"""What the leader has decided, as it lies in ZooKeeper: ideal state, targets, external view.

Only a leader writes here, and each transaction holds a check of `/epoch`: whoever was superseded,
and does not know it yet, fails. What cannot be read is made anew from what can, so that garbage in
one place moves nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sharding import layout
from sharding.connection import Check, Connection, Create, Operation, Set
from sharding.errors import Conflict, CorruptState, WrongCluster
from sharding.layout import Head
from sharding.model import IdealState, ReplicaState, ShardMap, Target, shards_array
from sharding.rebalance import Decided

__all__ = ["Decisions", "recovered_ideal", "take_epoch"]

_log = logging.getLogger(__name__)

# ZooKeeper takes requests below 1 MiB. Smaller ones let heartbeats through in between.
_COMMIT_BYTES_MAX = 384 << 10
_COMMIT_OPERATIONS_MAX = 256
_CHECKED_AT_ONCE = 200  # targets


@dataclass(frozen=True)
class _Kept:
    """A view or ideal state in ZooKeeper."""

    head: Head | None = None  # None: there is none, or it cannot be read
    state: Any = None  # None: it cannot be read
    corrupt: str | None = None


def take_epoch(connection: Connection) -> Check:
    """Begins a new epoch; the check that every write of it must hold.

    What the znode says is for people. What fences is its version, which rises whatever it says.
    """
    znode = connection.get(layout.EPOCH)
    if znode is None:
        try:
            connection.create(layout.EPOCH, layout.encode_epoch(0))
        except Conflict:
            _log.debug("another candidate made %s", layout.EPOCH)
        znode = connection.get(layout.EPOCH)
        if znode is None:
            raise Conflict(layout.EPOCH, "is gone again")
    try:
        epoch = layout.decode_epoch(znode.data)
    except CorruptState as error:
        _log.warning("%s; going on from its version", error)
        epoch = znode.version
    version = connection.set(layout.EPOCH, layout.encode_epoch(epoch + 1), znode.version)
    return Check(layout.EPOCH, version)


class Decisions:
    """Reads them once, at the begin of an epoch, and writes what changes. For one thread."""

    def __init__(self, connection: Connection, fence: Check) -> None:
        self._connection = connection
        self._fence = fence
        self._ideal = _Kept()
        self._view = _Kept()
        self._targets: dict[str, Target] = {}  # as they lie there
        self._there: set[str] = set()  # znodes that exist
        self._said: list[str] = []
        self.first_version = 1
        self.bytes_written = 0  # ever
        self._checked = 0  # targets, in this turn through all of them
        self.corrupt_reads = 0  # ever
        self._ensured: set[str] = set()

    def load(self, shard_count: int) -> Decided:
        """Raises `Disconnected`, and `WrongCluster` for a cluster of another shard count."""
        self._there = set()
        self._ideal = self._read(layout.IDEAL, layout.assemble_ideal)
        self._view = self._read(layout.VIEW, layout.assemble_view)
        for kept in (self._ideal, self._view):
            if kept.head is not None and kept.head.shard_count != shard_count:
                raise WrongCluster(
                    f"the shards of this cluster are {kept.head.shard_count}, and {layout.CONFIG} "
                    f"says {shard_count}; that can never change: put it back"
                )
        names = self._connection.children(layout.TARGET) or []
        paths = [layout.target_path(name) for name in names]
        self._targets = {}
        lost = []
        for name, path, znode in zip(names, paths, self._connection.get_many(paths), strict=True):
            if znode is None:
                continue
            self._there.add(path)
            try:
                self._targets[name] = layout.decode_target(path, znode.data)
            except CorruptState as error:
                self._say(error)
                lost.append(name)
        versions = [kept.head.version for kept in (self._ideal, self._view) if kept.head]
        versions += [target.version for target in self._targets.values()]
        # Above all versions that were ever given, also of what is gone, if clocks are about right.
        self.first_version = max([time.time_ns() // 1000, *(version + 1 for version in versions)])

        view: ShardMap | None = self._view.state
        ideal: IdealState | None = self._ideal.state
        targets = dict(self._targets)
        for name in lost:
            targets[name] = self._recovered_target(name, shard_count, view, ideal)
        if ideal is None and targets:
            ideal = recovered_ideal(self.first_version, shard_count, targets, view)
        return Decided(ideal, targets, view, view_known=self._view.corrupt is None)

    def write(self, decided: Decided) -> None:
        """Writes what is not there yet: ideal state, then the view, then targets, so that nothing
        is dropped that a reader may still be sent to.

        `Conflict` of `/epoch`: there is another leader. After any error, what lies there is not
        known: load again.
        """
        writes: list[tuple[str, bytes]] = []
        ideal, view = self._ideal, self._view
        if decided.ideal is not None and decided.ideal is not ideal.state:
            before = (ideal.head, ideal.state) if ideal.head is not None else None
            head, parts = layout.encode_ideal(decided.ideal, before)
            ideal = _Kept(head, decided.ideal)
            writes += parts
        if decided.view is not None and decided.view is not view.state:
            before_view = (view.head, view.state) if view.head is not None else None
            head, parts = layout.encode_view(decided.view, before_view)
            view = _Kept(head, decided.view)
            writes += parts
        changed = {
            name: target
            for name, target in decided.targets.items()
            if self._targets.get(name) is not target
        }
        writes += [
            (layout.target_path(name), layout.encode_target(target))
            for name, target in sorted(changed.items())
        ]
        self._commit(writes)
        self._ideal, self._view = ideal, view
        self._targets.update(changed)

    def complaints(self) -> list[str]:
        """What could not be read since this was last asked."""
        said, self._said = self._said, []
        return said

    def untouched(self) -> bool:
        """Whether ZooKeeper still has what was written: nobody else should have been there.

        Looks at the heads, and at some targets in turn.
        """
        heads = [
            (layout.head_path(root), kept.head)
            for root, kept in ((layout.IDEAL, self._ideal), (layout.VIEW, self._view))
            if kept.head is not None
        ]
        names = sorted(self._targets)
        begin = self._checked % max(len(names), 1)
        names = names[begin : begin + _CHECKED_AT_ONCE]
        self._checked = begin + len(names)
        paths = [path for path, _ in heads] + [layout.target_path(name) for name in names]
        znodes = self._connection.get_many(paths)
        try:
            for (path, head), znode in zip(heads, znodes, strict=False):
                if znode is None or layout.decode_head(path, znode.data) != head:
                    return False
            for name, znode in zip(names, znodes[len(heads) :], strict=True):
                path = layout.target_path(name)
                if znode is None or layout.decode_target(path, znode.data) != self._targets[name]:
                    return False
        except CorruptState as error:
            self.corrupt_reads += 1
            _log.warning("%s; it is made anew", error)
            return False
        return True

    # ---- reading ---------------------------------------------------------------------------------

    def _read(self, root: str, assemble: Callable[..., Any]) -> _Kept:
        for kind in ("nodes", "chunks"):
            names = self._connection.children(f"{root}/{kind}") or []
            self._there |= {f"{root}/{kind}/{name}" for name in names}
        head_path = layout.head_path(root)
        znode = self._connection.get(head_path)
        if znode is None:
            return _Kept()
        self._there.add(head_path)
        try:
            head = layout.decode_head(head_path, znode.data)
        except CorruptState as error:
            return _Kept(corrupt=self._say(error))
        node_paths, shard_paths = layout.chunk_paths(root, head)
        try:
            state = assemble(
                head,
                [layout.decode_nodes_chunk(*one) for one in self._chunks(node_paths)],
                [layout.decode_shards_chunk(*one) for one in self._chunks(shard_paths)],
            )
            if state is None:
                raise CorruptState(head_path, "names chunks that are not there")
        except CorruptState as error:
            return _Kept(head, corrupt=self._say(error))
        return _Kept(head, state)

    def _chunks(self, paths: Sequence[str]) -> list[tuple[str, bytes]]:
        found = []
        for path, znode in zip(paths, self._connection.get_many(paths), strict=True):
            if znode is None:
                raise CorruptState(path, "is gone")
            found.append((path, znode.data))
        return found

    def _say(self, error: CorruptState) -> str:
        text = f"{error}; it is made anew from the rest"
        _log.warning("%s", text)
        self.corrupt_reads += 1
        self._said.append(text)
        return text

    def _recovered_target(
        self, name: str, shard_count: int, view: ShardMap | None, ideal: IdealState | None
    ) -> Target:
        """What the node was most likely told: what it holds, is in the view with, should have."""
        parts = [np.zeros(0, np.uint32)]
        path = layout.current_path(name)
        znode = self._connection.get(path)
        if znode is not None:
            try:
                parts.append(layout.decode_current(path, znode.data).shards)
            except CorruptState as error:
                self._say(error)
        if view is not None:
            parts.append(view.held_by(name)[0])
        if ideal is not None and name in ideal.nodes:
            row = np.flatnonzero(ideal.replicas == ideal.nodes.index(name))
            parts.append((np.searchsorted(ideal.first, row, "right") - 1).astype(np.uint32))
        shards = np.concatenate(parts)
        return Target(self.first_version, shards_array(shards[shards < shard_count]))

    # ---- writing ---------------------------------------------------------------------------------

    def _commit(self, writes: Sequence[tuple[str, bytes]]) -> None:
        batch: list[Operation] = [self._fence]
        size = 0
        for path, data in writes:
            full = size + len(data) > _COMMIT_BYTES_MAX or len(batch) > _COMMIT_OPERATIONS_MAX
            if full and len(batch) > 1:
                self._connection.commit(batch)
                batch, size = [self._fence], 0
            if path in self._there:
                batch.append(Set(path, data))
            else:
                self._ensure(path.rpartition("/")[0])
                batch.append(Create(path, data))
                self._there.add(path)
            size += len(data)
            self.bytes_written += len(data)
        if len(batch) > 1:
            self._connection.commit(batch)

    def _ensure(self, parent: str) -> None:
        if parent not in self._ensured:
            self._connection.ensure(parent)
            self._ensured.add(parent)


def recovered_ideal(
    version: int, shard_count: int, targets: dict[str, Target], view: ShardMap | None
) -> IdealState:
    """An ideal state from what nodes were told, when that is all that is left: whoever is online
    in the view comes first."""
    names = tuple(sorted(targets))
    shards, nodes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    ranks = [np.zeros(0, np.int64)]
    for number, name in enumerate(names):
        mine = targets[name].shards[targets[name].shards < shard_count]
        rank = np.full(len(mine), 2, np.int64)
        if view is not None:
            held, states = view.held_by(name)
            rank[np.isin(mine, held)] = 1
            rank[np.isin(mine, held[states == ReplicaState.ONLINE])] = 0
        shards.append(mine.astype(np.int64))
        nodes.append(np.full(len(mine), number, np.int64))
        ranks.append(rank)
    shard, node = np.concatenate(shards), np.concatenate(nodes)
    order = np.lexsort((node, np.concatenate(ranks), shard))
    first = np.zeros(shard_count + 1, np.int64)
    np.cumsum(np.bincount(shard, minlength=shard_count), out=first[1:])
    return IdealState(version, names, first.astype(np.uint32), node[order].astype(np.uint32))
