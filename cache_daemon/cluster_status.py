"""A node's place in its cluster as operators see it: for status, metrics and the log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cache_daemon._native import Node
from cache_daemon.metrics import SampleLike, SampleSource
from sharding.model import ShardMap, Shards

if TYPE_CHECKING:  # it loads the client of ZooKeeper, which other nodes do without
    from sharding.connection import Connection

__all__ = ["ClusterSample", "ClusterStatus", "Fill", "Membership", "cluster_samples"]

_PREFIX = "feature_cache_cluster_"

Fill = Callable[[Shards, ShardMap], None]
"""Fills shards from the replicas that a view names; takes its time, and does not raise."""


@dataclass(frozen=True)
class ClusterStatus:
    """At the moment of asking."""

    role: str  # root, leaf
    cluster: str
    node: str = ""  # its name in the cluster; a root has none
    session: str = "disconnected"  # connected, disconnected (it may live on), lost
    session_age_seconds: float | None = None  # since ZooKeeper was heard of; None: never
    map_version: int = 0  # 0: no map yet
    map_age_seconds: float = 0.0  # since the map was last known to be the newest
    shard_count: int = 0
    leaves: int = 0  # that the map names
    shards_online: int = 0  # of this leaf; on a root: that some leaf answers for
    shards_warming: int = 0
    registration: str = ""  # of a leaf: why it is not registered
    leader: bool = False  # this node leads the cluster
    moves: int = 0  # under way; known to the leader alone
    frozen: str = ""  # why the leader moves nothing
    problems: tuple[str, ...] = ()

    @property
    def connected(self) -> bool:
        """Whether ZooKeeper is heard of."""
        return self.session == "connected"


class Membership(SampleSource, Protocol):
    """A node's place in its cluster as the daemon's life cycle knows it; see `cluster`.

    Before `start` it has a status and samples, too.
    """

    def start(
        self,
        node: Node,
        addresses: Sequence[str],
        on_routed: Callable[[], None] | None = None,
        fill: Fill | None = None,
    ) -> None:
        """Takes part from now on; returns at once.

        `addresses` are the listeners, ports as bound. `on_routed` is called when the node of a root
        has its first shard map. `fill` is called for shards that begin empty on a leaf, before they
        go online.
        """

    def leave(self) -> None:
        """Takes leave of the cluster and waits until requests go elsewhere, for bounded time."""

    def stop(self) -> None:
        """Ends the session and all threads. Idempotent; the node may be closed afterwards."""

    def status(self) -> ClusterStatus: ...

    def owned(self) -> tuple[Shards, ShardMap | None]:
        """The shards that a leaf answers for, and the newest view of who has which."""

    @property
    def connection(self) -> Connection:
        """To ZooKeeper; works once it has been started."""


@dataclass(frozen=True)
class ClusterSample:
    """One gauge or counter of a node's place in its cluster."""

    name: str
    help: str
    value: float
    labels: dict[str, str] = field(default_factory=dict)
    kind: str = "gauge"


def cluster_samples(status: ClusterStatus) -> Sequence[SampleLike]:
    """The status as metrics."""

    def gauge(name: str, help: str, value: float, **labels: str) -> ClusterSample:
        return ClusterSample(_PREFIX + name, help, value, labels)

    shards = "Shards by state: those of this leaf; on a root those that some leaf has."
    samples = [
        gauge("info", "Role and cluster; always 1.", 1, role=status.role, cluster=status.cluster),
        gauge(
            "session_connected",
            "1 while the node has a session with ZooKeeper. Without one it goes on serving.",
            float(status.connected),
        ),
        gauge("map_version", "Version of the shard map in use; 0: none yet.", status.map_version),
        gauge(
            "map_age_seconds",
            "Seconds since the shard map in use was last known to be the newest.",
            status.map_age_seconds,
        ),
        gauge("shards", shards, status.shards_online, state="online"),
        gauge("shards", shards, status.shards_warming, state="warming"),
        gauge("shard_count", "Shards of the key space; 0: not known yet.", status.shard_count),
        gauge("leaves", "Leaves that the shard map names.", status.leaves),
        gauge("is_leader", "1 on the node that leads the cluster.", float(status.leader)),
        gauge("problems", "What is wrong with the cluster as seen here.", len(status.problems)),
    ]
    if status.role == "leaf":
        registered = "1 while the leaf is registered under its name."
        samples.append(gauge("registered", registered, float(not status.registration)))
    if status.leader:  # only the leader knows
        samples += [
            gauge("moves", "Shards on their way from leaf to leaf.", status.moves),
            gauge("frozen", "1 while the leader moves nothing.", float(bool(status.frozen))),
        ]
    return samples
