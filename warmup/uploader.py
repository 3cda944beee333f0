"""Brings finished windows of the local request log to the snapshot store.

The oldest first, one at a time, again and again until it succeeds or the window is too old. A local
file goes when its manifest is there; so a process that was killed leaves nothing that the next one
does not upload, or find uploaded.
"""

from __future__ import annotations

import logging
import mmap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from warmup.errors import SnapshotError
from warmup.layout import LOG_SUFFIX
from warmup.manifest import LogInfo
from warmup.snapshots import SnapshotStore

__all__ = ["OwnedShards", "UploadState", "Uploader"]

_log = logging.getLogger(__name__)

_POLL_S = 1.0
_RETRY_S = (2.0, 120.0)  # first and longest pause after a failure
_EXPIRE_EVERY_S = 600.0
_COMPLAIN_EVERY_S = 60.0

OwnedShards = Callable[[], "tuple[int, Sequence[int]] | None"]
"""The number of shards and those that the node's keys are of, rising; None: it has all keys."""


@dataclass(frozen=True)
class UploadState:
    """At the moment of asking; counts since the start."""

    uploaded: int = 0  # windows
    uploaded_bytes: int = 0
    failed: int = 0  # attempts
    dropped: int = 0  # windows that went unsent: too old, or damaged
    expired: int = 0  # objects of the store
    pending: int = 0  # finished windows on the local disk
    oldest_pending_seconds: float = 0.0
    problem: str = ""  # of the last attempt; "": it succeeded


class Uploader:
    """Works in a thread of its own from `start` until `stop`. `inspect` reads a log's bytes.

    `inspect` raises ValueError for what is no whole log.
    """

    def __init__(
        self,
        folder: Path,
        store: SnapshotStore,
        inspect: Callable[[memoryview], LogInfo],
        *,
        retention_s: float,
        owned: OwnedShards | None = None,
        clock: Callable[[], float] = time.time,
        poll_s: float = _POLL_S,
    ) -> None:
        self._folder = folder
        self._store = store
        self._inspect = inspect
        self._retention_s = retention_s
        self._owned = owned
        self._clock = clock
        self._poll_s = poll_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upload", daemon=True)
        self._lock = threading.Lock()
        self._state = UploadState()  # guarded by _lock
        self._complained_at = -_COMPLAIN_EVERY_S

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 2.0) -> bool:
        """Ends it; False when an upload still runs, which is left in its thread. Idempotent."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def state(self) -> UploadState:
        pending = self._finished()
        with self._lock:
            state = self._state
        oldest_s = 0.0
        if pending:
            try:
                oldest_s = max(0.0, self._clock() - pending[0].stat().st_mtime)
            except OSError:
                oldest_s = 0.0  # it went meanwhile
        return replace(state, pending=len(pending), oldest_pending_seconds=oldest_s)

    def _run(self) -> None:
        pause_s = _RETRY_S[0]
        expire_at = time.monotonic()
        while not self._stopping.is_set():
            try:
                worked = self._upload_all()
                if time.monotonic() >= expire_at:
                    self._count(expired=self._store.expire(self._retention_s, self._clock()))
                    expire_at = time.monotonic() + _EXPIRE_EVERY_S
            except SnapshotError as error:
                self._failed(str(error))
            except Exception as error:
                _log.exception("the upload of request logs failed")
                self._failed(f"{type(error).__name__}: {error}")
            else:
                pause_s = _RETRY_S[0]
                if worked:
                    continue
                self._stopping.wait(self._poll_s)
                continue
            self._stopping.wait(pause_s)
            pause_s = min(pause_s * 2, _RETRY_S[1])

    def _finished(self) -> list[Path]:
        """The oldest first: their names begin with their window's time."""
        return sorted(self._folder.glob(f"*{LOG_SUFFIX}"))

    def _upload_all(self) -> bool:
        """Whether there was something to do."""
        files = self._finished()
        for path in files:
            if self._stopping.is_set():
                break
            self._upload(path)
        return bool(files)

    def _upload(self, path: Path) -> None:
        try:
            age_s = self._clock() - path.stat().st_mtime
            if age_s > self._retention_s:
                _log.warning("request log: %s is too old to be uploaded, and goes", path.name)
                path.unlink()
                self._count(dropped=1)
                return
            info = self._inspected(path)
            owned = self._owned() if self._owned is not None else None
            count, shards = owned or (0, ())
            size = path.stat().st_size
            manifest = self._store.upload(
                path, info, self._clock(), shard_count=count, shards=shards
            )
        except FileNotFoundError:
            return  # the recorder needed the room
        except ValueError as error:
            _log.warning("request log: %s is damaged, and goes: %s", path.name, error)
            path.unlink(missing_ok=True)
            self._count(dropped=1)
            return
        path.unlink(missing_ok=True)
        self._count(uploaded=1, uploaded_bytes=size)
        _log.info(
            "request log: uploaded %s, %d keys in %d bytes",
            *(manifest.log, manifest.keys, manifest.size),
        )

    def _inspected(self, path: Path) -> LogInfo:
        # Mapped: a log may be larger than what a node has to spare.
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            memoryview(data) as view,
        ):
            return self._inspect(view)

    def _count(self, **more: int) -> None:
        with self._lock:
            counts = {name: getattr(self._state, name) + by for name, by in more.items()}
            self._state = replace(self._state, problem="", **counts)

    def _failed(self, problem: str) -> None:
        with self._lock:
            self._state = replace(self._state, failed=self._state.failed + 1, problem=problem)
        if time.monotonic() - self._complained_at >= _COMPLAIN_EVERY_S:
            self._complained_at = time.monotonic()
            _log.warning("request log: it cannot be uploaded, and is tried again: %s", problem)
