"""All replicas of a cluster as arrays: what each is asked, says and is shown as.

A key is shard x (number of nodes) + node; arrays of keys are sorted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sharding.model import ReplicaState

__all__ = [
    "ABSENT",
    "LAST_RANK",
    "Bools",
    "Floats",
    "Ints",
    "Replicas",
    "by_shard",
    "contained",
    "looked_up",
    "rank_in_group",
    "since",
]

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

ABSENT = -1  # a state beside those of ReplicaState
LAST_RANK = 1 << 20  # of a replica that is not wanted


@dataclass(frozen=True)
class Replicas:
    """Each replica that a target names, one a row."""

    keys: Ints
    shard: Ints
    node: Ints
    rank: Ints  # its place among the wanted ones; `LAST_RANK` when it is not wanted
    live: Bools  # its node is there and can be read
    opaque: Bools  # something of its node cannot be read: it stays as it is
    enabled: Bools
    draining: Bools
    reported: Bools  # its node has said what it holds since it registered
    current: Ints  # what the node says, or ABSENT
    before: Ints  # what the last view says, or ABSENT
    shard_count: int

    @property
    def good(self) -> Bools:
        """Where placement wants them, and allowed to be there."""
        return (self.rank < LAST_RANK) & self.enabled

    def shown(self, wished: Ints, frozen: bool, view_known: bool) -> tuple[Bools, Bools]:
        """Which replicas the next view names, and which of them as online.

        `wished` is how many replicas of each shard are wanted.
        """
        good = self.good
        warming = self.live & (self.current == ReplicaState.WARMING)
        online = self.live & (self.current == ReplicaState.ONLINE)
        if view_known:
            online &= self.before != ABSENT  # else it has missed writes since it was left out
        online |= self.opaque & (self.before == ReplicaState.ONLINE)
        # A node that registered anew warms again; but the last one that was online stays so.
        again = self.live & (self.before == ReplicaState.ONLINE) & (warming | ~self.reported)
        online |= again & ~self.served(online)
        warming &= ~online
        warming |= self.opaque & (self.before == ReplicaState.WARMING)

        shown = online & good
        # One stays in any case, also where no node is to have the shard at all.
        missing = np.maximum(wished, 1) - self.count(shown)
        shown |= self._stay(online & ~good & self.enabled, missing, frozen)
        # A disabled node goes at once, unless it is the last that has the shard.
        shown |= online & ~self.enabled & ~self.served(shown)
        if frozen:
            # Many are away at once: they may well be alive, and nobody else has these shards.
            last = ~self.live & (self.before == ReplicaState.ONLINE) & self.enabled
            last &= ~self.served(shown)
            online |= last
            shown |= last
        stands_in = warming & self.enabled & ~self.served(shown)
        shown |= warming & (good | self.opaque) | stands_in
        return shown, shown & online

    def _stay(self, spare: Bools, missing: Ints, frozen: bool) -> Bools:
        """Which online replicas that nobody wants still fill in for wanted ones that are not."""
        if frozen:
            return spare
        at = np.flatnonzero(spare)
        order = at[np.lexsort((self.keys[at], self.draining[at], self.shard[at]))]
        stays = order[rank_in_group(self.shard[order]) < missing[self.shard[order]]]
        result = np.zeros(len(self.keys), bool)
        result[stays] = True
        return result

    def count(self, which: Bools) -> Ints:
        """How many of these each shard has."""
        return by_shard(self.shard[which], self.shard_count)

    def served(self, which: Bools) -> Bools:
        """For each replica: whether its shard has any of these."""
        result: Bools = (self.count(which) > 0)[self.shard]
        return result


def by_shard(shards: Ints, shard_count: int) -> Ints:
    return np.bincount(shards, minlength=shard_count).astype(np.int64)


def rank_in_group(groups: Ints) -> Ints:
    """For each element of sorted groups: how many of its group come before it."""
    return np.arange(len(groups)) - np.searchsorted(groups, groups, "left")


def contained(keys: Ints, known: Ints) -> Bools:
    """Which keys are among `known`, which is sorted."""
    if not len(known):
        return np.zeros(len(keys), bool)
    found: Bools = known[np.minimum(np.searchsorted(known, keys), len(known) - 1)] == keys
    return found


def looked_up(keys: Ints, known: Ints, values: Ints, default: int) -> Ints:
    """The value of each key among `known` ones in any order."""
    if not len(known):
        return np.full(len(keys), default, np.int64)
    order = np.argsort(known, kind="stable")
    known, values = known[order], values[order]
    at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[at] == keys, values[at], default)


def since(keys: Ints, known: Ints, times: Floats, now: float) -> Floats:
    """Since when each key is there: as remembered, else now. `known` is sorted."""
    if not len(known):
        return np.full(len(keys), now)
    at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[at] == keys, times[at], now)
