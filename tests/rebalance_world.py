"""A cluster in memory: nodes that take up what they are asked, in their own time, around the pure
step of the controller. A clock by hand; no threads."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from sharding.model import (
    ClusterConfig,
    CurrentState,
    LiveNode,
    NodeOverride,
    ReplicaState,
    ShardMap,
)
from sharding.rebalance import Decided, Memory, Seen, Step, step

__all__ = ["Node", "World"]

_WARMING, _ONLINE = int(ReplicaState.WARMING), int(ReplicaState.ONLINE)


@dataclass
class Node:
    """What a participant does: own, warm once the view says so, report, drop."""

    name: str
    zone: str
    weight: float = 1.0
    capacity: int = 0
    there: bool = True
    lives: int = 1
    states: dict[int, int] = field(default_factory=dict)

    @property
    def instance(self) -> str:
        return f"{self.name}-{self.lives}"

    def restart(self) -> None:
        """Another registration, which has to warm all it holds again."""
        self.there = True
        self.lives += 1
        self.states = dict.fromkeys(self.states, _WARMING)

    def take_up(self, asked: set[int], view: ShardMap | None, may_warm: bool = True) -> None:
        """One round: drops and takes up shards, and ends the warming of those that the view shows
        with this registration."""
        if not self.there:
            return
        self.states = {shard: state for shard, state in self.states.items() if shard in asked}
        for shard in asked:
            self.states.setdefault(shard, _WARMING)
        if view is None or not may_warm:
            return
        leaf = next((leaf for leaf in view.leaves if leaf.name == self.name), None)
        if leaf is not None and leaf.instance == self.instance:
            for shard in view.held_by(self.name)[0].tolist():
                if shard in self.states:
                    self.states[shard] = _ONLINE

    def current(self) -> CurrentState:
        shards = sorted(self.states)
        return CurrentState(
            self.instance,
            1,
            np.array(shards, np.uint32),
            np.array([self.states[shard] for shard in shards], np.uint8),
        )


class World:
    """Nodes, and a leader whose steps are checked against the one before."""

    def __init__(self, nodes: list[Node], **config: object) -> None:
        values: dict[str, object] = {
            "cluster": "test",
            "shard_count": 32,
            "replicas": 2,
            "rebalance_delay_seconds": 60.0,
            "max_moves": 8,
            "drop_grace_seconds": 5.0,
        }
        self.config = ClusterConfig.model_validate(values | config)
        self.nodes = {node.name: node for node in nodes}
        self.overrides: dict[str, NodeOverride] = {}
        self.unreadable: set[str] = set()
        self.decided = Decided()
        self.memory = Memory()
        self.now = 1000.0
        self.last: Step | None = None
        self.started = 0  # replicas that were asked for, ever

    def override(self, name: str, **values: object) -> None:
        self.overrides[name] = NodeOverride.model_validate(values)

    def seen(self) -> Seen:
        live = {
            node.name: LiveNode(
                name=node.name,
                address=f"{node.name}:1",
                zone=node.zone,
                weight=node.weight,
                capacity=node.capacity,
                cluster="test",
                instance_id=node.instance,
            )
            for node in self.nodes.values()
            if node.there
        }
        return Seen(
            config=self.config,
            overrides=dict(self.overrides),
            live=live,
            # What a node wrote stays when it goes.
            current={name: node.current() for name, node in self.nodes.items()},
            unreadable=frozenset(self.unreadable),
        )

    def lead(self) -> Step:
        """One step of the leader; AssertionError when it hurts what was well."""
        seen, before = self.seen(), self.decided
        made = step(seen, before, self.memory, self.now)
        self._check(seen, before, made)
        self.started += sum(
            len(set(target.shards.tolist()) - self.asked(name))
            for name, target in made.decided.targets.items()
        )
        self.decided, self.memory, self.last = made.decided, made.memory, made
        return made

    def new_leader(self) -> None:
        self.memory = Memory()

    def asked(self, name: str) -> set[int]:
        target = self.decided.targets.get(name)
        return set() if target is None else set(target.shards.tolist())

    def turn(self, seconds: float = 1.0, may_warm: bool = True) -> Step:
        """All nodes do what they are asked, then the leader does a step."""
        self.now += seconds
        for node in self.nodes.values():
            node.take_up(self.asked(node.name), self.decided.view, may_warm)
        return self.lead()

    def settle(self, turns: int = 200) -> int:
        """Turns until nothing changes any more, for longer than the grace; how many it took."""
        quiet = 0
        for count in range(turns):
            before = self.decided
            self.turn()
            same = self.decided.view is before.view and self.decided.targets == before.targets
            quiet = quiet + 1 if same else 0
            if quiet > self.config.drop_grace_seconds + 2:
                return count
        raise AssertionError(f"does not settle within {turns} turns")

    def replicas(self, shard: int) -> dict[str, ReplicaState]:
        """What the view says of a shard."""
        assert self.decided.view is not None
        return {leaf.name: state for leaf, state in self.decided.view.replicas(shard)}

    def online(self, shard: int) -> set[str]:
        return {name for name, state in self.replicas(shard).items() if state == _ONLINE}

    def wanted(self, shard: int) -> list[str]:
        ideal = self.decided.ideal
        assert ideal is not None
        row = ideal.replicas[ideal.first[shard] : ideal.first[shard + 1]]
        return [ideal.nodes[node] for node in row.tolist()]

    def load(self, name: str) -> int:
        """Shards that the view names on a node."""
        assert self.decided.view is not None
        return len(self.decided.view.held_by(name)[0])

    def assert_settled(self) -> None:
        """The view, the targets and what nodes hold are what placement wants, all online."""
        for shard in range(self.config.shard_count):
            wanted = set(self.wanted(shard))
            assert self.replicas(shard) == dict.fromkeys(wanted, ReplicaState.ONLINE)
        for name, node in self.nodes.items():
            wanted_here = {s for s in range(self.config.shard_count) if name in self.wanted(s)}
            assert self.asked(name) == wanted_here
            assert not node.there or set(node.states) == wanted_here

    def _check(self, seen: Seen, before: Decided, made: Step) -> None:
        view = made.decided.view
        assert view is not None
        count = self.config.shard_count
        old = before.view
        for shard in range(count if old is not None else 0):
            assert old is not None
            was = {leaf.name for leaf, state in old.replicas(shard) if state == _ONLINE}
            alive = {
                name
                for name in was
                if name in seen.live
                and self.nodes[name].states.get(shard) == _ONLINE
                and old.leaves[[leaf.name for leaf in old.leaves].index(name)].instance
                == self.nodes[name].instance
            }
            now = {leaf.name for leaf, state in view.replicas(shard) if state == _ONLINE}
            assert not alive or now & set(seen.live), f"shard {shard} lost its last replica"
            named = {leaf.name for leaf, _ in old.replicas(shard)}
            assert now <= named, f"shard {shard}: {now - named} online without having warmed"
        for name, target in before.targets.items():
            gone = set(target.shards.tolist()) - set(made.decided.targets[name].shards.tolist())
            shown = set(view.held_by(name)[0].tolist())
            was_shown = set(old.held_by(name)[0].tolist()) if old is not None else set()
            assert not gone & shown, "dropped while the view names it"
            if name in seen.live and self.config.drop_grace_seconds:
                assert not gone & was_shown, "dropped without the grace"
        for shard, leaf, state in zip(
            view.shard_of_replica().tolist(), view.leaf.tolist(), view.state.tolist(), strict=True
        ):
            name = view.leaves[leaf].name
            if name in seen.live and name not in self.unreadable:
                assert view.leaves[leaf].instance == self.nodes[name].instance
                assert shard in self.nodes[name].states or state == _ONLINE
            else:
                assert made.frozen is not None or name in self.unreadable
        assert view.version >= (old.version if old is not None else 0)
        assert replace(made.decided, view=view) == made.decided
