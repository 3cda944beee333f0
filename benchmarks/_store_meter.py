"""What a store of type redis is asked for, as Redis itself counts it."""

import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import redis

__all__ = ["StoreMeter"]


@dataclass(frozen=True)
class _Reading:
    """What was counted at some moment between two."""

    before: float
    after: float
    keys: int


class StoreMeter:
    """Reads how many keys Redis has been asked for, many times a second. A context manager."""

    _EVERY_S = 0.02

    def __init__(self, client: redis.Redis) -> None:
        """`client` is closed at the end."""
        self._client = client
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
        before = time.monotonic()
        stats: Any = self._client.info("stats")
        keys = int(stats["keyspace_hits"]) + int(stats["keyspace_misses"])
        self._readings.append(_Reading(before, time.monotonic(), keys))

    @property
    def keys(self) -> int:
        """Asked for meanwhile."""
        return self._readings[-1].keys - self._readings[0].keys

    def busiest_second(self) -> float:
        """The most keys asked for in any second, wherever it begins."""
        # A second begins as late as a reading allows, and ends as early: it may look busier than
        # it was, never idler.
        before = np.array([reading.before for reading in self._readings])
        after = np.array([reading.after for reading in self._readings])
        keys = np.array([reading.keys for reading in self._readings], np.float64)
        # The count a second after each reading, between the two readings around that moment.
        later = np.interp(after + 1.0, before, keys)
        return float((later - keys).max())

    def seconds_busy(self) -> float:
        """From the first key that was asked for to the last."""
        moved = [
            after.after
            for before, after in zip(self._readings, self._readings[1:], strict=False)
            if after.keys > before.keys
        ]
        return moved[-1] - moved[0] if moved else 0.0
