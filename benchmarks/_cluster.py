"""A sharded cluster of real daemons on one machine: leaves and a root, over a ZooKeeper."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from cache_daemon._proto.feature_cache.v1 import admin_pb2
from cache_daemon.cachectl_admin import AdminClient, DaemonUnreachable, RequestRefused
from cache_daemon.client import Client

__all__ = ["CHROOT", "NAMESPACE", "ClusterError", "Member", "ShardedCluster"]

CHROOT = "/feature-cache/bench"
NAMESPACE = "pin"
_NAME = "bench"
_START_S = 60.0
_STOP_S = 60.0
_CALL_S = 10.0
_POLL_S = 0.05
_LOG_LINES_SHOWN = 20
_ROOT_FOLDER = Path(__file__).resolve().parent.parent


class ClusterError(RuntimeError):
    """A daemon or the cluster does not do what it should; carries the end of a log."""


class Member:
    """One daemon of the cluster: any number of processes, one after the other, at one address."""

    def __init__(self, folder: Path, name: str, sections: dict[str, Any]) -> None:
        """`sections` of the config beyond `listen`."""
        folder.mkdir()
        self.name = name
        self.target = f"127.0.0.1:{_free_port()}"
        self.config_path = folder / "config.yaml"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        config = {
            "listen": {"grpc": [self.target], "admin": f"unix:{folder}/admin.sock"},
            **sections,
        }
        self.config_path.write_text(yaml.safe_dump(config, sort_keys=False))

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        if self._process is None or not self.running:
            raise ClusterError(f"{self.name} has ended:\n{self.log_end()}")
        return self._process.pid

    def start(self) -> None:
        """Starts a process; see `wait`."""
        with (self._folder / "daemon.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-c", "from cache_daemon.cli import main; main()", "run"),
                    *("--config", str(self.config_path)),
                ],
                # Its store is of this package.
                env=os.environ | {"PYTHONPATH": str(_ROOT_FOLDER)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> None:
        """Waits until it serves. Raises ClusterError when it does not."""
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self.running:
            with contextlib.suppress(DaemonUnreachable, RequestRefused):
                if self.status().state == "SERVING":
                    return
            time.sleep(_POLL_S)
        raise ClusterError(f"{self.name} does not serve:\n{self.log_end()}")

    def kill(self) -> None:
        """SIGKILL; nothing when it does not run."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def stop(self) -> None:
        """An orderly stop. Raises ClusterError when it is none."""
        os.kill(self.pid, signal.SIGTERM)
        process, self._process = self._process, None
        if process is None:
            return
        try:
            code = process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise ClusterError(f"{self.name} does not stop:\n{self.log_end()}") from None
        if code != 0:
            raise ClusterError(f"{self.name} stopped with {code}:\n{self.log_end()}")

    def status(self) -> admin_pb2.GetStatusResponse:
        with AdminClient(f"unix:{self._folder}/admin.sock", _CALL_S) as admin:
            return admin.status()

    def client(self, **options: Any) -> Client:
        return Client(self.target, **({"timeout": _CALL_S} | options))

    def log_end(self) -> str:
        path = self._folder / "daemon.log"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join(lines[-_LOG_LINES_SHOWN:])


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
        self.root = Member(
            folder / "root",
            "root",
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

    def add_leaf(self) -> Member:
        """One more, started; the cluster is not waited for."""
        leaf = self._leaf(len(self.leaves))
        self.leaves.append(leaf)
        leaf.start()
        leaf.wait()
        return leaf

    def wait_settled(self, holding: Member | None = None, timeout_s: float = 60.0) -> float:
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

    def leader(self) -> Member:
        """The leaf that leads. Raises ClusterError while nobody does."""
        for leaf in self._running():
            if leaf.status().cluster.leader:
                return leaf
        raise ClusterError("no leaf leads the cluster")

    def _running(self) -> Iterator[Member]:
        return (leaf for leaf in self.leaves if leaf.running)

    def _leaf(self, number: int) -> Member:
        name = f"leaf-{number + 1}"
        place = {"role": "leaf", "leaf": {"name": name, "zone": f"zone-{number + 1}"}}
        sections = self.values_sections(self._memory) | self._of_leaves
        sections |= {"topology": "sharded", "sharding": self._sharding | place}
        return Member(self._folder / name, name, sections)

    def values_sections(self, memory: str) -> dict[str, Any]:
        """Of the config of a node that keeps values as a leaf does, and is in no cluster."""
        return {
            "topology": "separate",
            "memory": {"size": memory, "expected_item_size": 208},
            "namespaces": {NAMESPACE: {"store": "all", "domains": {"all": {"budget": "100%"}}}},
            "stores": {"all": {"type": "benchmarks._restart_store:AllValues"}},
            "drain_timeout": "5s",
        }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
