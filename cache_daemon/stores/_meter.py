"""What the guard counts, in the shapes of `_native.Sample` and `_native.Histogram`."""

import threading
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

__all__ = ["StoreHistogram", "StoreMeter", "StoreSample"]

# Seconds. From an embedded store's tens of microseconds to a timeout of many seconds.
_BOUNDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05,
    0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip


@dataclass(frozen=True)
class StoreSample:
    """One counter or gauge; the shape of `_native.Sample`."""

    name: str
    help: str
    kind: str  # counter | gauge
    value: float
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StoreHistogram:
    """One latency histogram; the shape of `_native.Histogram`."""

    name: str
    help: str
    labels: dict[str, str]
    bounds: list[float]  # seconds, upper bounds
    counts: list[int]  # per bucket, not cumulative; one more than bounds
    sum: float  # seconds


class StoreMeter:
    """Counts of one store. A few additions under a lock a call, none a key. Thread-safe."""

    def __init__(self, outcomes: tuple[str, ...]) -> None:
        """`outcomes` are shown from the start, at zero, so that rates have a first value."""
        self._mutex = threading.Lock()
        self._attempts: Counter[str] = Counter(dict.fromkeys(outcomes, 0))
        self._keys = 0
        self._retries = 0
        self._garbled_groups = 0
        self._rate_wait_s = 0.0
        self._buckets = [0] * (len(_BOUNDS) + 1)
        self._seconds = 0.0

    def attempt(self, outcome: str, seconds: float, keys: int) -> None:
        """One call of the store itself, which took `seconds`."""
        bucket = bisect_left(_BOUNDS, seconds)
        with self._mutex:
            self._attempts[outcome] += 1
            self._keys += keys
            self._buckets[bucket] += 1
            self._seconds += seconds

    def refusal(self, outcome: str) -> None:
        """A call that did not reach the store."""
        with self._mutex:
            self._attempts[outcome] += 1

    def retry(self) -> None:
        with self._mutex:
            self._retries += 1

    def garbled(self, groups: int) -> None:
        with self._mutex:
            self._garbled_groups += groups

    def rate_wait(self, seconds: float) -> None:
        with self._mutex:
            self._rate_wait_s += seconds

    def samples(self, store: str) -> list[StoreSample]:
        labels = {"store": store}
        with self._mutex:
            attempts = [
                StoreSample(
                    "feature_cache_store_calls_total",
                    "Calls to the store by what became of them, retries included.",
                    "counter",
                    count,
                    labels | {"outcome": outcome},
                )
                for outcome, count in self._attempts.items()
            ]
            return [
                *attempts,
                StoreSample(
                    "feature_cache_store_asked_keys_total",
                    "Keys that the store was asked for, retries included.",
                    "counter",
                    self._keys,
                    labels,
                ),
                StoreSample(
                    "feature_cache_store_retries_total",
                    "Calls that were repeated after the store was unavailable.",
                    "counter",
                    self._retries,
                    labels,
                ),
                StoreSample(
                    "feature_cache_store_garbled_groups_total",
                    "Groups answered with too few or too many values.",
                    "counter",
                    self._garbled_groups,
                    labels,
                ),
                StoreSample(
                    "feature_cache_store_rate_wait_seconds_total",
                    "Time that calls waited for the store's rate limit.",
                    "counter",
                    self._rate_wait_s,
                    labels,
                ),
            ]

    def histogram(self, store: str) -> StoreHistogram:
        with self._mutex:
            return StoreHistogram(
                "feature_cache_store_call_seconds",
                "Duration of calls to the store.",
                {"store": store},
                list(_BOUNDS),
                list(self._buckets),
                self._seconds,
            )
