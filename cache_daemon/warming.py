"""How a daemon fills its node: before it serves, when an operator asks, and a leaf's new shards.

Runs at most one warm-up at a time and remembers how the last one went. What a warm-up does is in
`warmup`; what it is made of, in `warmup_parts`.

Each has a thread of its own, which is left behind when it does not end in time: a call to S3 that
hangs must not keep a node from serving.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cache_daemon._native import Node
from cache_daemon.cluster_status import Membership
from cache_daemon.config import Config
from cache_daemon.lifecycle import Lifecycle, State
from cache_daemon.metrics import HistogramLike, SampleLike
from cache_daemon.pipeline import StartError
from cache_daemon.warmup_parts import Parts, Uploads
from cache_daemon.warmup_status import (
    Warming,
    WarmupRefused,
    WarmupSample,
    WarmupStatus,
    status_line,
    warmup_samples,
)
from sharding.model import ShardMap, Shards
from warmup.errors import WarmupError
from warmup.warmer import Outcome, Progress, Warmer

__all__ = ["NodeWarming", "make_warming"]

_log = logging.getLogger(__name__)

_JOIN_S = 5.0
_GRACE_S = 1.0  # beyond its time, for calls that are on their way
_POLL_S = 0.05
_SAME_MOVE_S = 5.0
_FILL_S_MIN = 1.0
_NOTHING = (
    "this node has nothing to be filled from; give warmup.snapshots or warmup.peers, and a plan "
    "other than none"
)


def make_warming(config: Config, lifecycle: Lifecycle) -> Warming:
    """What fills the node of `config`, which has a warmup section.

    Raises StartError for what cannot be made.
    """
    assert config.warmup is not None
    try:
        return NodeWarming(config, lifecycle, Parts(config, config.warmup))
    except (ValueError, WarmupError) as error:
        raise StartError(f"warmup: {error}") from error


@dataclass(frozen=True)
class _Task:
    """What is to be filled, and in how much time."""

    seconds: float
    shards: Shards | None = None  # of a leaf; None: all that the node has
    view: ShardMap | None = None  # who has them


class NodeWarming:
    """See `Warming`. Thread-safe."""

    def __init__(self, config: Config, lifecycle: Lifecycle, parts: Parts) -> None:
        self._config = config
        self._lifecycle = lifecycle
        self._parts = parts
        self._uploads: Uploads | None = None
        self._node: Node | None = None
        self._membership: Membership | None = None  # of a leaf
        self._thread: threading.Thread | None = None  # of the start, later of an operator's
        self._turn = threading.Lock()  # held by the one that runs
        self._closed = threading.Event()
        self._ended = threading.Event()  # an operator has ended the one at the start
        # Of the participant's thread alone: when shards were filled last, and when that is to end.
        self._filled_at = self._fill_until = float("-inf")
        self._lock = threading.Lock()  # guards what follows
        self._warmer: Warmer | None = None  # runs
        self._progress: Progress | None = None  # of the last one, at its end
        self._outcome: Outcome | None = None  # of the last one
        self._max_seconds = config.warmup.max_duration if config.warmup else 0.0
        self._serving_cold = False
        self._runs = dict.fromkeys(("warmed", "partial", "failed", "stopped"), 0)

    # ---- the daemon's side

    def attach(self, node: Node, membership: Membership | None) -> None:
        self._node, self._membership = node, membership
        self._uploads = self._parts.start_uploads(self._owned)

    def begin(self, on_end: Callable[[Exception | None], None]) -> None:
        def first() -> None:
            try:
                error = self._first()
            except Exception as unexpected:
                _log.exception("the warm-up failed")
                error = StartError(f"the warm-up failed: {unexpected}; a bug, see the log")
            self._ended.clear()  # was of this one alone
            on_end(error)

        self._start_thread(first)

    def fill(self, shards: Shards, view: ShardMap) -> None:
        if not self._config.warms or self._ended.is_set():
            return
        with self._lock:
            running = self._warmer
        if running is not None:  # an operator's: shards that nobody may ask yet come first
            running.stop()
        self._run(_Task(self._time_to_fill(), shards, view))
        self._filled_at = time.monotonic()

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            warmer, thread, uploads = self._warmer, self._thread, self._uploads
        if warmer is not None:
            warmer.stop()
        if uploads is not None:
            uploads.stop()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_S)

    def _time_to_fill(self) -> float:
        """How long shards may take that come now. In the participant's thread alone.

        Those that come right after others that did not get warm in time share their time: a leaf
        with thousands of shards, which come by some hundred, must not wait for S3 again and again.
        """
        now = time.monotonic()
        with self._lock:
            outcome = self._outcome
        went_well = outcome is None or outcome.state == "warmed"
        if went_well or now - self._filled_at > _SAME_MOVE_S:
            self._fill_until = now + self._max_duration
        return max(self._fill_until - now, _FILL_S_MIN)

    # ---- operators

    def start(self, max_duration_s: float | None) -> None:
        if not self._config.warms:
            raise WarmupRefused(_NOTHING)
        if (state := self._lifecycle.state) is not State.SERVING:
            raise WarmupRefused(f"the daemon is {state.value}; a warm-up begins when it serves")
        seconds = max_duration_s or self._max_duration
        task = _Task(seconds)
        if self._membership is not None:
            shards, view = self._membership.owned()
            if view is None or not len(shards):
                raise WarmupRefused("this leaf answers for no shard yet; see `cachectl status`")
            task = _Task(seconds, shards, view)
        with self._lock:
            if self._warmer is not None or (self._thread is not None and self._thread.is_alive()):
                raise WarmupRefused("one runs already; `cachectl warmup status` shows it")
            self._start_thread_locked(lambda: self._by_hand(task))

    def stop(self) -> bool:
        with self._lock:
            warmer = self._warmer
        at_start = self._lifecycle.state is State.WARMING
        if at_start:
            self._ended.set()
        if warmer is not None:
            warmer.stop()
        return warmer is not None or at_start

    # ---- warm-ups

    @property
    def _max_duration(self) -> float:
        return self._config.warmup.max_duration if self._config.warmup else 0.0

    def _owned(self) -> tuple[int, Shards] | None:
        """The shards whose keys this node is asked for; None: all."""
        if self._membership is None or self._config.sharding is None:
            return None
        return self._config.sharding.shard_count, self._membership.owned()[0]

    def _first(self) -> Exception | None:
        """The one at the start; why the daemon must not serve, if so."""
        membership = self._membership
        if membership is None:
            self._run(_Task(self._max_duration))
        else:
            self._await_shards(membership)
        with self._lock:
            outcome = self._outcome
        if outcome is None or outcome.state != "failed" or self._closed.is_set():
            return None
        assert self._node is not None
        if kept := self._parts.kept_items(self._node):
            _log.warning(
                "the warm-up brought nothing: %s; the node has the %d items that it kept",
                outcome.reason,
                kept,
            )
            return None
        if self._config.warmup is not None and self._config.warmup.on_failure == "fail":
            return StartError(
                f"the warm-up brought nothing: {outcome.reason}; with warmup.on_failure: "
                "serve_cold the node would serve all the same"
            )
        _log.warning("the warm-up brought nothing: %s; the node serves cold", outcome.reason)
        with self._lock:
            self._serving_cold = True
        return None

    def _await_shards(self, membership: Membership) -> None:
        """Waits until the first shards that the leaf was given are online; they are filled in the
        participant's thread."""
        deadline = time.monotonic() + self._max_duration
        first = 0
        while not self._closed.wait(_POLL_S) and not self._ended.is_set():
            status = membership.status()
            online, warming = status.shards_online, status.shards_warming
            first = first or online + warming
            if online and (not warming or online >= first):
                with self._lock:  # kept through a restart: there was nothing to fill
                    self._outcome = self._outcome or Outcome("warmed", "its shards were kept")
                return
            if time.monotonic() > deadline:
                reason = f"{online} of {online + warming} shards are online after max_duration"
                if not first:
                    reason = "no shard was assigned to this leaf within max_duration"
                    reason += "".join(f": {problem}" for problem in status.problems)
                _log.warning("%s", reason)
                with self._lock:
                    if self._outcome is None:
                        self._outcome = Outcome("failed", reason)
                return

    def _by_hand(self, task: _Task) -> None:
        try:
            outcome = self._run(task)
        except Exception:
            _log.exception("the warm-up failed")
            return
        if outcome.state in ("warmed", "partial"):
            with self._lock:
                self._serving_cold = False

    def _run(self, task: _Task) -> Outcome:
        node = self._node
        assert node is not None, "attach comes first"
        with self._turn:
            with self._lock:
                self._max_seconds = task.seconds
            warmer: Warmer | None = None
            try:
                warmer = self._parts.make_warmer(
                    node, task.seconds, task.shards, task.view, self._membership
                )
                with self._lock:
                    self._warmer = warmer
                if self._closed.is_set() or self._ended.is_set():
                    warmer.stop()
                outcome = self._run_in_time(warmer, task.seconds)
            except Exception as error:  # a node serves cold rather than not at all
                _log.exception("the warm-up met what it did not expect")
                outcome = Outcome("failed", f"{type(error).__name__}: {error}")
            with self._lock:
                self._warmer, self._outcome = None, outcome
                self._progress = warmer.progress() if warmer is not None else None
                self._runs[outcome.state] += 1
        _log.info("warm-up: %s", self._line())
        return outcome

    def _run_in_time(self, warmer: Warmer, seconds: float) -> Outcome:
        """As `warmer.run`, but it returns in time, whatever hangs. Raises what that raises."""
        results: list[Outcome | Exception] = []
        ended = threading.Event()

        def run() -> None:
            try:
                results.append(warmer.run())
            except Exception as error:
                results.append(error)
            ended.set()

        threading.Thread(target=run, name="warmer", daemon=True).start()
        deadline = time.monotonic() + seconds + _GRACE_S
        while not ended.wait(_POLL_S):
            if self._closed.is_set() or self._ended.is_set():
                # What it hangs in may take long: nobody waits for that.
                deadline = min(deadline, time.monotonic() + _GRACE_S)
            if time.monotonic() > deadline:
                break
        if not results:
            warmer.stop()
            ended.wait(_GRACE_S)
        if results:
            if isinstance(results[0], Exception):
                raise results[0]
            return results[0]
        if self._closed.is_set() or self._ended.is_set():
            return Outcome("stopped", "it was told to")
        progress = warmer.progress()
        came = progress.keys_fetched or progress.items_copied
        problem = progress.problems[-1] if progress.problems else "snapshots or peers do not answer"
        return Outcome("partial" if came else "failed", f"its time is over: {problem}")

    def _start_thread(self, target: Callable[[], None]) -> None:
        with self._lock:
            self._start_thread_locked(target)

    def _start_thread_locked(self, target: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=target, name="warm-up", daemon=True)
        self._thread.start()

    # ---- what operators see

    def status(self) -> WarmupStatus:
        with self._lock:
            warmer, outcome, uploads = self._warmer, self._outcome, self._uploads
            progress = warmer.progress() if warmer is not None else self._progress
            status = WarmupStatus(
                state=self._state_locked(),
                reason=outcome.reason if outcome is not None and warmer is None else "",
                serving_cold=self._serving_cold,
                max_seconds=self._max_seconds,
                target_hit_ratio=self._target,
                uploads=uploads.status() if uploads is not None else None,
            )
        if progress is None:
            return status
        running = warmer is not None
        problems = progress.problems if running else ()
        return replace(
            status,
            reason=problems[-1] if problems else status.reason,
            phase=progress.phase if running else "",
            keys_done=progress.keys_done,
            keys_total=progress.keys_total,
            keys_fetched=progress.keys_fetched,
            keys_failed=progress.keys_failed,
            keys_per_second=progress.keys_per_second if running else 0.0,
            rate_limit=progress.rate_limit if running else 0.0,
            items_copied=progress.items_copied,
            bytes_copied=progress.bytes_copied,
            predicted_hit_ratio=progress.predicted_hit_ratio,
            seconds=progress.seconds,
            seconds_left=progress.seconds_left if running else None,
            snapshots=progress.snapshots,
            fleet_members=progress.fleet_members if running else 0,
        )

    def _state_locked(self) -> str:
        if self._warmer is not None:
            return "running"
        if self._outcome is not None:
            return self._outcome.state
        return "pending" if self._config.warms else "off"

    @property
    def _target(self) -> float:
        return self._config.warmup.target_hit_ratio if self._config.warmup else 0.0

    def _line(self) -> str:
        return status_line(self.status())

    def tell_progress(self) -> str:
        line = f"warming up: {self._line()}"
        _log.info("%s", line)
        return line

    # ---- a source of samples

    def samples(self) -> Sequence[SampleLike]:
        runs = "Warm-ups that ended, by how."
        with self._lock:
            counts = dict(self._runs)
        return [
            *warmup_samples(self.status()),
            *(
                WarmupSample(
                    "feature_cache_warmup_runs_total",
                    runs,
                    count,
                    {"outcome": outcome},
                    "counter",
                )
                for outcome, count in counts.items()
            ),
        ]

    def histograms(self) -> Sequence[HistogramLike]:
        return []
