"""How a client routes to the leaves of a cluster itself, without a root between.

The routing is a root's own: a native node that keeps nothing, in the client's process, fed with the
external view from ZooKeeper.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from cache_daemon import _native
from cache_daemon._client_errors import Unavailable
from cache_daemon.cluster import RootMembership
from cache_daemon.config_sharded import AuthSettings, ShardingSettings, ZooKeeperSettings

__all__ = ["LeafRouter", "ZooKeeperLogin"]


class ZooKeeperLogin(AuthSettings):
    """As whom a client logs in to ZooKeeper: `scheme` digest or sasl, `user`, `password_file`."""


class LeafRouter:
    """Routes by the newest shard map; by the last one while ZooKeeper is away. Thread-safe."""

    def __init__(
        self,
        *,
        zookeeper: str,
        cluster: str,
        namespaces: Sequence[str],
        login: ZooKeeperLogin | None,
        session_timeout: float,
        wait: float,
    ) -> None:
        """Waits for the first map.

        Raises ValueError for settings that cannot be, Unavailable when no map of that cluster came
        within `wait` seconds, and SecretError for a password file that cannot be read.
        """
        settings = ShardingSettings(
            role="root",
            cluster=cluster,
            zookeeper=ZooKeeperSettings.model_validate(
                {"hosts": zookeeper, "session_timeout": f"{session_timeout:g}s", "auth": login}
            ),
        )
        if not namespaces:
            raise ValueError("say which namespaces the client will ask for")
        self.node = _native.Node(
            _native.NodeConfig(
                memory_bytes=0,
                namespaces=[_namespace(name) for name in dict.fromkeys(namespaces)],
                root=_native.RootConfig(),
            )
        )
        self._membership = RootMembership(settings)
        routed = threading.Event()
        self._membership.start(self.node, (), routed.set)
        if not routed.wait(wait):
            problems = "; ".join(self._membership.status().problems)
            self.close()
            raise Unavailable(
                f"no shard map of cluster {cluster!r} from {zookeeper} within {wait:g} s"
                + (f": {problems}" if problems else "")
            )

    @property
    def map_version(self) -> int:
        """Of the map that is routed by."""
        return self._membership.status().map_version

    def close(self) -> None:
        """Ends calls under way. Idempotent."""
        self._membership.stop()
        self.node.shutdown()


def _namespace(name: str) -> _native.NamespaceConfig:
    # The leaves know their domains; a router has none of its own.
    domain = _native.DomainConfig(name="default", budget_bytes=0)
    return _native.NamespaceConfig(name=name, domains=[domain], default_domain="default")
