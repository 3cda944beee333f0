"""Follows the external view, and hands each new map to whoever routes by it.

A root has one, and a client that asks leaves itself. While ZooKeeper is away the last map stays.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from sharding._view_reader import ViewReader
from sharding.connection import Connection, State, boot_clock
from sharding.errors import ClusterError, CorruptState
from sharding.model import ShardMap

__all__ = ["Spectator"]

_log = logging.getLogger(__name__)

# However many leaves say at once that a map is old, ZooKeeper is asked so often.
_REFRESH_EVERY_S = 0.05
_REFRESH_IN_VAIN_S = 1.0  # for a version that nobody has published
_RETRY_S = 1.0
_POLL_S = 30.0  # a watch that got lost costs so long; none is known to


class Spectator:
    """Calls `on_map` with each map, in a thread of its own; versions only rise.

    `on_map` gets the newest map: one that was replaced before it was read is left out.
    """

    def __init__(
        self,
        connection: Connection,
        on_map: Callable[[ShardMap], None],
        *,
        clock: Callable[[], float] = boot_clock,
    ) -> None:
        self._connection = connection
        self._on_map = on_map
        self._clock = clock
        self._reader = ViewReader(connection)
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="spectator", daemon=True)
        self._stopping = False

        self._lock = threading.Lock()  # guards all that follows
        self._map: ShardMap | None = None
        self._wanted = 0  # the newest version that somebody has heard of
        self._quiet_until = 0.0  # after one that nobody had published
        self._silences = 0  # times that the connection, and with it a watch, was lost
        self._watching = False  # the map was the newest, and its watch is still there
        self._confirmed_at: float | None = None
        self._problem: str | None = None
        self.corrupt_reads = 0  # ever

    def start(self) -> None:
        self._connection.on_state(self._on_state)
        self._thread.start()

    def stop(self) -> None:
        """Idempotent; the map stays."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(5)

    @property
    def map(self) -> ShardMap | None:
        """The newest map; None before the first."""
        with self._lock:
            return self._map

    @property
    def age_seconds(self) -> float | None:
        """How long ago the map was known to be the newest; None before the first.

        While the session lives that is the time since its last answer, as a change would be told.
        """
        with self._lock:
            if self._watching:
                return self._connection.session_age()
            return None if self._confirmed_at is None else self._clock() - self._confirmed_at

    @property
    def problem(self) -> str | None:
        """Why there is no newer map, for people; None when all is well."""
        with self._lock:
            return self._problem

    def refresh(self, at_least_version: int) -> None:
        """Somebody has heard of this version: looks at once, however old the watch says the map is.

        Does not wait. Many calls make few reads.
        """
        with self._lock:
            if self._map is not None and self._map.version >= at_least_version:
                return
            if at_least_version <= self._wanted:
                return
            self._wanted = at_least_version
        self._wake.set()

    def _on_state(self, state: State) -> None:
        """In the connection's thread."""
        if state is not State.CONNECTED:
            age = self._connection.session_age()
            with self._lock:
                self._silences += 1
                if self._watching and age is not None:
                    self._confirmed_at = self._clock() - age
                self._watching = False
        self._wake.set()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            started = time.monotonic()
            try:
                pause_s = self._step()
            except Exception:
                # A map that is never updated again would be worse than any error.
                _log.exception("the spectator met what it did not expect")
                pause_s = _RETRY_S
            self._wake.wait(pause_s)
            if not self._stopping:
                time.sleep(max(0.0, started + _REFRESH_EVERY_S - time.monotonic()))

    def _step(self) -> float:
        """Reads once; seconds until it wants to look again without being woken."""
        if not self._connection.connected:
            return _RETRY_S
        now = self._clock()
        with self._lock:
            wanted, silences = self._wanted, self._silences
            quiet_s = self._quiet_until - now
            behind = wanted > (self._map.version if self._map else 0) and quiet_s <= 0
        try:
            if behind:
                # A server of an ensemble may be behind the one that the leaf has heard it from.
                self._connection.sync("/")
            found = self._reader.read(self._wake.set)
        except CorruptState as error:
            with self._lock:
                self.corrupt_reads += 1
            self._report(f"{error}; going on with the last good map")
            return _RETRY_S
        except ClusterError as error:
            self._report(str(error))
            return _RETRY_S
        self._report(None)
        if found is not None:
            self._take(found, now, silences)
        if behind and (found is None or found.version < wanted):
            with self._lock:
                # Not published after all. Whoever says it again is heard again, later.
                self._quiet_until = now + _REFRESH_IN_VAIN_S
                if self._wanted == wanted:
                    self._wanted = 0
        return quiet_s if quiet_s > 0 else _POLL_S

    def _take(self, found: ShardMap, asked_at: float, silences: int) -> None:
        with self._lock:
            is_new = self._map is None or found.version > self._map.version
            if is_new:
                self._map = found
            self._watching = silences == self._silences
            self._confirmed_at = asked_at
        if is_new:
            try:
                self._on_map(found)
            except Exception:
                _log.exception("shard map %d was not taken", found.version)

    def _report(self, problem: str | None) -> None:
        with self._lock:
            before, self._problem = self._problem, problem
        if problem is not None and problem != before:
            _log.warning("no newer shard map: %s", problem)
