"""What is said to ZooKeeper and what it answers, without a word of how."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

__all__ = [
    "Check",
    "Create",
    "Credentials",
    "Delete",
    "Operation",
    "Set",
    "State",
    "Watch",
    "Znode",
    "ZooKeeperConfig",
]

Watch = Callable[[], None]
"""Called once, in a thread of the connection, when what was read changes or the watch is lost. It
must not block: wake a thread of your own."""

_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")
_CHROOT = re.compile(r"(?:/[A-Za-z0-9][A-Za-z0-9._-]*)+")


@dataclass(frozen=True)
class Credentials:
    """Who we are to ZooKeeper.

    `digest` identifies its bearer for access lists and is never refused: a wrong password shows as
    an access denied. `sasl` (DIGEST-MD5) is refused when it is wrong.
    """

    scheme: Literal["digest", "sasl"]
    user: str
    password: str = field(repr=False)

    def __post_init__(self) -> None:
        if not self.user or ":" in self.user:
            raise ValueError(f"user {self.user!r}: must be a name without a colon")
        if not self.password:
            raise ValueError(f"user {self.user!r} has no password")


@dataclass(frozen=True)
class ZooKeeperConfig:
    """`hosts` is `host:port,host:port/chroot`; the port is 2181 where none is given.

    `acl` says who may read and write what we create: `creator` only those with our credentials.
    ValueError for what cannot work.
    """

    hosts: str
    session_timeout_seconds: float = 10.0  # asked for; ZooKeeper has bounds of its own
    credentials: Credentials | None = None
    acl: Literal["open", "creator"] = "open"

    def __post_init__(self) -> None:
        servers, slash, chroot = self.hosts.partition("/")
        for server in servers.split(","):
            match = _HOST.fullmatch(server.strip())
            if match is None or not 0 < int(match[1] or 2181) < 65536:
                raise ValueError(f"{server!r} is not a server; write host:port,host:port/chroot")
        if slash and _CHROOT.fullmatch(f"/{chroot}") is None:
            raise ValueError(f"'/{chroot}' is not a chroot; write one like /feature-cache/prod")
        if self.acl == "creator" and self.credentials is None:
            raise ValueError("acl: creator needs credentials, else nobody could read what we write")
        if not 0.2 <= self.session_timeout_seconds <= 3600:
            raise ValueError(
                f"a session timeout of {self.session_timeout_seconds:g} s; 0.2 s to an hour is fine"
            )


class State(Enum):
    CONNECTED = "connected"  # it answers, and the session lives
    DISCONNECTED = "disconnected"  # no answer; the session may live on
    LOST = "lost"  # the session has ended, or its timeout has passed without an answer


@dataclass(frozen=True)
class Znode:
    data: bytes
    version: int  # rises with every write, from 0
    owner: int  # session of an ephemeral znode, else 0


@dataclass(frozen=True)
class Check:
    """Fails a transaction unless the znode has this version."""

    path: str
    version: int


@dataclass(frozen=True)
class Create:
    path: str
    data: bytes
    ephemeral: bool = False


@dataclass(frozen=True)
class Set:
    path: str
    data: bytes
    version: int = -1  # -1: any


@dataclass(frozen=True)
class Delete:
    path: str
    version: int = -1


Operation = Check | Create | Set | Delete
