"""The cluster's controller: of all that run, one is elected and leads.

One thread: it stands for election, and as the leader turns each change that it sees into a step of
`rebalance` and writes what follows. Watches and the connection's callbacks only wake it; many at
once make one step. A leader that was paused, or cut off, may go on believing that it leads: its
next write fails at `/epoch` (see `_decisions`), and it begins anew with nothing that it believed.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from sharding import layout
from sharding._decisions import Decisions, take_epoch
from sharding._election import Election
from sharding._observer import Observer
from sharding.connection import Check, Connection, State
from sharding.errors import ClusterError, Conflict, Disconnected, WrongCluster
from sharding.model import ClusterConfig
from sharding.placement import Problem
from sharding.rebalance import Decided, Memory, Step, step

__all__ = ["Controller", "ControllerStatus"]

_log = logging.getLogger(__name__)

_RETRY_S = 1.0
_POLL_S = 30.0  # what no watch has told is seen after so long
_DEBOUNCE_S = 0.1  # from the first event to the step that takes in all that came meanwhile
_FIRST_SETTLE_S = (1.0, 10.0)  # how long no node must have come before the first placement; at most


@dataclass(frozen=True)
class ControllerStatus:
    """Of one controller. All but `leader` and `problems` is empty on those that do not lead."""

    leader: bool
    moves: tuple[tuple[int, str], ...] = ()  # shard and node, asked for and not online yet
    waiting: int = 0  # replicas that wait for their turn
    without_online: int = 0  # shards
    frozen: str | None = None  # why nothing moves
    frozen_since: float | None = None  # seconds since the epoch
    problems: tuple[str, ...] = ()  # for people, and what to do
    view_version: int = 0
    steps: int = 0  # since it leads
    bytes_written: int = 0  # since it leads
    corrupt_reads: int = 0  # ever


@dataclass
class _Reign:
    """What a leader knows. Dropped as a whole when it leads no more."""

    session: int
    decisions: Decisions
    decided: Decided
    memory: Memory
    fresh: bool = True  # loaded, and no connection was lost since
    steps: int = 0
    checked_at: float = 0.0  # of the clock, as all times here
    live: frozenset[str] = frozenset()
    live_since: float = 0.0
    first_live_at: float | None = None


class Controller:
    """`config` is what this node believes of the cluster: written when there is none yet, else it
    must name the same cluster. `name` is for people, to see who leads."""

    def __init__(
        self,
        connection: Connection,
        config: ClusterConfig,
        name: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        debounce_seconds: float = _DEBOUNCE_S,
        first_settle_seconds: float = _FIRST_SETTLE_S[0],
    ) -> None:
        self._connection = connection
        self._own_config = config
        self._name = name
        self._clock = clock
        self._debounce_s = debounce_seconds
        self._first_settle_s = first_settle_seconds
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)

        # Of the thread alone.
        self._election = Election(connection, name)
        self._observer = Observer(connection, self._wake.set)
        self._reign: _Reign | None = None
        self._known: ClusterConfig | None = None
        self._corrupt_before = 0  # reads in earlier reigns

        self._lock = threading.Lock()  # guards all that follows
        self._silences = 0  # times that the connection, and with it the watches, was lost
        self._silences_met = 0
        self._status = ControllerStatus(leader=False)
        self._step: Step | None = None

    def start(self) -> None:
        self._connection.on_state(self._on_state)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the thread and lets another lead. Idempotent; a step under way is waited for."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def status(self) -> ControllerStatus:
        disconnected = self._connection.problem
        with self._lock:
            status, made = self._status, self._step
        if disconnected is not None:
            # Whether another leads by now cannot be known.
            return ControllerStatus(
                leader=False, problems=(disconnected,), corrupt_reads=status.corrupt_reads
            )
        if made is None:
            return status
        names = made.memory.names
        moves = tuple(
            (key // len(names), names[key % len(names)]) for key in made.memory.moving.tolist()
        )
        return replace(status, moves=moves)

    # ---- the thread ------------------------------------------------------------------------------

    def _on_state(self, state: State) -> None:
        """In the connection's thread."""
        if state is not State.CONNECTED:
            with self._lock:
                self._silences += 1
        self._wake.set()

    def _run(self) -> None:
        pause_s = 0.0
        while not self._stop.is_set():
            if self._wake.wait(pause_s) and self._reign is not None:
                self._stop.wait(self._debounce_s)
            self._wake.clear()
            if self._stop.is_set():
                break
            try:
                pause_s = self._turn()
            except Exception:
                # Without a leader nothing would ever move again.
                _log.exception("the controller met what it did not expect; beginning anew")
                self._abdicate("met what it did not expect")
                pause_s = _RETRY_S
        self._abdicate("stops")
        try:
            if self._connection.connected:
                self._election.resign()
        except ClusterError as error:
            _log.info("the next leader waits for this session to end: %s", error)

    def _turn(self) -> float:
        """Stands for election or leads; seconds until the next turn that nothing asks for."""
        if not self._connection.connected:
            return _RETRY_S
        try:
            return self._lead_or_stand()
        except Disconnected as error:
            # What was under way may have been done or not.
            if self._reign is not None:
                self._reign.fresh = False
            _log.info("%s; looking again", error)
            return _RETRY_S
        except Conflict as error:
            if error.path == layout.EPOCH:
                self._abdicate("another leads")
            elif self._reign is not None:
                self._reign.fresh = False
            _log.info("%s; looking again", error)
            return self._debounce_s
        except ClusterError as error:
            # Not for us to lead; perhaps for another one, with another config.
            self._abdicate(str(error))
            with contextlib.suppress(ClusterError):
                self._election.resign()
            self._tell(ControllerStatus(leader=False, problems=(str(error),)))
            return _RETRY_S

    def _lead_or_stand(self) -> float:
        with self._lock:
            silent, self._silences_met = self._silences != self._silences_met, self._silences
        if silent:
            self._observer.reset()
            if self._reign is not None:
                self._reign.fresh = False
        config = self._config()
        reign = self._reign
        if reign is not None and reign.session != self._connection.sessions:
            self._abdicate("its session is over")
            reign = None
        if not self._election.stand(self._wake.set):
            if reign is not None:
                self._abdicate("its candidate is gone")
            self._tell(ControllerStatus(leader=False))
            return _POLL_S
        if reign is None:
            reign = self._begin(config)
        elif not reign.fresh:
            reign.decided = reign.decisions.load(config.shard_count)
            reign.memory = Memory()
            reign.fresh = True
        return self._lead(reign, config)

    def _config(self) -> ClusterConfig:
        config = self._observer.config()
        if config is None:
            config = self._known or self._own_config
            with contextlib.suppress(Conflict):  # Another node was first.
                self._connection.create(layout.CONFIG, layout.encode_config(config))
                _log.warning("%s was not there: written by this node", layout.CONFIG)
            config = self._observer.config() or config
        if config.cluster != self._own_config.cluster:
            raise WrongCluster(
                f"{self._connection.config.hosts} belongs to cluster {config.cluster!r}, and this "
                f"node's config says {self._own_config.cluster!r}: it does not lead; give one of "
                "them another chroot"
            )
        if self._known is not None and self._known.shard_count != config.shard_count:
            raise WrongCluster(
                f"the cluster's shard_count went from {self._known.shard_count} to "
                f"{config.shard_count}, which nothing that is stored survives; put it back"
            )
        self._known = config
        return config

    # ---- leading ---------------------------------------------------------------------------------

    def _begin(self, config: ClusterConfig) -> _Reign:
        session = self._connection.sessions
        fence: Check = take_epoch(self._connection)
        # Whatever the last leader wrote is there before our epoch is, and nothing after.
        decisions = Decisions(self._connection, fence)
        decided = decisions.load(config.shard_count)
        now = self._clock()
        self._reign = _Reign(session, decisions, decided, Memory(), checked_at=now)
        _log.info("%s leads, by version %d of %s", self._name, fence.version, fence.path)
        return self._reign

    def _abdicate(self, why: str) -> None:
        if self._reign is not None:
            _log.info("%s leads no more: %s", self._name, why)
            self._corrupt_before += self._reign.decisions.corrupt_reads
            self._reign = None
        self._tell(ControllerStatus(leader=False))

    def _lead(self, reign: _Reign, config: ClusterConfig) -> float:
        now = self._clock()
        if now - reign.checked_at > _POLL_S:
            reign.checked_at = now
            self._observer.look_again()
            if not reign.decisions.untouched():
                reign.decided = reign.decisions.load(config.shard_count)
        seen, problems = self._observer.see(config)
        if frozenset(seen.live) != reign.live:
            reign.live, reign.live_since = frozenset(seen.live), now
        wait_s = self._first_wait_s(reign, now)
        if wait_s > 0:
            self._tell(ControllerStatus(leader=True))
            return wait_s
        made = step(seen, reign.decided, reign.memory, now, reign.decisions.first_version)
        reign.decisions.write(made.decided)
        reign.decided, reign.memory = made.decided, made.memory
        reign.steps += 1
        self._tell_step(reign, made, problems)
        return _POLL_S if made.wake_in_seconds is None else min(made.wake_in_seconds, _POLL_S)

    def _first_wait_s(self, reign: _Reign, now: float) -> float:
        """A cluster that starts is placed once, not once for each node that comes."""
        ideal = reign.decided.ideal
        if ideal is not None and len(ideal.replicas):
            return 0.0
        if not reign.live:
            return _POLL_S
        if reign.first_live_at is None:
            reign.first_live_at = now
        settled_at = reign.live_since + self._first_settle_s
        return min(settled_at, reign.first_live_at + _FIRST_SETTLE_S[1]) - now

    # ---- what is said ----------------------------------------------------------------------------

    def _tell_step(self, reign: _Reign, made: Step, problems: list[Problem]) -> None:
        texts = [problem.text for problem in (*problems, *made.problems)]
        texts += reign.decisions.complaints()
        with self._lock:
            before = self._status
        for text in texts:
            if text not in before.problems:
                _log.warning("%s", text)
        since = None
        if made.frozen is not None:
            since = before.frozen_since if before.frozen_since is not None else time.time()
        elif before.frozen is not None:
            _log.warning("enough nodes are back: shards may move again")
        view = made.decided.view
        self._tell(
            ControllerStatus(
                leader=True,
                waiting=made.waiting,
                without_online=made.without_online,
                frozen=made.frozen,
                frozen_since=since,
                problems=tuple(dict.fromkeys(texts)),
                view_version=view.version if view is not None else 0,
                steps=reign.steps,
                bytes_written=reign.decisions.bytes_written,
            ),
            made,
        )

    def _tell(self, status: ControllerStatus, made: Step | None = None) -> None:
        corrupt = self._corrupt_before + self._observer.corrupt_reads
        corrupt += self._reign.decisions.corrupt_reads if self._reign is not None else 0
        with self._lock:
            self._status = replace(status, corrupt_reads=corrupt)
            self._step = made
