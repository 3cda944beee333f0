"""The way to ZooKeeper: one client, its session, and a timer of our own for it.

With `_kazoo` the only module that knows kazoo. It adds what kazoo leaves to its users:

- Connecting in the background for as long as it takes. kazoo's thread ends for good when ZooKeeper
  refuses a password; here another client is made after a while.
- `CONNECTED` means that ZooKeeper has answered a request, not that a socket is open: a session that
  SASL will refuse is announced by kazoo, too.
- `LOST` comes when the session's timeout has passed since the last request that was answered, also
  while nothing answers at all; kazoo says it only when a server told so.
- Every call has a time limit, and raises the errors of `sharding.errors`.
- Passwords are in no repr, log line or exception: what kazoo logs of its requests is dropped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from kazoo.client import KazooClient
from kazoo.exceptions import KazooException
from kazoo.handlers.threading import KazooTimeoutError
from kazoo.protocol.states import KazooState, KeeperState

from sharding import _kazoo
from sharding.errors import Conflict, Disconnected
from sharding.znodes import (
    Check,
    Create,
    Credentials,
    Delete,
    Operation,
    Set,
    State,
    Watch,
    Znode,
    ZooKeeperConfig,
)

__all__ = [
    "Check",
    "Connection",
    "Create",
    "Credentials",
    "Delete",
    "Operation",
    "Set",
    "State",
    "Watch",
    "Znode",
    "ZooKeeperConfig",
    "boot_clock",
]

_log = logging.getLogger(__name__)

_REMAKE_DELAY_S = (1.0, 10.0)  # first and longest, after ZooKeeper refused us
_SILENT_BEFORE_WARNING_S = 2.0
_READS_AT_ONCE_MAX = 128


def boot_clock() -> float:
    """Seconds since boot, with those in which the machine slept: sessions end meanwhile."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Connection:
    """A session with ZooKeeper that is made again when it ends. Safe from any thread.

    `start` returns at once. Calls raise `Disconnected` while there is no connection.
    """

    def __init__(self, config: ZooKeeperConfig, *, clock: Callable[[], float] = boot_clock) -> None:
        self.config = config
        self._clock = clock
        self._callbacks: list[Callable[[State], None]] = []
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="zookeeper-session", daemon=True)

        self._lock = threading.Lock()  # guards all that follows
        self._client: KazooClient | None = None
        self._client_ended = False
        self._connects = 0  # sockets that kazoo reported open, ever
        self._confirmed = -1  # the one on which an answer has come
        self._kazoo_lost = False  # a session ended since the last step
        self._ping_sent: float | None = None  # that is not answered yet
        self._ping_due = 0.0
        self._last_contact: float | None = None
        self._former_contact: float | None = None  # of the session before this one
        self._session_id: int | None = None
        self._sessions = 0
        self._timeout_s = config.session_timeout_seconds
        self._state = State.DISCONNECTED
        self._since = clock()
        self._remake_at = 0.0
        self._remake_delay_s = _REMAKE_DELAY_S[0]
        self._problem: str | None = None
        self._warned = False

    def __repr__(self) -> str:
        return f"Connection({self.config.hosts!r}, {self._state.value})"

    # ---- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts connecting, in the background, until `close`."""
        self._thread.start()

    def close(self, timeout_s: float = 2.0) -> None:
        """Ends the session, which takes ephemeral znodes away at once. Idempotent.

        When ZooKeeper does not take the good-bye within `timeout_s`, the session ends by itself
        after its timeout.
        """
        with self._lock:
            self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        with self._lock:
            client, self._client = self._client, None
            self._state = State.LOST
            self._problem = "the connection was closed"
        if client is not None:
            _kazoo.end_client(client, timeout_s)

    def on_state(self, callback: Callable[[State], None]) -> None:
        """`callback` gets each new state, in one thread of the connection; it must not block."""
        self._callbacks.append(callback)

    @property
    def state(self) -> State:
        return self._state

    @property
    def connected(self) -> bool:
        return self._state is State.CONNECTED

    @property
    def problem(self) -> str | None:
        """Why there is no connection, for people; None when there is one."""
        with self._lock:
            return None if self._state is State.CONNECTED else self._why_locked()

    @property
    def session_id(self) -> int | None:
        """Of the session now or, while disconnected, of the last one."""
        with self._lock:
            return self._session_id

    @property
    def sessions(self) -> int:
        """How many there have been. Another number: what was ephemeral is gone."""
        with self._lock:
            return self._sessions

    @property
    def session_timeout_s(self) -> float:
        """As negotiated, and as asked for before the first connection."""
        with self._lock:
            return self._timeout_s

    def session_age(self) -> float | None:
        """Seconds since ZooKeeper last got a request that it answered; None: never."""
        with self._lock:
            return None if self._last_contact is None else self._clock() - self._last_contact

    def former_session_age(self) -> float | None:
        """Seconds since the last answer in the session before this one; None: there was none."""
        with self._lock:
            return None if self._former_contact is None else self._clock() - self._former_contact

    def wait_connected(self, timeout_s: float) -> bool:
        """For commands and tests; a daemon waits for `on_state`."""
        deadline = time.monotonic() + timeout_s
        while not self.connected:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    # ---- reads and writes ----------------------------------------------------------------------

    def get(self, path: str, watch: Watch | None = None) -> Znode | None:
        """None when there is no such znode; then `watch` waits for it to be created."""
        found = self._found(path, *self._begin(path, _getting(path, watch)))
        if found is None and watch is not None and self.exists(path, watch) is not None:
            return self.get(path, watch)  # It was created between the two.
        return found

    def get_many(self, paths: Sequence[str]) -> list[Znode | None]:
        """As `get`, with the requests on their way at once."""
        found: list[Znode | None] = []
        for at in range(0, len(paths), _READS_AT_ONCE_MAX):
            part = paths[at : at + _READS_AT_ONCE_MAX]
            waiting = [(path, *self._begin(path, _getting(path))) for path in part]
            found += [self._found(path, sent, result) for path, sent, result in waiting]
        return found

    def _found(self, path: str, sent: float, result: Any) -> Znode | None:
        try:
            data, stat = self._finish(path, sent, result)
        except Conflict:
            return None
        return Znode(data, stat.version, stat.ephemeralOwner)

    def exists(self, path: str, watch: Watch | None = None) -> int | None:
        """Its version; None when there is no such znode."""
        stat = self._call(path, lambda client: client.exists_async(path, _watcher(watch)))
        return None if stat is None else int(stat.version)

    def children(self, path: str, watch: Watch | None = None) -> list[str] | None:
        """Sorted names; None when there is no such znode (and no watch then)."""
        try:
            names = self._call(
                path, lambda client: client.get_children_async(path, _watcher(watch))
            )
        except Conflict:
            return None
        return sorted(names)

    def create(
        self, path: str, data: bytes = b"", *, ephemeral: bool = False, sequence: bool = False
    ) -> str:
        """The path made, and its parents; `Conflict` when it is there already."""

        def begin(client: KazooClient) -> Any:
            return client.create_async(
                path, data, ephemeral=ephemeral, sequence=sequence, makepath=True
            )

        return str(self._call_in_chroot(path, begin))

    def set(self, path: str, data: bytes, version: int = -1) -> int:
        """The new version; `Conflict` when it is not there or has another one."""
        stat = self._call(path, lambda client: client.set_async(path, data, version))
        return int(stat.version)

    def put(self, path: str, data: bytes) -> None:
        """Sets it, or creates it and its parents. For znodes that one client alone writes."""
        try:
            self.set(path, data)
        except Conflict:
            try:
                self.create(path, data)
            except Conflict:
                self.set(path, data)

    def delete(self, path: str, version: int = -1) -> bool:
        """Whether it was there; `Conflict` for another version, or when it has children."""
        try:
            self._call(path, lambda client: client.delete_async(path, version))
        except Conflict as error:
            if _kazoo.is_missing(error.__cause__):
                return False
            raise
        return True

    def ensure(self, path: str) -> None:
        """Makes the znode and its parents where they are missing."""
        self._call_in_chroot(path, lambda client: client.ensure_path_async(path))

    def sync(self, path: str) -> None:
        """Reads that follow see all that was written before this call, by whomever."""
        self._call(path, lambda client: client.sync_async(path))

    def commit(self, operations: Sequence[Operation]) -> None:
        """All of them or none; `Conflict` names the first that was refused."""

        def begin(client: KazooClient) -> Any:
            transaction = client.transaction()
            for one in operations:
                if isinstance(one, Check):
                    transaction.check(one.path, one.version)
                elif isinstance(one, Create):
                    transaction.create(one.path, one.data, ephemeral=one.ephemeral)
                elif isinstance(one, Set):
                    transaction.set_data(one.path, one.data, one.version)
                else:
                    transaction.delete(one.path, one.version)
            return transaction.commit_async()

        if not operations:
            return
        refusal = _kazoo.first_refused(self._call(operations[0].path, begin))
        if refusal is not None:
            at, error = refusal
            raise self._translated(operations[at].path, error) from error

    def _call_in_chroot(self, path: str, begin: Callable[[KazooClient], Any]) -> Any:
        try:
            return self._call(path, begin)
        except Conflict as error:
            if not _kazoo.is_missing(error.__cause__):
                raise
        try:
            _kazoo.make_chroot(self.config)
        except (KazooException, KazooTimeoutError) as error:
            raise self._translated(path, error) from error
        return self._call(path, begin)

    def _call(self, path: str, begin: Callable[[KazooClient], Any]) -> Any:
        return self._finish(path, *self._begin(path, begin))

    def _begin(self, path: str, begin: Callable[[KazooClient], Any]) -> tuple[float, Any]:
        with self._lock:
            client = self._client
            answered = self._confirmed == self._connects
        # kazoo would keep the request and send it whenever it connects; and what is sent before the
        # first answer may still meet a refusal.
        if client is None or not client.connected or not answered:
            raise Disconnected(f"{path}: {self.problem or 'the connection is being made'}")
        return self._clock(), begin(client)

    def _finish(self, path: str, sent: float, result: Any) -> Any:
        try:
            answer = result.get(timeout=self.session_timeout_s)
        except (KazooException, KazooTimeoutError) as error:
            raise self._translated(path, error) from error
        self._contact(sent)
        return answer

    def _translated(self, path: str, error: Exception) -> Exception:
        return _kazoo.translated(path, error, self.config.credentials)

    # ---- the session, in one thread ------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._stopping:
                    return
                tick = min(0.25, self._timeout_s / 10)
            try:
                self._step()
            except Exception:
                # Nobody else would notice that the timer stands still.
                _log.exception("the session timer of ZooKeeper met what it did not expect")
            self._wake.wait(tick)
            self._wake.clear()

    def _step(self) -> None:
        self._keep_client()
        self._ping()
        for state in self._transitions():
            for callback in list(self._callbacks):
                callback(state)

    def _keep_client(self) -> None:
        """Makes the client, and makes another when ZooKeeper refused the last one."""
        now = self._clock()
        with self._lock:
            old = self._client
            if old is not None and self._client_ended and _kazoo.is_refusal(old.handler.failure):
                self._problem = _kazoo.refused(self.config.credentials)
            busy = old is not None and not self._client_ended
            if self._stopping or busy or now < self._remake_at:
                return
            self._client = None
            self._client_ended = False
            self._remake_at = now + self._remake_delay_s
            self._remake_delay_s = min(self._remake_delay_s * 2, _REMAKE_DELAY_S[1])
        if old is not None:
            _kazoo.end_client(old, 1.0)
        client = _kazoo.make_client(self.config, self._granted)
        client.add_listener(lambda state: self._kazoo_state(client, state))
        with self._lock:
            self._client = client
        client.start_async()

    def _granted(self, timeout_s: float) -> None:
        """In kazoo's thread."""
        with self._lock:
            self._timeout_s = timeout_s

    def _kazoo_state(self, client: KazooClient, state: str) -> None:
        """In kazoo's thread."""
        with self._lock:
            if self._client is None or client is not self._client:
                return
            if state == KazooState.CONNECTED:
                self._connects += 1
                self._ping_sent = None
                self._ping_due = 0.0
            elif state == KazooState.LOST:
                self._kazoo_lost = True
                self._former_contact = self._last_contact
                ended = self._client.client_state
                self._client_ended = ended in (KeeperState.CLOSED, KeeperState.AUTH_FAILED)
                if ended == KeeperState.AUTH_FAILED:
                    self._problem = _kazoo.refused(self.config.credentials)
        self._wake.set()

    def _ping(self) -> None:
        """Asks for something a third of the session's timeout after the last answer."""
        now = self._clock()
        with self._lock:
            client = self._client
            if client is None or not client.connected:
                return
            if self._ping_sent is not None or now < self._ping_due:
                return
            self._ping_sent = now
            connect = self._connects
        client.exists_async("/").rawlink(lambda result: self._pong(client, connect, now, result))

    def _pong(self, client: KazooClient, connect: int, sent: float, result: Any) -> None:
        """In kazoo's thread."""
        error = result.exception
        with self._lock:
            if client is not self._client or connect != self._connects:
                return
            self._ping_sent = None
            if _kazoo.is_answer(error):
                self._confirmed = connect
                self._ping_due = sent + self._timeout_s / 3
            elif _kazoo.is_refusal(error):
                self._problem = _kazoo.refused(self.config.credentials)
        if _kazoo.is_answer(error):
            self._contact(sent)
        self._wake.set()

    def _contact(self, sent: float) -> None:
        """An answer came to what was sent then: the session has lived at least until then."""
        with self._lock:
            self._last_contact = max(self._last_contact or sent, sent)

    def _transitions(self) -> list[State]:
        """The states to tell of, as they came since the last step."""
        now = self._clock()
        told: list[State] = []
        with self._lock:
            client = self._client
            age = None if self._last_contact is None else now - self._last_contact
            over = self._kazoo_lost or (age is not None and age > self._timeout_s)
            self._kazoo_lost = False
            alive = (
                client is not None
                and client.connected
                and self._confirmed == self._connects
                and age is not None
                and age <= self._timeout_s
            )
            identity = client.client_id if alive and client is not None else None
            session_id = identity[0] if identity else None
            if self._state is State.CONNECTED and alive and session_id != self._session_id:
                over = True
            if over and self._sessions and self._state is not State.LOST:
                told.append(self._enter_locked(State.LOST, now))
            if alive and session_id is not None and self._state is not State.CONNECTED:
                if session_id != self._session_id:
                    self._sessions += 1
                self._session_id = session_id
                self._problem = None
                self._remake_delay_s = _REMAKE_DELAY_S[0]
                told.append(self._enter_locked(State.CONNECTED, now))
            elif not alive and self._state is State.CONNECTED:
                told.append(self._enter_locked(State.DISCONNECTED, now))
            if (
                self._state is not State.CONNECTED
                and not self._warned
                and now - self._since > _SILENT_BEFORE_WARNING_S
            ):
                self._warned = True
                _log.warning(
                    "no connection to ZooKeeper: %s; trying again, and serving goes on",
                    self._why_locked(),
                )
        return told

    def _enter_locked(self, state: State, now: float) -> State:
        silent_s = now - self._since
        if state is State.CONNECTED:
            _log.info(
                "connected to ZooKeeper at %s, session %#x%s",
                self.config.hosts,
                self._session_id or 0,
                f", after {silent_s:.1f} s" if self._warned else "",
            )
            self._warned = False
        elif state is State.LOST:
            age = now - (self._last_contact or now)
            ended = "ZooKeeper has ended it" if age < self._timeout_s else self._why_locked()
            _log.warning("the session with ZooKeeper is over: %s", ended)
        if State.CONNECTED in (state, self._state):
            self._since = now
        self._state = state
        return state

    def _why_locked(self) -> str:
        if self._problem is not None:
            return self._problem
        if self._last_contact is None:
            return f"nobody has answered at {self.config.hosts} yet"
        age = self._clock() - self._last_contact
        return f"no answer from {self.config.hosts} for {age:.1f} s"


def _watcher(watch: Watch | None) -> Callable[[object], None] | None:
    return None if watch is None else _kazoo.Watcher(watch)


def _getting(path: str, watch: Watch | None = None) -> Callable[[KazooClient], Any]:
    return lambda client: client.get_async(path, _watcher(watch))
