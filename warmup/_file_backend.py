"""Objects as files below a directory, such as one that all nodes mount.

A file appears under its name when it is whole: it is written beside, synced and renamed. Writers
that must not cross take a kernel lock on a file of the directory, so that conditional writes hold
among processes of one machine, and on network file systems that have locks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from warmup.backend import ObjectInfo
from warmup.errors import AccessDenied, Conflict, NotThere, SnapshotError, Unreachable

__all__ = ["FileBackend"]

_LOCK = ".lock"
_PART = ".part"  # of a file that is being written; never listed
_DIRECTORY_MODE = 0o750
_FILE_MODE = 0o640


class FileBackend:
    """See `Backend`. The directory is made when something is written."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def url(self) -> str:
        return f"file://{self._root}"

    def find(self, prefix: str) -> Iterator[ObjectInfo]:
        folder = self._root / prefix.rpartition("/")[0]
        found = []
        with _told(self._root):
            for base, _, names in os.walk(folder):
                for name in names:
                    if name == _LOCK or name.endswith(_PART):
                        continue
                    path = Path(base, name)
                    key = path.relative_to(self._root).as_posix()
                    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                        stat = path.stat()
                        found.append(ObjectInfo(key, stat.st_size, stat.st_mtime))
        yield from sorted(
            (each for each in found if each.key.startswith(prefix)), key=lambda each: each.key
        )

    def read(self, key: str) -> bytes:
        with _told(self._path(key)):
            return self._path(key).read_bytes()

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        data = self.read(key)
        return data, _tag(data)

    def put(
        self, key: str, data: bytes, *, if_absent: bool = False, if_tag: str | None = None
    ) -> None:
        path = self._path(key)
        with _told(path), self._locked(path):
            if if_absent and path.exists():
                raise Conflict(f"{path} is there already")
            if if_tag is not None and (not path.exists() or _tag(path.read_bytes()) != if_tag):
                raise Conflict(f"{path} has changed")
            with _replacing(path) as file:
                file.write(data)

    def put_file(self, key: str, path: Path) -> None:
        to = self._path(key)
        with _told(to):
            to.parent.mkdir(_DIRECTORY_MODE, parents=True, exist_ok=True)
            with path.open("rb") as source, _replacing(to) as file:
                shutil.copyfileobj(source, file, 1 << 20)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _told(path), contextlib.suppress(FileNotFoundError):
            path.unlink()
            # Windows that are over leave no directories behind.
            folder = path.parent
            with contextlib.suppress(OSError):
                while folder != self._root:
                    folder.rmdir()
                    folder = folder.parent

    def expire_uploads(self, older_than_s: float) -> int:
        count = 0
        with _told(self._root):
            now = _now(self._root)
            for base, _, names in os.walk(self._root):
                for path in (Path(base, name) for name in names if name.endswith(_PART)):
                    with contextlib.suppress(FileNotFoundError):
                        if path.stat().st_mtime < now - older_than_s:
                            path.unlink()
                            count += 1
        return count

    def _path(self, key: str) -> Path:
        if not key or key.startswith("/") or ".." in key.split("/"):
            raise ValueError(f"{key!r} is no key")
        return self._root / key

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        path.parent.mkdir(_DIRECTORY_MODE, parents=True, exist_ok=True)
        descriptor = os.open(self._root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _now(root: Path) -> float:
    """By the clock that gives files their times, which may be another machine's."""
    try:
        with tempfile.NamedTemporaryFile(dir=root, suffix=_PART) as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return 0.0


def _tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[tempfile._TemporaryFileWrapper[bytes]]:
    """A file that takes the place of `path` when all of it is durable."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=_PART, delete=False) as file:
        try:
            yield file
            file.flush()
            os.fchmod(file.fileno(), _FILE_MODE)
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.name)
            raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the operating system refuses, as an error of this package."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotThere(f"there is no {error.filename or path}") from error
    except PermissionError as error:
        raise AccessDenied(
            f"{error.filename or path}: this user may not read or write there"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT):
            raise Unreachable(f"{path}: {error.strerror}") from error
        raise SnapshotError(f"{path}: {error.strerror}") from error
