"""How many keys may be asked for now: under a limit, and less while the store suffers.

The limit is met in every second, not on average: what was not used is not made up for, and a burst
is a hundredth of a second's keys. Additive increase and multiplicative decrease (Chiu and Jain,
1989) bring the rate down when answers fail or take longer than at first, and up again after that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from warmup.protocols import WarmResult

__all__ = ["TICK_S", "Pace"]

TICK_S = 0.01  # how often `take` should be asked

# The store counts its seconds by itself, and a batch may wait a little on its way there.
_SHARE_OF_LIMIT = 0.98
_BURST_S = 0.01
_JUDGE_S = 0.5
_JUDGED_KEYS_MIN = 20
_FAILURES_MAX = 0.02  # share of keys, in the time that is judged
_SLOWER = 3.0  # than at first, and by
_SLOWER_S = 0.005
_DECREASE = 0.7
_INCREASE = 0.05
_FACTOR_MIN = 0.02
_PAUSE_S = (0.5, 8.0)  # after nothing succeeded: first and longest
_OUTSTANDING_S = 0.03  # of the rate, beyond what the latency asks for
_LATENCY_KEPT = 0.2  # weight of the newest in the mean


class Pace:
    """Thread-safe. `limit` in keys a second; it may change at any time, also to 0."""

    def __init__(self, limit: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # guards all that follows
        self._limit = limit
        self._factor = 1.0
        self._credit = 0.0
        self._filled_at = clock()
        self._outstanding = 0
        self._latency_s: float | None = None  # mean of late
        self._first_latency_s: float | None = None
        self._judge_at = self._filled_at + _JUDGE_S
        self._keys = 0  # answered since the last judgement
        self._failed = 0
        self._slow_s = 0.0  # sum of latencies, by batch
        self._batches = 0
        self._pause_s = 0.0
        self._paused_until = 0.0

    @property
    def rate(self) -> float:
        """Keys a second that may be asked for now."""
        with self._lock:
            return self._rate_locked()

    @property
    def outstanding(self) -> int:
        """Keys that were taken, and not answered yet."""
        with self._lock:
            return self._outstanding

    def set_limit(self, limit: float) -> None:
        with self._lock:
            self._fill_locked()
            self._limit = limit

    def take(self, most: int) -> int:
        """How many keys may be asked for now, at most `most`; they count as outstanding."""
        with self._lock:
            self._fill_locked()
            if self._clock() < self._paused_until:
                return 0
            rate = self._rate_locked()
            latency_s = self._latency_s or 0.0
            room = rate * (_OUTSTANDING_S + 2 * latency_s) - self._outstanding
            allowed = int(min(most, self._credit, max(room, 1 - self._outstanding)))
            if allowed <= 0:
                return 0
            self._credit -= allowed
            self._outstanding += allowed
            return allowed

    def give_back(self, taken: int) -> None:
        """Of keys that were taken and not asked for after all."""
        with self._lock:
            self._outstanding -= taken
            self._credit += taken

    def ended(self, taken: int, result: WarmResult) -> None:
        """What became of keys that were asked for together."""
        with self._lock:
            self._outstanding -= taken
            # What the cache had did not cost the store anything.
            self._credit = min(self._credit + result.held, self._burst_locked())
            failed = result.timed_out + result.throttled + result.error
            asked = failed + result.fetched + result.not_found
            if asked:
                self._keys += asked
                self._failed += failed
                self._slow_s += result.seconds
                self._batches += 1
            self._judge_locked()

    def _rate_locked(self) -> float:
        return self._limit * _SHARE_OF_LIMIT * self._factor

    def _burst_locked(self) -> float:
        return max(1.0, self._rate_locked() * _BURST_S)

    def _fill_locked(self) -> None:
        now = self._clock()
        self._credit += self._rate_locked() * (now - self._filled_at)
        self._credit = min(self._credit, self._burst_locked())
        self._filled_at = now

    def _judge_locked(self) -> None:
        now = self._clock()
        nothing_came = 0 < self._keys == self._failed
        if self._keys < _JUDGED_KEYS_MIN and not nothing_came:
            return
        if now < self._judge_at and not nothing_came:
            return
        mean_s = self._slow_s / self._batches
        self._latency_s = (
            mean_s
            if self._latency_s is None
            else self._latency_s + _LATENCY_KEPT * (mean_s - self._latency_s)
        )
        failing = self._failed > _FAILURES_MAX * self._keys
        if self._first_latency_s is None and not failing:
            self._first_latency_s = mean_s
        first_s = self._first_latency_s
        slow = first_s is not None and mean_s > max(_SLOWER * first_s, first_s + _SLOWER_S)
        if failing or slow:
            self._factor = max(self._factor * _DECREASE, _FACTOR_MIN)
        else:
            self._factor = min(self._factor + _INCREASE, 1.0)
        if nothing_came:
            self._pause_s = min(max(self._pause_s * 2, _PAUSE_S[0]), _PAUSE_S[1])
            self._paused_until = now + self._pause_s
            self._credit = 0.0
        else:
            self._pause_s = 0.0
        self._keys = self._failed = self._batches = 0
        self._slow_s = 0.0
        self._judge_at = now + _JUDGE_S
