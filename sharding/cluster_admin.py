"""What operators ask of a cluster and tell it, through ZooKeeper alone: no daemon need run.

Reads are of one moment as far as ZooKeeper allows; the controller may write between them. Writes
change /config and /nodes, which the controller follows. What would leave the cluster short of
nodes is refused unless `force` says otherwise.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from sharding import layout
from sharding._view_reader import ViewReader, read_ideal
from sharding.connection import Connection, Znode
from sharding.errors import Conflict, CorruptState, NotInitialised, Refused, UnknownNode
from sharding.model import (
    REPLICAS_MAX,
    ClusterConfig,
    CurrentState,
    IdealState,
    Leaf,
    LiveNode,
    NodeOverride,
    ReplicaState,
    ShardMap,
    Shards,
    Target,
)

__all__ = ["ClusterAdmin", "Move", "NodeInfo", "ShardInfo", "ShardsSummary"]

_T = TypeVar("_T")

_CLUSTER = ""  # no node is called so
_ATTEMPTS_MAX = 5
_NAMED_MAX = 1000  # shards of a kind in a summary


@dataclass(frozen=True)
class NodeInfo:
    name: str
    live: LiveNode | None  # None: not registered now
    override: NodeOverride
    ideal: int  # shards that placement wants on it
    target: int  # that it was told to hold
    online: int  # by its own word
    warming: int
    problems: tuple[str, ...]

    @property
    def weight(self) -> float | None:
        """The one that counts; None for a node that is away and was given none."""
        if self.override.weight is not None:
            return self.override.weight
        return self.live.weight if self.live else None

    @property
    def state(self) -> str:
        """One word for a table."""
        if not self.override.enabled:
            return "disabled"
        if self.override.draining:
            return "drained" if not self.target else "draining"
        return "live" if self.live else "away"


@dataclass(frozen=True)
class ShardsSummary:
    view_version: int  # 0: no view yet
    shard_count: int
    replicas: int  # that the config asks for
    by_online: Mapping[int, int]  # shards by their number of online replicas
    without_online: tuple[int, ...]  # the first thousand
    short: tuple[int, ...]  # have fewer online replicas than the config asks for; likewise


@dataclass(frozen=True)
class Move:
    """One replica on its way."""

    shard: int
    node: str
    direction: Literal["comes", "goes"]
    stage: str  # what it waits for


@dataclass(frozen=True)
class ShardInfo:
    """Where a shard lives, as everybody sees it."""

    shard: int
    ideal: tuple[str, ...]  # in order
    view: tuple[tuple[Leaf, ReplicaState], ...]  # what roots go by
    target: tuple[str, ...]  # nodes that were told to hold it
    current: tuple[tuple[str, ReplicaState], ...]  # nodes that say they do
    notes: tuple[str, ...]  # what is out of the ordinary


@dataclass(frozen=True)
class _Seen:
    config: ClusterConfig
    live: Mapping[str, LiveNode]
    overrides: Mapping[str, NodeOverride]
    current: Mapping[str, CurrentState]  # believed ones: of the registration that is live
    targets: Mapping[str, Target]
    ideal: IdealState | None
    view: ShardMap | None
    problems: Mapping[str, tuple[str, ...]]  # by node, and `_CLUSTER`

    @property
    def names(self) -> list[str]:
        return sorted({*self.live, *self.overrides, *self.targets})


class ClusterAdmin:
    """Raises `Disconnected` and `AuthenticationFailed` of the connection besides its own errors."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    # ---- the cluster ---------------------------------------------------------------------------

    def init(self, config: ClusterConfig) -> bool:
        """Writes the config of a new cluster; False when it is there already, and the same.

        `Refused` when there is another one.
        """
        try:
            self._connection.create(layout.CONFIG, layout.encode_config(config))
        except Conflict:
            there = self.config()
            if there == config:
                return False
            differing = ", ".join(
                f"{name} is {getattr(there, name)!r}, not {value!r}"
                for name, value in config.model_dump().items()
                if getattr(there, name) != value
            )
            raise Refused(
                f"there is a cluster already: {differing}. Change it by the other commands, "
                "or take another chroot"
            ) from None
        return True

    def config(self) -> ClusterConfig:
        """`NotInitialised` when there is no cluster here."""
        return self._read_config()[0]

    def set_replicas(self, replicas: int, *, force: bool = False) -> ClusterConfig:
        """How many nodes hold each shard, from now on."""
        if not 1 <= replicas <= REPLICAS_MAX:
            raise Refused(f"{replicas} replicas; 1 to {REPLICAS_MAX} are possible")
        usable = self._usable(self._overrides())
        if replicas > len(usable) and not force:
            raise Refused(
                f"{replicas} replicas need as many nodes, and {len(usable)} may hold shards "
                f"({_some(usable)}); add or enable nodes first, or force it"
            )
        return self.change_config(replicas=replicas)

    def change_config(self, **changes: float) -> ClusterConfig:
        """Changes fields of the config, all but its name and shard_count; the new config."""
        if fixed := {"cluster", "shard_count"} & set(changes):
            raise Refused(f"{_some(sorted(fixed))} of a cluster cannot be changed")
        if unknown := set(changes) - set(ClusterConfig.model_fields):
            raise Refused(f"a cluster has no {_some(sorted(unknown))}")
        for _ in range(_ATTEMPTS_MAX):
            config, version = self._read_config()
            try:
                changed = ClusterConfig.model_validate({**config.model_dump(), **changes})
            except ValueError as error:
                raise Refused(str(error)) from None
            try:
                self._connection.set(layout.CONFIG, layout.encode_config(changed), version)
            except Conflict:
                continue
            return changed
        raise Refused(f"{layout.CONFIG} is changed by others all the time; try again")

    # ---- nodes ---------------------------------------------------------------------------------

    def nodes(self) -> list[NodeInfo]:
        """All nodes that were ever registered and not forgotten, by name."""
        seen = self._see()
        ideal = {}
        if seen.ideal is not None:
            counts = np.bincount(seen.ideal.replicas, minlength=len(seen.ideal.nodes))
            ideal = dict(zip(seen.ideal.nodes, counts.tolist(), strict=True))
        infos = []
        for name in sorted({*seen.names, *(name for name, count in ideal.items() if count)}):
            current, target = seen.current.get(name), seen.targets.get(name)
            infos.append(
                NodeInfo(
                    name=name,
                    live=seen.live.get(name),
                    override=seen.overrides.get(name, NodeOverride()),
                    ideal=int(ideal.get(name, 0)),
                    target=len(target.shards) if target else 0,
                    online=len(current.of(ReplicaState.ONLINE)) if current else 0,
                    warming=len(current.of(ReplicaState.WARMING)) if current else 0,
                    problems=seen.problems.get(name, ()),
                )
            )
        return infos

    def drain(self, name: str, *, force: bool = False) -> NodeOverride:
        """Moves away what a node has, make before break, and gives it nothing new."""
        return self._change(name, {"draining": True}, force)

    def undrain(self, name: str) -> NodeOverride:
        return self._change(name, {"draining": False}, True)

    def disable(self, name: str, *, force: bool = False) -> NodeOverride:
        """Takes a node out at once: nobody asks it any more, and its shards are placed anew."""
        return self._change(name, {"enabled": False}, force)

    def enable(self, name: str) -> NodeOverride:
        return self._change(name, {"enabled": True}, True)

    def set_weight(self, name: str, weight: float | None) -> NodeOverride:
        """Its share in relation to others; None: what the node says itself."""
        return self._change(name, {"weight": weight}, True)

    def forget(self, name: str) -> None:
        """Removes a node for good, so that nobody waits for it any more.

        `Refused` while it is registered or there are shards on it.
        """
        seen = self._see()
        self._known(name, seen.names)
        if name in seen.live:
            raise Refused(f"{name} is registered at {seen.live[name].address}; stop it first")
        shards = len(seen.targets[name].shards) if name in seen.targets else 0
        if shards:
            raise Refused(
                f"{name} is still to hold {shards} shards; disable it and wait until they moved"
            )
        for path in (
            layout.target_path(name),
            layout.current_path(name),
            layout.override_path(name),
        ):
            self._connection.delete(path)

    # ---- shards --------------------------------------------------------------------------------

    def shards(self) -> ShardsSummary:
        config, view = self.config(), self._view()
        if view is None:
            return ShardsSummary(
                0, config.shard_count, config.replicas, {0: config.shard_count}, (), ()
            )
        shard_of = view.shard_of_replica()
        online = np.bincount(
            shard_of[view.state == ReplicaState.ONLINE], minlength=view.shard_count
        )
        numbers, counts = np.unique(online, return_counts=True)
        return ShardsSummary(
            view_version=view.version,
            shard_count=view.shard_count,
            replicas=config.replicas,
            by_online=dict(zip(numbers.tolist(), counts.tolist(), strict=True)),
            without_online=tuple(np.flatnonzero(online == 0)[:_NAMED_MAX].tolist()),
            short=tuple(np.flatnonzero(online < config.replicas)[:_NAMED_MAX].tolist()),
        )

    def moves(self) -> list[Move]:
        """Replicas that come or go now, by shard."""
        seen = self._see()
        ideal: dict[str, set[int]] = {}
        if seen.ideal is not None:
            ideal = _shards_by_node(seen.ideal.nodes, seen.ideal.first, seen.ideal.replicas)
        view: dict[str, set[int]] = {}
        if seen.view is not None:
            leaves = [leaf.name for leaf in seen.view.leaves]
            view = _shards_by_node(leaves, seen.view.first, seen.view.leaf)
        none: set[int] = set()
        found: list[Move] = []
        for name in sorted({*seen.names, *ideal}):
            current = seen.current.get(name)
            wanted, shown = ideal.get(name, none), view.get(name, none)
            target = set(seen.targets[name].shards.tolist()) if name in seen.targets else none
            online = set(current.of(ReplicaState.ONLINE).tolist()) if current else none
            held = set(current.shards.tolist()) if current else none
            for shard in wanted - online:
                if shard not in target:
                    stage = "waits for its turn"
                elif name not in seen.live:
                    stage = "waits for the node to come back"
                elif shard not in held:
                    stage = "waits for the node to take it"
                else:
                    stage = "is warmed" if shard in shown else "waits to be published"
                found.append(Move(shard, name, "comes", stage))
            for shard in (held | target) - wanted:
                if shard in shown:
                    stage = "serves until its successor is online"
                elif shard in target:
                    stage = "answers late requests"
                else:
                    stage = "is dropped by the node"
                found.append(Move(shard, name, "goes", stage))
        return sorted(found, key=lambda move: (move.shard, move.direction, move.node))

    def explain(self, shard: int) -> ShardInfo:
        """Where a shard lives and why; `Refused` for one that there is not."""
        seen = self._see()
        if not 0 <= shard < seen.config.shard_count:
            raise Refused(
                f"there is no shard {shard}; this cluster has 0 to {seen.config.shard_count - 1}"
            )
        ideal: tuple[str, ...] = ()
        if seen.ideal is not None and shard < seen.ideal.shard_count:
            row = slice(int(seen.ideal.first[shard]), int(seen.ideal.first[shard + 1]))
            ideal = tuple(seen.ideal.nodes[node] for node in seen.ideal.replicas[row].tolist())
        view: tuple[tuple[Leaf, ReplicaState], ...] = ()
        if seen.view is not None and shard < seen.view.shard_count:
            view = tuple(seen.view.replicas(shard))
        current = tuple(
            (name, ReplicaState(int(one.states[np.searchsorted(one.shards, shard)])))
            for name, one in sorted(seen.current.items())
            if shard in one.shards
        )
        target = tuple(name for name, one in sorted(seen.targets.items()) if shard in one.shards)
        return ShardInfo(shard, ideal, view, target, current, _notes(seen, ideal, view, target))

    # ---- reading -------------------------------------------------------------------------------

    def _read_config(self) -> tuple[ClusterConfig, int]:
        znode = self._connection.get(layout.CONFIG)
        if znode is None:
            raise NotInitialised(
                f"there is no cluster at {self._connection.config.hosts}; check the chroot, "
                "or write one by `cachectl cluster init`"
            )
        return layout.decode_config(znode.data), znode.version

    def _see(self) -> _Seen:
        problems: dict[str, list[str]] = {}

        def read(
            root: str, decode: Callable[[str, bytes], _T], names: list[str] | None = None
        ) -> dict[str, _T]:
            if names is None:
                names = self._connection.children(root) or []
            found = {}
            paths = [f"{root}/{name}" for name in names]
            for name, path, znode in zip(
                names, paths, self._connection.get_many(paths), strict=True
            ):
                if znode is None:
                    continue
                try:
                    found[name] = decode(path, znode.data)
                except CorruptState as error:
                    problems.setdefault(name, []).append(str(error))
            return found

        config = self.config()
        live = read(layout.LIVE, layout.decode_live)
        overrides = read(layout.NODES, layout.decode_override)
        written = read(layout.CURRENT, layout.decode_current)
        current = {
            name: one
            for name, one in written.items()
            if name in live and one.instance_id == live[name].instance_id
        }
        targets = read(layout.TARGET, layout.decode_target)
        ideal = view = None
        try:
            ideal = read_ideal(self._connection)
            view = self._view()
        except CorruptState as error:
            problems.setdefault(_CLUSTER, []).append(str(error))
        said = {name: tuple(texts) for name, texts in problems.items()}
        return _Seen(config, live, overrides, current, targets, ideal, view, said)

    def _view(self) -> ShardMap | None:
        return ViewReader(self._connection).read(None)

    def _overrides(self) -> dict[str, NodeOverride]:
        """Of all known nodes; one that nobody can read is as if nobody had said anything."""
        names = set(self._connection.children(layout.NODES) or [])
        names |= set(self._connection.children(layout.LIVE) or [])
        paths = [layout.override_path(name) for name in sorted(names)]
        znodes = self._connection.get_many(paths)
        return {
            name: _override_of(path, znode)
            for name, path, znode in zip(sorted(names), paths, znodes, strict=True)
        }

    # ---- writing -------------------------------------------------------------------------------

    def _change(
        self, name: str, changes: Mapping[str, bool | float | None], force: bool
    ) -> NodeOverride:
        for _ in range(_ATTEMPTS_MAX):
            overrides = self._overrides()
            self._known(name, list(overrides))
            path = layout.override_path(name)
            znode = self._connection.get(path)
            override = _override_of(path, znode)
            try:
                changed = NodeOverride.model_validate({**override.model_dump(), **changes})
            except ValueError as error:
                raise Refused(f"{name}: {_first_line(error)}") from None
            if not force:
                self._enough_left(name, {**overrides, name: changed})
            data = layout.encode_override(changed)
            try:
                if znode is None:
                    self._connection.create(path, data)
                else:
                    self._connection.set(path, data, znode.version)
            except Conflict:
                continue
            return changed
        raise Refused(f"{name} is changed by others all the time; try again")

    def _known(self, name: str, names: list[str]) -> None:
        if name in names:
            return
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        if near:
            raise UnknownNode(f"no node is called {name!r}; did you mean {_some(near, ' or ')}?")
        raise UnknownNode(f"no node is called {name!r}; there are {_some(names) or 'none'}")

    def _enough_left(self, name: str, overrides: Mapping[str, NodeOverride]) -> None:
        replicas = self.config().replicas
        left = self._usable(overrides)
        if len(left) < replicas:
            raise Refused(
                f"without {name} there are {len(left)} nodes ({_some(left) or 'none'}) for "
                f"{replicas} replicas; add nodes or ask for fewer replicas first, or force it"
            )

    @staticmethod
    def _usable(overrides: Mapping[str, NodeOverride]) -> list[str]:
        return [name for name, one in overrides.items() if one.enabled and not one.draining]


def _override_of(path: str, znode: Znode | None) -> NodeOverride:
    """One that nobody can read is as if nobody had said anything, and may be written over."""
    if znode is None:
        return NodeOverride()
    try:
        return layout.decode_override(path, znode.data)
    except CorruptState:
        return NodeOverride()


def _shards_by_node(names: Sequence[str], first: Shards, replicas: Shards) -> dict[str, set[int]]:
    """Of a map or an ideal state, by name; nodes that have none are left out."""
    counts = np.diff(first).astype(np.int64)
    shards = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)
    order = np.argsort(replicas, kind="stable")
    starts = np.flatnonzero(np.diff(replicas[order], prepend=np.uint32(len(names))))
    return {
        names[int(replicas[part[0]])]: set(shards[part].tolist())
        for part in np.split(order, starts[1:])
        if len(part)
    }


def _notes(
    seen: _Seen,
    ideal: tuple[str, ...],
    view: tuple[tuple[Leaf, ReplicaState], ...],
    target: tuple[str, ...],
) -> tuple[str, ...]:
    notes = list(seen.problems.get(_CLUSTER, ()))
    if seen.ideal is None:
        notes.append("nothing is placed yet: is a controller running?")
    if seen.view is None:
        notes.append("nothing is published yet: is a controller running?")
    elif not any(state is ReplicaState.ONLINE for _, state in view):
        notes.append("no replica is online: its keys come from the store")
    if len(ideal) < seen.config.replicas and seen.ideal is not None:
        notes.append(
            f"placed on {len(ideal)} of {seen.config.replicas} nodes: there are not enough"
        )
    for name in ideal:
        override = seen.overrides.get(name, NodeOverride())
        if name not in seen.live:
            notes.append(f"{name} is away")
        elif not override.enabled:
            notes.append(f"{name} is disabled, and will lose it")
        elif override.draining:
            notes.append(f"{name} is draining, and will lose it")
        elif name not in target:
            notes.append(f"{name} is to get it when its turn comes")
    shown = {leaf.name for leaf, _ in view}
    notes += [f"{name} holds it only until others do" for name in sorted(shown - set(ideal))]
    return tuple(notes)


def _some(names: list[str], separator: str = ", ", most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def _first_line(error: ValueError) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return lines[2] if len(lines) > 2 else lines[0]
