"""A warm-up as operators see it: for status and metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cache_daemon._native import Node
from cache_daemon.cluster_status import Membership
from cache_daemon.metrics import SampleLike, SampleSource
from sharding.model import ShardMap, Shards

__all__ = [
    "UploadStatus",
    "Warming",
    "WarmupControl",
    "WarmupRefused",
    "WarmupSample",
    "WarmupStatus",
    "status_line",
    "warmup_samples",
]

_PREFIX = "feature_cache_warmup_"
_STATES = ("off", "pending", "running", "warmed", "partial", "failed", "stopped")


class WarmupRefused(Exception):
    """A warm-up cannot begin now; the message says why and what to do."""


@dataclass(frozen=True)
class UploadStatus:
    """How the request log of this node gets to the snapshots."""

    uploaded: int = 0  # windows
    failed: int = 0  # attempts
    dropped: int = 0  # windows that went unsent
    pending: int = 0  # finished windows on the local disk
    oldest_pending_seconds: float = 0.0
    problem: str = ""  # of the last attempt


@dataclass(frozen=True)
class WarmupStatus:
    """At the moment of asking."""

    # off: nothing to warm from; pending: not begun; running; then how the last one ended: warmed,
    # partial, failed, stopped.
    state: str
    reason: str = ""
    serving_cold: bool = False  # the one at the start failed, nothing was kept, and it serves
    phase: str = ""  # while it runs
    keys_done: int = 0
    keys_total: int = 0  # of the replay; 0: not known yet
    keys_fetched: int = 0
    keys_failed: int = 0
    keys_per_second: float = 0.0
    rate_limit: float = 0.0
    items_copied: int = 0
    bytes_copied: int = 0
    predicted_hit_ratio: float | None = None
    target_hit_ratio: float = 0.0
    seconds: float = 0.0
    seconds_left: float | None = None
    max_seconds: float = 0.0
    snapshots: int = 0
    fleet_members: int = 0  # nodes that share a rate now; 0: it is not shared
    uploads: UploadStatus | None = None


class WarmupControl(Protocol):
    """What operators may ask of a daemon's warm-up. Both return at once."""

    def start(self, max_duration_s: float | None) -> None:
        """Warms up while the daemon serves; None: as long as configured. Raises WarmupRefused."""

    def stop(self) -> bool:
        """Ends the one that runs; False when none does."""


class Warming(WarmupControl, SampleSource, Protocol):
    """The filling of a node as the daemon's life cycle knows it; see `warming`.

    Before `attach` it has a status and samples, too.
    """

    def attach(self, node: Node, membership: Membership | None) -> None:
        """From now on what `node` records is uploaded. `membership` is of a leaf."""

    def begin(self, on_end: Callable[[Exception | None], None]) -> None:
        """Fills the node; returns at once. The membership of a leaf has been started.

        `on_end` is called once: with why the daemon must not serve, if so.
        """

    def fill(self, shards: Shards, view: ShardMap) -> None:
        """Fills shards that begin empty on a leaf, from the replicas of `view` and snapshots.

        Returns when that is done or its time is over; never raises for what cannot be had.
        """

    def tell_progress(self) -> str:
        """Says in the log how far it is; returns the line. Main thread only."""

    def close(self) -> None:
        """Ends what is under way, for bounded time. Idempotent."""

    def status(self) -> WarmupStatus: ...


@dataclass(frozen=True)
class WarmupSample:
    """One gauge or counter of a warm-up or an upload."""

    name: str
    help: str
    value: float
    labels: dict[str, str] = field(default_factory=dict)
    kind: str = "gauge"


def status_line(status: WarmupStatus) -> str:
    """How it goes, in a line for the log."""
    parts = [f"{status.state}{f', {status.phase}' if status.phase else ''}"]
    if status.keys_done or status.keys_total:
        of = f" of {status.keys_total:,}" if status.keys_total else ""
        parts.append(f"{status.keys_done:,}{of} keys")
    if status.keys_per_second:
        parts.append(f"{status.keys_per_second:,.0f}/s")
    if status.items_copied:
        parts.append(f"{status.items_copied:,} items copied ({status.bytes_copied / 1e6:,.0f} MB)")
    if status.predicted_hit_ratio is not None:
        parts.append(f"{status.predicted_hit_ratio:.1%} of the recorded traffic would hit")
    parts.append(f"{status.seconds:.1f} s")
    if status.reason:
        parts.append(status.reason)
    return ", ".join(parts)


def warmup_samples(status: WarmupStatus) -> Sequence[SampleLike]:
    """The status as metrics."""

    def gauge(name: str, help: str, value: float, **labels: str) -> WarmupSample:
        return WarmupSample(_PREFIX + name, help, value, labels)

    def counter(name: str, help: str, value: float) -> WarmupSample:
        return WarmupSample(f"{_PREFIX}{name}_total", help, value, kind="counter")

    predicted = -1.0 if status.predicted_hit_ratio is None else status.predicted_hit_ratio
    state = "How the warm-up stands, or how the last one ended: 1 for its state, 0 for the others."
    samples: list[SampleLike] = [
        *(gauge("state", state, float(status.state == name), state=name) for name in _STATES),
        gauge(
            "serving_cold",
            "1 while the node serves although its first warm-up failed and it had kept nothing.",
            float(status.serving_cold),
        ),
        gauge("keys", "Keys of the replay; 0: not known yet.", status.keys_total),
        gauge("keys_done", "Keys of the replay that are done.", status.keys_done),
        gauge("keys_failed", "Keys of the replay that no store answered.", status.keys_failed),
        gauge("keys_per_second", "Keys that the replay asks of stores.", status.keys_per_second),
        gauge("rate_limit_keys_per_second", "Keys that it may ask at most.", status.rate_limit),
        gauge("fleet_members", "Nodes that share the rate now; 0: none.", status.fleet_members),
        gauge("items_copied", "Items that were copied from peers.", status.items_copied),
        gauge("bytes_copied", "Bytes that were copied from peers.", status.bytes_copied),
        gauge(
            "predicted_hit_ratio",
            "Share of the sampled traffic whose keys are in the cache; -1: not known.",
            predicted,
        ),
        gauge("target_hit_ratio", "Where the warm-up ends.", status.target_hit_ratio),
        gauge("seconds", "Since the warm-up began, or that it took.", status.seconds),
        gauge("max_seconds", "How long it may take.", status.max_seconds),
    ]
    if (uploads := status.uploads) is not None:
        samples += [
            counter("uploads", "Windows of the request log that were uploaded.", uploads.uploaded),
            counter("upload_failures", "Attempts at an upload that failed.", uploads.failed),
            counter("uploads_dropped", "Windows that went unsent: too old.", uploads.dropped),
            gauge("uploads_pending", "Finished windows that wait for it.", uploads.pending),
            gauge(
                "upload_lag_seconds",
                "Age of the oldest finished window that waits; 0: none does.",
                uploads.oldest_pending_seconds,
            ),
        ]
    return samples
