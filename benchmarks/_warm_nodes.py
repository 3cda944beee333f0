"""Daemons that record, warm up and serve, and the store that they ask, for `warmup`."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import redis
import yaml

from benchmarks._servers import RunningServer
from cache_daemon._proto.feature_cache.v1 import admin_pb2
from cache_daemon.cachectl_admin import AdminClient, DaemonUnreachable, RequestRefused
from cache_daemon.client import Client, Status

__all__ = ["Node", "NodeError", "Request", "StoreMeter", "ask", "fill_redis", "wait_for_snapshots"]

Ids = npt.NDArray[np.uint64]
Request = Mapping[str, Ids]
"""The ids that one request asks for, by namespace."""

VALUE_BYTES = 200
_START_S = 60.0
_STOP_S = 30.0
_CALL_S = 10.0
_POLL_S = 0.05
_LOG_LINES_SHOWN = 20
_FILL_KEYS = 10_000
_HITS = np.array([Status.HIT_DRAM, Status.HIT_NVM], np.uint8)
_ROOT_FOLDER = Path(__file__).resolve().parent.parent


class NodeError(RuntimeError):
    """A daemon does not do what it should; carries the end of its log."""


class Node:
    """One daemon process, from construction until the end of the context."""

    def __init__(self, folder: Path, sections: Mapping[str, Any]) -> None:
        """`sections` of the config beyond `listen`. See `wait`."""
        folder.mkdir()
        self._folder = folder
        self._admin = f"unix:{folder}/admin.sock"
        self._ready = folder / "ready.json"
        config = {"listen": {"grpc": ["127.0.0.1:0"], "admin": self._admin}, **sections}
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        with (folder / "daemon.log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-c", "from cache_daemon.cli import main; main()", "run"),
                    *("--config", str(path), "--ready-file", str(self._ready)),
                ],
                # Stores of this package are found by it.
                env=os.environ | {"PYTHONPATH": str(_ROOT_FOLDER)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> "Node":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def target(self) -> str:
        return str(json.loads(self._ready.read_text())["grpc"][0])

    @property
    def server(self) -> RunningServer:
        host, port = self.target.rsplit(":", 1)
        return RunningServer(self.pid, host, int(port))

    def client(self) -> Client:
        return Client(self.target, timeout=_CALL_S)

    def status(self) -> admin_pb2.GetStatusResponse | None:
        """None while it does not answer. Raises NodeError when it has ended."""
        if self._process.poll() is not None:
            raise NodeError(f"the daemon has ended:\n{self.log_end()}")
        with (
            contextlib.suppress(DaemonUnreachable, RequestRefused),
            AdminClient(self._admin, _CALL_S) as admin,
        ):
            return admin.status()
        return None

    def sample(self, name: str) -> float:
        """The sum of a metric over all labels; 0 where there is none."""
        with AdminClient(self._admin, _CALL_S) as admin:
            return sum(s.value for s in admin.stats().samples if s.name == name)

    def wait(self, timeout_s: float = _START_S) -> float:
        """Waits until it serves; returns the seconds. Raises NodeError when it does not."""
        began = time.monotonic()
        while time.monotonic() < began + timeout_s:
            status = self.status()
            if status is not None and status.state == "SERVING":
                return time.monotonic() - began
            time.sleep(_POLL_S)
        raise NodeError(f"the daemon does not serve:\n{self.log_end()}")

    def stop(self) -> None:
        """An orderly stop. Raises NodeError when it is none."""
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            raise NodeError(f"the daemon does not stop:\n{self.log_end()}") from None
        if code != 0:
            raise NodeError(f"the daemon stopped with {code}:\n{self.log_end()}")

    def log_end(self) -> str:
        lines = (self._folder / "daemon.log").read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES_SHOWN:])


def ask(client: Client, request: Request) -> tuple[int, int]:
    """Sends one request; returns how many cells were hits, of how many.

    Raises NodeError where a cell has no value and the store has one for each.
    """
    hits = cells = 0
    reply = client.batch_get(request)
    for name in request:
        column = reply[name]
        hits += int(np.isin(column.statuses, _HITS).sum())
        cells += len(column.statuses)
        if not column.found.all():
            status = Status(int(column.statuses[~column.found][0])).name
            raise NodeError(f"a cell of {name} has no value: {status}")
    return hits, cells


def fill_redis(server: RunningServer, namespace: str, ids: Ids) -> None:
    """One value an id, as the daemon's store of type redis asks for it."""
    with redis.Redis(port=server.port) as client:
        for first in range(0, ids.size, _FILL_KEYS):
            part = ids[first : first + _FILL_KEYS]
            prefix = namespace.encode() + b":"
            client.mset(
                {
                    prefix + key: key * (VALUE_BYTES // 8)
                    for key in (int(number).to_bytes(8, "little") for number in part)
                }
            )


@dataclass(frozen=True)
class _Reading:
    at: float
    keys: int


class StoreMeter:
    """Reads how many keys Redis has been asked for, many times a second. A context manager."""

    _EVERY_S = 0.02

    def __init__(self, server: RunningServer) -> None:
        self._client = redis.Redis(port=server.port)
        self._stop = threading.Event()
        self._readings: list[_Reading] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "StoreMeter":
        self._read()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._read()
        self._client.close()

    def _run(self) -> None:
        while not self._stop.wait(self._EVERY_S):
            self._read()

    def _read(self) -> None:
        # The reply says what was counted at some moment between these two; the later one makes a
        # second that begins here look busier, never idler.
        before = time.monotonic()
        stats: Any = self._client.info("stats")
        self._readings.append(
            _Reading(before, int(stats["keyspace_hits"]) + int(stats["keyspace_misses"]))
        )

    @property
    def keys(self) -> int:
        """Asked for meanwhile."""
        return self._readings[-1].keys - self._readings[0].keys

    def busiest_second(self) -> float:
        """The most keys asked for in any second, wherever it begins."""
        at = np.array([reading.at for reading in self._readings])
        keys = np.array([reading.keys for reading in self._readings], np.float64)
        # The count a second after each reading, between the two readings around that moment.
        later = np.interp(at + 1.0, at, keys)
        return float((later - keys).max())

    def seconds_busy(self) -> float:
        """From the first key that was asked for to the last."""
        moved = [
            after.at
            for before, after in zip(self._readings, self._readings[1:], strict=False)
            if after.keys > before.keys
        ]
        return moved[-1] - moved[0] if moved else 0.0


def wait_for_snapshots(folder: Path, timeout_s: float) -> int:
    """Waits until the windows that were recorded are uploaded; returns the bytes of their logs.

    `folder`: where a `file://` store lies. Raises NodeError when nothing comes, or it goes on.
    """
    deadline = time.monotonic() + timeout_s
    before: Sequence[Path] = ()
    since = time.monotonic()
    while time.monotonic() < deadline:
        logs = sorted(folder.rglob("*.fcrl"))
        if list(before) != logs:
            before, since = logs, time.monotonic()
        if logs and time.monotonic() - since > timeout_s / 3:
            return sum(path.stat().st_size for path in logs)
        time.sleep(_POLL_S)
    raise NodeError(f"{len(before)} snapshots in {folder} after {timeout_s:g} s")
