"""A leaf's registration under /live, and its word about itself under /current.

For one thread. Who holds a name is decided by the ephemeral znode alone. /current outlives it, so
it is written by its version: a process that was paused while another took its name finds that the
version has moved on, and looks at /live again before it writes another word.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable

from sharding import layout
from sharding.connection import Connection, Watch
from sharding.errors import Conflict, CorruptState, NameTaken
from sharding.model import CurrentState, LiveNode, NodeOverride

_log = logging.getLogger(__name__)

_ATTEMPTS_MAX = 3
_FORMER_MAX = 16


class Registration:
    """Registers `node`, each time under an instance id of its own."""

    def __init__(self, connection: Connection, node: LiveNode, clock: Callable[[], float]) -> None:
        self._connection = connection
        self._clock = clock
        self._seen_at = 0.0  # when the registration was last known to stand
        self._node = node
        self._path = layout.live_path(node.name)
        self._former: list[str] = []  # instance ids that were ours
        self._session = 0  # of the connection, in which `instance_id` was registered
        self._current_version: int | None = None  # of the znode; None: not known
        self._written: bytes | None = None
        self.instance_id = ""  # empty: not registered

    def is_ours(self, watch: Watch) -> bool:
        """Whether the registration stands; False forgets it."""
        if not self.instance_id or self._session != self._connection.sessions:
            self.instance_id = ""
            return False
        asked_at = self._clock()
        znode = self._connection.get(self._path, watch)
        if znode is not None and znode.owner == self._connection.session_id:
            try:
                found = layout.decode_live(self._path, znode.data)
            except CorruptState as error:
                _log.warning("%s; writing it again", error)
                found = None
            if found is None or found.instance_id == self.instance_id:
                if found is None:
                    self._connection.set(self._path, self._data(), znode.version)
                    self._connection.exists(self._path, watch)
                self._seen_at = asked_at
                return True
        self.instance_id = ""
        return False

    def register(self, watch: Watch, before: Callable[[float], None]) -> None:
        """Registers anew; `before` is called when nothing but the write is left to do, with the
        time at which the last registration was still known to stand.

        Raises `NameTaken` while another process holds the name; `watch` waits for it to end.
        """
        session = self._connection.sessions
        for _ in range(_ATTEMPTS_MAX):
            znode = self._connection.get(self._path, watch)
            if znode is None:
                before(self._stood_until())
                self.instance_id = uuid.uuid4().hex
                self._former = [*self._former[1 - _FORMER_MAX :], self.instance_id]
                try:
                    self._connection.create(self._path, self._data(), ephemeral=True)
                except Conflict:
                    self.instance_id = ""
                    continue
                self._connection.exists(self._path, watch)
                break
            holder = self._holder(znode.data)
            mine = znode.owner == self._connection.session_id
            if not mine and (holder is None or holder.instance_id not in self._former):
                raise NameTaken(self._taken(holder, znode.owner))
            # Of this process: its former session has not ended yet, or an answer was lost.
            self._connection.delete(self._path, znode.version)
        else:
            raise NameTaken(f"{self._node.name} is registered and gone by turns; trying again")
        self._session = session
        self._seen_at = self._clock()
        self._current_version = None
        self._written = None
        override = layout.override_path(self._node.name)
        if self._connection.exists(override) is None:
            with contextlib.suppress(Conflict):  # An operator was first.
                self._connection.create(override, layout.encode_override(NodeOverride()))

    def _stood_until(self) -> float:
        """An answer in the session of a registration proves it, too: a watch is on it."""
        age = self._connection.former_session_age()
        if age is not None and self._connection.sessions == self._session + 1:
            return max(self._seen_at, self._clock() - age)
        return self._seen_at

    def leave(self) -> None:
        """Takes the registration away, when it is still ours."""
        if self.is_ours(_nothing):
            self._connection.delete(self._path)
            self.instance_id = ""

    def write_current(self, current: CurrentState) -> None:
        """Says what is held, unless that was said already.

        `Conflict` when another wrote meanwhile: see whether the registration is still ours.
        """
        data = layout.encode_current(current)
        if data == self._written:
            return
        path = layout.current_path(self._node.name)
        self._written = None
        version, self._current_version = self._current_version, None
        if version is None:
            znode = self._connection.get(path)
            version = None if znode is None else znode.version
        if version is None:
            self._connection.create(path, data)
            self._current_version = 0
        else:
            self._current_version = self._connection.set(path, data, version)
        self._written = data

    def _data(self) -> bytes:
        return layout.encode_live(self._node.model_copy(update={"instance_id": self.instance_id}))

    def _holder(self, data: bytes) -> LiveNode | None:
        try:
            return layout.decode_live(self._path, data)
        except CorruptState:
            return None

    def _taken(self, holder: LiveNode | None, session: int) -> str:
        whom = f"the one at {holder.address}" if holder is not None else "one that wrote garbage"
        return (
            f"another process is registered as {self._node.name!r}: {whom}, session {session:#x}. "
            "Names must be unique: give one of the two another; "
            "if it is this node's former life, its session ends by itself"
        )


def _nothing() -> None:
    pass
