"""Who of the candidates leads: the one whose ephemeral znode has the lowest number."""

from __future__ import annotations

import uuid

from sharding import layout
from sharding.connection import Connection, Watch

__all__ = ["Election"]

_ATTEMPTS_MAX = 5


class Election:
    """One candidate, of whatever session the connection has. For one thread."""

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection = connection
        self._name = name
        self._session = 0
        self._prefix = ""

    def stand(self, watch: Watch) -> bool:
        """Stands for election, and tells whether we lead; `watch` waits for that to change.

        Leading is a belief, which the next write has to prove (see `Decisions`).
        """
        if self._session != self._connection.sessions:
            self._session = self._connection.sessions
            # Part of the path, so that a create whose answer was lost is found again.
            self._prefix = f"candidate-{uuid.uuid4().hex}-"
        for _ in range(_ATTEMPTS_MAX):
            candidates = self._candidates()
            mine = next((name for name in candidates if name.startswith(self._prefix)), None)
            if mine is None:
                path = f"{layout.LEADER}/{self._prefix}"
                self._connection.create(path, self._name.encode(), ephemeral=True, sequence=True)
                continue
            place = candidates.index(mine)
            # Each watches the one before it: an end wakes one of them, not all.
            watched = candidates[max(place - 1, 0)]
            if self._connection.exists(f"{layout.LEADER}/{watched}", watch) is not None:
                return place == 0
        return False

    def resign(self) -> None:
        """Takes the candidate away, if there is one in this session."""
        if self._prefix and self._session == self._connection.sessions:
            for name in self._candidates():
                if name.startswith(self._prefix):
                    self._connection.delete(f"{layout.LEADER}/{name}")

    def _candidates(self) -> list[str]:
        names = self._connection.children(layout.LEADER) or []
        return sorted((name for name in names if _number(name) >= 0), key=_number)


def _number(name: str) -> int:
    """What ZooKeeper numbered the candidate with; -1 for what is none."""
    digits = name.rpartition("-")[2]
    return int(digits) if name.startswith("candidate-") and digits.isdigit() else -1
