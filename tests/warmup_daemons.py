"""Daemons that record and such that are warmed by it, for tests: one store, one place of snapshots.

Windows are of a second, so that a recorded log is finished soon.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cache_daemon._proto.feature_cache.v1 import admin_pb2
from cache_daemon.cachectl_admin import AdminClient, DaemonUnreachable, RequestRefused
from cache_daemon.client import Client, Status
from cache_daemon.stores.lmdb import LmdbWriter
from tests.daemon_process import Daemon
from tests.servers import free_port, wait_until

__all__ = ["HITS", "ITEMS", "KEYS", "Fleet", "WarmNode"]

NAMESPACE = "pin"
ITEMS = {b"item %d" % number: b"value of %d" % number for number in range(4000)}
KEYS = list(ITEMS)
HITS = (Status.HIT_DRAM, Status.HIT_NVM)
_UPLOAD_S = 30.0


class WarmNode:
    """One daemon at addresses of its own, which answers before it serves."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        folder.mkdir()
        self.folder = folder
        self.target = f"127.0.0.1:{free_port()}"
        self.http_target = f"127.0.0.1:{free_port()}"
        self.config = config | {
            "listen": {
                "grpc": [self.target],
                "admin": f"unix:{folder}/admin.sock",
                "http": self.http_target,
            }
        }
        self._daemon: Daemon | None = None

    @property
    def daemon(self) -> Daemon:
        assert self._daemon is not None
        return self._daemon

    def launch(self, **environment: str) -> "WarmNode":
        """Starts a process; does not wait for it."""
        (self.folder / "ready.json").unlink(missing_ok=True)  # of one that was killed
        self._daemon = Daemon(self.folder, self.config, **environment)
        return self

    def start(self, **environment: str) -> "WarmNode":
        self.launch(**environment).daemon.wait_until_ready()
        return self

    def wait_for(self, *states: str, timeout_s: float = 30.0) -> "WarmNode":
        """Until the daemon is in one of these states."""
        wait_until(
            lambda: self.state in states,
            timeout_s,
            f"{' or '.join(states)}; log:\n{self.daemon.log}",
        )
        return self

    def kill(self) -> None:
        if self._daemon is not None:
            self._daemon.process.kill()
            self._daemon.process.wait()

    def admin(self) -> AdminClient:
        return AdminClient(f"unix:{self.folder}/admin.sock", 5.0)

    def status(self) -> admin_pb2.GetStatusResponse:
        with self.admin() as admin:
            return admin.status()

    @property
    def state(self) -> str:
        """ "" while it does not answer."""
        try:
            return self.status().state
        except (DaemonUnreachable, RequestRefused):
            return ""

    @property
    def warmup(self) -> admin_pb2.WarmupStatus:
        return self.status().warmup

    def client(self, **options: Any) -> Client:
        return Client(self.target, **({"timeout": 10.0} | options))

    def hits(self, keys: Sequence[bytes] = KEYS) -> float:
        """The share of keys that are in the cache; asks no store."""
        with self.client() as client:
            found = [
                status
                for first in range(0, len(keys), 1000)
                for status in client.batch_get(
                    {NAMESPACE: keys[first : first + 1000]}, cache_only=True
                )[NAMESPACE].statuses.tolist()
            ]
        return sum(status in HITS for status in found) / len(found)

    def ask(self, keys: Sequence[bytes] = KEYS, times: int = 1) -> None:
        """Reads keys, some hundred a request; their values must be right."""
        with self.client() as client:
            for _ in range(times):
                for first in range(0, len(keys), 500):
                    part = keys[first : first + 500]
                    column = client.batch_get({NAMESPACE: part})[NAMESPACE]
                    assert column.to_bytes() == [ITEMS[key] for key in part]


class Fleet:
    """Nodes on one store; a context manager, at whose end no process is left."""

    def __init__(
        self, folder: Path, url: str, *, store: dict[str, Any] | None = None, **snapshots: Any
    ) -> None:
        """`url` of the snapshots, `snapshots` are further keys of that section. `store` is one in
        place of an LMDB that has `ITEMS`."""
        self.folder = folder
        self.nodes: list[WarmNode] = []
        self._snapshots = {"url": url, **snapshots}
        if store is None:
            with LmdbWriter(folder / "features", sync=False, map_size=64 << 20) as writer:
                writer.write_many(NAMESPACE, ITEMS)
            store = {"type": "lmdb", "options": {"path": str(folder / "features")}}
        self._store = store

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for node in self.nodes:
            node.kill()

    def node(self, name: str, *, ttl: str = "0", **warmup: Any) -> WarmNode:
        """Not started; `warmup` are keys of that section beside its snapshots."""
        section = {"snapshots": self._snapshots, "max_duration": "20s", **warmup}
        config: dict[str, Any] = {
            "memory": {"size": "32MiB"},
            "namespaces": {
                NAMESPACE: {
                    "store": "features",
                    "domains": {"main": {"budget": "90%", "ttl": ttl}},
                }
            },
            "stores": {"features": self._store},
            "warmup": {key: value for key, value in section.items() if value is not None},
            "drain_timeout": "5s",
        }
        made = WarmNode(self.folder / name, config)
        self.nodes.append(made)
        return made

    def recorder(self, name: str = "recorder", **warmup: Any) -> WarmNode:
        """Not started: it records everything, in windows of a second, and warms from nothing."""
        record = {"dir": str(self.folder / f"{name}-log"), "sample": "100%", "window": "1s"}
        return self.node(name, **{"record": record, "plan": "none", **warmup})

    def record(self, node: WarmNode, keys: Sequence[bytes] = KEYS, times: int = 1) -> None:
        """Reads keys at a node that records, and waits until that is uploaded."""
        node.ask(keys, times)
        time.sleep(1.1)  # the window is over ...
        node.ask(keys[:1])  # ... and another one begins
        wait_until(
            lambda: node.warmup.uploads.uploaded > 0 and not node.warmup.uploads.pending,
            _UPLOAD_S,
            f"an upload; log:\n{node.daemon.log}",
        )
