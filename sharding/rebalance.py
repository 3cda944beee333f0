"""One step of the controller, pure: from what is seen in ZooKeeper to what is to be written there.

A shard's replicas go through these stages, and every step moves each as far as it may:

    wanted (/ideal) → asked for (/target) → WARMING, then ONLINE (/current, and so in /view)
    → no longer wanted → left out of /view → after the grace out of /target

- A replica leaves the view only when another one has taken its place (make before break).
- A node that is away keeps its shards for the delay, and is not in the view meanwhile. When many
  are away at once, that is taken for a fault of the network: nothing moves, and a shard that has
  nobody else keeps its last owners in the view.
- A shard without any online replica is no move: it is asked for at once, beyond `max_moves`; and
  while all nodes that want it are away, another one stands in.
- What left the view gets no writes any more. So it never comes back into it without having been
  dropped and warmed anew.

`Decided` is what the leader wrote last, `Memory` what only it knows: since when. A new leader
begins with an empty one, so that all delays start anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from sharding._replicas import (
    ABSENT,
    LAST_RANK,
    Bools,
    Floats,
    Ints,
    Replicas,
    contained,
    looked_up,
    rank_in_group,
    since,
)
from sharding.model import (
    ClusterConfig,
    CurrentState,
    IdealState,
    Leaf,
    LiveNode,
    NodeOverride,
    ReplicaState,
    ShardMap,
    Target,
)
from sharding.placement import NO_NODE, PlacementNode, Problem, place

__all__ = ["Decided", "Memory", "Seen", "Step", "step"]

_Matrix = npt.NDArray[np.int32]

_UNKNOWN = "unknown"  # address of a node that nobody has seen since the view was lost
_DEAD_NAMES_MAX = 64  # in the node table, before it is made anew
_SLOW_MOVE_S = 600.0
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Seen:
    """What nodes and operators wrote. Names in `unreadable` have a znode that nobody can read, and
    no readable one from before: whatever they hold, they keep it, and get nothing new."""

    config: ClusterConfig
    overrides: Mapping[str, NodeOverride] = field(default_factory=dict)
    live: Mapping[str, LiveNode] = field(default_factory=dict)
    current: Mapping[str, CurrentState] = field(default_factory=dict)
    unreadable: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Decided:
    """What the leader wrote; None where there is nothing yet. `view_known` is false when there was
    one that nobody can read: it is made anew from what nodes hold."""

    ideal: IdealState | None = None
    targets: Mapping[str, Target] = field(default_factory=dict)
    view: ShardMap | None = None
    view_known: bool = True


def _no_keys() -> Ints:
    return np.zeros(0, np.int64)


def _no_times() -> Floats:
    return np.zeros(0)


@dataclass(frozen=True)
class Memory:
    """What one leader remembers from step to step. Times are those of the clock of `step`; keys are
    of the node table `names`."""

    names: tuple[str, ...] = ()
    away_since: Mapping[str, float] = field(default_factory=dict)
    hidden: Ints = field(default_factory=_no_keys)  # replicas that left the view
    hidden_since: Floats = field(default_factory=_no_times)
    moving: Ints = field(default_factory=_no_keys)  # replicas that are asked for and not online
    moving_since: Floats = field(default_factory=_no_times)
    placed_from: object = None
    placement_problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Step:
    decided: Decided
    memory: Memory
    moving: int  # replicas that are asked for and not online yet
    waiting: int  # replicas that are wanted and not asked for yet
    without_online: int  # shards
    frozen: str | None  # why nothing moves
    problems: tuple[Problem, ...]
    wake_in_seconds: float | None  # until the next delay or grace ends


def step(seen: Seen, decided: Decided, memory: Memory, now: float, first_version: int = 1) -> Step:
    """One step. `now` is a clock in seconds that never goes back; versions without a predecessor
    begin at `first_version`."""
    return _Stepper(seen, decided, memory, now, first_version).run()


class _Stepper:
    """The work of one call of `step`."""

    def __init__(
        self, seen: Seen, decided: Decided, memory: Memory, now: float, first_version: int
    ) -> None:
        self._seen = seen
        self._shard_count = seen.config.shard_count
        self._decided = decided
        self._now = now
        self._first_version = first_version
        self._problems: list[Problem] = []
        self._wakes: list[float] = []

        self._names = self._node_table()
        self._number = {name: index for index, name in enumerate(self._names)}
        self._count = max(len(self._names), 1)
        if memory.names != self._names:
            memory = _renumbered(memory, self._names)
        self._memory = memory
        self._live = self._flags(lambda name: name in seen.live)
        self._opaque = self._flags(lambda name: name in seen.unreadable)
        self._enabled = self._flags(lambda name: self._override(name).enabled)
        self._draining = self._flags(lambda name: self._override(name).draining)

    def run(self) -> Step:
        wanted = self._wanted_before()
        asked = self._asked()
        away, known = self._away(wanted)
        frozen = self._why_frozen(away, known)
        if frozen is not None:
            self._report("frozen", frozen)
            # The delay runs only while moves could start.
            away = dict.fromkeys(away, self._now)
        nodes = self._placement_nodes(away)
        placed = (nodes, self._seen.config.replicas, self._shard_count)
        placement_problems = self._memory.placement_problems
        if frozen is not None:
            placed = self._memory.placed_from  # type: ignore[assignment]
        elif placed != self._memory.placed_from:
            placement = place(
                nodes,
                self._shard_count,
                self._seen.config.replicas,
                self._instead(wanted, nodes, asked),
            )
            wanted, placement_problems = placement.assignment, placement.problems
        self._problems += placement_problems

        replicas = self._replicas(wanted, asked)
        wished = self._wished(wanted)
        shown, online = replicas.shown(wished, frozen is not None, self._decided.view_known)
        served = replicas.count(online)
        hidden, hidden_since = self._hidden(replicas, shown)
        kept = self._kept(replicas, served, hidden, hidden_since, frozen is not None)
        in_work = kept & replicas.good & replicas.live & ~online
        started, waiting = self._starts(wanted, asked[kept], served, in_work, replicas)
        if frozen is not None:
            started, waiting = _no_keys(), waiting + len(started)
        else:
            alone = self._unowned(served, replicas, kept, started)
            started = np.concatenate([started, self._stand_ins(alone, nodes, wanted)])
        keys = np.sort(np.concatenate([asked[kept], started]))
        moving = np.sort(np.concatenate([asked[in_work], started]))
        moving_since = since(moving, self._memory.moving, self._memory.moving_since, self._now)
        self._report_slow(moving, moving_since)

        view = self._view(replicas, shown, online)
        memory = Memory(
            names=self._names,
            away_since=away,
            hidden=hidden,
            hidden_since=hidden_since,
            moving=moving,
            moving_since=moving_since,
            placed_from=placed,
            placement_problems=placement_problems,
        )
        return Step(
            decided=Decided(self._ideal(wanted), self._targets(keys), view),
            memory=memory,
            moving=len(moving),
            waiting=waiting,
            without_online=int(np.count_nonzero(served == 0)),
            frozen=frozen,
            problems=tuple(self._problems),
            wake_in_seconds=max(min(self._wakes), 0.0) if self._wakes else None,
        )

    # ---- nodes -----------------------------------------------------------------------------------

    def _node_table(self) -> tuple[str, ...]:
        """Names in the order of their numbers; a number stays as long as it can."""
        ideal, targets = self._decided.ideal, self._decided.targets
        old = ideal.nodes if ideal else ()
        used = set(self._seen.live) | self._seen.unreadable
        used |= {name for name, target in targets.items() if len(target.shards)}
        if ideal is not None:
            used |= {old[node] for node in np.unique(ideal.replicas).tolist()}
        dead = [name for name in old if name not in used]
        if len(dead) > max(_DEAD_NAMES_MAX, len(old) // 2):
            gone = set(dead)
            old = tuple(name for name in old if name not in gone)
        return (*old, *sorted(used.difference(old)))

    def _flags(self, test: Callable[[str], bool]) -> Bools:
        return np.array([test(name) for name in self._names], bool)

    def _override(self, name: str) -> NodeOverride:
        return self._seen.overrides.get(name, NodeOverride())

    def _away(self, wanted: _Matrix) -> tuple[dict[str, float], int]:
        """Nodes that should hold shards and are not live, with since when; and of how many."""
        holding = np.zeros(len(self._names), bool)
        holding[wanted[wanted != NO_NODE]] = True
        known = self._enabled & (holding | self._live | self._opaque)
        gone = known & ~self._live & ~self._opaque
        names = [self._names[node] for node in np.flatnonzero(gone)]
        times = self._memory.away_since
        return {name: times.get(name, self._now) for name in names}, int(known.sum())

    def _why_frozen(self, away: Mapping[str, float], known: int) -> str | None:
        """Why nothing may move, or None. One node alone is no mass loss, whatever its share."""
        there = known - len(away)
        least = self._seen.config.freeze_below
        if len(away) < 2 or there >= least * known:
            return None
        return (
            f"{there} of {known} nodes are live, less than freeze_below ({least:g}): nothing moves "
            "until more are back, or until those that are gone for good are disabled: "
            f"{_list(sorted(away))}"
        )

    def _placement_nodes(self, away: Mapping[str, float]) -> tuple[PlacementNode, ...]:
        delay = self._seen.config.rebalance_delay_seconds
        leaves = {leaf.name: leaf for leaf in self._leaves_before()}
        nodes = []
        for name in self._names:
            live, override = self._seen.live.get(name), self._override(name)
            usable = override.enabled and not override.draining
            pinned = name in self._seen.unreadable
            if live is None and not pinned:
                left = away[name] + delay - self._now if name in away else 0.0
                pinned = left > 0
                usable = usable and pinned
                if usable:
                    self._wakes.append(left)
            zone = live.zone if live else leaves[name].zone if name in leaves else ""
            nodes.append(
                PlacementNode(
                    name=name,
                    zone=zone,
                    weight=override.weight or (live.weight if live else 1.0),
                    capacity=live.capacity if live else 0,
                    usable=usable,
                    pinned=pinned,
                )
            )
        return tuple(nodes)

    # ---- what was decided before -----------------------------------------------------------------

    def _leaves_before(self) -> tuple[Leaf, ...]:
        return self._decided.view.leaves if self._decided.view is not None else ()

    def _wanted_before(self) -> _Matrix:
        """The last ideal state as a matrix, in numbers of the node table."""
        ideal = self._decided.ideal
        replicas = self._seen.config.replicas
        if ideal is None:
            return np.full((self._shard_count, replicas), NO_NODE, np.int32)
        counts = np.diff(ideal.first).astype(np.int64)
        width = max(int(counts.max(initial=0)), replicas)
        matrix = np.full((max(self._shard_count, len(counts)), width), NO_NODE, np.int32)
        shard = np.repeat(np.arange(len(counts)), counts)
        numbers = self._numbers(ideal.nodes)
        matrix[shard, rank_in_group(shard)] = numbers[ideal.replicas]
        return matrix[: self._shard_count]

    def _numbers(self, names: Iterable[str]) -> Ints:
        return np.array([self._number.get(name, NO_NODE) for name in names], np.int64)

    def _asked(self) -> Ints:
        """Keys of what the targets name; shards that the cluster does not have are left out."""
        parts = [_no_keys()]
        wrong = []
        for name, target in self._decided.targets.items():
            good = target.shards[target.shards < self._shard_count].astype(np.int64)
            if len(good) < len(target.shards):
                wrong.append(name)
            if len(good):
                parts.append(good * self._count + self._number[name])
        self._report_unknown(wrong, "targets name")
        return np.sort(np.concatenate(parts))

    def _replicas(self, wanted: _Matrix, asked: Ints) -> Replicas:
        shards, columns = np.nonzero(wanted != NO_NODE)
        node = asked % self._count
        live = self._seen.live
        reported = self._flags(
            lambda name: (
                name in live
                and name in self._seen.current
                and live[name].instance_id == self._seen.current[name].instance_id
            )
        )
        return Replicas(
            keys=asked,
            shard=asked // self._count,
            node=node,
            rank=looked_up(
                asked, shards * self._count + wanted[shards, columns], columns, LAST_RANK
            ),
            live=(self._live & ~self._opaque)[node],
            opaque=self._opaque[node],
            enabled=self._enabled[node],
            draining=self._draining[node],
            reported=reported[node],
            current=self._current(asked),
            before=self._before(asked),
            shard_count=self._shard_count,
        )

    def _current(self, keys: Ints) -> Ints:
        """What nodes say of replicas; a state of an earlier registration says nothing."""
        known, states = [_no_keys()], [_no_keys()]
        wrong = []
        for name, current in self._seen.current.items():
            live = self._seen.live.get(name)
            if live is None or live.instance_id != current.instance_id:
                continue
            good = current.shards < self._shard_count
            if not good.all():
                wrong.append(name)
            known.append(current.shards[good].astype(np.int64) * self._count + self._number[name])
            states.append(current.states[good].astype(np.int64))
        self._report_unknown(wrong, "nodes hold")
        return looked_up(keys, np.concatenate(known), np.concatenate(states), ABSENT)

    def _before(self, keys: Ints) -> Ints:
        """What the last view says of replicas."""
        view = self._decided.view
        if view is None or not len(view.leaf):
            return np.full(len(keys), ABSENT, np.int64)
        node = self._numbers(leaf.name for leaf in view.leaves)[view.leaf]
        known = view.shard_of_replica().astype(np.int64) * self._count + node
        there = node != NO_NODE
        return looked_up(keys, known[there], view.state[there].astype(np.int64), ABSENT)

    def _instead(self, wanted: _Matrix, nodes: tuple[PlacementNode, ...], asked: Ints) -> _Matrix:
        """What placement starts from: where a wanted node is gone, whoever is in the view with the
        shard already takes its place."""
        usable = np.array([node.usable for node in nodes], bool)
        previous = wanted.copy()
        if not len(usable):
            return previous
        previous[(previous != NO_NODE) & ~usable[previous]] = NO_NODE
        shard, node = asked // self._count, asked % self._count
        spare = usable[node] & self._live[node] & (previous[shard] == NO_NODE).any(axis=1)
        spare &= ~(previous[shard] == node[:, None]).any(axis=1)
        spare[spare] = self._before(asked[spare]) != ABSENT
        for row, name in zip(shard[spare].tolist(), node[spare].tolist(), strict=True):
            holes = np.flatnonzero(previous[row] == NO_NODE)
            if len(holes):
                previous[row, holes[0]] = name
        return previous

    def _wished(self, wanted: _Matrix) -> Ints:
        """Wanted replicas of each shard, on nodes that are allowed to have any."""
        allowed = wanted != NO_NODE
        if len(self._names):
            allowed &= self._enabled[wanted]
        wished: Ints = allowed.sum(axis=1).astype(np.int64)
        return wished

    # ---- what leaves -----------------------------------------------------------------------------

    def _hidden(self, replicas: Replicas, shown: Bools) -> tuple[Ints, Floats]:
        """Replicas that a node holds and the view does not name, and since when."""
        keys = replicas.keys[replicas.live & (replicas.current != ABSENT) & ~shown]
        times = since(keys, self._memory.hidden, self._memory.hidden_since, self._now)
        return keys, times

    def _kept(
        self, replicas: Replicas, served: Ints, hidden: Ints, hidden_since: Floats, frozen: bool
    ) -> Bools:
        """Which replicas stay asked for."""
        left = hidden_since + self._seen.config.drop_grace_seconds - self._now
        if frozen:
            return np.ones(len(replicas.keys), bool)
        self._wakes += [float(left[left > 0].min())] if (left > 0).any() else []
        over = contained(replicas.keys, hidden[left <= 0])
        # Nothing is known of it, or it was not begun: no reader can have it from the view.
        unused = ~replicas.live | (replicas.reported & (replicas.current == ABSENT))
        unused &= ~replicas.good & ~replicas.opaque & (served[replicas.shard] > 0)
        kept: Bools = ~(over | unused)
        return kept

    # ---- what comes ------------------------------------------------------------------------------

    def _starts(
        self, wanted: _Matrix, asked: Ints, served: Ints, in_work: Bools, replicas: Replicas
    ) -> tuple[Ints, int]:
        """Which wanted replicas are asked for now, and how many have to wait."""
        shards, columns = np.nonzero(wanted != NO_NODE)
        nodes = wanted[shards, columns].astype(np.int64)
        keys = shards * self._count + nodes
        missing = np.flatnonzero(~contained(keys, asked))
        shards, nodes, keys = shards[missing], nodes[missing], keys[missing]
        # What its node still holds from before is dropped first.
        ready = (self._live & ~self._opaque & self._enabled)[nodes] if len(nodes) else nodes > 0
        ready = ready & (self._current(keys) == ABSENT)
        urgent = served[shards] == 0
        busy = int(np.count_nonzero(in_work & (served[replicas.shard] > 0)))
        room = max(self._seen.config.max_moves - busy, 0)
        others = np.flatnonzero(ready & ~urgent)
        others = others[np.lexsort((keys[others], served[shards[others]]))][:room]
        started = np.concatenate([keys[ready & urgent], keys[others]])
        return np.sort(started), len(keys) - len(started)

    def _unowned(self, served: Ints, replicas: Replicas, kept: Bools, started: Ints) -> Ints:
        """Shards that no node that is there has, will have, or is asked to have."""
        owned = served > 0
        owned[replicas.shard[kept & (replicas.live | replicas.opaque)]] = True
        owned[started // self._count] = True
        return np.flatnonzero(~owned)

    def _stand_ins(self, shards: Ints, nodes: tuple[PlacementNode, ...], wanted: _Matrix) -> Ints:
        """Who takes such shards while those that should have them are away."""
        there = self._live & ~self._opaque
        if not len(shards) or not there.any():
            return _no_keys()
        present = tuple(
            replace(node, usable=node.usable and bool(here), pinned=False)
            for node, here in zip(nodes, there, strict=True)
        )
        rows = place(present, self._shard_count, self._seen.config.replicas, wanted).assignment
        node = rows[shards, 0].astype(np.int64)
        found = node != NO_NODE
        return np.sort(shards[found] * self._count + node[found])

    # ---- what is written -------------------------------------------------------------------------

    def _view(self, replicas: Replicas, shown: Bools, online: Bools) -> ShardMap:
        old = self._decided.view
        at = np.flatnonzero(shown)
        at = at[np.lexsort((replicas.node[at], replicas.rank[at], replicas.shard[at]))]
        first = np.zeros(self._shard_count + 1, np.int64)
        np.cumsum(replicas.count(shown), out=first[1:])
        state = np.where(online[at], int(ReplicaState.ONLINE), int(ReplicaState.WARMING))
        view = ShardMap(
            old.version if old is not None else self._first_version,
            self._leaves(),
            first.astype(np.uint32),
            replicas.node[at].astype(np.uint32),
            state.astype(np.uint8),
        )
        if old is None or view == old:
            return old or view
        return replace(view, version=max(old.version + 1, self._first_version))

    def _leaves(self) -> tuple[Leaf, ...]:
        before = {leaf.name: leaf for leaf in self._leaves_before()}
        leaves = []
        for name in self._names:
            live = self._seen.live.get(name)
            if live is not None:
                leaves.append(Leaf(name, live.address, live.zone, live.instance_id))
            else:
                leaves.append(before.get(name, Leaf(name, _UNKNOWN, _UNKNOWN)))
        return tuple(leaves)

    def _targets(self, keys: Ints) -> dict[str, Target]:
        old = self._decided.targets
        targets = dict(old)
        node = keys % self._count
        order = np.argsort(node, kind="stable")
        ends = np.searchsorted(node[order], np.arange(len(self._names) + 1))
        shards = (keys // self._count)[order].astype(np.uint32)
        for number, name in enumerate(self._names):
            mine = shards[ends[number] : ends[number + 1]]
            before = old.get(name)
            if before is None and len(mine):
                targets[name] = Target(self._first_version, mine)
            elif before is not None and not np.array_equal(before.shards, mine):
                targets[name] = Target(max(before.version + 1, self._first_version), mine)
        return targets

    def _ideal(self, wanted: _Matrix) -> IdealState:
        old = self._decided.ideal
        there = wanted != NO_NODE
        first = np.zeros(len(wanted) + 1, np.int64)
        np.cumsum(there.sum(axis=1), out=first[1:])
        version = old.version if old is not None else self._first_version
        ideal = IdealState(
            version, self._names, first.astype(np.uint32), wanted[there].astype(np.uint32)
        )
        if old is None or ideal == old:
            return old or ideal
        return replace(ideal, version=max(old.version + 1, self._first_version))

    # ---- what is said ----------------------------------------------------------------------------

    def _report(self, kind: str, text: str) -> None:
        self._problems.append(Problem(kind, text))

    def _report_unknown(self, names: list[str], what: str) -> None:
        problem = Problem(
            "unknown_shard",
            f"{what} shards beyond the {self._shard_count} that there are: {_list(sorted(names))}",
        )
        if names and problem not in self._problems:
            self._problems.append(problem)

    def _report_slow(self, moving: Ints, moving_since: Floats) -> None:
        slow = moving[moving_since < self._now - _SLOW_MOVE_S]
        if len(slow):
            names = sorted({self._names[node] for node in (slow % self._count).tolist()})
            self._report(
                "slow_moves",
                f"{len(slow)} replicas are not online {_SLOW_MOVE_S / 60:g} minutes after they "
                f"were asked for; see the logs of {_list(names)}",
            )


def _renumbered(memory: Memory, names: tuple[str, ...]) -> Memory:
    """The memory with keys of another node table."""
    number = {name: index for index, name in enumerate(names)}
    numbers = np.array([number.get(name, NO_NODE) for name in memory.names], np.int64)

    def keys(old: Ints, times: Floats) -> tuple[Ints, Floats]:
        if not len(old):
            return _no_keys(), _no_times()
        shard, node = old // len(memory.names), numbers[old % len(memory.names)]
        new = shard * len(names) + node
        there = node != NO_NODE
        order = np.argsort(new[there])
        return new[there][order], times[there][order]

    hidden, hidden_since = keys(memory.hidden, memory.hidden_since)
    moving, moving_since = keys(memory.moving, memory.moving_since)
    return replace(
        memory,
        names=names,
        hidden=hidden,
        hidden_since=hidden_since,
        moving=moving,
        moving_since=moving_since,
    )


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")
