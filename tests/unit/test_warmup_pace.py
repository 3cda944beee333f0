"""How many keys may be asked for now, by a clock that the tests hold in their hands."""

from dataclasses import dataclass

from warmup.pace import Pace

_RATE = 10_000.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Result:
    fetched: int = 0
    held: int = 0
    not_found: int = 0
    timed_out: int = 0
    throttled: int = 0
    error: int = 0
    skipped: int = 0
    seconds: float = 0.002


def run(pace: Pace, clock: Clock, seconds: float, **outcome: float) -> list[tuple[float, int]]:
    """Asks every 10 ms, answered at once; returns when how many were asked for."""
    asked: list[tuple[float, int]] = []
    end = clock.now + seconds
    while clock.now < end:
        if taken := pace.take(100_000):
            asked.append((clock.now, taken))
            share = outcome.get("failed", 0.0)
            failed = round(taken * share)
            pace.ended(
                taken,
                Result(fetched=taken - failed, error=failed, seconds=outcome.get("took", 0.002)),
            )
        clock.now += 0.01
    return asked


def busiest_second(asked: list[tuple[float, int]]) -> int:
    return max(sum(count for at, count in asked if begin <= at < begin + 1.0) for begin, _ in asked)


def test_the_limit_holds_in_every_second() -> None:
    clock = Clock()
    pace = Pace(_RATE, clock=clock)
    asked = run(pace, clock, 5.0)
    assert 0.95 * _RATE < busiest_second(asked) <= _RATE
    assert sum(count for _, count in asked) > 0.93 * 5 * _RATE


def test_a_stall_is_not_made_up_for() -> None:
    clock = Clock()
    pace = Pace(_RATE, clock=clock)
    asked = run(pace, clock, 2.0)
    clock.now += 3.0  # nobody asked
    asked += run(pace, clock, 2.0)
    assert busiest_second(asked) <= _RATE


def test_what_the_cache_had_costs_nothing() -> None:
    clock = Clock()
    pace = Pace(1000.0, clock=clock)
    clock.now += 1.0
    taken = pace.take(100)
    assert taken > 0
    assert pace.take(100) == 0
    pace.ended(taken, Result(held=taken))
    assert pace.take(100) == taken


def test_a_slow_store_holds_back_what_is_outstanding() -> None:
    clock = Clock()
    pace = Pace(_RATE, clock=clock)
    total = 0
    for _ in range(500):  # nothing is answered for five seconds
        total += pace.take(100_000)
        clock.now += 0.01
    assert total == pace.outstanding
    assert total < 0.05 * _RATE


def test_failures_bring_the_rate_down_and_success_up_again() -> None:
    clock = Clock()
    pace = Pace(_RATE, clock=clock)
    run(pace, clock, 2.0)
    full = pace.rate
    run(pace, clock, 3.0, failed=0.3)
    assert pace.rate < 0.3 * full
    run(pace, clock, 15.0)
    assert pace.rate == full


def test_longer_answers_bring_the_rate_down() -> None:
    clock = Clock()
    pace = Pace(_RATE, clock=clock)
    run(pace, clock, 2.0)
    full = pace.rate
    run(pace, clock, 4.0, took=0.1)
    assert pace.rate < 0.3 * full
    run(pace, clock, 15.0)
    assert pace.rate == full


def test_a_store_that_is_down_is_left_alone_for_a_while() -> None:
    clock = Clock()
    pace = Pace(_RATE, clock=clock)
    run(pace, clock, 2.0)
    asked = run(pace, clock, 30.0, failed=1.0)
    assert len(asked) < 12
    assert sum(count for _, count in asked) < 0.05 * 30 * _RATE
    clock.now += 10.0
    assert sum(count for _, count in run(pace, clock, 5.0)) > 0
    run(pace, clock, 20.0)
    assert pace.rate > 0.9 * _RATE


def test_the_limit_may_change_at_any_time() -> None:
    clock = Clock()
    pace = Pace(0.0, clock=clock)
    assert run(pace, clock, 1.0) == []
    pace.set_limit(_RATE)
    assert sum(count for _, count in run(pace, clock, 1.0)) > 0.9 * _RATE
    pace.set_limit(0.0)
    clock.now += 0.05
    pace.take(1000)
    assert run(pace, clock, 1.0) == []


def test_a_slow_limit_still_goes_on() -> None:
    clock = Clock()
    pace = Pace(2.0, clock=clock)
    asked = run(pace, clock, 10.0)
    assert 15 <= sum(count for _, count in asked) <= 20
