"""Which shard maps a leaf takes writes by."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sharding.model import ShardMap

__all__ = ["OwnedView"]

_Shards = npt.NDArray[np.uint32]
_Versions = npt.NDArray[np.uint64]


class OwnedView:
    """Since which version of the map a write of a shard reaches all of its replicas.

    A write by a root whose map is older than the newest replica of a shard would miss that replica:
    the node refuses it, and the root asks for the map. Not thread-safe.
    """

    def __init__(self) -> None:
        self.version = 0  # of the newest map; 0: none yet
        # Of leaves at their addresses, whatever their place in a map.
        self._numbers: dict[tuple[str, str], int] = {}
        self._replicas: _Versions = np.empty(0, np.uint64)  # shard and number of a leaf in each
        self._since: _Versions = np.empty(0, np.uint64)

    def take(self, map: ShardMap) -> None:
        """A newer map: shards that got a replica have a new version to be written by."""
        if len(self._since) != map.shard_count:
            self._since = np.zeros(map.shard_count, np.uint64)
        keys = [(leaf.name, leaf.address) for leaf in map.leaves]
        numbers = [self._numbers.setdefault(key, len(self._numbers)) for key in keys]
        shards = map.shard_of_replica().astype(np.uint64)
        replicas = shards << np.uint64(32) | np.array(numbers, np.uint64)[map.leaf]
        new = np.setdiff1d(replicas, self._replicas)
        self._since[new >> np.uint64(32)] = map.version
        self._replicas = replicas
        self.version = map.version

    def written_since(self, shards: _Shards) -> _Versions:
        """One version a shard; 0 for what no map has named yet."""
        since = np.zeros(len(shards), np.uint64)
        known = shards < len(self._since)
        since[known] = self._since[shards[known]]
        return since
