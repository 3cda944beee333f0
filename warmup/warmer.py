"""One warm-up of a node: what is copied from peers, then what is replayed, then how it went.

auto        domains whose items outlive their transfer are copied, the rest is replayed
replay      all is replayed
peer_copy   all is copied
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from warmup.choose import domains_to_copy
from warmup.errors import SnapshotError
from warmup.fleet_rate import Document, FleetRate
from warmup.pace import Pace
from warmup.peer_copy import PeerCopy
from warmup.protocols import KeyPlan, Peer
from warmup.replay import Replay, ReplayEnd
from warmup.snapshots import Snapshot, SnapshotStore

__all__ = ["Outcome", "Progress", "Sources", "WarmSettings", "Warmer"]

_log = logging.getLogger(__name__)

_RETRY_S = (0.5, 10.0)  # when snapshots cannot be reached


@dataclass(frozen=True)
class WarmSettings:
    """Of one warm-up."""

    plan: str = "auto"  # auto, replay, peer_copy
    rate: float = 20_000.0  # keys a second that the node asks of stores
    fleet_rate: float | None = None  # of all nodes that warm up at once
    windows: int = 6
    max_age_s: float = 7200.0
    hosts: int = 8  # of one window
    realtime_ttl_s: float = 300.0  # domains with a shorter TTL are replayed last, never copied
    copy_bytes_per_second: float = float(256 << 20)
    max_seconds: float = 600.0
    target_hit_ratio: float = 0.95
    # Whether snapshots that cannot be reached are waited for; else their store's attempts are all.
    patient: bool = True
    shard_count: int = 0  # of a leaf
    shards: npt.NDArray[np.uint32] | None = None  # that are to be filled, rising; None: all keys


@dataclass(frozen=True)
class Sources:
    """What the node is filled from, and by."""

    make_plan: Callable[[], KeyPlan]
    snapshots: SnapshotStore | None = None
    peers: Sequence[Peer] = ()
    fleet_document: Document | None = None  # where the nodes share `fleet_rate`
    node_name: str = ""  # among them
    # Whose items may lie on NVM, which a copy leaves out: what it did not bring is replayed.
    nvm_namespaces: frozenset[str] = frozenset()
    # What the node has evicted for good, and how many items it has, by (namespace, domain).
    fill: Callable[[], Mapping[tuple[str, str], tuple[float, float]]] = dict
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time


@dataclass(frozen=True)
class Outcome:
    """How a warm-up ended.

    warmed: the target was reached, or all there was came in; partial: some of it; failed: nothing
    could be had; stopped: it was told to.
    """

    state: str
    reason: str = ""
    seconds: float = 0.0
    predicted_hit_ratio: float | None = None  # None: nothing was replayed


@dataclass(frozen=True)
class Progress:
    """At the moment of asking."""

    phase: str = "waiting"  # waiting, peers, copy, snapshots, replay, ended
    seconds: float = 0.0
    seconds_left: float | None = None  # None: not known yet
    snapshots: int = 0
    keys_total: int = 0
    keys_done: int = 0
    keys_fetched: int = 0
    keys_failed: int = 0
    keys_per_second: float = 0.0
    rate_limit: float = 0.0
    predicted_hit_ratio: float | None = None
    items_copied: int = 0
    bytes_copied: int = 0
    fleet_members: int = 0  # nodes that warm up at once; 0: the rate is not shared
    problems: tuple[str, ...] = ()


class Warmer:
    """Made for one warm-up: `run` once. The rest may be used from any thread."""

    def __init__(self, settings: WarmSettings, sources: Sources) -> None:
        self._settings = settings
        self._sources = sources
        self._clock = sources.clock
        self._stopping = threading.Event()
        self._began = self._clock()
        self._ended: float | None = None
        self._phase = "waiting"
        self._problems: list[str] = []
        self._copy = PeerCopy(sources.peers, clock=self._clock)
        self._copied_all = False
        shared = settings.fleet_rate is not None and sources.fleet_document is not None
        self._pace = Pace(0.0 if shared else settings.rate, clock=self._clock)
        self._replay: Replay | None = None
        self._fleet: FleetRate | None = None

    def stop(self) -> None:
        """Lets `run` return within about a second."""
        self._stopping.set()
        self._copy.stop()
        if self._replay is not None:
            self._replay.stop()

    def progress(self) -> Progress:
        state = self._replay.state if self._replay is not None else None
        now = self._ended if self._ended is not None else self._clock()
        left = None
        if state is not None and state.keys_per_second > 0:
            left = max(0, state.keys_total - state.keys_done) / state.keys_per_second
        fleet = self._fleet
        problems = [*self._problems, *self._copy.problems]
        if state is not None:
            problems += state.problems
        if fleet is not None and fleet.problem:
            problems.append(f"fleet rate: {fleet.problem}")
        return Progress(
            phase=state.phase if state is not None and self._phase == "replay" else self._phase,
            seconds=now - self._began,
            seconds_left=left,
            snapshots=state.snapshots if state else 0,
            keys_total=state.keys_total if state else 0,
            keys_done=state.keys_done if state else 0,
            keys_fetched=state.keys_fetched if state else 0,
            keys_failed=state.keys_failed if state else 0,
            keys_per_second=state.keys_per_second if state else 0.0,
            rate_limit=self._pace.rate,
            predicted_hit_ratio=state.predicted_hit_ratio if state else None,
            items_copied=self._copy.items,
            bytes_copied=self._copy.bytes,
            fleet_members=fleet.members if fleet is not None else 0,
            problems=tuple(dict.fromkeys(problems)),
        )

    def run(self) -> Outcome:
        """Fills the node. Raises RuntimeError when the node is shut down meanwhile."""
        self._began = self._clock()
        deadline = self._began + self._settings.max_seconds
        try:
            outcome = self._run(deadline)
        finally:
            if self._fleet is not None:
                self._fleet.stop()
            self._ended = self._clock()
            self._phase = "ended"
        if self._stopping.is_set():
            outcome = Outcome("stopped", "it was told to")
        state = self._replay.state if self._replay is not None else None
        return Outcome(
            outcome.state,
            outcome.reason,
            self._ended - self._began,
            state.predicted_hit_ratio if state is not None else None,
        )

    def _run(self, deadline: float) -> Outcome:
        copied = self._copy_from_peers(deadline)
        if self._settings.plan == "peer_copy":
            if self._copied_all:
                return Outcome("warmed", f"{self._copy.items} items copied")
            reason = "; ".join(self._copy.problems) or "no peer was to be had in time"
            return Outcome("partial" if self._copy.items else "failed", reason)
        if self._sources.snapshots is None:
            if self._copied_all:
                return Outcome("warmed", f"{self._copy.items} items copied; there are no snapshots")
            reason = "; ".join(self._copy.problems) or "there are no snapshots, and no peers"
            return Outcome("partial" if self._copy.items else "failed", reason)
        return self._replay_snapshots(self._sources.snapshots, copied, deadline)

    def _copy_from_peers(self, deadline: float) -> list[tuple[str, str]]:
        """Returns the domains that were copied as a whole."""
        if self._settings.plan == "replay" or not self._sources.peers:
            return []
        self._phase = "peers"
        described = self._copy.describe(deadline)
        domains = [(each.namespace, each.domain) for each in described]
        # What only peers have is all copied; else what lives long enough.
        if self._settings.plan == "auto" and self._sources.snapshots is not None:
            domains = domains_to_copy(
                described, self._settings.copy_bytes_per_second, self._settings.realtime_ttl_s
            )
        if not domains:
            return []
        self._phase = "copy"
        self._copied_all = self._copy.run(domains, deadline)
        return domains if self._copied_all else []

    def _replay_snapshots(
        self, store: SnapshotStore, copied: Sequence[tuple[str, str]], deadline: float
    ) -> Outcome:
        settings, sources = self._settings, self._sources
        self._phase = "snapshots"
        found = self._find(store, deadline)
        if not found:
            reason = self._problems[-1] if self._problems else f"there are none in {store.url}"
            return Outcome("partial" if self._copy.items else "failed", f"no snapshots: {reason}")
        plan = self._sources.make_plan()
        if settings.shards is not None:
            plan.own(settings.shard_count, settings.shards)
        self._start_fleet()
        replay = self._replay = Replay(
            plan,
            self._pace,
            target_hit_ratio=settings.target_hit_ratio,
            realtime_ttl_s=settings.realtime_ttl_s,
            fill=self._sources.fill,
            clock=self._clock,
        )
        if self._stopping.is_set():
            return Outcome("stopped")
        self._phase = "replay"
        if not replay.load(store, found, deadline):
            return Outcome(
                "partial" if self._copy.items else "failed",
                "; ".join(replay.state.problems) or "no snapshot could be read in time",
            )
        if not plan.keys and settings.shards is None:
            return Outcome(
                "partial" if self._copy.items else "failed",
                "the snapshots name no key that this node can ask for: they are of other "
                "namespaces, hashed, or of namespaces without a store",
            )
        plan.drop_domains([each for each in copied if each[0] not in sources.nvm_namespaces])
        end = replay.run(deadline)
        return self._judge(end, replay)

    def _judge(self, end: str, replay: Replay) -> Outcome:
        state = replay.state
        predicted = state.predicted_hit_ratio or 0.0
        words = (
            f"{predicted:.1%} of the recorded traffic would hit "
            f"(target {self._settings.target_hit_ratio:.1%})"
        )
        if end == ReplayEnd.STOPPED:
            return Outcome("stopped")
        if end == ReplayEnd.TIME:
            came = state.keys_fetched or state.keys_held or self._copy.items
            return Outcome("partial" if came else "failed", f"its time is over: {words}")
        if end == ReplayEnd.FULL:
            return Outcome("warmed", f"the cache is full: {words}")
        failed = state.keys_total - state.keys_done
        if end == ReplayEnd.DONE and failed > 0.05 * state.keys_total:
            nothing = not (state.keys_done or self._copy.items)
            return Outcome(
                "failed" if nothing else "partial", f"{failed} keys could not be fetched: {words}"
            )
        return Outcome("warmed", words)

    def _find(self, store: SnapshotStore, deadline: float) -> list[Snapshot]:
        """The snapshots to use; [] where there are none, or none can be reached in time."""
        settings = self._settings
        shards = None if settings.shards is None else set(settings.shards.tolist())
        pause_s = _RETRY_S[0]
        while not self._stopping.is_set():
            try:
                return store.freshest(
                    windows=settings.windows,
                    max_age_s=settings.max_age_s,
                    hosts=settings.hosts,
                    now=self._sources.wall_clock(),
                    shard_count=settings.shard_count,
                    shards=shards,
                )
            except SnapshotError as error:
                self._problems.append(str(error))
                _log.warning("warm-up: %s", error)
            left_s = deadline - self._clock()
            if left_s <= pause_s or not settings.patient:
                break
            self._stopping.wait(pause_s)
            pause_s = min(pause_s * 2, _RETRY_S[1])
        return []

    def _start_fleet(self) -> None:
        settings, document = self._settings, self._sources.fleet_document
        if settings.fleet_rate is None or document is None:
            return

        def share(rate: float) -> None:
            self._pace.set_limit(min(rate, settings.rate))

        self._fleet = FleetRate(
            document, self._sources.node_name, settings.fleet_rate, share, clock=self._clock
        )
        self._fleet.start()
