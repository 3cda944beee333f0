"""Real servers for tests, as child processes on loopback, each on a port of its own.

A server that is not installed makes the test fail: nothing here skips. To add one, derive from
`Server`, say how it is started and when it is ready, and give it a fixture in
tests/integration/conftest.py.
"""

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import redis

__all__ = ["RedisServer", "Server", "free_port", "wait_until"]


def free_port() -> int:
    """A TCP port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0, what: str = "") -> None:
    """Polls until `condition` holds; AssertionError when it does not within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what or condition}"
        time.sleep(0.01)


class Server:
    """One server process; a context manager. Subclasses say `command` and `is_ready`."""

    program = ""  # as found on PATH
    package = ""  # Debian's, for the message when it is missing
    ready_timeout_s = 20.0

    def __init__(self, directory: Path) -> None:
        """`directory` is the server's own, for data, sockets and its log."""
        self.directory = directory
        self.log_path = directory / f"{self.program}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """Program and arguments; called at each start."""
        raise NotImplementedError

    def is_ready(self) -> bool:
        """True once the server answers. Must not raise while it does not."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.program} is not running"
        return self._process.pid

    def start(self) -> None:
        """Starts it and waits until it is ready; again after a kill, on the same port and data."""
        assert self._process is None, f"{self.program} runs already"
        if shutil.which(self.program) is None:
            raise AssertionError(
                f"{self.program} is not installed, and this test needs the real one; "
                f"install Debian's {self.package} (make setup does)"
            )
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(), cwd=self.directory, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + self.ready_timeout_s
        while not self.is_ready():
            ended = self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                self.kill()
                reason = "ended at once" if ended else "did not get ready"
                log_end = self.log_path.read_text(errors="replace")[-2000:]
                raise AssertionError(f"{self.program} {reason}:\n{log_end}")
            time.sleep(0.01)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL when that does not help. Idempotent."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._process = None

    def kill(self) -> None:
        """SIGKILL: the server has no chance to say goodbye."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def pause(self) -> None:
        """SIGSTOP: connections stay, nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


class RedisServer(Server):
    """Redis without persistence, on TCP and a Unix socket."""

    program = "redis-server"
    package = "redis-server"

    def __init__(self, directory: Path, *arguments: str, password: str | None = None) -> None:
        """`arguments` are further ones of redis-server."""
        super().__init__(directory)
        self.port = free_port()
        self.unix_socket = directory / "redis.sock"
        self.password = password
        self._arguments = arguments

    def command(self) -> list[str]:
        return [
            self.program,
            *("--port", str(self.port), "--bind", "127.0.0.1"),
            *("--unixsocket", str(self.unix_socket)),
            *("--save", "", "--appendonly", "no", "--dir", str(self.directory)),
            *(("--requirepass", self.password) if self.password else ()),
            *self._arguments,
        ]

    def client(self) -> redis.Redis:
        """A redis-py client, to prepare data and to look at it."""
        return redis.Redis(unix_socket_path=str(self.unix_socket), password=self.password)

    def client_over_tcp(self) -> redis.Redis:
        return redis.Redis(host="127.0.0.1", port=self.port, password=self.password)

    def is_ready(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.RedisError:
            return False
