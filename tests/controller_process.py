"""A controller as a process of its own, for tests that stop and kill it:

    python -m tests.controller_process HOSTS NAME CONFIG [--pause-before-write FILE]

CONFIG is a ClusterConfig as JSON. It runs until its standard input ends. With a FILE, the first
write that it would do while FILE exists is preceded by a SIGSTOP to itself: it has decided, and
sleeps. Woken, it waits for a session and then sends what it had decided, and says how that went.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sharding.connection import Connection, Operation, ZooKeeperConfig
from sharding.controller import Controller
from sharding.errors import Conflict
from sharding.model import ClusterConfig

__all__ = ["ControllerProcess"]

_SESSION_S = 1.0


class ControllerProcess:
    """The process, from the outside; a context manager."""

    def __init__(
        self, hosts: str, name: str, config: ClusterConfig, pause_file: Path | None = None
    ) -> None:
        pause = [] if pause_file is None else ["--pause-before-write", str(pause_file)]
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, hosts, name, config.model_dump_json(), *pause],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def is_stopped(self) -> bool:
        """Whether a SIGSTOP holds it."""
        state = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "T"

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def line(self) -> str:
        """The next line that it prints."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def __enter__(self) -> ControllerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        assert self._process.stdout is not None
        self._process.stdout.close()


class _Pausing(Connection):
    """Sleeps once between a decision and its write."""

    pause_file: Path | None = None

    def commit(self, operations: Sequence[Operation]) -> None:
        if self.pause_file is None or not self.pause_file.exists():
            return super().commit(operations)
        self.pause_file = None
        before = self.sessions
        os.kill(os.getpid(), signal.SIGSTOP)
        # The client below would refuse to send in a session that is over; that is no fence yet.
        while self.sessions == before or not self.wait_connected(1):
            pass
        try:
            super().commit(operations)
        except Conflict as error:
            print(f"refused {error.path}", flush=True)
            raise
        print("written", flush=True)
        return None


def _main() -> None:
    hosts, name, config, *pause = sys.argv[1:]
    connection = _Pausing(ZooKeeperConfig(hosts, _SESSION_S))
    connection.pause_file = Path(pause[1]) if pause else None
    controller = Controller(connection, ClusterConfig.model_validate_json(config), name)
    connection.start()
    controller.start()
    sys.stdin.read()
    controller.stop()
    connection.close()


if __name__ == "__main__":
    _main()
