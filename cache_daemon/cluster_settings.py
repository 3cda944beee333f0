"""From the `sharding` section of a config to what the modules of `sharding` take."""

from pathlib import Path

from cache_daemon.config_sharded import ShardingSettings, ZooKeeperSettings, read_secret
from sharding.model import ClusterConfig
from sharding.znodes import Credentials, ZooKeeperConfig

__all__ = ["cluster_config", "zookeeper_config"]


def zookeeper_config(settings: ZooKeeperSettings) -> ZooKeeperConfig:
    """How to reach ZooKeeper, with the password as it is in its file.

    Raises SecretError for that file, and ValueError for a user's name that cannot be.
    """
    auth = settings.auth
    credentials = None
    if auth is not None:
        password = read_secret(Path(auth.password_file))
        credentials = Credentials(auth.scheme, auth.user, password)
    return ZooKeeperConfig(
        hosts=settings.hosts,
        session_timeout_seconds=settings.session_timeout,
        credentials=credentials,
        acl=settings.acl,
    )


def cluster_config(settings: ShardingSettings) -> ClusterConfig:
    """What a cluster begins with, where this node is the first."""
    return ClusterConfig(
        cluster=settings.cluster,
        shard_count=settings.shard_count,
        replicas=settings.replicas,
        rebalance_delay_seconds=settings.rebalance_delay,
        max_moves=settings.max_moves,
        drop_grace_seconds=settings.drop_grace,
        freeze_below=settings.freeze_below,
    )
