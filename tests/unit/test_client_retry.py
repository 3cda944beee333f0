"""The retry policy as a pure state machine: a manual clock, chosen randomness, no waiting."""

from collections.abc import Generator

import pytest

from cache_daemon import _native, client
from cache_daemon._client_core import Attempt, Pause, attempts
from cache_daemon._client_errors import error_of

_UNAVAILABLE = 14
_RESOURCE_EXHAUSTED = 8

Steps = Generator[Attempt | Pause, _native.RpcError | None, None]


def _failure(code: int, details: str = "said so") -> _native.RpcError:
    error = _native.RpcError(details)
    error.code = code
    error.details = details
    return error


class _Clock:
    """Shows whatever time the test says it is."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _steps(clock: _Clock, timeout_s: float, draw: float = 1.0, **policy: float) -> Steps:
    return attempts(
        client.RetryPolicy(**policy),  # type: ignore[arg-type]
        timeout_s,
        method="batch_get",
        target="host:1",
        clock=clock,
        random=lambda: draw,
    )


def test_the_first_attempt_has_the_whole_timeout() -> None:
    assert next(_steps(_Clock(), 0.05)) == Attempt(0.05)


def test_pauses_double_up_to_their_bound_and_the_deadline_shrinks() -> None:
    clock = _Clock()
    steps = _steps(clock, 10.0, attempts=5, pause_s=0.1, pause_max_s=0.3)
    assert next(steps) == Attempt(10.0)
    seen = []
    for _ in range(4):
        clock.now += 1.0  # the attempt
        pause = steps.send(_failure(_UNAVAILABLE))
        assert isinstance(pause, Pause)
        seen.append(pause.seconds)
        clock.now += pause.seconds
        attempt = next(steps)
        assert isinstance(attempt, Attempt)
        assert attempt.timeout_s == pytest.approx(110.0 - clock.now)
    assert seen == pytest.approx([0.1, 0.2, 0.3, 0.3])
    with pytest.raises(client.Unavailable):
        steps.send(_failure(_UNAVAILABLE))


@pytest.mark.parametrize("draw", [0.0, 0.25, 1.0])
def test_jitter_spreads_the_pause_from_zero_to_its_bound(draw: float) -> None:
    steps = _steps(_Clock(), 10.0, draw=draw, pause_s=0.1, pause_max_s=0.1)
    next(steps)
    pause = steps.send(_failure(_UNAVAILABLE))
    assert isinstance(pause, Pause)
    assert pause.seconds == pytest.approx(0.1 * draw)


def test_no_retry_that_the_deadline_would_cut_off() -> None:
    clock = _Clock()
    steps = _steps(clock, 0.05, pause_s=0.04, pause_max_s=0.04)
    next(steps)
    clock.now += 0.02
    with pytest.raises(client.Unavailable, match="batch_get of host:1"):
        steps.send(_failure(_UNAVAILABLE))


def test_a_refusal_for_want_of_room_is_retried_but_a_message_too_large_is_not() -> None:
    steps = _steps(_Clock(), 1.0)
    next(steps)
    assert isinstance(steps.send(_failure(_RESOURCE_EXHAUSTED, "queue is full")), Pause)
    steps = _steps(_Clock(), 1.0)
    next(steps)
    with pytest.raises(client.InvalidRequest):
        steps.send(_failure(_RESOURCE_EXHAUSTED, "Received message larger than max (99 vs. 9)"))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (1, client.ClientClosed),
        (2, client.ServerFault),
        (3, client.InvalidRequest),
        (4, client.DeadlineExceeded),
        (5, client.UnknownName),
        (7, client.PermissionDenied),
        (11, client.InvalidRequest),
        (12, client.ServerFault),
        (13, client.ServerFault),
        (15, client.ServerFault),
        (16, client.PermissionDenied),
    ],
)
def test_other_failures_end_the_call_at_once_as_their_own_error(
    code: int, expected: type[client.FeatureCacheError]
) -> None:
    steps = _steps(_Clock(), 1.0)
    next(steps)
    with pytest.raises(client.FeatureCacheError, match="said so") as caught:
        steps.send(_failure(code))
    assert type(caught.value) is expected
    assert (caught.value.code, caught.value.details) == (code, "said so")


def test_errors_are_also_what_python_calls_them() -> None:
    kinds = {3: ValueError, 4: TimeoutError, 14: ConnectionError}
    for code, kind in kinds.items():
        assert isinstance(error_of(_failure(code), method="m", target="t"), kind)


@pytest.mark.parametrize(
    "policy", [{"attempts": 0}, {"attempts": 101}, {"pause_s": -1}, {"pause_s": 2.0}]
)
def test_a_policy_without_sense_is_refused(policy: dict[str, float]) -> None:
    with pytest.raises(client.InvalidRequest):
        client.RetryPolicy(**policy)  # type: ignore[arg-type]
