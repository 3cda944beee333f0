"""What goes wrong between a node and its cluster.

    ClusterError
    ├── CorruptState         a znode holds what nobody of this release wrote
    ├── AuthenticationFailed ZooKeeper refused the credentials
    ├── Disconnected         ZooKeeper did not answer in time
    ├── Conflict             another client changed first what a write rests on
    ├── NotInitialised       there is no cluster under this chroot yet
    ├── WrongCluster         the chroot belongs to another cluster
    ├── NameTaken            another process is registered under this node's name
    ├── UnknownNode          no node of that name was ever registered
    └── Refused              what an operator asked for contradicts the cluster

The text of each says what to do next. None of them ever names a password.
"""

__all__ = [
    "AuthenticationFailed",
    "ClusterError",
    "Conflict",
    "CorruptState",
    "Disconnected",
    "NameTaken",
    "NotInitialised",
    "Refused",
    "UnknownNode",
    "WrongCluster",
]


class ClusterError(Exception):
    """The root of the tree."""


class CorruptState(ClusterError):
    """A znode that cannot be believed: garbage, a bad checksum, a newer format, a wrong number."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.path = path
        self.why = why

    def __reduce__(self) -> tuple[type["CorruptState"], tuple[str, str]]:
        return type(self), (self.path, self.why)


class AuthenticationFailed(ClusterError):
    """ZooKeeper refused user and password, or there is no such user."""


class Disconnected(ClusterError):
    """No answer of ZooKeeper within the time a call had. What was asked may have been done."""


class Conflict(ClusterError):
    """A znode is there, is not there, or has another version than a write expected.

    Of a transaction nothing was done then.
    """

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.path = path
        self.why = why

    def __reduce__(self) -> tuple[type["Conflict"], tuple[str, str]]:
        return type(self), (self.path, self.why)


class NotInitialised(ClusterError):
    """Nobody has written the cluster's config yet."""


class WrongCluster(ClusterError):
    """The cluster under this chroot has another name or format than the node's own config."""


class NameTaken(ClusterError):
    """Another process holds /live/<name>; its session must end first."""


class UnknownNode(ClusterError):
    """No node of that name; the text names those that are near."""


class Refused(ClusterError):
    """A change that the cluster cannot follow."""
