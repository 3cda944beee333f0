"""The composition root itself, in this process: what a slow start and a slow end look like to a
service manager, to signals and to operators. As a process it is in tests/e2e."""

import contextlib
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_daemon import app
from cache_daemon.app import Daemon, Outcome, Pipeline, StartError
from cache_daemon.cachectl_admin import AdminClient, RequestRefused
from cache_daemon.config import Config, ConfigError, ServiceManager, parse_config
from cache_daemon.lifecycle import State


@pytest.fixture
def config(tmp_path: Path, shared: Path) -> Config:
    return parse_config(
        f"listen: {{grpc: ['unix:{tmp_path}/data.sock'], admin: 'unix:{tmp_path}/admin.sock', "
        "http: '127.0.0.1:0'}\n"
        "memory: {size: 16MiB}\n"
        f"persist: {{dir: {shared}, name: life}}\n"
        "namespaces: {pin: {domains: {main: {budget: 50%}}}}\n"
    )


@pytest.fixture
def heard(tmp_path: Path) -> Iterator[socket.socket]:
    """What a service manager hears."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        yield listener


def words(heard: socket.socket) -> list[str]:
    """All that was heard so far."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(heard.recv(4096).decode())
    return found


class Run:
    """A daemon in the main thread, and a thread beside it that does something to it."""

    def __init__(self, config: Config, tmp_path: Path) -> None:
        self.daemon = Daemon(config, ServiceManager(str(tmp_path / "notify")))
        self.admin = f"unix:{tmp_path}/admin.sock"
        self.seconds = 0.0  # from the last signal to the end
        self._signalled = 0.0

    def wait_for(self, state: State) -> None:
        assert self.daemon.lifecycle.wait_for(state, 20)

    def signal(self) -> None:
        self._signalled = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)

    def run(self, beside: threading.Thread | None = None) -> Outcome:
        if beside is not None:
            beside.start()
        outcome = self.daemon.run()
        self.seconds = time.monotonic() - self._signalled
        if beside is not None:
            beside.join(10)
        return outcome


def test_a_slow_end_asks_for_time_and_a_second_signal_skips_it(
    config: Config, tmp_path: Path, heard: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "_EXTEND_S", 0.2)
    let_go, began = threading.Event(), threading.Event()

    def slow(_pipeline: Pipeline) -> None:
        began.set()
        let_go.wait(30)

    monkeypatch.setattr(Pipeline, "shut_down", slow)
    run = Run(config, tmp_path)
    states: list[str] = []

    def beside() -> None:
        run.wait_for(State.SERVING)
        run.signal()
        assert began.wait(10)
        with AdminClient(run.admin, 10) as admin:  # it answers all the time
            states.append(admin.status().state)
        time.sleep(0.5)
        run.signal()

    outcome = run.run(threading.Thread(target=beside))
    let_go.set()
    assert states == ["DRAINING"]
    # Every request was answered; what is left runs in a thread under which the process ends.
    assert outcome == Outcome(drained=True, threads_left=True)
    assert run.seconds < 5
    assert words(heard).count("EXTEND_TIMEOUT_USEC=200000") >= 2


def test_an_end_in_order_leaves_nothing_behind(config: Config, tmp_path: Path) -> None:
    run = Run(config, tmp_path)

    def beside() -> None:
        run.wait_for(State.SERVING)
        run.signal()

    outcome = run.run(threading.Thread(target=beside))
    assert outcome == Outcome(drained=True, threads_left=False)
    assert run.daemon.lifecycle.state is State.STOPPED
    # The memory is whole, and not in use any more.
    with_same = Run(config, tmp_path)

    def look() -> None:
        with_same.wait_for(State.SERVING)
        with AdminClient(with_same.admin, 10) as admin:
            found.append(admin.status().start.memory)
        with_same.signal()

    found: list[str] = []
    with_same.run(threading.Thread(target=look))
    assert found == ["clean"]


def test_a_slow_start_is_seen_from_everywhere_and_ends_at_a_signal(
    config: Config,
    tmp_path: Path,
    heard: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(app, "_TELL_PROGRESS_S", 0.1)
    let_go = threading.Event()

    def slow(_pipeline: Pipeline) -> None:
        let_go.wait(30)
        raise StartError("it was let go")

    monkeypatch.setattr(Pipeline, "_make_node", slow)
    run = Run(config, tmp_path)
    seen: dict[str, str] = {}

    def beside() -> None:
        run.wait_for(State.RECOVERING)
        with AdminClient(run.admin, 10) as admin:
            status = admin.status()
            seen["state"] = status.state
            with pytest.raises(RequestRefused, match="recovering"):
                admin.resize("pin", "main", 1 << 20)
            for path in ("healthz", "metrics"):
                with urllib.request.urlopen(f"http://{status.http_address}/{path}") as reply:
                    seen[path] = reply.read().decode()
        time.sleep(0.4)
        run.signal()

    with caplog.at_level("INFO"):
        outcome = run.run(threading.Thread(target=beside))
    let_go.set()
    assert outcome == Outcome(drained=True, threads_left=True)
    assert run.seconds < 5
    assert seen["state"] == "RECOVERING"
    assert '"state": "RECOVERING"' in seen["healthz"]
    assert 'feature_cache_state{state="RECOVERING"} 1.0' in seen["metrics"]
    assert 'feature_cache_recovery_progress{phase=""} 0.0' in seen["metrics"]
    assert "EXTEND_TIMEOUT_USEC=30000000\nSTATUS=recovering" in words(heard)
    assert "before anything was served" in caplog.text


def test_an_operator_ends_a_slow_start(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()

    def slow(_pipeline: Pipeline) -> None:
        let_go.wait(30)
        raise StartError("it was let go")

    monkeypatch.setattr(Pipeline, "_make_node", slow)
    run = Run(config, tmp_path)

    def beside() -> None:
        run.wait_for(State.RECOVERING)
        with AdminClient(run.admin, 10) as admin:
            admin.drain(0)

    outcome = run.run(threading.Thread(target=beside))
    let_go.set()
    assert outcome == Outcome(drained=True, threads_left=True)


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (MemoryError(), StartError, "cannot reserve 16MiB of memory: the system refuses"),
        (OSError(13, "persist: a: it is not ours"), StartError, "^persist: a: it is not ours$"),
        (OSError("without a number"), StartError, "^without a number$"),
        (ValueError("persist.name"), ConfigError, "the engine refuses it: persist.name"),
        (RuntimeError("unheard of"), RuntimeError, "unheard of"),
    ],
)
def test_what_the_engine_refuses_is_told(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    expected: type[Exception],
    message: str,
) -> None:
    def refuse(*_arguments: object) -> None:
        raise error

    monkeypatch.setattr("cache_daemon.pipeline.Node", refuse)
    run = Run(config, tmp_path)
    with pytest.raises(expected, match=message):
        run.run()
    assert run.daemon.lifecycle.state is State.STOPPED
    assert not (tmp_path / "admin.sock").exists()


def test_an_end_that_fails_is_told_and_does_not_hang(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken:
        def stop(self) -> None: ...

        def shutdown(self) -> bool:
            raise RuntimeError("on purpose")

    shut_down = Pipeline.shut_down

    def fail(pipeline: Pipeline) -> None:
        pipeline._node = Broken()  # type: ignore[assignment]
        shut_down(pipeline)

    monkeypatch.setattr(Pipeline, "shut_down", fail)
    run = Run(config, tmp_path)

    def beside() -> None:
        run.wait_for(State.SERVING)
        run.signal()

    outcome = run.run(threading.Thread(target=beside))
    assert outcome.drained
    assert "the next start checks what it left" in caplog.text


def test_what_does_not_fit_into_the_time_is_told(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    class Slow:
        def shutdown(self) -> bool:
            return False

    pipeline = Pipeline(config)
    pipeline._node = Slow()  # type: ignore[assignment]
    pipeline.shut_down()
    assert "not all was written for the next start" in caplog.text
    assert "persist.shutdown_limit is 20s" in caplog.text
