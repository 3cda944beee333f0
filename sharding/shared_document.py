"""A small document that many nodes change, as one znode; its version is the tag to write with."""

from __future__ import annotations

from sharding.connection import Connection
from sharding.errors import Conflict

__all__ = ["ZnodeDocument"]


class ZnodeDocument:
    """Bytes that change as a whole, and only from what the writer has seen. Thread-safe.

    All methods raise `Disconnected` while ZooKeeper is away; a write may have come through then.
    """

    def __init__(self, connection: Connection, path: str) -> None:
        self._connection = connection
        self._path = path

    def read(self) -> tuple[bytes | None, str]:
        """The bytes, None where there are none yet, and the tag to write with."""
        znode = self._connection.get(self._path)
        return (None, "") if znode is None else (znode.data, str(znode.version))

    def write(self, data: bytes, tag: str) -> bool:
        """Writes over what `read` returned with that tag; False: somebody else was first."""
        try:
            if tag:
                self._connection.set(self._path, data, int(tag))
            else:
                self._connection.create(self._path, data)
        except Conflict:
            return False
        return True
