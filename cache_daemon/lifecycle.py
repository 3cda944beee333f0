"""The daemon's states, and the signals that move it from one to the next.

STARTING → RECOVERING → WARMING → SERVING → DRAINING → STOPPED, always forward; a daemon without
anything to recover or to warm from, a start that fails and a stop at once skip what lies between.
"""

import logging
import queue
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from types import FrameType

__all__ = [
    "DrainRequest",
    "Drained",
    "Event",
    "Finished",
    "Inbox",
    "Lifecycle",
    "Listener",
    "NodeMade",
    "Routed",
    "State",
    "StopSignal",
    "Warmed",
]

_log = logging.getLogger(__name__)


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class State(str, Enum):
    """Where the daemon is in its life; the value is what operators see."""

    STARTING = "STARTING"
    RECOVERING = "RECOVERING"  # what an earlier process left behind is looked at
    WARMING = "WARMING"  # it answers, but nobody shall ask yet: the cache is being filled
    SERVING = "SERVING"
    DRAINING = "DRAINING"
    STOPPED = "STOPPED"


_ORDER = list(State)
Listener = Callable[[State], None]


class Lifecycle:
    """The one place that knows the daemon's state. Thread-safe.

    Listeners are called in the thread that advances, in the order in which they were added, one
    transition at a time; one that raises is logged and does not stop the others.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._advancing = threading.Lock()  # held over the listeners, so they see states in order
        self._changed = threading.Condition()
        self._listeners: list[Listener] = []  # guarded by _changed
        self._state = State.STARTING  # guarded by _changed

    @property
    def state(self) -> State:
        with self._changed:
            return self._state

    @property
    def uptime_s(self) -> float:
        """Seconds since this object was made."""
        return time.monotonic() - self._started

    def add_listener(self, listener: Listener) -> None:
        """`listener(state)` is called after every later transition; it must not advance."""
        with self._changed:
            self._listeners.append(listener)

    def advance(self, state: State) -> bool:
        """Moves on to `state`; False, and nothing happens, when the daemon is there or beyond."""
        with self._advancing:
            with self._changed:
                if _ORDER.index(state) <= _ORDER.index(self._state):
                    return False
                _log.info("state %s -> %s", self._state.value, state.value)
                self._state = state
                self._changed.notify_all()
                listeners = tuple(self._listeners)
            for listener in listeners:
                _call(listener, state)
            return True

    def wait_for(self, state: State, timeout_s: float) -> bool:
        """Waits until `state` or a later one is reached; False when time runs out first."""
        with self._changed:
            return self._changed.wait_for(
                lambda: _ORDER.index(self._state) >= _ORDER.index(state), timeout_s
            )


def _call(listener: Listener, state: State) -> None:
    try:
        listener(state)
    except Exception:
        _log.exception("a listener of state %s failed", state.value)


@dataclass(frozen=True)
class StopSignal:
    """SIGTERM or SIGINT came."""

    name: str


@dataclass(frozen=True)
class DrainRequest:
    """An operator asks for a drain; timeout in seconds, None for the configured one."""

    timeout_s: float | None = None


@dataclass(frozen=True)
class Drained:
    """The drain ended; `complete` when no accepted request had to be cancelled."""

    complete: bool


@dataclass(frozen=True)
class NodeMade:
    """The pipeline runs, or why it cannot."""

    error: Exception | None = None


@dataclass(frozen=True)
class Routed:
    """A root knows its leaves."""


@dataclass(frozen=True)
class Warmed:
    """The warm-up ended; why the daemon shall not serve, if so."""

    error: Exception | None = None


@dataclass(frozen=True)
class Finished:
    """What shall outlive the process is written, as far as it could be."""


Event = StopSignal | DrainRequest | Drained | NodeMade | Routed | Warmed | Finished


class Inbox:
    """What the daemon's main thread waits for.

    The kernel may hand a signal to any thread. Python then runs the handler in the main thread, but
    does not wake it, so the main thread waits on a socket that the C-level handler writes to
    (`signal.set_wakeup_fd`). Events themselves are in a SimpleQueue, the one queue whose `put` may
    be called from a handler at any point, since it takes no lock.
    """

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._wake, self._waker = socket.socketpair()
        self._wake.setblocking(False)
        self._waker.setblocking(False)

    def put(self, event: Event) -> None:
        """From any thread or signal handler."""
        self._events.put(event)
        with suppress(BlockingIOError):  # full: a wake-up is under way already
            self._waker.send(b"\0")

    def get(self, timeout_s: float | None) -> Event | None:
        """The next event; None when none came in time. None as timeout waits for ever."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            # The bytes first: one that comes after them is for an event that we may not have seen.
            with suppress(BlockingIOError):
                self._wake.recv(4096)
            with suppress(queue.Empty):
                return self._events.get_nowait()
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return None
            select.select([self._wake], [], [], left)

    def release_signals(self) -> None:
        """Gives SIGTERM and SIGINT back to the kernel's default: the next one kills."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Turns SIGTERM and SIGINT into events for a while. Main thread only."""

        def deliver(number: int, _frame: FrameType | None) -> None:
            self.put(StopSignal(signal.Signals(number).name))

        old = {number: signal.signal(number, deliver) for number in _SIGNALS}
        old_fd = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(old_fd)
            for number, handler in old.items():
                signal.signal(number, handler)
