"""The `sharding` section: a node's place in a cluster whose state is in ZooKeeper.

Also what a topology asks of the other sections, and the few things that the machine decides.
"""

import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from cache_daemon.config_base import (
    Address,
    Name,
    StrictModel,
    is_address,
    is_loopback,
    split_address,
)
from cache_daemon.config_problem import MISSING, Problem, at_path
from cache_daemon.config_units import Duration, Lateness, LatenessField, Share, Size

__all__ = [
    "AuthSettings",
    "HedgeSettings",
    "HotTierSettings",
    "LeafSettings",
    "RootSettings",
    "SecretError",
    "ShardingSettings",
    "ZooKeeperSettings",
    "advertised",
    "is_root",
    "node_name",
    "read_secret",
    "topology_problems",
]

_SHARDS_MAX = 1_000_000  # these two as in sharding/model.py
_REPLICAS_MAX = 16
_SECRET_BYTES_MAX = 4096
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.\-]+):\d{1,5}")
_CHROOT = re.compile(r"(/[A-Za-z0-9][A-Za-z0-9._\-]*)*")
_NOWHERE = ("0.0.0.0", "::", "*")  # a listener's "every interface", which is no address to call

_NOT_ON_A_ROOT = ("memory", "nvm", "persist")  # it keeps no values


def _check_hosts(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError("write the servers as text: zk1:2181,zk2:2181/feature-cache/prod")
    hosts, slash, chroot = value.partition("/")
    for host in hosts.split(","):
        if not _HOST.fullmatch(host.strip()):
            raise ValueError(
                f"{host.strip()!r} is no server of ZooKeeper; write host:port, several with commas "
                "between them, and the cluster's path behind the last"
            )
    if slash and (not _CHROOT.fullmatch(slash + chroot) or not chroot):
        raise ValueError(f"{slash + chroot!r} is no path; write it as /feature-cache/prod")
    return value


class AuthSettings(StrictModel):
    """As whom the node logs in to ZooKeeper."""

    scheme: Literal["digest", "sasl"] = Field(
        default="digest", description="digest, or sasl (DIGEST-MD5)."
    )
    user: str = Field(min_length=1, max_length=256, description="The name to log in by.")
    password_file: str = Field(
        min_length=1,
        max_length=4096,
        description="A file that holds the password and nothing else.",
    )


class ZooKeeperSettings(StrictModel):
    """Where the state of the cluster is."""

    hosts: Annotated[str, BeforeValidator(_check_hosts)] = Field(
        description="Servers and the cluster's path: zk1:2181,zk2:2181/feature-cache/prod."
    )
    session_timeout: Duration = Field(
        default=10.0,
        ge=0.4,
        le=300,
        description="A node that is not heard of for so long counts as gone.",
    )
    auth: AuthSettings | None = Field(default=None, description="None: without a login.")
    acl: Literal["open", "creator"] = Field(
        default="open",
        description="creator: only who logs in alike may read and write; needs auth.",
    )


class LeafSettings(StrictModel):
    """What a leaf says of itself."""

    name: Name | None = Field(
        default=None, description="Unique in the cluster; none: the machine's host name."
    )
    zone: Name = Field(
        default="default", description="What fails together; replicas are spread over zones."
    )
    weight: float = Field(
        default=1.0, gt=0, le=1e6, description="Its share of the shards, in relation to others."
    )
    capacity: int = Field(
        default=0, ge=0, le=_SHARDS_MAX, description="Shards that it takes at most; 0: any number."
    )
    write_log: Size = Field(
        default=16 << 20,
        ge=64 << 10,
        le=1 << 30,
        description="Bytes of what was written of late, for a replica that was away.",
    )
    advertise: Address | None = Field(
        default=None,
        description="The address at which roots reach it; none: the first TCP one of listen.grpc.",
    )


class HedgeSettings(StrictModel):
    """A second leaf is asked when the first is slow; the first answer wins."""

    after: LatenessField = Field(
        default=Lateness(quantile=0.99),
        description="When a leaf is slow: a quantile of recent replies (p99), or a time (2ms).",
    )
    budget: Share = Field(
        default=0.02,
        description="Of the requests to leaves, at most so many are sent twice; 0: none.",
    )


class HotTierSettings(StrictModel):
    """The hottest values, kept on the root for a moment."""

    memory: Size = Field(ge=1 << 20, description="Bytes never exceeded.")
    max_age: Duration = Field(
        default=1.0, gt=0, le=1, description="How long a value is answered from here, at most 1s."
    )


class RootSettings(StrictModel):
    """How a root asks its leaves."""

    leaf_timeout: Duration = Field(
        default=0.25,
        le=60,
        description="How long one leaf may take before another replica is asked; 0: as long as "
        "the caller waits.",
    )
    attempts: int = Field(
        default=3, ge=1, le=8, description="Replicas that are asked for a key at most."
    )
    retry_budget: Share = Field(
        default=0.2,
        description="Requests to leaves that are repeated elsewhere: at most this share of them.",
    )
    hedge: HedgeSettings = HedgeSettings()
    store_fallback_budget: Share = Field(
        default=0.05,
        description="Keys that no leaf answers ask the store: at most this share of all asked.",
    )
    threads: int = Field(
        default=2, ge=1, le=64, description="Threads that complete the requests to leaves."
    )
    connections_per_leaf: int = Field(
        default=1, ge=1, le=64, description="Connections that are kept to each leaf."
    )
    hot_tier: HotTierSettings | None = Field(
        default=None, description="None: every read asks the leaves."
    )


class ShardingSettings(StrictModel):
    """A node's place in a cluster; only with topology: sharded."""

    role: Literal["root", "leaf"] = Field(
        description="root: splits batches over the leaves; leaf: answers for shards."
    )
    cluster: Name = Field(
        description="The cluster's name; a node of another one is refused at the same path."
    )
    zookeeper: ZooKeeperSettings
    shard_count: int = Field(
        default=1024,
        ge=1,
        le=_SHARDS_MAX,
        description="Shards of the key space; cannot be changed once the cluster exists.",
    )
    replicas: int = Field(
        default=2, ge=1, le=_REPLICAS_MAX, description="Leaves that hold each shard."
    )
    rebalance_delay: Duration = Field(
        default=120.0,
        le=86_400,
        description="How long a leaf may be away before its shards move elsewhere.",
    )
    max_moves: int = Field(
        default=64, ge=1, le=_SHARDS_MAX, description="Shards that move at a time."
    )
    drop_grace: Duration = Field(
        default=10.0,
        le=3600,
        description="How long a leaf still answers for a shard that has moved away.",
    )
    freeze_below: Share = Field(
        default=0.7,
        description="Nothing moves while fewer of the enabled leaves are there than this share.",
    )
    controller: bool | None = Field(
        default=None,
        description="Whether this node may lead the cluster; none: leaves may, roots may not.",
    )
    leaf: LeafSettings | None = Field(default=None, description="Only with role: leaf.")
    root: RootSettings | None = Field(default=None, description="Only with role: root.")

    @property
    def as_leaf(self) -> LeafSettings:
        """The leaf section, or all of its defaults."""
        return self.leaf or LeafSettings()

    @property
    def as_root(self) -> RootSettings:
        """The root section, or all of its defaults."""
        return self.root or RootSettings()

    @property
    def stands_for_election(self) -> bool:
        """Whether this node may lead the cluster."""
        return self.role == "leaf" if self.controller is None else self.controller

    @field_validator("zookeeper")
    @classmethod
    def _acl_needs_auth(cls, zookeeper: ZooKeeperSettings) -> ZooKeeperSettings:
        if zookeeper.acl == "creator" and zookeeper.auth is None:
            raise ValueError("acl: creator needs auth; say user and password_file, or acl: open")
        return zookeeper


class SecretError(Exception):
    """A password file that cannot be used; the message says which and why."""


def read_secret(path: Path) -> str:
    """The one line in the file at `path`. Raises SecretError."""
    try:
        with path.open("rb") as file:
            content = file.read(_SECRET_BYTES_MAX + 1)
    except OSError as error:
        raise SecretError(f"password_file {path}: {error.strerror}") from error
    if len(content) > _SECRET_BYTES_MAX:
        raise SecretError(f"password_file {path}: larger than {_SECRET_BYTES_MAX} bytes")
    try:
        secret = content.decode().strip()
    except UnicodeDecodeError as error:
        raise SecretError(f"password_file {path}: not UTF-8 text") from error
    if not secret or "\n" in secret:
        raise SecretError(f"password_file {path}: must hold the password in one line")
    return secret


def node_name(settings: ShardingSettings) -> str:
    """By what name the node is known in the cluster: the configured one, or the host's."""
    return settings.as_leaf.name or socket.gethostname()


def advertised(settings: ShardingSettings, bound: list[str]) -> str:
    """The address at which roots reach the leaf; `bound` are its listeners, ports as bound.

    "" where none of them can be reached from elsewhere and none was given.
    """
    if settings.as_leaf.advertise is not None:
        return settings.as_leaf.advertise
    return next((address for address in bound if _can_be_called(address)), "")


def _can_be_called(address: str) -> bool:
    host, _ = split_address(address)
    return host != "" and host not in _NOWHERE


def is_root(raw: Mapping[Any, Any]) -> bool:
    """Whether raw settings are a root's."""
    return raw.get("topology") == "sharded" and at_path(raw, "sharding", "role") == "root"


def topology_problems(raw: Mapping[Any, Any]) -> Iterator[Problem]:
    """What `topology` asks of the sections, of raw settings."""
    sharded = raw.get("topology") == "sharded"
    sharding = raw.get("sharding")
    role = at_path(raw, "sharding", "role")
    if sharded and sharding is None:
        yield Problem(
            ("sharding",),
            "missing; topology: sharded needs it, with role, cluster and zookeeper",
        )
    if not sharded and sharding is not None:
        topology = raw.get("topology", "colocated")
        yield Problem(
            ("sharding",),
            f"it has no meaning with topology: {topology}; write topology: sharded, or remove it",
        )
        return
    if role in ("root", "leaf"):
        other = "leaf" if role == "root" else "root"
        if at_path(sharding, other) is not None:
            yield Problem(
                ("sharding", other),
                f"this node's role is {role}; remove it, or write role: {other}",
            )
    yield from _root_problems(raw) if is_root(raw) else _values_problems(raw)
    if sharded and role == "leaf":
        yield from _leaf_problems(raw)


def _values_problems(raw: Mapping[Any, Any]) -> Iterator[Problem]:
    """Nodes that keep values say how many."""
    if "memory" not in raw:
        yield Problem(("memory",), MISSING)
    for name, namespace in _mappings(raw.get("namespaces")):
        if "domains" not in namespace:
            yield Problem(("namespaces", name, "domains"), MISSING)


def _root_problems(raw: Mapping[Any, Any]) -> Iterator[Problem]:
    for section in _NOT_ON_A_ROOT:
        if raw.get(section) is not None:
            hint = "; for a hot tier write sharding.root.hot_tier" if section == "memory" else ""
            yield Problem(
                (section,),
                f"a root keeps no values of its own: this belongs to the leaves{hint}",
            )
    # Its namespaces may be those of a leaf's file: what only keepers of values need has no effect.
    stores = [namespace.get("store") for _, namespace in _mappings(raw.get("namespaces"))]
    budget = at_path(raw, "sharding", "root", "store_fallback_budget")
    if budget is not None and budget not in (0, "0%") and not any(stores):
        yield Problem(
            ("sharding", "root", "store_fallback_budget"),
            "no namespace has a store to ask; give one a store, or remove this",
        )


def _leaf_problems(raw: Mapping[Any, Any]) -> Iterator[Problem]:
    advertise = at_path(raw, "sharding", "leaf", "advertise")
    grpc = at_path(raw, "listen", "grpc")
    listeners = (
        [address for address in grpc if isinstance(address, str)] if isinstance(grpc, list) else []
    )
    if advertise is None:
        if listeners and not any(map(_can_be_called, filter(is_address, listeners))):
            yield Problem(
                ("sharding", "leaf", "advertise"),
                f"missing; {', '.join(listeners)} is no address that a root could call: say here "
                "how roots reach this leaf, such as leaf-1.example:7070",
            )
        return
    if isinstance(advertise, str) and is_address(advertise):
        host, port = split_address(advertise)
        if host and (host in _NOWHERE or not port):
            yield Problem(
                ("sharding", "leaf", "advertise"),
                f"{advertise} is no address that a root could call; write its host and port",
            )
        elif not is_loopback(advertise) and listeners and all(map(is_loopback, listeners)):
            yield Problem(
                ("sharding", "leaf", "advertise"),
                f"nothing listens at {advertise}: listen.grpc is of this machine alone",
            )


def _mappings(section: object) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    for name, value in section.items() if isinstance(section, Mapping) else ():
        if isinstance(name, str) and isinstance(value, Mapping):
            yield name, value
