"""A leaf's part in its cluster: registers it, and makes it hold what the controller says.

One thread reconciles: it reads what ZooKeeper holds (target, view, own registration), compares it
with what this node holds, and does the next step. Callbacks of the connection only wake it, so it
does not matter which of them come, nor how often. Warming runs in a thread of its own.

A shard comes:   own() → WARMING in /current → the view names us for it → warm() → ONLINE
and goes:        own() without it → drop() → out of /current

Nothing that ZooKeeper does or fails to do makes a leaf drop anything, except a target that no
longer names the shard. While the session is lost it serves what it has. When it registers again,
all it holds is WARMING, and warm() is told how long it may have missed writes.

A view counts only when it names the registration that is ours now: one of a former life may still
be replaced by one without us, and writes in between would be missed.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sharding import layout
from sharding._holdings import Holdings, WarmJob
from sharding._registration import Registration
from sharding._view_reader import ViewReader
from sharding.connection import Connection, State, boot_clock
from sharding.errors import (
    ClusterError,
    Conflict,
    CorruptState,
    Disconnected,
    WrongCluster,
)
from sharding.model import (
    ClusterConfig,
    LiveNode,
    ReplicaState,
    ShardMap,
    Shards,
    Target,
    shards_array,
)

__all__ = ["Hooks", "Participant", "ParticipantStatus"]

_log = logging.getLogger(__name__)

_RETRY_S = 1.0
_POLL_S = 30.0  # what no watch has told is seen after so long
_WARM_RETRY_S = (1.0, 60.0)  # first and longest pause after a warm() that raised
_WARM_BATCH_SHARDS_MAX = 256  # a call, so that a large node gets its shards online one by one


class Hooks(Protocol):
    """What a participant asks of the node. All may be called again with what they know already.

    `own` and `drop` are called in the participant's thread and must be quick; `warm` may take as
    long as it wants.
    """

    def own(self, version: int, shard_count: int, shards: Shards) -> None:
        """All shards to answer for, rising, and the newest view that was seen (0: none)."""

    def warm(self, shards: Shards, view: ShardMap, away_seconds: float | None) -> None:
        """Brings shards up to date; they go online when it returns.

        `view` names whom to ask. `away_seconds`: what was held before may lack the writes of so
        long; None: nothing is known of what was held. Raising leaves them warming, and it is called
        again after a while.
        """

    def drop(self, shards: Shards) -> None:
        """Shards that are not owned any more; may run while others are warmed, never these."""

    def session_lost(self, away_seconds: float) -> None:
        """ZooKeeper has not answered for a session's time. Once for each loss; go on serving."""


@dataclass(frozen=True)
class ParticipantStatus:
    name: str
    registered: bool
    instance_id: str
    shard_count: int  # 0: not known yet
    target_version: int  # 0: none yet
    view_version: int  # 0: none yet
    warming: int  # shards
    online: int
    session_age_seconds: float | None
    problems: tuple[str, ...]  # for people, and what to do
    corrupt_reads: int


class Participant:
    """`node.instance_id` does not matter: each registration gets one of its own.

    `config` is what this node believes of the cluster; it is written when there is no config yet,
    and must name the same cluster as the one that there is, whose numbers hold.
    """

    def __init__(
        self,
        connection: Connection,
        config: ClusterConfig,
        node: LiveNode,
        hooks: Hooks,
        *,
        clock: Callable[[], float] = boot_clock,
    ) -> None:
        self._connection = connection
        self._own_config = config
        self._node = node
        self._hooks = hooks
        self._clock = clock
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="participant", daemon=True)

        # Of the reconciling thread alone.
        self._reader = ViewReader(connection)
        self._registration = Registration(connection, node, clock)
        self._losses_told = 0
        self._owned: tuple[int, int, Shards] | None = None  # as the hook was told

        self._lock = threading.Lock()  # guards all that follows
        self._holdings = Holdings()
        self._losses = 0  # of sessions
        self._instance_id = ""  # of the last registration
        self._registered = False
        self._cluster: ClusterConfig | None = None
        self._target: Target | None = None
        self._view: ShardMap | None = None
        self._warming_now: Shards = shards_array([])  # of the job under way
        self._going: Shards = shards_array([])  # are about to be dropped
        self._problems: dict[str, str] = {}
        self._corrupt_reads = 0

        self._warm_wake = threading.Event()
        self._warm_thread = threading.Thread(target=self._run_warm, name="warm", daemon=True)

    def start(self) -> None:
        self._connection.on_state(self._on_state)
        self._thread.start()
        self._warm_thread.start()

    def stop(self, leave: bool = True, timeout_s: float = 5.0) -> None:
        """Ends both threads; a warm() that runs is not waited for. Holds what it holds.

        `leave` takes the registration away, so that the cluster need not wait for the session to
        end. Idempotent.
        """
        self._stopping = True
        self._wake.set()
        self._warm_wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        with self._lock:
            registered, self._registered = self._registered, False
        if leave and registered and not self._thread.is_alive():
            try:
                self._registration.leave()
            except ClusterError as error:
                _log.warning("%s leaves when its session ends: %s", self._node.name, error)

    def status(self) -> ParticipantStatus:
        age = self._connection.session_age()
        disconnected = self._connection.problem
        with self._lock:
            problems = dict(self._problems)
            if disconnected is not None:
                problems["connection"] = disconnected
            return ParticipantStatus(
                name=self._node.name,
                registered=self._registered and disconnected is None,
                instance_id=self._instance_id,
                shard_count=self._cluster.shard_count if self._cluster else 0,
                target_version=self._target.version if self._target else 0,
                view_version=self._view.version if self._view else 0,
                warming=self._holdings.count(online=False),
                online=self._holdings.count(online=True),
                session_age_seconds=age,
                problems=tuple(problems.values()),
                corrupt_reads=self._corrupt_reads,
            )

    def held(self) -> Shards:
        """Rising shards that are held now, warming or online."""
        with self._lock:
            return self._holdings.shards()

    # ---- the reconciling thread ----------------------------------------------------------------

    def _on_state(self, state: State) -> None:
        """In the connection's thread."""
        if state is State.LOST:
            with self._lock:
                self._losses += 1
        self._wake.set()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            pause_s = _RETRY_S
            try:
                pause_s = self._step()
            except Exception:
                # A leaf that no longer follows its target would be worse than any error.
                _log.exception("the participant met what it did not expect; trying again")
            self._wake.wait(pause_s)

    def _step(self) -> float:
        """One reconciliation; seconds until the next that nothing asks for."""
        self._tell_loss()
        if not self._connection.connected:
            return _RETRY_S
        try:
            cluster = self._read_config()
            self._register()
            self._read_target(cluster)
            self._read_view()
            self._take_and_drop(cluster)
            with self._lock:
                target_version = self._target.version if self._target else 0
                current = self._holdings.current(self._instance_id, target_version)
            self._registration.write_current(current)
        except Disconnected:
            return _RETRY_S  # The connection tells of it itself.
        except Conflict as error:
            _log.info("%s; looking again", error)
            return 0.05
        except ClusterError as error:
            self._problem("cluster", str(error))
            return _RETRY_S
        self._problem("cluster", None)
        self._warm_wake.set()
        return _POLL_S

    def _tell_loss(self) -> None:
        """Once for each loss."""
        with self._lock:
            losses = self._losses
        if losses == self._losses_told:
            return
        self._losses_told = losses
        if self._connection.connected:
            age = self._connection.former_session_age()
        else:
            age = self._connection.session_age()
        self._hooks.session_lost(age or 0.0)

    def _read_config(self) -> ClusterConfig:
        znode = self._connection.get(layout.CONFIG, self._wake.set)
        with self._lock:
            known = self._cluster
        if znode is None:
            with contextlib.suppress(Conflict):  # Another node was first.
                written = layout.encode_config(known or self._own_config)
                self._connection.create(layout.CONFIG, written)
                _log.warning("%s was not there: written by this node", layout.CONFIG)
            znode = self._connection.get(layout.CONFIG, self._wake.set)
            if znode is None:
                raise CorruptState(layout.CONFIG, "is gone again")
        try:
            cluster = layout.decode_config(znode.data)
        except CorruptState as error:
            self._corrupt("config", error)
            if known is None:
                raise
            return known
        self._problem("config", None)
        if cluster.cluster != self._own_config.cluster:
            raise WrongCluster(
                f"{self._connection.config.hosts} belongs to cluster {cluster.cluster!r}, and this "
                f"node's config says {self._own_config.cluster!r}; give one of them another chroot"
            )
        if known is not None and known.shard_count != cluster.shard_count:
            raise WrongCluster(
                f"the cluster's shard_count went from {known.shard_count} to "
                f"{cluster.shard_count}, which nothing that is stored survives; put it back"
            )
        if known is None and cluster.shard_count != self._own_config.shard_count:
            _log.warning(
                "the cluster has %d shards; this node's config says %d, which counts only for a "
                "new cluster",
                cluster.shard_count,
                self._own_config.shard_count,
            )
        with self._lock:
            self._cluster = cluster
        return cluster

    def _register(self) -> None:
        """Sees to it that we are registered; `NameTaken` when another is."""
        if self._registration.is_ours(self._wake.set):
            return
        with self._lock:
            self._registered = False
        self._registration.register(self._wake.set, self._forget_states)
        with self._lock:
            self._instance_id = self._registration.instance_id
            self._registered = True
            held = len(self._holdings.shards())
        _log.info(
            "registered as %s, instance %s%s",
            self._node.name,
            self._registration.instance_id,
            f"; {held} shards are to be warmed again" if held else "",
        )

    def _forget_states(self, away_since: float) -> None:
        """What is warmed from here on is for the registration that comes."""
        with self._lock:
            self._instance_id = ""
            self._holdings.all_warming(away_since)

    def _read_target(self, cluster: ClusterConfig) -> None:
        path = layout.target_path(self._node.name)
        znode = self._connection.get(path, self._wake.set)
        if znode is None:
            return  # Nothing was ever given, or somebody deleted it: what is held stays.
        with self._lock:
            known = self._target
        try:
            target = layout.decode_target(path, znode.data)
            if known is not None and target.version < known.version:
                raise CorruptState(
                    path, f"went back from version {known.version} to {target.version}"
                )
        except CorruptState as error:
            self._corrupt("target", error)
            return
        unknown = target.shards[target.shards >= cluster.shard_count]
        if len(unknown):
            some = ", ".join(str(shard) for shard in unknown[:5])
            self._problem(
                "target",
                f"{path}: {len(unknown)} shards that a cluster of {cluster.shard_count} does not "
                f"have ({some}); left out",
            )
            target = Target(target.version, target.shards[: len(target.shards) - len(unknown)])
        else:
            self._problem("target", None)
        with self._lock:
            self._target = target

    def _read_view(self) -> None:
        try:
            view = self._reader.read(self._wake.set)
        except CorruptState as error:
            self._corrupt("view", error)
            return
        self._problem("view", None)
        if view is not None:
            with self._lock:
                self._view = view

    def _take_and_drop(self, cluster: ClusterConfig) -> None:
        """Makes what is owned what the target says, and tells the node of a newer view."""
        with self._lock:
            held = self._holdings.shards()
            wanted = held if self._target is None else self._target.shards
            # What is being warmed stays until that is done: a hook never warms what it dropped.
            owned = shards_array(np.union1d(wanted, np.intersect1d(held, self._warming_now)))
            gone = shards_array(np.setdiff1d(held, owned, assume_unique=True))
            new = shards_array(np.setdiff1d(owned, held, assume_unique=True))
            self._going = gone
            version = self._view.version if self._view else 0
        if self._owned is None or not (
            self._owned[:2] == (version, cluster.shard_count)
            and np.array_equal(self._owned[2], owned)
        ):
            self._hooks.own(version, cluster.shard_count, owned)
            self._owned = (version, cluster.shard_count, owned)
        if len(gone):
            self._hooks.drop(gone)
        if len(gone) or len(new):
            _log.info("target: %d shards come, %d go", len(new), len(gone))
            with self._lock:
                self._holdings.remove(gone)
                self._holdings.add(new)

    # ---- the warming thread --------------------------------------------------------------------

    def _run_warm(self) -> None:
        while not self._stopping:
            self._warm_wake.clear()
            found = self._next_job()
            if found is None:
                self._warm_wake.wait(self._warm_pause_s())
            else:
                self._warm(*found)

    def _next_job(self) -> tuple[WarmJob, ShardMap, str] | None:
        """What to warm, by which view, for which registration."""
        if not self._connection.connected:
            return None  # The registration may be gone; see first.
        with self._lock:
            view, instance = self._view, self._instance_id
            if view is None or not instance:
                return None
            leaf = next((leaf for leaf in view.leaves if leaf.name == self._node.name), None)
            if leaf is None or leaf.instance not in ("", instance):
                return None
            named, states = view.held_by(self._node.name)
            if not leaf.instance:
                named = shards_array(named[states == ReplicaState.WARMING])
            named = shards_array(np.setdiff1d(named, self._going, assume_unique=True))
            job = self._holdings.next_job(named, self._clock(), _WARM_BATCH_SHARDS_MAX)
            if job is None:
                return None
            self._warming_now = job.shards
            return job, view, instance

    def _warm_pause_s(self) -> float:
        with self._lock:
            retry_at = self._holdings.next_retry_at()
        if retry_at is None:
            return _POLL_S
        return min(max(retry_at - self._clock(), 0.05), _POLL_S)

    def _warm(self, job: WarmJob, view: ShardMap, instance: str) -> None:
        away_s = None if job.away_since is None else self._clock() - job.away_since
        failure: Exception | None = None
        try:
            self._hooks.warm(job.shards, view, away_s)
        except Exception as error:
            failure = error
            _log.warning("warming %d shards: %s", len(job.shards), error, exc_info=True)
        with self._lock:
            self._warming_now = shards_array([])
            # Of a registration that is over nothing counts: all is to be warmed again.
            if self._instance_id == instance:
                if failure is None:
                    self._holdings.warmed(job.shards)
                else:
                    self._holdings.failed(job.shards, self._clock(), _WARM_RETRY_S)
        self._problem("warm", None if failure is None else f"warming: {failure}; trying again")
        self._wake.set()

    # ---- what went wrong -----------------------------------------------------------------------

    def _corrupt(self, what: str, error: CorruptState) -> None:
        with self._lock:
            self._corrupt_reads += 1
        self._problem(what, f"{error}; going on with what was read before")

    def _problem(self, what: str, text: str | None) -> None:
        """Notes it until it is over, and logs it once."""
        with self._lock:
            before = self._problems.pop(what, None)
            if text is not None:
                self._problems[what] = text
        if text is not None and text != before:
            _log.warning("%s: %s", self._node.name, text)
