"""What a cluster is made of. Values only: nothing here knows ZooKeeper, and nothing changes.

Arrays of shards are uint32 and rising, those of a map lie as in
`native/include/feature_cache/cluster.hpp`. All arrays are made read-only, so that one object can be
handed to any thread.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "NODES_MAX",
    "REPLICAS_MAX",
    "SHARDS_MAX",
    "SHARD_ENTRIES_MAX",
    "ClusterConfig",
    "CurrentState",
    "IdealState",
    "Leaf",
    "LiveNode",
    "NodeName",
    "NodeOverride",
    "ReplicaState",
    "ShardMap",
    "Shards",
    "States",
    "Target",
    "shards_array",
    "states_array",
]

SHARDS_MAX = 1_000_000
"""Of a cluster. Two bitmaps of them fit into one znode of 256 KiB."""
NODES_MAX = 60_000
"""Entries of a node table, so that a number of a node takes two bytes."""
REPLICAS_MAX = 16
"""Of a shard, as an operator may ask for."""
SHARD_ENTRIES_MAX = 64
"""Replicas of a shard in a map, where old and new owners stand side by side during a move."""

NodeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}$")]
"""Goes into paths of znodes, metrics and tables."""
# Printable ASCII: a byte a character, and no line breaks.
_Word = Annotated[str, Field(pattern=r"^[ -~]{1,128}$")]
_Address = Annotated[str, Field(pattern=r"^[ -~]{1,260}$")]  # a DNS name has 253 characters
_Weight = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
_Seconds = Annotated[float, Field(ge=0, le=31_536_000, allow_inf_nan=False)]

Shards = npt.NDArray[np.uint32]
States = npt.NDArray[np.uint8]


class ReplicaState(IntEnum):
    """Values as in the data plane. A replica that is not named holds nothing."""

    WARMING = 0  # gets writes, is not asked for values
    ONLINE = 1


class _Record(BaseModel):
    """Keys of a later release are left out; what is there must be right."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ClusterConfig(_Record):
    """What all nodes of a cluster agree on; /config."""

    cluster: _Word
    shard_count: Annotated[int, Field(ge=1, le=SHARDS_MAX)]  # never changes
    replicas: Annotated[int, Field(ge=1, le=REPLICAS_MAX)] = 2
    rebalance_delay_seconds: _Seconds = 120.0  # after the loss of a node, before its shards move
    max_moves: Annotated[int, Field(ge=1, le=SHARDS_MAX)] = 64  # under way at once
    drop_grace_seconds: _Seconds = 10.0  # a replica answers so long after the view left it out
    # Share of the known, enabled nodes that must be live for moves to start.
    freeze_below: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.7


class NodeOverride(_Record):
    """What operators said of a node; /nodes/<name>."""

    enabled: bool = True  # false: holds nothing and is not asked
    draining: bool = False  # true: gets nothing new, and what it has moves away
    weight: _Weight | None = None  # None: what the node says itself


class LiveNode(_Record):
    """A leaf as it registered itself; /live/<name>."""

    name: NodeName
    address: _Address  # host:port or unix:/path, as roots reach it
    zone: _Word
    weight: _Weight = 1.0
    capacity: Annotated[int, Field(ge=0, le=SHARDS_MAX)] = 0  # most shards; 0: no limit
    version: Annotated[str, Field(pattern=r"^[ -~]{0,128}$")] = ""  # of the software
    cluster: _Word
    # Random for each registration: tells two processes of one name apart. Empty before the first.
    instance_id: Annotated[str, Field(pattern=r"^[ -~]{0,128}$")] = ""


def _frozen_array(values: npt.ArrayLike, dtype: type[np.generic]) -> npt.NDArray[Any]:
    """A read-only array of `dtype`; a copy unless it is one already, as its owner may write on."""
    array: npt.NDArray[Any] = np.ascontiguousarray(values, dtype=dtype)
    if array.flags.writeable:
        array = array.copy()
        array.flags.writeable = False
    return array


def shards_array(shards: npt.ArrayLike) -> Shards:
    """Rising, unique, read-only shard numbers of any sequence of them."""
    return _frozen_array(np.unique(np.asarray(shards, dtype=np.uint32)), np.uint32)


def states_array(states: npt.ArrayLike) -> States:
    """Read-only `ReplicaState`s of any sequence of them."""
    return _frozen_array(states, np.uint8)


class _Arrays:
    """Equality by content for dataclasses that hold arrays."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        for field in fields(self):  # type: ignore[arg-type]
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            same = np.array_equal(mine, theirs) if isinstance(mine, np.ndarray) else mine == theirs
            if not same:
                return False
        return True

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Leaf:
    name: str  # unique in the cluster
    address: str  # host:port or unix:/path
    zone: str
    instance: str = ""  # the registration that was believed; the data plane does not need it


@dataclass(frozen=True, eq=False)
class ShardMap(_Arrays):
    """One version of the external view: which leaf answers which shard."""

    version: int  # rises with every change
    leaves: tuple[Leaf, ...]
    first: Shards  # shard_count + 1 numbers: the replicas of shard s are first[s]..first[s + 1]
    leaf: Shards  # of each replica, an index into `leaves`
    state: States  # of each replica

    def __post_init__(self) -> None:
        """ValueError for a map that contradicts itself."""
        _freeze(self, first=np.uint32, leaf=np.uint32, state=np.uint8)
        _check_offsets(self.first, len(self.leaf), len(self.leaves))
        if len(self.state) != len(self.leaf):
            raise ValueError(f"{len(self.state)} states of {len(self.leaf)} replicas")
        if len(self.leaf) and int(self.leaf.max()) >= len(self.leaves):
            raise ValueError(f"replica on leaf {self.leaf.max()} of {len(self.leaves)}")
        if len(self.state) and int(self.state.max()) > ReplicaState.ONLINE:
            raise ValueError(f"unknown state {self.state.max()}")
        if len({leaf.name for leaf in self.leaves}) != len(self.leaves):
            raise ValueError("two leaves of one name")
        _check_once(self.shard_of_replica(), self.leaf)

    @property
    def shard_count(self) -> int:
        return len(self.first) - 1

    def replicas(self, shard: int) -> list[tuple[Leaf, ReplicaState]]:
        """Who holds a shard, best first; IndexError for one that there is not."""
        if not 0 <= shard < self.shard_count:
            raise IndexError(f"shard {shard} of {self.shard_count}")
        row = slice(int(self.first[shard]), int(self.first[shard + 1]))
        return [
            (self.leaves[leaf], ReplicaState(state))
            for leaf, state in zip(self.leaf[row].tolist(), self.state[row].tolist(), strict=True)
        ]

    def shard_of_replica(self) -> Shards:
        """The shard of each replica, in the order of `leaf` and `state`."""
        return _shard_of_entry(self.first)

    def held_by(self, name: str) -> tuple[Shards, States]:
        """Shards (rising) and states that the map names of one leaf; empty when it knows none."""
        index = next((i for i, leaf in enumerate(self.leaves) if leaf.name == name), None)
        rows = np.flatnonzero(self.leaf == index) if index is not None else np.arange(0)
        # Only the rows of this leaf are looked up: a map has hundreds of thousands.
        shards = np.searchsorted(self.first, rows, side="right") - 1
        return _frozen_array(shards, np.uint32), _frozen_array(self.state[rows], np.uint8)


@dataclass(frozen=True, eq=False)
class CurrentState(_Arrays):
    """What a node holds; /current/<name>."""

    instance_id: str  # of the registration that wrote it
    target_version: int  # that it works on
    shards: Shards  # rising; one that is not named is OFFLINE
    states: States

    def __post_init__(self) -> None:
        """ValueError when shards do not rise or lack a state."""
        _freeze(self, shards=np.uint32, states=np.uint8)
        _check_rising(self.shards)
        if len(self.states) != len(self.shards):
            raise ValueError(f"{len(self.states)} states of {len(self.shards)} shards")
        if len(self.states) and int(self.states.max()) > ReplicaState.ONLINE:
            raise ValueError(f"unknown state {self.states.max()}")

    def of(self, state: ReplicaState) -> Shards:
        """Rising shards that are in `state`."""
        return _frozen_array(self.shards[self.states == state], np.uint32)


@dataclass(frozen=True, eq=False)
class Target(_Arrays):
    """What a node must hold; /target/<name>."""

    version: int  # rises with every change
    shards: Shards  # rising

    def __post_init__(self) -> None:
        """ValueError when shards do not rise."""
        _freeze(self, shards=np.uint32)
        _check_rising(self.shards)


@dataclass(frozen=True, eq=False)
class IdealState(_Arrays):
    """Where placement wants each shard; /ideal. Laid out as a map is."""

    version: int
    nodes: tuple[str, ...]
    first: Shards  # shard_count + 1 numbers
    replicas: Shards  # indices into `nodes`; the order of a shard's replicas is kept

    def __post_init__(self) -> None:
        """ValueError for a state that contradicts itself."""
        _freeze(self, first=np.uint32, replicas=np.uint32)
        _check_offsets(self.first, len(self.replicas), len(self.nodes))
        if len(self.replicas) and int(self.replicas.max()) >= len(self.nodes):
            raise ValueError(f"replica on node {self.replicas.max()} of {len(self.nodes)}")
        if len(set(self.nodes)) != len(self.nodes):
            raise ValueError("two nodes of one name")
        _check_once(_shard_of_entry(self.first), self.replicas)

    @property
    def shard_count(self) -> int:
        return len(self.first) - 1


def _freeze(record: object, **dtypes: type[np.generic]) -> None:
    for name, dtype in dtypes.items():
        object.__setattr__(record, name, _frozen_array(getattr(record, name), dtype))


def _check_offsets(first: Shards, entries: int, nodes: int) -> None:
    if not 1 <= len(first) <= SHARDS_MAX + 1:
        raise ValueError(f"{len(first) - 1} shards; at most {SHARDS_MAX}")
    if nodes > NODES_MAX:
        raise ValueError(f"{nodes} nodes; at most {NODES_MAX}")
    if int(first[0]) != 0 or int(first[-1]) != entries:
        raise ValueError(f"offsets end at {first[-1]}, and there are {entries} replicas")
    if bool((first[1:] < first[:-1]).any()):
        raise ValueError("offsets fall")
    if len(first) > 1 and int(np.diff(first).max()) > SHARD_ENTRIES_MAX:
        raise ValueError(f"a shard of more than {SHARD_ENTRIES_MAX} replicas")


def _shard_of_entry(first: Shards) -> Shards:
    counts = np.diff(first).astype(np.int64)
    return np.repeat(np.arange(len(counts), dtype=np.uint32), counts)


def _check_once(shard: Shards, node: Shards) -> None:
    """No shard twice on one node."""
    pairs = np.sort(shard.astype(np.uint64) << np.uint64(32) | node)
    twice = np.flatnonzero(pairs[1:] == pairs[:-1])
    if len(twice):
        raise ValueError(f"shard {int(pairs[twice[0]]) >> 32} twice on one node")


def _check_rising(shards: Shards) -> None:
    if len(shards) and int(shards[-1]) >= SHARDS_MAX:
        raise ValueError(f"shard {shards[-1]}; at most {SHARDS_MAX - 1}")
    if bool((shards[1:] <= shards[:-1]).any()):
        raise ValueError("shards do not rise")
