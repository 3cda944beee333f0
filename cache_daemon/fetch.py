"""The fetch loop: carries batches of misses from the native queues to a feature store and back.

Nothing here runs per key. Native code forms the batches, bounds their number and gives up on a call
at its timeout; what a store returns later is dropped there.
"""

import logging
import threading
import time
from typing import Protocol

from cache_daemon._native import FetchBatch
from cache_daemon.stores import Store, StoreError, StoreThrottled, StoreTimeout

__all__ = ["BatchSource", "FetchLoop"]

_log = logging.getLogger(__name__)

_WAIT_S = 1.0  # a stop wakes take_fetch; this bounds what a missed wake-up may cost
_PAUSE_AFTER_FAULT_S = 0.1
_LOG_EVERY_S = 5.0


class BatchSource(Protocol):
    """Where batches come from: a `Node`."""

    def take_fetch(self, store: str, wait_s: float) -> FetchBatch | None: ...


class FetchLoop:
    """Answers the misses of one store from `concurrency` threads.

    The threads are daemonic: a store call that never returns cannot keep the process alive.
    """

    def __init__(self, source: BatchSource, name: str, store: Store, concurrency: int):
        self._source = source
        self.name = name
        self._store = store
        self._stopping = threading.Event()
        self._complaints = _Complaints(name)
        self._threads = [
            threading.Thread(target=self._run, name=f"fetch-{name}-{number}", daemon=True)
            for number in range(concurrency)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def request_stop(self) -> None:
        """Takes no more batches; call it before `Node.stop`, which wakes the threads."""
        self._stopping.set()

    def join(self, timeout_s: float) -> bool:
        """Waits for all threads together; False when a store call still runs after that."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._take_and_answer()

    def _take_and_answer(self) -> None:
        batch = None
        try:
            batch = self._source.take_fetch(self.name, _WAIT_S)
            if batch is not None:
                self._answer(batch)
        except Exception:
            # Neither take_fetch nor complete/fail should raise. If they do, going on serves the
            # other batches; the pause keeps a lasting fault from taking a whole core.
            _log.exception("store %s: the fetch loop failed", self.name)
            self._stopping.wait(_PAUSE_AFTER_FAULT_S)
        finally:
            # The batch holds its slot while it exists. What keeps a store's exception (a log
            # handler, a reference cycle until it is collected) keeps these frames by its
            # traceback, but so not the batch.
            batch = None

    def _answer(self, batch: FetchBatch) -> None:
        try:
            values = self._store.get_many(batch.groups, batch.timeout_s)
        except StoreThrottled as error:
            batch.fail("throttled")
            self._complaints.add(error)
        except StoreTimeout as error:
            batch.fail("timed_out")
            self._complaints.add(error)
        except StoreError as error:
            batch.fail("error")
            self._complaints.add(error)
        except BaseException as error:
            # A store is anybody's code; not even its SystemExit may take this slot away for good.
            batch.fail("error")
            self._complaints.add(error, trace=True)
        else:
            self._complete(batch, values)
        finally:
            del batch  # see _take_and_answer

    def _complete(self, batch: FetchBatch, values: object) -> None:
        try:
            batch.complete(values)  # type: ignore[arg-type]  # native code judges what it gets
        except Exception as error:
            batch.fail("error")
            self._complaints.add(error, trace=True)
        finally:
            del batch  # see _take_and_answer


class _Complaints:
    """Logs a store's failures, at most one every few seconds: a store that is down fails often."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._next = 0.0  # guarded by _lock
        self._left_out = 0  # guarded by _lock

    def add(self, error: BaseException, *, trace: bool = False) -> None:
        now = time.monotonic()
        with self._lock:
            if now < self._next:
                self._left_out += 1
                return
            left_out, self._left_out = self._left_out, 0
            self._next = now + _LOG_EVERY_S
        _log.warning(
            "store %s: %s: %s%s",
            self._name,
            type(error).__name__,
            error,
            f" (and {left_out} more since the last line)" if left_out else "",
            exc_info=error if trace else None,
        )
