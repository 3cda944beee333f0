"""The external view of a cluster as it changes, for benchmarks."""

import threading
import time
from types import TracebackType

from benchmarks._cluster import CHROOT, ClusterError
from sharding.connection import Connection, ZooKeeperConfig
from sharding.model import ShardMap
from sharding.spectator import Spectator

__all__ = ["SESSION_S", "View"]

SESSION_S = 2.0


class View:
    """The external view as it changes: every map with its time. A context manager."""

    def __init__(self, hosts: str) -> None:
        self._connection = Connection(ZooKeeperConfig(hosts + CHROOT, SESSION_S))
        self._spectator = Spectator(self._connection, self._take)
        self._lock = threading.Lock()
        self._maps: list[tuple[float, ShardMap]] = []

    def __enter__(self) -> "View":
        self._connection.start()
        self._spectator.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._spectator.stop()
        self._connection.close()

    def _take(self, map: ShardMap) -> None:
        with self._lock:
            self._maps.append((time.monotonic(), map))

    def maps(self) -> list[tuple[float, ShardMap]]:
        with self._lock:
            return list(self._maps)

    def latest(self) -> ShardMap:
        """The newest; waits a little for the first."""
        deadline = time.monotonic() + 10
        while not self.maps():
            if time.monotonic() > deadline:
                raise ClusterError("no external view within 10 s")
            time.sleep(0.02)
        return self.maps()[-1][1]
