"""A root whose leaves are slow, parted from it or gone: what it answers, and from where."""

import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cache_daemon.client import Client, RetryPolicy, Status
from tests.proxy import TcpProxy
from tests.servers import wait_until
from tests.sharded_daemons import ITEMS, NAMESPACE, Cluster
from tests.zookeeper import ZooKeeperServer, new_chroot

_KEYS = list(ITEMS)
_VALUES = list(ITEMS.values())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZooKeeperServer]:
    server = ZooKeeperServer(tmp_path_factory.mktemp("zookeeper"))
    with server:
        yield server


def _statuses(client: Client, **options: Any) -> Counter[int]:
    return Counter(client.batch_get({NAMESPACE: _KEYS}, **options)[NAMESPACE].statuses.tolist())


def test_a_leaf_behind_a_dead_network_is_asked_no_more(
    server: ZooKeeperServer, tmp_path: Path
) -> None:
    """Its session with ZooKeeper lives, so that the map names it all the while."""
    with Cluster(tmp_path, new_chroot(server.address), rebalance_delay="60s") as cluster:
        leaf = cluster.leaves[0]
        with TcpProxy(int(leaf.target.rpartition(":")[2])) as proxy:
            leaf.config["sharding"]["leaf"]["advertise"] = proxy.address
            cluster.start()
            with cluster.root.client(timeout=2.0, retry=RetryPolicy(attempts=1)) as client:
                assert client.batch_get({NAMESPACE: _KEYS})[NAMESPACE].to_bytes() == _VALUES
                for part in (proxy.black_hole, proxy.refuse):
                    part()
                    for _ in range(10):
                        began = time.monotonic()
                        values = client.batch_get({NAMESPACE: _KEYS})[NAMESPACE].to_bytes()
                        assert values == _VALUES, "the other replicas have them"
                        assert time.monotonic() - began < 1.5
                    assert cluster.root.cluster().leaves == 3
                    proxy.forward()

                def asked_again() -> bool:
                    assert client.batch_get({NAMESPACE: _KEYS})[NAMESPACE].to_bytes() == _VALUES
                    return proxy.open_connections > 0

                wait_until(asked_again, 30, "it is asked again")


def test_a_leaf_that_hangs_costs_time_and_no_value(server: ZooKeeperServer, tmp_path: Path) -> None:
    with Cluster(tmp_path, new_chroot(server.address), rebalance_delay="60s") as cluster:
        cluster.start()
        leaf = next(leaf for leaf in cluster.leaves if not leaf.cluster().leader)
        with cluster.root.client(timeout=2.0, retry=RetryPolicy(attempts=1)) as client:
            assert client.batch_get({NAMESPACE: _KEYS})[NAMESPACE].to_bytes() == _VALUES
            leaf.daemon.signal(signal.SIGSTOP)
            try:
                until = time.monotonic() + 4  # it is asked at first, then left out of the map
                while time.monotonic() < until:
                    assert client.batch_get({NAMESPACE: _KEYS})[NAMESPACE].to_bytes() == _VALUES
                assert cluster.root.cluster().leaves == 2
            finally:
                leaf.daemon.signal(signal.SIGCONT)
            cluster.wait_settled()
            assert leaf.cluster().registration == ""
            assert client.batch_get({NAMESPACE: _KEYS})[NAMESPACE].to_bytes() == _VALUES


def test_a_write_that_a_replica_did_not_get_is_partial(
    server: ZooKeeperServer, tmp_path: Path
) -> None:
    with Cluster(tmp_path, new_chroot(server.address), leaves=2, rebalance_delay="60s") as cluster:
        leaf = cluster.leaves[0]
        with TcpProxy(int(leaf.target.rpartition(":")[2])) as proxy:
            leaf.config["sharding"]["leaf"]["advertise"] = proxy.address
            cluster.start()
            with cluster.root.client() as client:
                assert client.batch_put({NAMESPACE: ([b"k"], [b"v"])}).all_stored
                proxy.refuse()
                reply = client.batch_put({NAMESPACE: ([b"k"], [b"v2"])}, timeout=2.0)
                assert not reply.all_stored


def test_shards_without_a_leaf_come_from_the_store_within_its_budget(
    server: ZooKeeperServer, tmp_path: Path
) -> None:
    with Cluster(tmp_path, new_chroot(server.address), leaves=1, replicas=1) as cluster:
        rich = cluster.make_root("rich", store_fallback_budget="100%", leaf_timeout="100ms")
        poor = cluster.make_root("poor", store_fallback_budget="10%", leaf_timeout="100ms")
        for root in (rich, poor):
            root.config["namespaces"] = {NAMESPACE: {"store": "features"}}
            root.config["stores"] = cluster.values()["stores"]
        cluster.start()
        try:
            for root in (rich, poor):
                root.start().wait()
            with (
                rich.client() as of_rich,
                poor.client() as of_poor,
                cluster.root.client() as of_none,
            ):
                clients = (of_rich, of_poor, of_none)
                for client in clients:
                    assert set(_statuses(client)) <= {Status.FETCHED, Status.HIT_DRAM}
                cluster.leaves[0].kill()
                seen = [_statuses(client, timeout=2.0) for client in clients]
            assert seen[0] == {Status.FETCHED: len(_KEYS)}
            assert 0 < seen[1][Status.FETCHED] <= 0.3 * len(_KEYS), seen[1]
            assert seen[2][Status.FETCHED] == 0
            assert sum(seen[2].values()) == len(_KEYS), "a cell each, and no failed batch"
        finally:
            rich.kill()
            poor.kill()


def test_a_hot_tier_answers_for_a_moment_and_knows_its_own_writes(
    server: ZooKeeperServer, tmp_path: Path
) -> None:
    with Cluster(tmp_path, new_chroot(server.address), leaves=2) as cluster:
        cluster.start()
        hot = cluster.make_root("hot", hot_tier={"memory": "8MiB", "max_age": "1s"})
        try:
            hot.start().wait()
            with hot.client() as of_hot, cluster.root.client() as of_other:

                def read() -> bytes | None:
                    return of_hot.batch_get({NAMESPACE: [b"k"]})[NAMESPACE].to_bytes()[0]

                assert of_hot.batch_put({NAMESPACE: ([b"k"], [b"1"])}).all_stored
                assert read() == b"1"
                calls = _calls(hot.daemon.http("/metrics")[1])
                assert {read() for _ in range(20)} == {b"1"}
                assert _calls(hot.daemon.http("/metrics")[1]) < calls + 20, "no leaf was asked"
                assert of_hot.batch_put({NAMESPACE: ([b"k"], [b"2"])}).all_stored
                assert read() == b"2", "its own write is seen at once"
                assert of_other.batch_put({NAMESPACE: ([b"k"], [b"3"])}).all_stored
                began = time.monotonic()
                wait_until(lambda: read() == b"3", 5, "another root's write is seen")
                assert time.monotonic() - began < 1.5
                assert of_other.batch_delete({NAMESPACE: [b"k"]}).all_stored
                wait_until(lambda: read() is None, 1.5, "another root's delete is seen")
        finally:
            hot.kill()


def _calls(metrics: str) -> float:
    lines = [line for line in metrics.splitlines() if line.startswith("feature_cache_root_calls")]
    return sum(float(line.split()[-1]) for line in lines)
