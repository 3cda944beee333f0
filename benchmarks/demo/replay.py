"""Replays ranking requests against a daemon, with a few clients at a time, and keeps count."""

import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from benchmarks.demo.candidates import RankingRequest
from benchmarks.demo.dataset import Dataset
from benchmarks.demo.features import (
    EMBEDDING_DIM,
    ITEM_EMBEDDING,
    ITEM_STATS,
    STATS_DIM,
    USER_SEQUENCE,
    FeatureTables,
)
from cache_daemon.client import Client, FeatureCacheError, Status

__all__ = ["NAMESPACES", "Progress", "Replay"]

NAMESPACES = (ITEM_EMBEDDING, ITEM_STATS, USER_SEQUENCE)

_TIMEOUT_S = 2.0  # far above what a request takes; whatever needs longer is a failure to report
_FAILURES_KEPT = 10
_WINDOW_REQUESTS = 200  # the live figures are of so many requests
_COLD_REQUESTS = 10  # so few meet an empty cache: a request asks for a sixth of what fits
# Traffic is switched over gradually, as to any node that joins: it grows exponentially over the
# first part of the time, from a few requests a second to as many as the clients can send.
_RAMP_SHARE = 0.2
_RAMP_FIRST_RATE = 4.0
_RAMP_FOLDS = 5.0  # e-folds
_PACE_POLL_S = 0.005
_CHECK_EVERY = 10  # requests of which some values are compared, byte by byte
_CHECKED_ITEMS = 4
_HITS = np.array([Status.HIT_DRAM, Status.HIT_NVM], np.uint8)
_STATUSES = 16  # more than the wire has; for bincount


@dataclass(frozen=True)
class _Served:
    """What became of one request. `cells[namespace]` counts its cells by status."""

    ended_s: float
    latency_s: float
    cells: Mapping[str, npt.NDArray[np.int64]]

    def hits(self, namespace: str) -> int:
        return int(self.cells[namespace][_HITS].sum())

    def nvm_hits(self, namespace: str) -> int:
        return int(self.cells[namespace][Status.HIT_NVM])

    def keys(self, namespace: str) -> int:
        return int(self.cells[namespace].sum())


@dataclass(frozen=True)
class Progress:
    """A reading of the replay. Ratios are hits per key asked, 0 to 1; `recent` covers the last 200
    requests; latencies are seconds of a whole request as the client sees it.
    """

    requests: int
    elapsed_s: float
    position: int  # of the interaction that was sent last
    keys: int
    hits: int  # of DRAM and NVM
    nvm_hits: int
    recent_rate: float  # requests a second
    recent_p50_s: float
    recent_p99_s: float
    recent_hit_ratio: Mapping[str, float]
    hit_ratio: Mapping[str, float]
    checked_values: int
    failures: tuple[str, ...]
    failure_count: int

    recent_overall_hit_ratio: float
    recent_nvm_hit_ratio: float  # the part of it that came from NVM

    @property
    def overall_hit_ratio(self) -> float:
        return self.hits / self.keys if self.keys else 0.0


@dataclass
class _Counts:
    served: list[_Served] = field(default_factory=list)
    window: deque[_Served] = field(default_factory=lambda: deque(maxlen=_WINDOW_REQUESTS))
    totals: dict[str, npt.NDArray[np.int64]] = field(
        default_factory=lambda: {name: np.zeros(_STATUSES, np.int64) for name in NAMESPACES}
    )
    position: int = 0
    checked_values: int = 0
    failures: list[str] = field(default_factory=list)
    failure_count: int = 0


class Replay:
    """Sends requests in order from `workers` threads, each with a connection of its own.

    Every reply is looked at: all cells must carry values, and of every tenth request some values
    are compared with what the store was filled with. What is wrong is a failure, and counted.
    """

    def __init__(
        self,
        requests: Iterator[RankingRequest],
        dataset: Dataset,
        tables: FeatureTables,
        connect: Callable[[], Client],
        *,
        workers: int,
        seconds_max: float,
    ) -> None:
        self._requests = requests
        self._requests_lock = threading.Lock()
        self._sent = 0  # guarded by _requests_lock
        self._dataset = dataset
        self._tables = tables
        self._connect = connect
        self._counts = _Counts()
        self._counts_lock = threading.Lock()
        self._stopped = threading.Event()
        self._started_s = time.monotonic()
        self._deadline_s = self._started_s + seconds_max
        self._threads = [
            threading.Thread(target=self._work, args=(number,), daemon=True)
            for number in range(workers)
        ]

    def start(self) -> None:
        """Starts the clients; the time that the replay may take runs from here."""
        seconds_max = self._deadline_s - self._started_s
        self._started_s = time.monotonic()
        self._deadline_s = self._started_s + seconds_max
        for thread in self._threads:
            thread.start()

    @property
    def running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """Ends the replay after the requests that are on their way."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(2 * _TIMEOUT_S)

    def progress(self) -> Progress:
        """What happened so far; cheap enough for a live view."""
        with self._counts_lock:
            counts = self._counts
            window = list(counts.window)
            totals = {name: cells.copy() for name, cells in counts.totals.items()}
            requests, position = len(counts.served), counts.position
            checked, failures = counts.checked_values, tuple(counts.failures)
            failure_count = counts.failure_count
        p50, p99 = _quantiles([served.latency_s for served in window])
        span = window[-1].ended_s - window[0].ended_s if len(window) > 1 else 0.0
        return Progress(
            requests=requests,
            elapsed_s=time.monotonic() - self._started_s,
            position=position,
            keys=sum(int(cells.sum()) for cells in totals.values()),
            hits=sum(int(cells[_HITS].sum()) for cells in totals.values()),
            nvm_hits=sum(int(cells[Status.HIT_NVM]) for cells in totals.values()),
            recent_rate=(len(window) - 1) / span if span else 0.0,
            recent_p50_s=p50,
            recent_p99_s=p99,
            recent_hit_ratio=MappingProxyType(
                {
                    name: _ratio(
                        sum(served.hits(name) for served in window),
                        sum(served.keys(name) for served in window),
                    )
                    for name in NAMESPACES
                }
            ),
            hit_ratio=MappingProxyType(
                {
                    name: _ratio(int(cells[_HITS].sum()), int(cells.sum()))
                    for name, cells in totals.items()
                }
            ),
            checked_values=checked,
            failures=failures,
            failure_count=failure_count,
            recent_overall_hit_ratio=_ratio(
                sum(served.hits(name) for served in window for name in NAMESPACES),
                sum(served.keys(name) for served in window for name in NAMESPACES),
            ),
            recent_nvm_hit_ratio=_ratio(
                sum(served.nvm_hits(name) for served in window for name in NAMESPACES),
                sum(served.keys(name) for served in window for name in NAMESPACES),
            ),
        )

    def latency_quantiles_s(self) -> tuple[float, float]:
        """Median and 99th percentile of all requests, in seconds."""
        with self._counts_lock:
            return _quantiles([served.latency_s for served in self._counts.served])

    def cold_and_warm_hit_ratio(self) -> tuple[float, float]:
        """The hit ratios of the first ten requests, and of the last quarter of all requests."""
        with self._counts_lock:
            served = list(self._counts.served)
        cold, warm = (
            _ratio(
                sum(one.hits(name) for one in part for name in NAMESPACES),
                sum(one.keys(name) for one in part for name in NAMESPACES),
            )
            for part in (served[:_COLD_REQUESTS], served[3 * len(served) // 4 :])
        )
        return cold, warm

    def _work(self, worker: int) -> None:
        # Seeded by worker: the values that are checked differ, the run can be repeated.
        sampler = random.Random(worker)
        with self._connect() as client:
            while not self._stopped.is_set() and time.monotonic() < self._deadline_s:
                with self._requests_lock:
                    due = self._sent < self._due()
                    request = next(self._requests, None) if due else None
                    self._sent += request is not None
                if not due:
                    time.sleep(_PACE_POLL_S)
                    continue
                if request is None:
                    return
                try:
                    self._serve(client, request, sampler)
                except FeatureCacheError as error:
                    self._fail(f"request {request.number}: {type(error).__name__}: {error}")

    def _due(self) -> float:
        """How many requests the ramp allows by now."""
        elapsed = time.monotonic() - self._started_s
        ramp = _RAMP_SHARE * (self._deadline_s - self._started_s)
        if elapsed >= ramp:
            return math.inf
        fold = ramp / _RAMP_FOLDS
        return 1 + _RAMP_FIRST_RATE * fold * math.expm1(elapsed / fold)

    def _serve(self, client: Client, request: RankingRequest, sampler: random.Random) -> None:
        items = self._dataset.item_ids[request.items].astype(np.uint64)
        user = self._dataset.user_ids[[request.user]].astype(np.uint64)
        began = time.monotonic()
        reply = client.batch_get(
            {ITEM_EMBEDDING: items, ITEM_STATS: items, USER_SEQUENCE: user}, timeout=_TIMEOUT_S
        )
        ended = time.monotonic()
        # What a ranker would do next: matrices, without a loop over keys.
        embeddings, embedded = reply[ITEM_EMBEDDING].to_numpy("float32", dim=EMBEDDING_DIM)
        stats, counted = reply[ITEM_STATS].to_numpy("float32", dim=STATS_DIM)
        sequence = reply[USER_SEQUENCE].to_bytes()[0]
        checked = 0
        if not (embedded.all() and counted.all() and sequence is not None):
            missing = int((~embedded).sum() + (~counted).sum()) + (sequence is None)
            self._fail(f"request {request.number}: {missing} cells without a value")
        elif request.number % _CHECK_EVERY == 0:
            rows = sampler.sample(range(len(items)), _CHECKED_ITEMS)
            films = request.items[rows]
            same = (
                np.array_equal(embeddings[rows], self._tables.item_embedding[films])
                and np.array_equal(stats[rows], self._tables.item_stats[films])
                and sequence == self._tables.user_sequence[request.user]
            )
            checked = 2 * len(rows) + 1
            if not same:
                self._fail(f"request {request.number}: values differ from the store's")
        cells = {
            name: np.bincount(reply[name].statuses, minlength=_STATUSES) for name in NAMESPACES
        }
        served = _Served(ended, ended - began, cells)
        with self._counts_lock:
            counts = self._counts
            counts.served.append(served)
            counts.window.append(served)
            counts.position = max(counts.position, request.position)
            counts.checked_values += checked
            for name, by_status in cells.items():
                counts.totals[name] += by_status

    def _fail(self, what: str) -> None:
        with self._counts_lock:
            self._counts.failure_count += 1
            if len(self._counts.failures) < _FAILURES_KEPT:
                self._counts.failures.append(what)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _quantiles(latencies_s: list[float]) -> tuple[float, float]:
    """Median and 99th percentile; zeros when nothing was measured."""
    if not latencies_s:
        return 0.0, 0.0
    p50, p99 = np.quantile(np.array(latencies_s), [0.5, 0.99])
    return float(p50), float(p99)
