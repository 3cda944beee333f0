"""Batches through a root while things happen to the cluster, second by second."""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import numpy.typing as npt

from benchmarks._cluster import NAMESPACE
from cache_daemon.client import Client, FeatureCacheError, RetryPolicy, Status

__all__ = ["Batch", "Load", "Second", "by_second", "wrong_values"]

_VALUE_WORDS = 25  # of eight bytes: what the store of the leaves makes of a key
_FROM_CACHE = (Status.HIT_DRAM, Status.HIT_NVM)
_FAILURES_KEPT = 20


@dataclass(frozen=True)
class Batch:
    """What became of one call."""

    at: float  # time.monotonic() when it began
    seconds: float
    keys: int = 0
    found: int = 0
    hits: int = 0  # of those, from a leaf's cache
    wrong: int = 0
    failure: str = ""
    statuses: dict[str, int] = field(default_factory=dict)  # of cells without a value

    @property
    def missing(self) -> int:
        return self.keys - self.found


@dataclass
class Second:
    """All batches that began in one second."""

    batches: int = 0
    failed: int = 0
    keys: int = 0
    found: int = 0
    hits: int = 0
    wrong: int = 0
    seconds_max: float = 0.0

    @property
    def missing(self) -> int:
        return self.keys - self.found

    @property
    def hit_ratio(self) -> float:
        return self.hits / self.keys if self.keys else 0.0


class Load:
    """Threads that read random batches of ids below `items`, from construction until `stop`."""

    def __init__(
        self,
        connect: Callable[..., Client],
        *,
        items: int,
        keys: int = 1000,
        threads: int = 2,
        pause_s: float = 0.02,
        timeout_s: float = 1.0,
    ) -> None:
        self._connect = connect
        self._shape = (items, keys)
        self._pause_s = pause_s
        self._timeout_s = timeout_s
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._batches: list[Batch] = []
        self._threads = [threading.Thread(target=self._run, args=[seed]) for seed in range(threads)]
        self.began = time.monotonic()
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Load":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends it, once what is on its way is back. Idempotent."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def batches(self) -> list[Batch]:
        """All so far."""
        with self._lock:
            return list(self._batches)

    def failures(self) -> list[str]:
        """What went wrong so far, the first few of it."""
        found = []
        for batch in self.batches():
            if batch.failure:
                found.append(batch.failure)
            if batch.wrong:
                found.append(f"{batch.wrong} wrong values")
        return found[:_FAILURES_KEPT]

    def _run(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        items, keys = self._shape
        # A call that fails is a failure: nobody repeats it.
        with self._connect(timeout=self._timeout_s, retry=RetryPolicy(attempts=1)) as client:
            while not self._stop.is_set():
                batch = _read(client, rng.integers(0, items, keys).astype(np.uint64))
                with self._lock:
                    self._batches.append(batch)
                self._stop.wait(self._pause_s)


def _read(client: Client, ids: npt.NDArray[np.uint64]) -> Batch:
    at = time.monotonic()
    try:
        column = client.batch_get({NAMESPACE: ids})[NAMESPACE]
    except FeatureCacheError as error:
        text = f"{type(error).__name__}: {error}"
        return Batch(at, time.monotonic() - at, ids.size, failure=text)
    seconds = time.monotonic() - at
    there = column.found
    counts = np.bincount(column.statuses, minlength=1)
    return Batch(
        at,
        seconds,
        keys=ids.size,
        found=int(there.sum()),
        hits=sum(int(counts[s]) for s in _FROM_CACHE if s < counts.size),
        wrong=wrong_values(ids[there], column.values),
        statuses={
            Status(int(status)).name: int(count)
            for status, count in zip(
                *np.unique(column.statuses[~there], return_counts=True), strict=True
            )
        },
    )


def wrong_values(ids: npt.NDArray[np.uint64], values: npt.NDArray[np.uint8]) -> int:
    """How many of the values, one after the other, are not what the store makes of their ids."""
    if values.size != ids.size * 8 * _VALUE_WORDS:
        return max(1, int(ids.size))
    words = values.view(np.uint64).reshape(-1, _VALUE_WORDS)
    return int((words != ids[:, None]).any(axis=1).sum())


def by_second(batches: Iterable[Batch], began: float) -> list[Second]:
    """Sums by the second since `began` in which a batch began; earlier ones are left out."""
    seconds: list[Second] = []
    for batch in batches:
        number = int(batch.at - began) if batch.at >= began else -1
        if number < 0:
            continue
        while len(seconds) <= number:
            seconds.append(Second())
        second = seconds[number]
        second.batches += 1
        second.failed += bool(batch.failure)
        second.keys += batch.keys
        second.found += batch.found
        second.hits += batch.hits
        second.wrong += batch.wrong
        second.seconds_max = max(second.seconds_max, batch.seconds)
    return seconds
