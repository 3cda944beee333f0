"""One daemon of a benchmark, as a process."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from benchmarks._servers import RunningServer
from cache_daemon._proto.feature_cache.v1 import admin_pb2
from cache_daemon.cachectl_admin import AdminClient, DaemonUnreachable, RequestRefused
from cache_daemon.client import Client

__all__ = ["Daemon", "DaemonError"]

_START_S = 60.0
_STOP_S = 60.0
_CALL_S = 10.0
_POLL_S = 0.05
_LOG_LINES_SHOWN = 20
_ROOT_FOLDER = Path(__file__).resolve().parent.parent


class DaemonError(RuntimeError):
    """A daemon does not do what it should; carries the end of its log."""


class Daemon:
    """Any number of processes, one after the other, with one config at one address.

    A context manager: at its end no process is left.
    """

    def __init__(self, folder: Path, sections: Mapping[str, Any]) -> None:
        """`folder` is made, and names it; `sections` of the config beyond `listen`."""
        folder.mkdir()
        self.name = folder.name
        self.target = f"127.0.0.1:{_free_port()}"
        self.config_path = folder / "config.yaml"
        self._admin = f"unix:{folder}/admin.sock"
        self._log = folder / "daemon.log"
        self._process: subprocess.Popen[bytes] | None = None
        config = {"listen": {"grpc": [self.target], "admin": self._admin}, **sections}
        self.config_path.write_text(yaml.safe_dump(config, sort_keys=False))

    def __enter__(self) -> "Daemon":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        if self._process is None or not self.running:
            raise DaemonError(f"{self.name} has ended:\n{self.log_end()}")
        return self._process.pid

    @property
    def server(self) -> RunningServer:
        host, port = self.target.rsplit(":", 1)
        return RunningServer(self.pid, host, int(port))

    def start(self) -> "Daemon":
        """Starts a process; see `wait`."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-c", "from cache_daemon.cli import main; main()", "run"),
                    *("--config", str(self.config_path)),
                ],
                # Stores of this package are found by it.
                env=os.environ | {"PYTHONPATH": str(_ROOT_FOLDER)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self

    def wait(self, timeout_s: float = _START_S) -> float:
        """Waits until it serves; returns the seconds. Raises DaemonError when it does not."""
        began = time.monotonic()
        while time.monotonic() < began + timeout_s and self.running:
            with contextlib.suppress(DaemonUnreachable, RequestRefused):
                if self.status().state == "SERVING":
                    return time.monotonic() - began
            time.sleep(_POLL_S)
        raise DaemonError(f"{self.name} does not serve:\n{self.log_end()}")

    def kill(self) -> None:
        """SIGKILL; nothing when it does not run."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def stop(self) -> None:
        """An orderly stop. Raises DaemonError when it is none."""
        os.kill(self.pid, signal.SIGTERM)
        process, self._process = self._process, None
        if process is None:
            return
        try:
            code = process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise DaemonError(f"{self.name} does not stop:\n{self.log_end()}") from None
        if code != 0:
            raise DaemonError(f"{self.name} stopped with {code}:\n{self.log_end()}")

    def status(self) -> admin_pb2.GetStatusResponse:
        with AdminClient(self._admin, _CALL_S) as admin:
            return admin.status()

    def sample(self, name: str) -> float:
        """The sum of a metric over all labels. Raises DaemonError where there is none."""
        with AdminClient(self._admin, _CALL_S) as admin:
            found = [sample.value for sample in admin.stats().samples if sample.name == name]
        if not found:
            raise DaemonError(f"{self.name} has no metric {name}")
        return sum(found)

    def client(self, **options: Any) -> Client:
        return Client(self.target, **({"timeout": _CALL_S} | options))

    def log_end(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return "\n".join(lines[-_LOG_LINES_SHOWN:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
