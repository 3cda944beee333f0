"""The guard around a store: what it may cost, and what happens when it fails.

The way of a call: concurrency slot, circuit breaker, rate limit, the store; after StoreUnavailable
again from the breaker on, with a growing random pause, as long as attempts and time are left.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    retry_if_not_exception_type,
    wait_random_exponential,
)

from cache_daemon.config_units import Duration
from cache_daemon.stores._base import (
    Groups,
    Store,
    StoreAnswerError,
    StoreBreakerOpen,
    StoreError,
    StoreThrottled,
    StoreTimeout,
    StoreUnavailable,
    Values,
)
from cache_daemon.stores._limits import BreakerState, CircuitBreaker, Clock, TokenBucket
from cache_daemon.stores._meter import StoreHistogram, StoreMeter, StoreSample

__all__ = ["GuardOptions", "GuardedStore", "StoreHistogram", "StoreSample"]

_OUTCOMES = {
    StoreBreakerOpen: "breaker_open",
    StoreUnavailable: "unavailable",
    StoreTimeout: "timeout",
    StoreThrottled: "throttled",
    StoreAnswerError: "answer_error",
    StoreError: "error",
}
_BREAKER_STATES: tuple[BreakerState, ...] = ("closed", "half_open", "open")


class GuardOptions(BaseModel):
    """Limits of one store."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    concurrency: int = Field(default=4, ge=1, le=256, description="calls outstanding at most")
    timeout: Duration = Field(
        default=1.0, gt=0, description="of a call, waits and retries included"
    )
    rate_limit: float = Field(default=0, ge=0, description="keys/s; 0: none")
    burst: float = Field(
        default=0, ge=0, description="keys that may be asked at once; 0: those of 1 s"
    )
    retries: int = Field(
        default=2, ge=0, le=10, description="further attempts when it is unavailable"
    )
    retry_backoff: Duration = Field(
        default=0.01,
        gt=0,
        description="the pause before a retry is random, up to this, doubled each time",
    )
    retry_backoff_max: Duration = Field(default=0.2, gt=0)
    breaker_failures: int = Field(
        default=5,
        ge=0,
        description="failed attempts in a row that open the circuit breaker; 0: never",
    )
    breaker_pause: Duration = Field(
        default=2.0,
        gt=0,
        description="how long an open breaker lets no call through before it probes",
    )


@dataclass(eq=False)
class _Attempt:
    """One call of the store that has not returned yet."""

    deadline: float
    generation: int
    overdue: bool = False


class GuardedStore:
    """A store with limits; a store itself. Thread-safe."""

    def __init__(
        self,
        name: str,
        store: Store,
        options: GuardOptions,
        *,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`name` is the store's in the config, the label of its metrics."""
        self._name = name
        self._store = store
        self._options = options
        self._clock = clock
        self._sleep = sleep
        self._slots = threading.BoundedSemaphore(options.concurrency)
        self._breaker = CircuitBreaker(options.breaker_failures, options.breaker_pause, clock)
        self._bucket = (
            TokenBucket(options.rate_limit, options.burst or options.rate_limit, clock)
            if options.rate_limit
            else None
        )
        self._meter = StoreMeter(("ok", *_OUTCOMES.values()))
        self._retrying = Retrying(
            stop=self._give_up,
            wait=wait_random_exponential(
                multiplier=options.retry_backoff, max=options.retry_backoff_max
            ),
            retry=retry_if_exception_type(StoreUnavailable)
            & retry_if_not_exception_type(StoreBreakerOpen),
            before_sleep=lambda _: self._meter.retry(),
            sleep=sleep,
            reraise=True,
        )
        self._mutex = threading.Lock()
        self._running: set[_Attempt] = set()

    @property
    def name(self) -> str:
        return self._name

    @property
    def state(self) -> str:
        """The circuit breaker's: `closed`, `half_open`, `open`; `disabled` where there is none."""
        self._notice_overdue()
        return self._breaker.state

    def get_many(self, groups: Groups, timeout_s: float) -> Values:
        """As `Store.get_many`, within the limits; raises nothing but the `StoreError` family.

        Groups whose number of values is wrong are passed on as they are: the engine answers ERROR
        for them and uses the others.
        """
        deadline = self._clock() + min(timeout_s, self._options.timeout)
        self._notice_overdue()
        if not self._slots.acquire(timeout=max(deadline - self._clock(), 0.0)):
            self._meter.refusal("throttled")
            raise StoreThrottled(
                f"store {self._name!r}: {self._options.concurrency} calls are outstanding already"
            )
        try:
            return self._attempt(groups, deadline)
        except StoreUnavailable as error:
            return self._try_again(groups, deadline, error)
        finally:
            self._slots.release()

    def close(self) -> None:
        self._store.close()

    def samples(self) -> list[StoreSample]:
        """Counters and gauges, named feature_cache_store_*, labelled with the store's name."""
        self._notice_overdue()
        labels = {"store": self._name}
        with self._mutex:
            running = len(self._running)
            overdue = sum(attempt.overdue for attempt in self._running)
        state = self._breaker.state
        return [
            *self._meter.samples(self._name),
            StoreSample(
                "feature_cache_store_breaker_trips_total",
                "How often the circuit breaker opened.",
                "counter",
                self._breaker.trips,
                labels,
            ),
            *(
                StoreSample(
                    "feature_cache_store_breaker_state",
                    "1 for the state that the circuit breaker is in.",
                    "gauge",
                    float(state == each),
                    labels | {"state": each},
                )
                for each in _BREAKER_STATES
            ),
            StoreSample(
                "feature_cache_store_running_calls",
                "Calls that have not returned yet.",
                "gauge",
                running,
                labels,
            ),
            StoreSample(
                "feature_cache_store_overdue_calls",
                "Calls that have not returned yet although their time is over.",
                "gauge",
                overdue,
                labels,
            ),
        ]

    def histograms(self) -> list[StoreHistogram]:
        return [self._meter.histogram(self._name)]

    def _try_again(self, groups: Groups, deadline: float, error: StoreUnavailable) -> Values:
        # The first attempt is replayed to tenacity as the error that it was: its machinery costs
        # 25 µs a call, which calls that succeed at once need not pay.
        first: list[StoreUnavailable] = [error]
        del error  # its traceback holds this frame: a cycle, and the batch's keys with it

        def attempt(groups: Groups, deadline: float) -> Values:
            if first:
                raise first.pop()
            return self._attempt(groups, deadline)

        return self._retrying(attempt, groups, deadline)

    def _attempt(self, groups: Groups, deadline: float) -> Values:
        keys = sum(len(keys) for _, keys in groups)
        self._wait_for_tokens(keys, deadline)
        if self._clock() >= deadline:
            self._meter.refusal("timeout")
            raise StoreTimeout(f"store {self._name!r}: no time is left to ask it")
        generation = self._breaker.permit()
        if generation is None:
            raise self._breaker_is_open()
        started = self._clock()
        attempt = _Attempt(deadline, generation)
        with self._mutex:
            self._running.add(attempt)
        try:
            values = self._call(groups, deadline - started)
        except BaseException as error:  # a store is anybody's code: SystemExit counts too
            blamed = not isinstance(error, StoreThrottled)
            self._end(attempt, _outcome(error), started, keys, failed=blamed)
            raise
        late = self._clock() > deadline
        self._end(attempt, "timeout" if late else "ok", started, keys, failed=late)
        self._count_garbled(groups, values)
        return values

    def _call(self, groups: Groups, timeout_s: float) -> Values:
        """The store's answer; whatever else it raises becomes one of the `StoreError` family."""
        try:
            return self._store.get_many(groups, timeout_s)
        except StoreError:
            raise
        except TimeoutError as error:
            raise StoreTimeout(f"store {self._name!r}: {error}") from error
        except OSError as error:
            raise StoreUnavailable(f"store {self._name!r}: {error}") from error
        except Exception as error:
            raise StoreAnswerError(
                f"store {self._name!r} raised {type(error).__name__}: {error}"
            ) from error

    def _wait_for_tokens(self, keys: int, deadline: float) -> None:
        # Before the tokens: an open breaker fails at once, and its calls cost no tokens.
        if self._breaker.blocked_s() > 0:
            raise self._breaker_is_open()
        if self._bucket is None:
            return
        # At most half of what is left: the call itself needs time too, and tokens spent on a call
        # that then runs out of it are lost to others.
        wait_s = self._bucket.reserve(keys, max(deadline - self._clock(), 0.0) / 2)
        if wait_s is None:
            self._meter.refusal("throttled")
            raise StoreThrottled(
                f"store {self._name!r}: {keys} keys are over its rate limit of "
                f"{self._options.rate_limit:g} keys/s"
            )
        if wait_s > 0:
            self._meter.rate_wait(wait_s)
            self._sleep(wait_s)

    def _breaker_is_open(self) -> StoreBreakerOpen:
        self._meter.refusal("breaker_open")
        return StoreBreakerOpen(
            f"store {self._name!r} failed {self._options.breaker_failures} times in a row; "
            f"next try in {self._breaker.blocked_s():.1f} s"
        )

    def _end(
        self, attempt: _Attempt, outcome: str, started: float, keys: int, *, failed: bool
    ) -> None:
        with self._mutex:
            self._running.discard(attempt)
            told = attempt.overdue
        if not failed:
            # Throttled counts as well: a store that limits us is alive.
            self._breaker.succeeded(attempt.generation)
        elif not told:
            self._breaker.failed(attempt.generation)
        self._meter.attempt(outcome, self._clock() - started, keys)

    def _notice_overdue(self) -> None:
        """Tells the breaker of calls that hang: they may never come back to do it themselves."""
        now = self._clock()
        with self._mutex:
            overdue = [a for a in self._running if not a.overdue and now > a.deadline]
            for attempt in overdue:
                attempt.overdue = True
        for attempt in overdue:
            self._breaker.failed(attempt.generation)

    def _count_garbled(self, groups: Groups, values: Values) -> None:
        try:
            wrong = sum(
                len(found) != len(keys) for found, (_, keys) in zip(values, groups, strict=True)
            )
        except (TypeError, ValueError):
            wrong = len(groups)
        if wrong:
            self._meter.garbled(wrong)

    def _give_up(self, state: RetryCallState) -> bool:
        deadline: float = state.args[1]
        return (
            state.attempt_number > self._options.retries
            or self._clock() + state.upcoming_sleep >= deadline
        )


def _outcome(error: BaseException) -> str:
    """The label of a failure; a store may derive exceptions of its own from the tree's."""
    return next((label for kind, label in _OUTCOMES.items() if isinstance(error, kind)), "error")
