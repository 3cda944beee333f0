"""Replay: what warm nodes were asked for is asked for again, at a rate that the store can bear.

Logs of the freshest windows become one plan of keys; what is there already is left out, and the
rest goes through the node's own way of a miss. It ends with the plan, when the part of the recorded
traffic that would now hit reaches the target, when its time is over, or when it is told to. The
keys of a domain that is full are given up: what comes would only push out what came before.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from warmup.errors import SnapshotError
from warmup.pace import TICK_S, Pace
from warmup.protocols import KeyPlan, WarmResult
from warmup.snapshots import Snapshot, SnapshotStore

__all__ = ["Replay", "ReplayEnd", "ReplayState"]

_log = logging.getLogger(__name__)

_BATCH_KEYS_MAX = 4096
_BATCH_TIMEOUT_S = 10.0
_PREDICT_EVERY_S = 2.0
_RATE_OVER_S = 2.0  # that is shown
# A window that is older by one counts so much less: what is asked changes.
_OLDER_WINDOW = 0.8
_PREDICT_SHARE = 20.0  # nor more often than so many times as long as it takes
_FULL_EVICTED_MIN = 100  # items that went while others came, and
_FULL_SHARE = 0.1  # of those that are there
_ROUNDS_MAX = 3  # through the plan: the first, and those of what failed


class ReplayEnd:
    """Why a replay ended."""

    DONE = "done"
    TARGET = "target"
    FULL = "full"
    TIME = "time"
    STOPPED = "stopped"


@dataclass(frozen=True)
class ReplayState:
    """At the moment of asking."""

    phase: str = "replay"  # snapshots, replay
    snapshots: int = 0  # logs that were read
    problems: tuple[str, ...] = ()  # of logs that could not be
    keys_total: int = 0  # of the plan, without what was there
    keys_done: int = 0
    keys_held: int = 0  # of those: the cache had them meanwhile
    keys_fetched: int = 0
    keys_failed: int = 0
    keys_per_second: float = 0.0
    rate_limit: float = 0.0
    predicted_hit_ratio: float | None = None


class Replay:
    """One replay. `run` blocks; `state` and `stop` may be used from any thread.

    `fill` says, for each (namespace, domain), what the node has evicted for good so far, and how
    many items it has.
    """

    def __init__(
        self,
        plan: KeyPlan,
        pace: Pace,
        *,
        target_hit_ratio: float,
        realtime_ttl_s: float,
        fill: Callable[[], Mapping[tuple[str, str], tuple[float, float]]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan = plan
        self._pace = pace
        self._target = target_hit_ratio
        self._realtime_ttl_s = realtime_ttl_s
        self._fill = fill
        self._full: set[tuple[str, str]] = set()
        self._clock = clock
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._state = ReplayState(phase="snapshots")  # guarded by _lock
        self._recent: list[tuple[float, int]] = []  # guarded by _lock

    @property
    def state(self) -> ReplayState:
        with self._lock:
            state, recent = self._state, self._recent
            now = self._clock()
            self._recent = recent = [each for each in recent if each[0] > now - _RATE_OVER_S]
        keys = sum(count for _, count in recent)
        return replace(state, keys_per_second=keys / _RATE_OVER_S, rate_limit=self._pace.rate)

    def stop(self) -> None:
        self._stopping.set()

    def load(self, store: SnapshotStore, snapshots: Sequence[Snapshot], deadline: float) -> int:
        """Adds logs to the plan, the freshest first; returns how many could be read.

        What cannot be read is told in the state, and left out.
        """
        windows: dict[int, int] = {}
        read = 0
        for snapshot in snapshots:
            if self._stopping.is_set() or self._clock() > deadline:
                break
            start = snapshot.manifest.window_start_ms
            age = windows.setdefault(start, len(windows))
            try:
                added = self._plan.add(store.read(snapshot), _OLDER_WINDOW**age)
            except (SnapshotError, ValueError) as error:
                _log.warning("replay: %s is left out: %s", snapshot.manifest.log, error)
                self._change(problems=(*self.state.problems, str(error)))
                continue
            read += 1
            self._change(snapshots=read)
            _log.info(
                "replay: %s of %s: %d keys, %d of them new; left out: %d of other namespaces, %d "
                "without a store, %d hashed, %d of other shards, %d over the limit",
                *(snapshot.manifest.log, snapshot.manifest.host, added.keys, added.new_keys),
                *(added.unknown_namespace, added.not_fetchable, added.hashed),
                *(added.not_owned, added.over_limit),
            )
        return read

    def run(self, deadline: float) -> str:
        """Asks for the keys of the plan until one of `ReplayEnd`."""
        held = self._plan.drop_held()
        self._plan.order(self._realtime_ttl_s)
        self._change(phase="replay", keys_total=self._plan.keys_left)
        _log.info("replay: %d keys, and %d that are there already", self._plan.keys_left, held)
        end = self._ask(deadline)
        while self._pace.outstanding and self._clock() < deadline + _BATCH_TIMEOUT_S:
            if self._stopping.wait(TICK_S):
                break
        self._predict()
        return end

    def _ask(self, deadline: float) -> str:
        predict_at = self._clock()
        before = dict(self._fill())
        rounds = 1
        while not self._stopping.is_set():
            now = self._clock()
            if now > deadline:
                return ReplayEnd.TIME
            if now >= predict_at:
                if self._predict() >= self._target:
                    return ReplayEnd.TARGET
                self._give_up_full(before)
                took_s = self._clock() - now
                predict_at = self._clock() + max(_PREDICT_EVERY_S, _PREDICT_SHARE * took_s)
            taken = self._pace.take(_BATCH_KEYS_MAX)
            if not taken:
                self._stopping.wait(TICK_S)
                continue
            asked = self._issue(taken)
            if asked < taken:
                self._pace.give_back(taken - asked)
            if asked:
                continue
            if self._pace.outstanding:
                self._stopping.wait(TICK_S)
                continue
            if rounds == _ROUNDS_MAX or not self._plan.retry_failed():
                return ReplayEnd.FULL if self._full else ReplayEnd.DONE
            rounds += 1
        return ReplayEnd.STOPPED

    def _issue(self, keys: int) -> int:
        """Asks for at most so many; returns how many there were."""
        sizes: list[int] = []
        known = threading.Event()  # sizes has been filled

        def done(result: WarmResult) -> None:
            known.wait()
            self._pace.ended(sizes[0], result)
            failed = result.timed_out + result.throttled + result.error
            with self._lock:
                state = self._state
                self._recent.append((self._clock(), result.fetched + result.not_found))
                self._state = replace(
                    state,
                    keys_done=state.keys_done + sizes[0] - failed,
                    keys_held=state.keys_held + result.held,
                    keys_fetched=state.keys_fetched + result.fetched,
                    keys_failed=state.keys_failed + failed,
                )

        asked = self._plan.issue(keys, _BATCH_TIMEOUT_S, done)
        sizes.append(asked)
        known.set()
        return asked

    def _predict(self) -> float:
        predicted = self._plan.predicted_hit_ratio()
        self._change(predicted_hit_ratio=predicted)
        return predicted

    def _give_up_full(self, before: Mapping[tuple[str, str], tuple[float, float]]) -> None:
        for domain, (evicted, items) in self._fill().items():
            went = evicted - before.get(domain, (0.0, 0.0))[0]
            if domain in self._full or went < max(_FULL_EVICTED_MIN, _FULL_SHARE * items):
                continue
            self._full.add(domain)
            given_up = self._plan.drop_domains([domain])
            _log.info("replay: %s/%s is full: %d keys are given up", *domain, given_up)

    def _change(self, **changes: object) -> None:
        with self._lock:
            self._state = replace(self._state, **changes)  # type: ignore[arg-type]
