"""A sharded cluster of `cache-daemon` processes for tests, over a ZooKeeper that is there."""

import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from cache_daemon._proto.feature_cache.v1 import admin_pb2
from cache_daemon.cachectl_admin import AdminClient, DaemonUnreachable, RequestRefused
from cache_daemon.client import Client
from cache_daemon.stores.lmdb import LmdbWriter
from tests.daemon_process import Daemon
from tests.servers import free_port, wait_until

__all__ = ["ITEMS", "NAMESPACE", "Cluster", "Node"]

NAMESPACE = "pin"
ITEMS = {b"item %d" % number: b"value of %d" % number for number in range(2000)}
_SETTLE_S = 60.0


class Node:
    """A root or a leaf: any number of processes, one after the other, at one address."""

    def __init__(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        folder.mkdir()
        self.name = name
        self.folder = folder
        self.config = config
        self.target = f"127.0.0.1:{free_port()}"
        config["listen"] = {
            "grpc": [self.target],
            "admin": f"unix:{folder}/admin.sock",
            "http": "127.0.0.1:0",
        }
        self._daemon: Daemon | None = None

    @property
    def daemon(self) -> Daemon:
        assert self._daemon is not None, f"{self.name} does not run"
        return self._daemon

    @property
    def running(self) -> bool:
        return self._daemon is not None and self._daemon.process.poll() is None

    def start(self) -> "Node":
        """Starts a process; see `wait`."""
        (self.folder / "ready.json").unlink(missing_ok=True)  # of one that was killed
        self._daemon = Daemon(self.folder, self.config)
        return self

    def wait(self) -> "Node":
        """Waits until it serves."""
        self.daemon.wait_until_ready()
        return self

    def kill(self) -> None:
        if self._daemon is not None:
            self._daemon.process.kill()
            self._daemon.process.wait()
            self._daemon = None

    def stop(self) -> int:
        """An orderly stop; its exit code."""
        self.daemon.signal()
        code = self.daemon.wait(30)
        self._daemon = None
        return code

    def status(self) -> admin_pb2.GetStatusResponse:
        with AdminClient(f"unix:{self.folder}/admin.sock", 5.0) as admin:
            return admin.status()

    def cluster(self) -> admin_pb2.ClusterStatus:
        """Its place in the cluster; an empty one while it does not answer."""
        try:
            return self.status().cluster
        except (DaemonUnreachable, RequestRefused):
            return admin_pb2.ClusterStatus()

    def client(self, **options: Any) -> Client:
        return Client(self.target, **({"timeout": 5.0} | options))


class Cluster:
    """A context manager; at its end no process is left."""

    def __init__(
        self, folder: Path, hosts: str, *, leaves: int = 3, store: bool = True, **sharding: Any
    ) -> None:
        """`hosts` of ZooKeeper with a chroot. `sharding` are keys of that section.

        The leaves read `ITEMS` from a store, unless `store` is False.
        """
        self.hosts = hosts
        self._folder = folder
        self._store = store
        self._sharding: dict[str, Any] = {
            "cluster": "test",
            "zookeeper": {"hosts": hosts, "session_timeout": "1s"},
            "shard_count": 64,
            "replicas": 2,
            "rebalance_delay": "2s",
            "drop_grace": "500ms",
            **sharding,
        }
        if store:
            with LmdbWriter(folder / "features", sync=False, map_size=16 << 20) as writer:
                writer.write_many(NAMESPACE, ITEMS)
        self.leaves = [self.leaf(number) for number in range(1, leaves + 1)]
        self.root = self.make_root("root")

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for node in (self.root, *self.leaves):
            node.kill()

    def start(self) -> "Cluster":
        """Starts all and waits until every shard has its replicas."""
        for node in (*self.leaves, self.root):
            node.start()
        for node in (*self.leaves, self.root):
            node.wait()
        self.wait_settled()
        return self

    def leaf(self, number: int, **sharding: Any) -> Node:
        """A leaf's files, not started and not yet of `leaves`; `sharding` as at construction."""
        name = f"leaf-{number}"
        place = {"role": "leaf", "leaf": {"name": name, "zone": f"zone-{number}"}}
        config: dict[str, Any] = {
            "topology": "sharded",
            "sharding": self._sharding | place | sharding,
            **self.values(),
        }
        return Node(self._folder / name, name, config)

    def values(self) -> dict[str, Any]:
        """The sections of a config that say what is kept, the same in any topology."""
        namespace: dict[str, Any] = {"domains": {"main": {"budget": "100%"}}}
        sections: dict[str, Any] = {
            "memory": {"size": "16MiB"},
            "namespaces": {NAMESPACE: namespace},
            "drain_timeout": "5s",
        }
        if self._store:
            namespace["store"] = "features"
            options = {"path": str(self._folder / "features")}
            sections["stores"] = {"features": {"type": "lmdb", "options": options}}
        return sections

    def make_root(self, name: str, **root: Any) -> Node:
        """A root's files, not started; `root` are keys of that section."""
        config: dict[str, Any] = {
            "topology": "sharded",
            "sharding": self._sharding | {"role": "root", "root": root},
            "namespaces": {NAMESPACE: {}},
            "drain_timeout": "5s",
        }
        return Node(self._folder / name, name, config)

    def add(self, node: Node) -> Node:
        """One leaf more, started; it ends with the others."""
        self.leaves.append(node)
        return node.start().wait()

    def wait_settled(self, without: tuple[str, ...] = ()) -> None:
        """Until the leaves that run, but for those `without`, hold all replicas, and know it."""
        wanted = self._sharding["shard_count"] * self._sharding["replicas"]

        def settled() -> bool:
            running = [leaf for leaf in self.leaves if leaf.running]
            states = {leaf.name: leaf.cluster() for leaf in running}
            held = {name: state.shards_online for name, state in states.items()}
            warming = sum(state.shards_warming for state in states.values())
            versions = {state.map_version for state in states.values()}
            if self.root.running:
                seen = self.root.cluster()
                versions.add(seen.map_version)
                if seen.shards_warming or seen.shards_online != self._sharding["shard_count"]:
                    return False
            return (
                sum(held.values()) == wanted
                and not warming
                and len(versions) == 1
                and not any(held.get(name) for name in without)
            )

        try:
            wait_until(settled, _SETTLE_S)
        except AssertionError as error:
            raise AssertionError(f"the cluster does not settle: {self.describe()}") from error

    def leader(self) -> Node:
        """The leaf that leads."""
        found: list[Node] = []

        def leads() -> bool:
            found[:] = [leaf for leaf in self.leaves if leaf.running and leaf.cluster().leader]
            return bool(found)

        wait_until(leads, 20, "a leader")
        return found[0]

    def describe(self) -> str:
        return ", ".join(
            f"{leaf.name} {state.shards_online}+{state.shards_warming} of map {state.map_version}"
            for leaf in self.leaves
            if leaf.running and (state := leaf.cluster())
        )

    def cachectl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`cachectl cluster ...` with the config of the first leaf."""
        return subprocess.run(
            [
                *(sys.executable, "-m", "cache_daemon.cachectl", "cluster", *arguments),
                *("--config", str(self.leaves[0].folder / "config.yaml")),
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
