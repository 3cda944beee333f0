"""Where snapshots lie: objects by key below a prefix, in S3 or in a directory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

__all__ = ["Backend", "BackendOptions", "ObjectInfo", "open_backend"]


@dataclass(frozen=True)
class ObjectInfo:
    """One object as a listing shows it."""

    key: str
    size: int  # bytes
    modified: float  # seconds since 1970, by the clock of the store


@dataclass(frozen=True)
class BackendOptions:
    """How an S3 is reached; a directory needs none of it."""

    endpoint: str | None = None  # of a server that speaks S3; None: AWS
    region: str | None = None  # None: as the usual AWS settings say
    timeout_s: float = 10.0  # of one call
    attempts: int = 4  # of one call
    part_bytes: int = 8 << 20  # of a multipart upload


class Backend(Protocol):
    """Objects by key. Thread-safe. Keys are relative to the store's prefix and use "/".

    All methods raise `SnapshotError`s.
    """

    @property
    def url(self) -> str:
        """Where that is, for people."""

    def find(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects whose keys begin with `prefix`, rising by key."""

    def read(self, key: str) -> bytes:
        """All bytes of an object. Raises NotThere."""

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        """The bytes and a tag that changes with them, for `put`. Raises NotThere."""

    def put(
        self, key: str, data: bytes, *, if_absent: bool = False, if_tag: str | None = None
    ) -> None:
        """Writes an object as a whole.

        `if_absent`: only where there is none; `if_tag`: only over what has that tag. Else Conflict.
        """

    def put_file(self, key: str, path: Path) -> None:
        """Writes a file as an object, which is seen when all of it is there."""

    def delete(self, key: str) -> None:
        """Idempotent."""

    def expire_uploads(self, older_than_s: float) -> int:
        """Forgets uploads that were begun so long ago and never ended; returns how many."""


def open_backend(url: str, options: BackendOptions | None = None) -> Backend:
    """The backend at `s3://bucket/prefix` or `file:///directory`; looks at nothing yet.

    Raises ValueError for another form.
    """
    parts = urlsplit(url)
    if parts.scheme == "file" and not parts.netloc and len(parts.path) > 1:
        from warmup._file_backend import FileBackend

        return FileBackend(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc:
        # Loads boto3, which nodes with a directory do without.
        from warmup._s3_backend import S3Backend

        return S3Backend(parts.netloc, parts.path.strip("/"), options or BackendOptions())
    raise ValueError(f"{url!r}: write s3://bucket/prefix or file:///absolute/path")
