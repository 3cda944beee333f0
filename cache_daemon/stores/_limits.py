"""What limits calls to a store: a token bucket and a circuit breaker.

Both are our own, because what the libraries offer does not fit threads that share one store.
pybreaker holds its lock while the protected call runs: calls go one by one, and one that hangs
stops all. circuitbreaker lets every waiting thread probe at once. Token bucket packages refuse or
sleep, but do not say how long the wait would be, which is needed to keep a deadline.
"""

import threading
from collections.abc import Callable
from typing import Literal

__all__ = ["BreakerState", "CircuitBreaker", "Clock", "TokenBucket"]

Clock = Callable[[], float]
"""Seconds of a clock that never goes back."""

BreakerState = Literal["closed", "half_open", "open", "disabled"]


class TokenBucket:
    """Tokens flow in at a steady rate up to a burst; takers may reserve tokens to come.

    Reservation as in golang.org/x/time/rate: waiters are served in the order in which they came,
    and a batch larger than the burst is possible: it waits for a full bucket and leaves a debt.
    Thread-safe.
    """

    def __init__(self, rate: float, burst: float, clock: Clock) -> None:
        """`rate` in tokens/s, `burst` in tokens; both above 0. The bucket starts full."""
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._mutex = threading.Lock()
        self._tokens = burst  # below 0: reserved by those who wait
        self._updated = clock()

    def reserve(self, tokens: float, wait_max_s: float) -> float | None:
        """Takes the tokens and returns the seconds to wait before they may be used.

        None when that would be more than `wait_max_s`; then nothing is taken.
        """
        with self._mutex:
            now = self._clock()
            self._tokens = min(self._burst, self._tokens + (now - self._updated) * self._rate)
            self._updated = now
            missing = min(tokens, self._burst) - self._tokens
            wait_s = max(missing, 0.0) / self._rate
            if wait_s > wait_max_s:
                return None
            self._tokens -= tokens
            return wait_s


class CircuitBreaker:
    """Opens after a number of failures in a row; after a pause, lets one probe through at a time.

    A permit carries the breaker's generation: what a call from before the last change of state
    reports is ignored, so that a late answer neither closes nor opens it. A probe that never comes
    back is replaced after another pause. Thread-safe.
    """

    def __init__(self, failures: int, pause_s: float, clock: Clock) -> None:
        """Opens after `failures` in a row, for `pause_s` seconds. 0 failures: never opens."""
        self._failures_max = failures
        self._pause_s = pause_s
        self._clock = clock
        self._mutex = threading.Lock()
        self._state: BreakerState = "closed" if failures else "disabled"
        self._generation = 0
        self._failures = 0  # in a row, while closed
        self._retry_at = 0.0  # when the next probe may start, while open or half-open
        self._trips = 0

    @property
    def state(self) -> BreakerState:
        return self._state

    @property
    def trips(self) -> int:
        """How often it has opened."""
        return self._trips

    def blocked_s(self) -> float:
        """Seconds until a call may pass; 0 when one may now."""
        with self._mutex:
            return self._blocked_s_locked()

    def permit(self) -> int | None:
        """Lets a call pass: returns the generation to report with; None when the call may not."""
        with self._mutex:
            if self._blocked_s_locked() > 0:
                return None
            if self._state in ("open", "half_open"):
                self._state = "half_open"
                self._generation += 1
                self._retry_at = self._clock() + self._pause_s
            return self._generation

    def succeeded(self, generation: int) -> None:
        with self._mutex:
            if generation != self._generation:
                return
            self._failures = 0
            if self._state == "half_open":
                self._state = "closed"
                self._generation += 1

    def failed(self, generation: int) -> None:
        with self._mutex:
            if generation != self._generation or self._state == "disabled":
                return
            self._failures += 1
            if self._state == "half_open" or self._failures >= self._failures_max:
                self._state = "open"
                self._generation += 1
                self._failures = 0
                self._trips += 1
                self._retry_at = self._clock() + self._pause_s

    def _blocked_s_locked(self) -> float:
        if self._state in ("closed", "disabled"):
            return 0.0
        return max(self._retry_at - self._clock(), 0.0)
