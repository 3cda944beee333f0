"""What can go wrong with snapshots and warm-ups.

    WarmupError
    └── SnapshotError        where snapshots lie, or a snapshot itself
        ├── NotThere         no such bucket, directory or object
        ├── AccessDenied     the credentials are wrong, missing or expired, or not enough
        ├── Unreachable      no answer, or one that says "not now"
        ├── Conflict         somebody else was first: a conditional write was refused
        ├── Damaged          bytes are not what was written
        └── NewerVersion     written by a later release

Messages say what to do, and never carry a secret.
"""

__all__ = [
    "AccessDenied",
    "Conflict",
    "Damaged",
    "NewerVersion",
    "NotThere",
    "SnapshotError",
    "Unreachable",
    "WarmupError",
]


class WarmupError(Exception):
    """Base of all errors of this package."""


class SnapshotError(WarmupError):
    """Of the place where snapshots lie, or of a snapshot."""


class NotThere(SnapshotError):
    """There is no such bucket, directory or object."""


class AccessDenied(SnapshotError):
    """The credentials are wrong, missing or expired, or do not allow it."""


class Unreachable(SnapshotError):
    """Nothing answers, or not in time, or it says that it cannot just now; worth another try."""


class Conflict(SnapshotError):
    """A conditional write found that somebody else had written."""


class Damaged(SnapshotError):
    """Bytes are not what was written."""


class NewerVersion(SnapshotError):
    """Written by a later release than this one."""
