"""A sharded cluster of real daemons on one machine: leaves and a root, over a ZooKeeper."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks._daemon import Daemon

__all__ = ["CHROOT", "NAMESPACE", "ClusterError", "ShardedCluster"]

CHROOT = "/feature-cache/bench"
NAMESPACE = "pin"
_NAME = "bench"
_POLL_S = 0.05


class ClusterError(RuntimeError):
    """The cluster does not do what it should; carries the end of a log."""


class ShardedCluster:
    """A context manager; at its end no daemon is left."""

    def __init__(
        self,
        folder: Path,
        hosts: str,
        *,
        leaves: int,
        shard_count: int = 256,
        replicas: int = 2,
        memory: str = "64MiB",
        rebalance_delay: str = "3s",
        session_timeout: str = "2s",
        root: dict[str, Any] | None = None,
        of_leaves: dict[str, Any] | None = None,
    ) -> None:
        """`hosts` of ZooKeeper, without a chroot.

        `root` is that section of the root's config, `of_leaves` are further ones of the leaves'.
        """
        self._folder = folder
        self._memory = memory
        self._of_leaves = of_leaves or {}
        self._replicas_wanted = shard_count * replicas
        self._sharding = {
            "cluster": _NAME,
            "zookeeper": {"hosts": hosts + CHROOT, "session_timeout": session_timeout},
            "shard_count": shard_count,
            "replicas": replicas,
            "rebalance_delay": rebalance_delay,
            "drop_grace": "1s",
        }
        self.leaves = [self._leaf(number) for number in range(leaves)]
        self.root = Daemon(
            folder / "root",
            {
                "topology": "sharded",
                "sharding": self._sharding | {"role": "root", "root": root or {}},
                "namespaces": {NAMESPACE: {}},
                "drain_timeout": "5s",
            },
        )

    def __enter__(self) -> "ShardedCluster":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for member in (self.root, *self.leaves):
            member.kill()

    def start(self) -> None:
        """Starts everybody and waits until every shard has all of its replicas."""
        for leaf in self.leaves:
            leaf.start()
        self.root.start()
        for member in (*self.leaves, self.root):
            member.wait()
        self.wait_settled()

    def add_leaf(self) -> Daemon:
        """One more, started; the cluster is not waited for."""
        leaf = self._leaf(len(self.leaves))
        self.leaves.append(leaf)
        leaf.start()
        leaf.wait()
        return leaf

    def wait_settled(self, holding: Daemon | None = None, timeout_s: float = 60.0) -> float:
        """Until all replicas of all shards are online on leaves that run; returns the seconds.

        `holding`: a leaf that must have some of them.
        """
        began = time.monotonic()
        wanted = self._replicas_wanted
        while time.monotonic() < began + timeout_s:
            time.sleep(_POLL_S)
            running = [leaf.status().cluster for leaf in self.leaves if leaf.running]
            online = sum(cluster.shards_online for cluster in running)
            warming = sum(cluster.shards_warming for cluster in running)
            running.append(self.root.status().cluster)
            warming += running[-1].shards_warming  # by the map
            if holding is not None and not holding.status().cluster.shards_online:
                continue
            if online == wanted and not warming and len({c.map_version for c in running}) == 1:
                return time.monotonic() - began
        raise ClusterError(
            f"not all shards are online after {timeout_s:g} s: {online} of {wanted}, "
            f"{warming} warming:\n{self.leaves[0].log_end()}"
        )

    def leader(self) -> Daemon:
        """The leaf that leads. Raises ClusterError while nobody does."""
        for leaf in self._running():
            if leaf.status().cluster.leader:
                return leaf
        raise ClusterError("no leaf leads the cluster")

    def _running(self) -> Iterator[Daemon]:
        return (leaf for leaf in self.leaves if leaf.running)

    def _leaf(self, number: int) -> Daemon:
        name = f"leaf-{number + 1}"
        place = {"role": "leaf", "leaf": {"name": name, "zone": f"zone-{number + 1}"}}
        sections = self.values_sections(self._memory) | self._of_leaves
        sections |= {"topology": "sharded", "sharding": self._sharding | place}
        return Daemon(self._folder / name, sections)

    def values_sections(self, memory: str) -> dict[str, Any]:
        """Of the config of a node that keeps values as a leaf does, and is in no cluster."""
        return {
            "topology": "separate",
            "memory": {"size": memory, "expected_item_size": 208},
            "namespaces": {NAMESPACE: {"store": "all", "domains": {"all": {"budget": "100%"}}}},
            "stores": {"all": {"type": "benchmarks._restart_store:AllValues"}},
            "drain_timeout": "5s",
        }
