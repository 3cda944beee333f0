"""Small documents that several nodes read and change."""

from __future__ import annotations

from typing import Protocol

from warmup.backend import Backend
from warmup.errors import Conflict, NotThere

__all__ = ["BackendDocument", "SharedDocument"]


class SharedDocument(Protocol):
    """Bytes that change as a whole, and only from what the writer has seen. Thread-safe."""

    def read(self) -> tuple[bytes | None, str]:
        """The bytes, None where there are none yet, and the tag to write with.

        Raises an error of the place where it lies.
        """

    def write(self, data: bytes, tag: str) -> bool:
        """Writes over what `read` returned with that tag; False: somebody else was first.

        Raises an error of the place where it lies; then it may have been written, or not.
        """


class BackendDocument:
    """A document where snapshots lie, by conditional writes. Raises `SnapshotError`s."""

    def __init__(self, backend: Backend, key: str) -> None:
        self._backend = backend
        self._key = key

    def read(self) -> tuple[bytes | None, str]:
        try:
            return self._backend.read_tagged(self._key)
        except NotThere:
            return None, ""

    def write(self, data: bytes, tag: str) -> bool:
        try:
            self._backend.put(self._key, data, if_absent=not tag, if_tag=tag or None)
        except (Conflict, NotThere):  # or it was deleted meanwhile
            return False
        return True
