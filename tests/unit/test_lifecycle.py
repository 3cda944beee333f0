"""The daemon's states, its signals, and what it tells the service manager (over a real socket)."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_daemon.lifecycle import Drained, DrainRequest, Inbox, Lifecycle, State, StopSignal
from cache_daemon.sdnotify import Notifier


def test_states_go_forward_only() -> None:
    lifecycle = Lifecycle()
    seen: list[State] = []
    lifecycle.add_listener(seen.append)
    assert lifecycle.state is State.STARTING
    assert lifecycle.advance(State.RECOVERING)
    assert lifecycle.advance(State.WARMING)
    assert lifecycle.advance(State.SERVING)
    assert not lifecycle.advance(State.SERVING)
    assert not lifecycle.advance(State.WARMING)
    assert not lifecycle.advance(State.RECOVERING)
    assert lifecycle.advance(State.DRAINING)
    assert not lifecycle.advance(State.SERVING)
    assert lifecycle.advance(State.STOPPED)
    assert not lifecycle.advance(State.DRAINING)
    assert seen == [State.RECOVERING, State.WARMING, State.SERVING, State.DRAINING, State.STOPPED]


def test_nothing_to_recover_is_skipped() -> None:
    lifecycle = Lifecycle()
    assert lifecycle.advance(State.SERVING)
    assert not lifecycle.advance(State.RECOVERING)


def test_a_failed_start_goes_straight_to_stopped() -> None:
    lifecycle = Lifecycle()
    assert lifecycle.advance(State.STOPPED)
    assert not lifecycle.advance(State.SERVING)


def test_a_listener_sees_the_new_state_and_may_fail() -> None:
    lifecycle = Lifecycle()
    seen: list[State] = []

    def broken(_state: State) -> None:
        raise RuntimeError("on purpose")

    lifecycle.add_listener(broken)
    lifecycle.add_listener(lambda _: seen.append(lifecycle.state))
    assert lifecycle.advance(State.SERVING)
    assert seen == [State.SERVING]


def test_waiting_ends_when_a_state_is_reached_or_passed() -> None:
    lifecycle = Lifecycle()
    assert not lifecycle.wait_for(State.SERVING, 0.01)
    thread = threading.Thread(target=lifecycle.advance, args=[State.DRAINING])
    thread.start()
    assert lifecycle.wait_for(State.SERVING, 10)
    thread.join()


def test_many_threads_make_each_transition_once() -> None:
    lifecycle = Lifecycle()
    seen: list[State] = []
    lifecycle.add_listener(seen.append)
    barrier = threading.Barrier(8)

    def climb() -> None:
        barrier.wait()
        for state in State:
            lifecycle.advance(state)

    threads = [threading.Thread(target=climb) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [State.RECOVERING, State.WARMING, State.SERVING, State.DRAINING, State.STOPPED]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_become_events_while_they_are_caught(number: signal.Signals) -> None:
    inbox = Inbox()
    before = signal.getsignal(number)
    with inbox.signals():
        os.kill(os.getpid(), number)
        assert inbox.get(10) == StopSignal(number.name)
    assert signal.getsignal(number) == before


def test_a_signal_wakes_a_main_thread_that_waits_for_ever() -> None:
    inbox = Inbox()
    with inbox.signals():
        main = threading.main_thread().ident
        assert main is not None
        timer = threading.Timer(0.05, signal.pthread_kill, [main, signal.SIGTERM])
        timer.start()
        assert inbox.get(None) == StopSignal("SIGTERM")


def test_a_signal_that_another_thread_takes_wakes_the_main_thread() -> None:
    inbox = Inbox()
    with inbox.signals():

        def take_it() -> None:
            time.sleep(0.05)  # so that the main thread waits; if not, the test is only weaker
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

        thread = threading.Thread(target=take_it)
        thread.start()
        started = time.monotonic()
        assert inbox.get(20) == StopSignal("SIGTERM")
        assert time.monotonic() - started < 10
        thread.join()


def test_released_signals_are_the_kernels_again() -> None:
    inbox = Inbox()
    with inbox.signals():
        inbox.release_signals()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_events_come_in_order() -> None:
    inbox = Inbox()
    assert inbox.get(0.01) is None
    inbox.put(DrainRequest(1.5))
    inbox.put(Drained(True))
    assert inbox.get(1) == DrainRequest(1.5)
    assert inbox.get(1) == Drained(True)


# ---- the service manager -------------------------------------------------------------------------


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """A socket that listens as systemd does, and the address that it would announce."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        if request.param == "path":
            address = bound = str(tmp_path / "notify")
        else:
            name = f"feature-cache-test-{os.getpid()}"
            address, bound = f"@{name}", f"\0{name}"
        listener.bind(bound)
        listener.settimeout(10)
        yield address, listener


def test_the_service_manager_is_told(manager: tuple[str, socket.socket]) -> None:
    address, listener = manager
    with Notifier(address) as notifier:
        notifier.recovering("recovering nvm: 40% of 1,000", 30)
        assert listener.recv(4096) == (
            b"EXTEND_TIMEOUT_USEC=30000000\nSTATUS=recovering nvm: 40% of 1,000"
        )
        notifier.ready("serving on 127.0.0.1:7070")
        assert listener.recv(4096) == b"READY=1\nSTATUS=serving on 127.0.0.1:7070"
        notifier.alive()
        assert listener.recv(4096) == b"WATCHDOG=1"
        notifier.stopping("draining")
        assert listener.recv(4096) == b"STOPPING=1\nSTATUS=draining"
        notifier.still_stopping(30)
        assert listener.recv(4096) == b"EXTEND_TIMEOUT_USEC=30000000"
    notifier.alive()
    listener.settimeout(0.05)
    with pytest.raises(TimeoutError):
        listener.recv(4096)


def test_nobody_to_tell_is_no_failure(tmp_path: Path) -> None:
    with Notifier("") as notifier:
        notifier.ready("")
    with Notifier(str(tmp_path / "nobody")) as notifier:
        notifier.ready("")
        notifier.alive()


def test_a_manager_that_does_not_read_does_not_block_us(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        with Notifier(str(tmp_path / "notify")) as notifier:
            for _ in range(2000):  # far more than a socket's queue holds
                notifier.alive()
