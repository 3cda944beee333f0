"""A daemon that is started, filled, ended and started again, and what a client sees of it."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from cache_daemon.cachectl_admin import AdminClient
from cache_daemon.client import Client, FeatureCacheError, RetryPolicy, Status

__all__ = [
    "NAMESPACE",
    "VALUE_BYTES",
    "Ids",
    "RestartedDaemon",
    "SharedMemory",
    "fill",
    "hits",
    "load",
    "shared_memory",
]

Ids = npt.NDArray[np.uint64]

NAMESPACE = "pin"
VALUE_BYTES = 200
_BATCH = 8192
_DEV_SHM = Path("/dev/shm")
_START_S = 120.0
_STOP_S = 60.0
_PROBE_S = 0.001
_CALL_S = 30.0
_LOG_LINES_SHOWN = 20
_ONCE = RetryPolicy(attempts=1)


class RestartedDaemon:
    """One config, one memory in `shared`, any number of processes one after the other.

    A context manager: at its end no process and no shared memory is left. `folder` takes config,
    sockets and log.
    """

    def __init__(self, folder: Path, shared: Path, sections: dict[str, Any]) -> None:
        """`sections` of the config beyond `listen` and `persist`."""
        self._folder = folder
        self._shared = shared
        self._name = f"fc-bench-{secrets.token_hex(4)}"
        self._socket = folder / "data.sock"
        self.target = f"unix:{self._socket}"
        self._process: subprocess.Popen[bytes] | None = None
        config = {
            "listen": {"grpc": [self.target], "admin": f"unix:{folder}/admin.sock"},
            "persist": {"dir": str(shared), "name": self._name},
            **sections,
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def __enter__(self) -> "RestartedDaemon":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        for path in self._shared.glob(f"{self._name}*"):
            path.unlink(missing_ok=True)

    def start(self, probe: int | None = None) -> float:
        """Starts a process; returns the seconds from its exec to the first reply.

        probe: an id; the reply must be a hit of it. Raises RuntimeError when none comes.
        """
        self._socket.unlink(missing_ok=True)  # what a killed process left would be probed in vain
        began = time.perf_counter()
        with (self._folder / "daemon.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("cache-daemon")),
                    *("run", "--config", str(self._folder / "config.yaml")),
                ],
                env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        while time.perf_counter() < began + _START_S:
            if self._process.poll() is not None:
                break
            if self._answers(probe):
                return time.perf_counter() - began
            time.sleep(_PROBE_S)
        raise RuntimeError(f"the daemon does not serve what it should:\n{self._log_end()}")

    def stop(self) -> float:
        """An orderly stop; returns its seconds. Raises RuntimeError when it is none."""
        process = self._running()
        began = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        code = process.wait(_STOP_S)
        if code != 0:
            raise RuntimeError(f"the daemon stopped with {code}:\n{self._log_end()}")
        self._process = None
        return time.perf_counter() - began

    def kill(self) -> None:
        """SIGKILL."""
        process = self._running()
        process.kill()
        process.wait()
        self._process = None

    def client(self) -> Client:
        return Client(self.target, timeout=_CALL_S, retry=_ONCE)

    def sample(self, name: str, **labels: str) -> float:
        """The sum of a metric's values that have these labels. Raises RuntimeError for none."""
        with AdminClient(f"unix:{self._folder}/admin.sock", _CALL_S) as admin:
            samples = admin.stats().samples
        found = [
            sample.value
            for sample in samples
            if sample.name == name and labels.items() <= dict(sample.labels).items()
        ]
        if not found:
            raise RuntimeError(f"the daemon shows no {name}{labels or ''}")
        return sum(found)

    def adoption_ms(self) -> float:
        """How long the start took to adopt the memory. Raises RuntimeError when it did not."""
        with AdminClient(f"unix:{self._folder}/admin.sock", _CALL_S) as admin:
            start = admin.status().start
        if start.memory not in ("clean", "checked"):
            raise RuntimeError(f"the start was {start.memory}: {start.memory_reason}")
        return start.memory_seconds * 1e3

    def _answers(self, probe: int | None) -> bool:
        # A socket first: a channel that finds none waits a second before it tries again.
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as plain:
            try:
                plain.connect(str(self._socket))
            except OSError:
                return False
        with self.client() as client:
            try:
                asked = np.array([0 if probe is None else probe], np.uint64)
                column = client.batch_get({NAMESPACE: asked}, cache_only=True)[NAMESPACE]
            except FeatureCacheError:
                return False
        if probe is not None and column.hits != 1:
            raise RuntimeError(
                f"the first reply is {Status(column.statuses[0]).name}, not a hit:\n"
                f"{self._log_end()}"
            )
        return True

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError(f"the daemon has ended:\n{self._log_end()}")
        return self._process

    def _log_end(self) -> str:
        lines = (self._folder / "daemon.log").read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES_SHOWN:])


@dataclass(frozen=True)
class SharedMemory:
    """A tmpfs for memory that persists, and whether it gives huge pages to who asks for them."""

    path: Path
    large_pages: bool


@contextlib.contextmanager
def shared_memory() -> Iterator[SharedMemory]:
    """A tmpfs of its own with huge pages where this process may mount one, else /dev/shm.

    /dev/shm itself gives none unless it is mounted with `huge=`, whatever `shmem_enabled` says.
    """
    with tempfile.TemporaryDirectory(prefix="fc-bench-shm-") as folder:
        options = "huge=advise,mode=0700,size=90%"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "fc-bench", folder],
            capture_output=True,
            check=False,
        )
        if mounted.returncode != 0:
            yield SharedMemory(_DEV_SHM, large_pages=False)
            return
        try:
            yield SharedMemory(Path(folder), large_pages=True)
        finally:
            subprocess.run(["umount", folder], check=True)


def values_of(ids: Ids, version: int) -> npt.NDArray[np.uint8]:
    """One row an id: the id, the version, and bytes that follow from both."""
    words = np.empty((ids.size, VALUE_BYTES // 8), np.uint64)
    words[:, 0] = ids
    words[:, 1] = version
    words[:, 2:] = ids[:, None] * np.uint64(0x9E3779B97F4A7C15) + np.arange(
        words.shape[1] - 2, dtype=np.uint64
    )
    return words.view(np.uint8)


def fill(daemon: RestartedDaemon, items: int) -> None:
    """Puts ids 0 to `items`. Raises RuntimeError when one is refused."""
    with daemon.client() as client:
        for first in range(0, items, _BATCH):
            ids = np.arange(first, min(first + _BATCH, items), dtype=np.uint64)
            if not client.batch_put({NAMESPACE: (ids, values_of(ids, 1))}).all_stored:
                raise RuntimeError("the daemon does not take all items")


def hits(daemon: RestartedDaemon, items: int) -> npt.NDArray[np.bool_]:
    """Which of the ids are a hit, with the right value. Raises RuntimeError for a wrong one."""
    found = np.zeros(items, np.bool_)
    with daemon.client() as client:
        for first in range(0, items, _BATCH):
            ids = np.arange(first, min(first + _BATCH, items), dtype=np.uint64)
            column = client.batch_get({NAMESPACE: ids}, cache_only=True)[NAMESPACE]
            there = column.found
            found[first : first + ids.size] = there
            words = column.values.view(np.uint64).reshape(-1, VALUE_BYTES // 8)
            version = words[:, 1]
            right = words[:, 0] == ids[there]
            right &= (version == 1) | (version == 2)
            right &= words[:, -1] == values_of(ids[there], 1).view(np.uint64)[:, -1]
            if not right.all():
                raise RuntimeError(f"{int((~right).sum())} values are wrong after id {first}")
    return found


@contextlib.contextmanager
def load(daemon: RestartedDaemon, overwritten: Ids, deleted: Ids) -> Iterator[dict[str, int]]:
    """Two clients overwrite, delete and read, until they are done or the daemon is gone.

    Yields how many keys were written and read, as it goes on.
    """
    done = {"puts": 0, "deletes": 0, "gets": 0}
    stop = threading.Event()

    def run(part: int) -> None:
        rng = np.random.default_rng(part)
        puts, deletes = overwritten[part::2], deleted[part::2]
        turns = max(1, puts.size // 1000)
        deletes_a_turn = -(-deletes.size // turns)
        with contextlib.suppress(FeatureCacheError), daemon.client() as client:
            for turn in range(turns):
                if stop.is_set():
                    return
                ids = puts[turn * 1000 : (turn + 1) * 1000]
                client.batch_put({NAMESPACE: (ids, values_of(ids, 2))})
                done["puts"] += ids.size
                ids = deletes[turn * deletes_a_turn : (turn + 1) * deletes_a_turn]
                if ids.size:
                    client.batch_delete({NAMESPACE: ids})
                    done["deletes"] += ids.size
                for _ in range(4):
                    client.batch_get({NAMESPACE: rng.choice(overwritten, 1000)}, cache_only=True)
                    done["gets"] += 1000

    threads = [threading.Thread(target=run, args=[part]) for part in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        stop.set()
        for thread in threads:
            thread.join()
