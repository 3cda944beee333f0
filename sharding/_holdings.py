"""What a leaf holds, shard by shard. Pure: no clock, no thread, no ZooKeeper."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sharding.model import CurrentState, Shards, shards_array

_UNKNOWN = np.nan


@dataclass(frozen=True)
class WarmJob:
    """Shards to warm in one call."""

    shards: Shards
    away_since: float | None  # when they were last known to be up to date; None: never


class Holdings:
    """Shards with their states; all arrays are parallel and rise by shard."""

    def __init__(self) -> None:
        self._shards = np.zeros(0, dtype=np.uint32)
        self._online = np.zeros(0, dtype=np.bool_)
        self._away_since = np.zeros(0, dtype=np.float64)
        self._failures = np.zeros(0, dtype=np.int64)
        self._retry_at = np.zeros(0, dtype=np.float64)

    def shards(self) -> Shards:
        return shards_array(self._shards)

    def count(self, *, online: bool) -> int:
        return int((self._online == online).sum())

    def current(self, instance_id: str, target_version: int) -> CurrentState:
        return CurrentState(instance_id, target_version, self._shards, self._online.view(np.uint8))

    def add(self, new: Shards) -> None:
        """Shards that are not held, as warming; what there may be of them is of unknown age."""
        count = len(new)
        self._rearrange(
            np.concatenate([self._shards, new]),
            np.concatenate([self._online, np.zeros(count, dtype=np.bool_)]),
            np.concatenate([self._away_since, np.full(count, _UNKNOWN)]),
            np.concatenate([self._failures, np.zeros(count, dtype=np.int64)]),
            np.concatenate([self._retry_at, np.zeros(count)]),
        )

    def remove(self, gone: Shards) -> None:
        kept = ~np.isin(self._shards, gone)
        self._rearrange(
            self._shards[kept],
            self._online[kept],
            self._away_since[kept],
            self._failures[kept],
            self._retry_at[kept],
        )

    def all_warming(self, away_since: float) -> None:
        """None is believed any more; those that were online may lack writes since then.

        One that was warming lacks what it lacked, and all since.
        """
        self._away_since = np.where(self._online, away_since, self._away_since)
        self._online = np.zeros_like(self._online)
        self._failures = np.zeros_like(self._failures)
        self._retry_at = np.zeros_like(self._retry_at)

    def warmed(self, shards: Shards) -> None:
        """Those of them that are still held go online."""
        done = np.isin(self._shards, shards)
        self._online = self._online | done
        self._failures[done] = 0

    def failed(self, shards: Shards, now: float, delays_s: tuple[float, float]) -> None:
        """They stay warming, and wait: the first delay, doubled each time up to the longest."""
        rows = np.isin(self._shards, shards)
        first_s, longest_s = delays_s
        doubled = first_s * np.exp2(np.minimum(self._failures[rows], 30))
        self._retry_at[rows] = now + np.minimum(doubled, longest_s)
        self._failures[rows] += 1

    def next_job(self, named: Shards, now: float, shards_max: int) -> WarmJob | None:
        """Of the shards that the view names us for, some that are to be warmed and may be now.

        Those that were held come first, as they are soonest up to date; all of a job were away
        since the same moment.
        """
        ready = np.flatnonzero(
            ~self._online & (self._retry_at <= now) & np.isin(self._shards, named)
        )
        if not len(ready):
            return None
        since = self._away_since[ready]
        known = since[~np.isnan(since)]
        if len(known):
            moment = float(known.max())
            rows = ready[since == moment][:shards_max]
            return WarmJob(shards_array(self._shards[rows]), moment)
        return WarmJob(shards_array(self._shards[ready[:shards_max]]), None)

    def next_retry_at(self) -> float | None:
        """When the next of those that wait may be warmed; None: none waits."""
        waiting = self._retry_at[~self._online & (self._failures > 0)]
        return float(waiting.min()) if len(waiting) else None

    def _rearrange(
        self,
        shards: npt.NDArray[np.uint32],
        online: npt.NDArray[np.bool_],
        away_since: npt.NDArray[np.float64],
        failures: npt.NDArray[np.int64],
        retry_at: npt.NDArray[np.float64],
    ) -> None:
        order = np.argsort(shards, kind="stable")
        self._shards = shards[order]
        self._online = online[order]
        self._away_since = away_since[order]
        self._failures = failures[order]
        self._retry_at = retry_at[order]
