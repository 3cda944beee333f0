"""A client that routes to the leaves itself, over real leaves and a real ZooKeeper."""

import asyncio
import time
from collections.abc import Iterator

import pytest

from cache_daemon.client import AsyncClient, Client, Status, Unavailable
from tests.sharded_daemons import ITEMS, NAMESPACE, Cluster
from tests.zookeeper import ZooKeeperServer, new_chroot

_KEYS = list(ITEMS)
_CLUSTER = "test"  # as tests/sharded_daemons.py calls it


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZooKeeperServer]:
    server = ZooKeeperServer(tmp_path_factory.mktemp("zookeeper"))
    with server:
        yield server


@pytest.fixture(scope="module")
def hosts(server: ZooKeeperServer) -> str:
    return new_chroot(server.address)


@pytest.fixture(scope="module")
def cluster(hosts: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), hosts) as cluster:
        yield cluster.start()


def _client(hosts: str) -> Client:
    return Client.sharded(zookeeper=hosts, cluster=_CLUSTER, namespaces=[NAMESPACE])


def test_reads_and_writes_what_the_root_reads_and_writes(hosts: str, cluster: Cluster) -> None:
    keys = [b"direct %d" % number for number in range(300)]
    with _client(hosts) as direct, cluster.root.client() as through_root:
        column = direct.batch_get({NAMESPACE: _KEYS})[NAMESPACE]
        assert column.to_bytes() == list(ITEMS.values())
        assert direct.batch_put({NAMESPACE: (keys, keys)}).all_stored
        assert through_root.batch_get({NAMESPACE: keys})[NAMESPACE].to_bytes() == keys
        assert through_root.batch_delete({NAMESPACE: keys}).all_stored
        gone = direct.batch_get({NAMESPACE: keys})[NAMESPACE]
        assert set(gone.statuses.tolist()) == {Status.NOT_FOUND}


@pytest.mark.usefixtures("cluster")
def test_works_for_asyncio(hosts: str) -> None:
    async def read() -> list[bytes | None]:
        client = AsyncClient.sharded(zookeeper=hosts, cluster=_CLUSTER, namespaces=[NAMESPACE])
        async with client:
            return (await client.batch_get({NAMESPACE: _KEYS}))[NAMESPACE].to_bytes()

    assert asyncio.run(read()) == list(ITEMS.values())


def test_a_lost_leaf_fails_no_batch(hosts: str, cluster: Cluster) -> None:
    lost = cluster.leaves[0]
    with _client(hosts) as client:
        client.batch_get({NAMESPACE: _KEYS})
        lost.kill()
        try:
            killed_at = time.monotonic()
            while (age := time.monotonic() - killed_at) < 3:
                column = client.batch_get({NAMESPACE: _KEYS}, timeout=2.0)[NAMESPACE]
                assert age < 1 or column.to_bytes() == list(ITEMS.values())
        finally:
            lost.start().wait()
        cluster.wait_settled()


@pytest.mark.usefixtures("cluster")
def test_zookeeper_may_be_away_but_not_from_the_start(server: ZooKeeperServer, hosts: str) -> None:
    with _client(hosts) as client:
        server.kill()
        try:
            column = client.batch_get({NAMESPACE: _KEYS})[NAMESPACE]
            assert column.to_bytes() == list(ITEMS.values())
            with pytest.raises(Unavailable, match="no shard map"):
                Client.sharded(zookeeper=hosts, cluster=_CLUSTER, namespaces=[NAMESPACE], wait=0.5)
        finally:
            server.start()


@pytest.mark.usefixtures("cluster")
def test_another_cluster_is_refused(hosts: str) -> None:
    with pytest.raises(Unavailable, match=_CLUSTER):
        Client.sharded(zookeeper=hosts, cluster="elsewhere", namespaces=[NAMESPACE], wait=3)


def test_settings_that_cannot_be_are_refused(hosts: str) -> None:
    with pytest.raises(ValueError, match="namespaces"):
        Client.sharded(zookeeper=hosts, cluster="c", namespaces=[])
    with pytest.raises(ValueError, match="host:port"):
        Client.sharded(zookeeper="nowhere", cluster="c", namespaces=["a"])
