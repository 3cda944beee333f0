"""What autoscalers wait for: a daemon that is warm, or one that is gone.

Both functions ask the admin service now and then, for bounded time. `cli_warmup` has the commands,
`hooks_aws` what AWS wants to be told meanwhile.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from types import FrameType
from typing import Any

from cache_daemon._proto.feature_cache.v1 import admin_pb2
from cache_daemon.cachectl_admin import (
    AdminClient,
    DaemonSilent,
    DaemonUnreachable,
    RequestRefused,
)
from cache_daemon.cachectl_warmup import warmup_dict, warmup_line

__all__ = [
    "HookExit",
    "Outcome",
    "Tell",
    "WaitLimits",
    "drain_until_gone",
    "stop_signals",
    "wait_until_warm",
]

_POLL_S = 0.5
_CALL_S = 5.0  # one call of the admin service
_ENDING = ("DRAINING", "STOPPED")

_Status = admin_pb2.GetStatusResponse
Tell = Callable[[str, _Status | None], None]
"""Shows a line to people; with it what the daemon said, None where it said nothing."""


class HookExit(IntEnum):
    """What an autoscaler sees of a hook."""

    DONE = 0  # warm, or drained
    USAGE = 2  # what typer itself uses, too
    TIMED_OUT = 3
    COLD = 4  # it serves, and its warm-up failed or brought too little
    UNREACHABLE = 5  # nobody answers, or the daemon is about to end
    NOT_TOLD = 6  # AWS could not be told
    SIGNALLED = 143  # SIGTERM or SIGINT came; the shell's number of the former


@dataclass(frozen=True)
class Outcome:
    """How the waiting ended."""

    code: HookExit
    message: str  # for people
    seconds: float
    status: _Status | None = None  # what the daemon said at last

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        status = self.status
        warmup = status.warmup if status is not None and status.HasField("warmup") else None
        return {
            "result": self.code.name.lower(),
            "exit_code": int(self.code),
            "message": self.message,
            "seconds": round(self.seconds, 3),
            "state": status.state if status is not None else None,
            "warmup": warmup_dict(warmup) if warmup is not None else None,
        }


@dataclass(frozen=True)
class WaitLimits:
    """Of `wait_until_warm`, in seconds."""

    timeout_s: float  # of all of it
    reach_s: float  # how long nobody may answer, at first and later
    min_hit_ratio: float | None = None  # predicted; less counts as cold


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Is set by SIGTERM and SIGINT, so that whoever waits can end in order. Main thread only.

    A second one kills, should that take too long.
    """
    stop = threading.Event()
    before: dict[signal.Signals, Any] = {}

    def deliver(number: int, _frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, deliver)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_until_warm(address: str, limits: WaitLimits, stop: threading.Event, tell: Tell) -> Outcome:
    """Waits until the daemon whose admin service is at `address` serves after its warm-up.

    The daemon need not be there yet. Never raises for what the daemon does.
    """
    began = heard = time.monotonic()
    last: _Status | None = None
    trouble = ""
    while True:
        now = time.monotonic()
        call_s = max(_POLL_S, min(_CALL_S, began + limits.timeout_s - now))
        try:
            last = _status(address, call_s)
            trouble = ""
        except (DaemonUnreachable, RequestRefused) as error:
            trouble = str(error)
        now = time.monotonic()
        if not trouble and last is not None:
            heard = now
            judged = _judge(last, limits.min_hit_ratio)
            if judged is not None:
                return Outcome(*judged, now - began, last)
        over = now - began >= limits.timeout_s
        if trouble and (over or now - heard >= limits.reach_s):
            before = f"; before, it was {_line(last)}" if last is not None else ""
            return Outcome(HookExit.UNREACHABLE, trouble + before, now - began, last)
        if over:
            assert last is not None
            return Outcome(
                HookExit.TIMED_OUT,
                f"not warm within {limits.timeout_s:g} s: {_line(last)}",
                now - began,
                last,
            )
        if trouble:
            tell(trouble, None)
        elif last is not None:
            tell(_line(last), last)
        if stop.wait(_POLL_S):
            return Outcome(
                HookExit.SIGNALLED, "a signal ended the wait", time.monotonic() - began, last
            )


def drain_until_gone(
    address: str, within_s: float, timeout_s: float, stop: threading.Event, tell: Tell
) -> Outcome:
    """Asks the daemon to drain, and waits until its process has ended.

    `within_s` is how long accepted requests may take, 0: as the daemon's config says; `timeout_s`
    how long this waits. The daemon goes on to drain when the wait is over.
    """
    began = time.monotonic()
    last: _Status | None = None
    asked = False
    while True:
        try:
            status = _status(address, _CALL_S)
            if last is not None and _is_another(status, last):
                return _gone(began, "the daemon ended, and another one began", last)
            last = status
            if status.state == "STOPPED":
                return _gone(began, "the daemon ended", last)
            if not asked:
                with AdminClient(address, _CALL_S) as client:
                    client.drain(within_s)
                asked = True
            tell(f"{status.state}, for {time.monotonic() - began:.0f} s", status)
        except DaemonSilent as error:
            tell(str(error), None)
        except DaemonUnreachable as error:
            if not asked:
                return Outcome(HookExit.UNREACHABLE, str(error), time.monotonic() - began)
            return _gone(began, "the daemon ended", last)
        except RequestRefused as error:
            if not asked:
                return Outcome(HookExit.USAGE, str(error), time.monotonic() - began, last)
            # The call was cut when the listener closed: ask once more.
        seconds = time.monotonic() - began
        if seconds >= timeout_s:
            code = HookExit.TIMED_OUT if asked else HookExit.UNREACHABLE
            message = f"the daemon is still there after {timeout_s:g} s"
            return Outcome(code, message, seconds, last)
        if stop.wait(min(_POLL_S / 2, timeout_s)):
            message = "a signal ended the wait; the daemon drains on"
            return Outcome(HookExit.SIGNALLED, message, time.monotonic() - began, last)


def _judge(status: _Status, min_hit_ratio: float | None) -> tuple[HookExit, str] | None:
    """What a state means to who waits for a warm daemon; None: wait on."""
    if status.state in _ENDING:
        return HookExit.UNREACHABLE, f"the daemon is {status.state}: somebody stops it"
    if status.state != "SERVING":
        return None
    line = _line(status)
    warmup = status.warmup
    if warmup.serving_cold:
        return HookExit.COLD, f"the daemon serves cold: {line}"
    if min_hit_ratio is not None:
        known = status.HasField("warmup") and warmup.state != "off"
        if not known or warmup.predicted_hit_ratio < 0:
            return HookExit.COLD, f"its predicted hit ratio is not known: {line}"
        if warmup.predicted_hit_ratio < min_hit_ratio:
            return HookExit.COLD, f"less than {min_hit_ratio:.1%} would hit: {line}"
    return HookExit.DONE, line


def _line(status: _Status) -> str:
    """State and warm-up, in a line."""
    if status.state == "RECOVERING":
        return f"{status.state} what an earlier process left"
    if not status.HasField("warmup") or status.state in ("STARTING", *_ENDING):
        return status.state
    return f"{status.state}: {warmup_line(status.warmup)}"


def _status(address: str, timeout_s: float) -> _Status:
    # A connection of its own each time: one that was refused tries again ever more seldom.
    with AdminClient(address, timeout_s) as client:
        return client.status()


def _is_another(now: _Status, before: _Status) -> bool:
    """Whether another process answers; in a container it has the same pid."""
    return now.pid != before.pid or now.uptime_seconds < before.uptime_seconds


def _gone(began: float, message: str, last: _Status | None) -> Outcome:
    return Outcome(HookExit.DONE, message, time.monotonic() - began, last)
