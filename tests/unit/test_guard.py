"""The guard around a store: limits, retries, breaker, counts. Stores here misbehave on purpose."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from cache_daemon.stores import (
    Groups,
    StoreAnswerError,
    StoreBreakerOpen,
    StoreConfigError,
    StoreError,
    StoreThrottled,
    StoreTimeout,
    StoreUnavailable,
    Values,
    make_store,
    options_model,
)
from cache_daemon.stores.guard import GuardedStore, GuardOptions

GROUPS: list[tuple[str, list[bytes]]] = [("pin_text", [b"a", b"b"]), ("user", [b"c"])]
GOOD: Values = [[b"1", None], [b"3"]]

Step = Values | Exception | Callable[[], Values]


class ScriptedStore:
    """Does one step of its script a call, the last one for ever."""

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps)
        self.calls: list[float] = []  # the timeouts that it was given
        self.closed = False

    def get_many(self, groups: Groups, timeout_s: float) -> Values:  # noqa: ARG002
        self.calls.append(timeout_s)
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        if isinstance(step, Exception):
            raise step
        return step() if callable(step) else step

    def close(self) -> None:
        self.closed = True


class Time:
    """A clock that moves only by being slept on."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def passing(self, seconds: float, then: Step) -> Callable[[], Values]:
        def step() -> Values:
            self.now += seconds
            if isinstance(then, Exception):
                raise then
            return then() if callable(then) else then

        return step


def guard(store: Any, time_: Time, **options: Any) -> GuardedStore:
    return GuardedStore(
        "features",
        store,
        GuardOptions.model_validate(options),
        clock=time_.clock,
        sleep=time_.sleep,
    )


def value(guarded: GuardedStore, name: str, **labels: str) -> float:
    found = [
        sample.value
        for sample in guarded.samples()
        if sample.name == f"feature_cache_store_{name}"
        and sample.labels == {"store": "features", **labels}
    ]
    assert len(found) == 1, (name, labels, found)
    return found[0]


def test_a_good_answer_passes_as_it_is_and_is_counted() -> None:
    store, time_ = ScriptedStore(GOOD), Time()
    guarded = guard(store, time_, timeout="500ms")

    assert guarded.get_many(GROUPS, 0.2) is GOOD
    assert guarded.get_many(GROUPS, 9.0) is GOOD

    assert store.calls == pytest.approx([0.2, 0.5])  # the caller's time, the guard's own
    assert value(guarded, "calls_total", outcome="ok") == 2
    assert value(guarded, "asked_keys_total") == 6
    assert value(guarded, "running_calls") == 0
    histogram = guarded.histograms()[0]
    assert sum(histogram.counts) == 2
    assert len(histogram.counts) == len(histogram.bounds) + 1
    guarded.close()
    assert store.closed


def test_unavailable_is_retried_with_growing_random_pauses() -> None:
    store, time_ = ScriptedStore(*[StoreUnavailable("down")] * 3, GOOD), Time()
    guarded = guard(store, time_, retries=3, retry_backoff="10ms", breaker_failures=0)

    assert guarded.get_many(GROUPS, 1.0) is GOOD

    assert len(store.calls) == 4
    assert len(time_.slept) == 3
    assert len(set(time_.slept)) == 3
    for pause, bound in zip(time_.slept, (0.01, 0.02, 0.04), strict=True):
        assert 0 <= pause <= bound
    assert value(guarded, "retries_total") == 3
    assert value(guarded, "calls_total", outcome="unavailable") == 3


def test_retries_end_and_the_last_error_is_raised() -> None:
    store, time_ = ScriptedStore(StoreUnavailable("first"), StoreUnavailable("last")), Time()
    guarded = guard(store, time_, retries=1)
    with pytest.raises(StoreUnavailable, match="last"):
        guarded.get_many(GROUPS, 1.0)
    assert len(store.calls) == 2


def test_no_retry_is_started_that_could_not_end_in_time() -> None:
    time_ = Time()
    store = ScriptedStore(time_.passing(0.09, StoreUnavailable("slow and down")))
    guarded = guard(store, time_, retries=10, retry_backoff="1m", retry_backoff_max="1h")
    started = time_.now
    with pytest.raises(StoreUnavailable):
        guarded.get_many(GROUPS, 0.1)
    assert time_.now - started <= 0.1
    assert len(store.calls) == 1


@pytest.mark.parametrize(
    ("raised", "expected", "outcome"),
    [
        (StoreTimeout("late"), StoreTimeout, "timeout"),
        (StoreThrottled("429"), StoreThrottled, "throttled"),
        (StoreAnswerError("no"), StoreAnswerError, "answer_error"),
        (StoreError("?"), StoreError, "error"),
        (TimeoutError("socket"), StoreTimeout, "timeout"),
        (KeyError("bug in a store"), StoreAnswerError, "answer_error"),
    ],
)
def test_other_failures_are_not_retried_and_are_of_the_family(
    raised: Exception, expected: type[StoreError], outcome: str
) -> None:
    store, time_ = ScriptedStore(raised), Time()
    guarded = guard(store, time_, retries=5)
    with pytest.raises(StoreError) as caught:
        guarded.get_many(GROUPS, 1.0)
    assert type(caught.value) is expected
    assert len(store.calls) == 1
    assert value(guarded, "calls_total", outcome=outcome) == 1


def test_a_refused_connection_of_a_plain_store_counts_as_unavailable() -> None:
    store, time_ = ScriptedStore(ConnectionRefusedError("nobody"), GOOD), Time()
    assert guard(store, time_).get_many(GROUPS, 1.0) is GOOD
    assert len(store.calls) == 2


def test_the_breaker_opens_fails_at_once_probes_and_closes() -> None:
    store, time_ = ScriptedStore(*[StoreUnavailable("down")] * 4, GOOD), Time()
    guarded = guard(store, time_, retries=0, breaker_failures=3, breaker_pause="2s")
    for _ in range(3):
        assert guarded.state == "closed"
        with pytest.raises(StoreUnavailable):
            guarded.get_many(GROUPS, 1.0)
    assert guarded.state == "open"

    with pytest.raises(StoreBreakerOpen, match=r"next try in 2\.0 s"):
        guarded.get_many(GROUPS, 1.0)
    assert len(store.calls) == 3  # the store was left alone

    time_.now += 2.0
    with pytest.raises(StoreUnavailable, match="down"):  # the probe fails: open again
        guarded.get_many(GROUPS, 1.0)
    with pytest.raises(StoreBreakerOpen):
        guarded.get_many(GROUPS, 1.0)
    assert len(store.calls) == 4

    time_.now += 2.0
    assert guarded.get_many(GROUPS, 1.0) is GOOD
    assert guarded.state == "closed"
    assert value(guarded, "breaker_trips_total") == 2
    assert value(guarded, "calls_total", outcome="breaker_open") == 2
    assert value(guarded, "breaker_state", state="closed") == 1
    assert value(guarded, "breaker_state", state="open") == 0


def test_retries_stop_when_the_breaker_opens() -> None:
    store, time_ = ScriptedStore(StoreUnavailable("down")), Time()
    guarded = guard(store, time_, retries=10, breaker_failures=2)
    with pytest.raises(StoreBreakerOpen):
        guarded.get_many(GROUPS, 1.0)
    assert len(store.calls) == 2


def test_throttled_by_the_store_does_not_open_the_breaker() -> None:
    store, time_ = ScriptedStore(StoreThrottled("429")), Time()
    guarded = guard(store, time_, breaker_failures=2)
    for _ in range(5):
        with pytest.raises(StoreThrottled):
            guarded.get_many(GROUPS, 1.0)
    assert guarded.state == "closed"


def test_answers_after_the_deadline_open_the_breaker() -> None:
    time_ = Time()
    store = ScriptedStore(time_.passing(0.3, GOOD))
    guarded = guard(store, time_, timeout="200ms", breaker_failures=2)
    for _ in range(2):
        assert guarded.get_many(GROUPS, 1.0) is GOOD
    assert guarded.state == "open"
    assert value(guarded, "calls_total", outcome="timeout") == 2


def test_only_one_thread_probes_a_half_open_breaker() -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> Values:
        entered.set()
        assert leave.wait(10)
        return GOOD

    store, time_ = ScriptedStore(StoreUnavailable("down"), hold), Time()
    guarded = guard(store, time_, retries=0, breaker_failures=1, breaker_pause="1s")
    with pytest.raises(StoreUnavailable):
        guarded.get_many(GROUPS, 1.0)
    time_.now += 1.0
    probe = threading.Thread(target=guarded.get_many, args=(GROUPS, 1.0))
    probe.start()
    assert entered.wait(10)
    assert guarded.state == "half_open"
    with pytest.raises(StoreBreakerOpen):
        guarded.get_many(GROUPS, 1.0)
    leave.set()
    probe.join(10)
    assert guarded.state == "closed"
    assert guarded.get_many(GROUPS, 1.0) is GOOD


def test_calls_that_hang_open_the_breaker_before_they_return() -> None:
    entered, leave = threading.Semaphore(0), threading.Event()

    def hang() -> Values:
        entered.release()
        assert leave.wait(10)
        return GOOD

    store, time_ = ScriptedStore(hang), Time()
    guarded = guard(store, time_, concurrency=3, timeout="1s", breaker_failures=2)
    threads = [threading.Thread(target=guarded.get_many, args=(GROUPS, 1.0)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert entered.acquire(timeout=10)
    assert guarded.state == "closed"
    assert value(guarded, "running_calls") == 2
    assert value(guarded, "overdue_calls") == 0

    time_.now += 1.1
    assert guarded.state == "open"
    assert value(guarded, "overdue_calls") == 2
    with pytest.raises(StoreBreakerOpen):
        guarded.get_many(GROUPS, 1.0)
    leave.set()
    for thread in threads:
        thread.join(10)
    # What they report now is from before the breaker opened, and changes nothing.
    assert guarded.state == "open"
    assert value(guarded, "breaker_trips_total") == 1
    assert value(guarded, "running_calls") == 0


def test_no_more_calls_than_the_concurrency_are_outstanding() -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> Values:
        entered.set()
        assert leave.wait(10)
        return GOOD

    store = ScriptedStore(hold)
    guarded = GuardedStore("features", store, GuardOptions(concurrency=1))
    holder = threading.Thread(target=guarded.get_many, args=(GROUPS, 5.0))
    holder.start()
    assert entered.wait(10)
    started = time.monotonic()
    with pytest.raises(StoreThrottled, match="1 calls are outstanding"):
        guarded.get_many(GROUPS, 0.05)
    assert time.monotonic() - started < 2
    assert len(store.calls) == 1
    leave.set()
    holder.join(10)


def test_the_rate_limit_delays_then_throttles() -> None:
    store, time_ = ScriptedStore(GOOD), Time()
    guarded = guard(store, time_, rate_limit=30, burst=3, breaker_failures=1)
    guarded.get_many(GROUPS, 1.0)  # 3 keys: the burst
    assert time_.slept == []
    guarded.get_many(GROUPS, 1.0)
    assert time_.slept == [pytest.approx(0.1)]
    assert value(guarded, "rate_wait_seconds_total") == pytest.approx(0.1)

    with pytest.raises(StoreThrottled, match="30 keys/s"):
        guarded.get_many(GROUPS, 0.1)  # would wait 0.1 s, more than half of the time
    assert len(store.calls) == 2
    assert guarded.state == "closed"
    guarded.get_many(GROUPS, 1.0)  # what was refused took no tokens
    assert time_.slept[1:] == [pytest.approx(0.1)]


def test_the_rate_holds_over_time_for_batches_above_the_burst() -> None:
    store, time_ = ScriptedStore(GOOD), Time()
    guarded = guard(store, time_, rate_limit=100, burst=1, timeout="1h")
    started = time_.now
    for _ in range(1000):
        guarded.get_many(GROUPS, 100.0)
    assert 3 * 1000 / (time_.now - started) == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize(
    ("answer", "garbled"),
    [
        ([[b"1"], [b"3"]], 1),
        ([[b"1", None, b"2"], []], 2),
        ([[b"1", None]], 2),
        ([], 2),
        (None, 2),
        (7, 2),
        ([[b"1", None], None], 2),
    ],
)
def test_garbage_is_passed_on_and_counted(answer: Any, garbled: int) -> None:
    store, time_ = ScriptedStore(lambda: answer), Time()
    guarded = guard(store, time_)
    assert guarded.get_many(GROUPS, 1.0) is answer
    assert value(guarded, "garbled_groups_total") == garbled


class OptionlessStore(ScriptedStore):
    """A user's store that takes its options as keyword arguments."""

    def __init__(self, answer: str) -> None:
        super().__init__([[answer.encode()]])


def test_module_class_stores_are_made_from_their_options() -> None:
    name = f"{__name__}:OptionlessStore"
    assert options_model(name) is None
    store = make_store("mine", name, {"answer": "yes"})
    assert list(store.get_many([("n", [b"k"])], 1.0)[0]) == [b"yes"]
    with pytest.raises(StoreConfigError, match=r"'mine'.*unexpected keyword argument 'wrong'"):
        make_store("mine", name, {"wrong": 1})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mysql", "unknown store type 'mysql'; use lmdb, redis or module:Class"),
        ("no_such_module:Store", "cannot import 'no_such_module'"),
        ("json:NoClass", "'json' has no class 'NoClass'"),
        ("json:JSONDecoder", "has no class 'JSONDecoder' with get_many"),
        (":Store", "unknown store type"),
    ],
)
def test_a_store_type_that_does_not_exist_is_named(kind: str, message: str) -> None:
    with pytest.raises(StoreConfigError, match=message):
        make_store("s", kind, {})


def test_pauses_differ_between_callers() -> None:
    """Clients that failed together must not come back together."""
    pauses: list[Sequence[float]] = []
    for _ in range(3):
        time_ = Time()
        guarded = guard(ScriptedStore(StoreUnavailable("down")), time_, breaker_failures=0)
        with pytest.raises(StoreUnavailable):
            guarded.get_many(GROUPS, 10.0)
        pauses.append(time_.slept)
    assert pauses[0] != pauses[1] != pauses[2]


def test_nothing_leaks_when_many_threads_meet_random_failures() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    errors = [StoreUnavailable("x"), StoreTimeout("x"), StoreThrottled("x"), KeyError("x")]

    class FlakyStore(ScriptedStore):
        running = 0
        most = 0

        def get_many(self, groups: Groups, timeout_s: float) -> Values:  # noqa: ARG002
            with mutex:
                self.running += 1
                self.most = max(self.most, self.running)
                error = chance.choice([*errors, *[None] * 6])
            time.sleep(0.0005)
            with mutex:
                self.running -= 1
            if error is not None:
                raise error
            return GOOD

    mutex, chance = threading.Lock(), random.Random(seed)
    store = FlakyStore(GOOD)
    options = {"concurrency": 3, "retry_backoff": "1ms", "breaker_pause": "5ms"}
    guarded = GuardedStore("features", store, GuardOptions.model_validate(options))
    answered: list[bool] = []

    def call() -> None:
        for _ in range(50):
            try:
                good = guarded.get_many(GROUPS, 5.0) is GOOD
            except StoreError:
                good = False
            with mutex:
                answered.append(good)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()

    assert len(answered) == 8 * 50
    assert store.most == 3
    assert value(guarded, "running_calls") == value(guarded, "overdue_calls") == 0
    assert value(guarded, "calls_total", outcome="ok") == sum(answered) > 0
    asked = sum(guarded.histograms()[0].counts)
    assert value(guarded, "asked_keys_total") == 3 * asked
    time.sleep(0.01)  # the pause of a breaker that may be open
    store.steps = [GOOD]
    errors.clear()
    assert guarded.get_many(GROUPS, 5.0) is GOOD
    assert guarded.state == "closed"
