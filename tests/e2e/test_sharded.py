"""A cluster of real daemons and a real ZooKeeper: what clients of the root see."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pytest

from cache_daemon.client import Client, FeatureCacheError, RetryPolicy, Status, Unavailable
from tests.daemon_process import Daemon
from tests.servers import wait_until
from tests.sharded_daemons import ITEMS, NAMESPACE, Cluster
from tests.zookeeper import ZooKeeperServer, new_chroot

_KEYS = list(ITEMS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZooKeeperServer]:
    server = ZooKeeperServer(tmp_path_factory.mktemp("zookeeper"))
    with server:
        yield server


@pytest.fixture
def hosts(server: ZooKeeperServer) -> str:
    return new_chroot(server.address)


@pytest.fixture(scope="module")
def cluster(server: ZooKeeperServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three leaves and a root; each test leaves it as it was."""
    folder = tmp_path_factory.mktemp("cluster")
    with Cluster(folder, new_chroot(server.address)) as cluster:
        yield cluster.start()


class Readers:
    """Threads that read all items through a node until the end; any failure is kept."""

    def __init__(self, target: str, threads: int = 2) -> None:
        self.batches = 0
        self.failures: list[str] = []
        self.missing: list[tuple[float, int]] = []  # when, and how many cells had no value
        self._target = target
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self) -> None:
        with Client(self._target, timeout=2.0, retry=RetryPolicy(attempts=1)) as client:
            while not self._stop.wait(0.01):
                at = time.monotonic()
                try:
                    column = client.batch_get({NAMESPACE: _KEYS})[NAMESPACE]
                except FeatureCacheError as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                    continue
                self.batches += 1
                values = column.to_bytes()
                absent = values.count(None)
                if absent:
                    self.missing.append((at, absent))
                wrong = sum(
                    value is not None and value != ITEMS[key]
                    for key, value in zip(_KEYS, values, strict=True)
                )
                if wrong:
                    self.failures.append(f"{wrong} wrong values")

    def __enter__(self) -> "Readers":
        for thread in self._threads:
            thread.start()
        wait_until(lambda: self.batches > 5 or bool(self.failures), 20, "batches")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(20)


def test_reads_and_writes_go_through_the_root(cluster: Cluster) -> None:
    with cluster.root.client() as client:
        column = client.batch_get({NAMESPACE: _KEYS})[NAMESPACE]
        assert column.to_bytes() == list(ITEMS.values())
        again = client.batch_get({NAMESPACE: _KEYS}, cache_only=True)[NAMESPACE]
        assert set(again.statuses.tolist()) <= {Status.HIT_DRAM, Status.MISS}
        keys = [b"written %d" % number for number in range(300)]
        values = [b"by the root %d" % number for number in range(300)]
        assert client.batch_put({NAMESPACE: (keys, values)}).all_stored
        assert client.batch_get({NAMESPACE: keys})[NAMESPACE].to_bytes() == values
        assert client.batch_delete({NAMESPACE: keys}).all_stored
        gone = client.batch_get({NAMESPACE: keys})[NAMESPACE]
        assert set(gone.statuses.tolist()) == {Status.NOT_FOUND}


def test_every_replica_has_what_was_written(cluster: Cluster) -> None:
    keys = [b"kept %d" % number for number in range(300)]
    with cluster.root.client() as client:
        assert client.batch_put({NAMESPACE: (keys, keys)}).all_stored
    holders = dict.fromkeys(keys, 0)
    for leaf in cluster.leaves:
        with leaf.client() as client:
            column = client.batch_get({NAMESPACE: keys}, cache_only=True)[NAMESPACE]
        statuses = column.statuses.tolist()
        assert set(statuses) == {Status.HIT_DRAM, Status.WRONG_SHARD}
        for key, status in zip(keys, statuses, strict=True):
            holders[key] += status == Status.HIT_DRAM
    assert set(holders.values()) == {2}


def test_status_and_metrics_say_who_holds_what(cluster: Cluster) -> None:
    root = cluster.root.cluster()
    assert (root.role, root.cluster, root.session) == ("root", "test", "connected")
    assert (root.shard_count, root.leaves, root.shards_online) == (64, 3, 64)
    leaves = [leaf.cluster() for leaf in cluster.leaves]
    assert sum(leaf.shards_online for leaf in leaves) == 128
    assert sum(leaf.leader for leaf in leaves) == 1
    assert {leaf.registration for leaf in leaves} == {""}
    assert not any(leaf.problems for leaf in (root, *leaves))
    wait_until(lambda: cluster.root.cluster().map_age_seconds < 2, 5, "a map known to be new")
    _, metrics = cluster.leaves[0].daemon.http("/metrics")
    assert 'feature_cache_cluster_info{cluster="test",role="leaf"} 1.0' in metrics
    assert "feature_cache_cluster_session_connected 1.0" in metrics
    assert "feature_cache_cluster_registered 1.0" in metrics


def test_a_killed_leaf_fails_no_batch_and_comes_back(cluster: Cluster) -> None:
    victim = cluster.leaves[1]
    with Readers(cluster.root.target) as readers:
        killed_at = time.monotonic()
        victim.kill()
        time.sleep(4)  # beyond the delay after which its shards move
        cluster.wait_settled()
        victim.start().wait()
        wait_until(lambda: victim.cluster().shards_online > 10, 30, "shards come back")
        cluster.wait_settled()
    assert readers.failures == []
    assert [late for late in readers.missing if late[0] > killed_at + 1] == []


def test_a_leaf_that_is_stopped_in_order_is_not_missed(cluster: Cluster) -> None:
    leaf = cluster.leaves[2]
    with Readers(cluster.root.target) as readers:
        assert leaf.stop() == 0
        nodes = json.loads(cluster.cachectl("nodes", "--json").stdout)["nodes"]
        assert [node["name"] for node in nodes if node["state"] == "away"] == [leaf.name]
        leaf.start().wait()
        wait_until(lambda: leaf.cluster().shards_online > 10, 30, "shards come back")
        cluster.wait_settled()
    assert readers.failures == []
    assert readers.missing == []


def test_cachectl_drains_a_leaf_and_takes_it_back(cluster: Cluster) -> None:
    leaf = cluster.leaves[0]
    with Readers(cluster.root.target) as readers:
        done = cluster.cachectl("drain", leaf.name)
        assert done.returncode == 0, done.stderr
        cluster.wait_settled(without=(leaf.name,))
        done = cluster.cachectl("undrain", leaf.name)
        assert done.returncode == 0, done.stderr
        wait_until(lambda: leaf.cluster().shards_online > 10, 30, "shards come back")
        cluster.wait_settled()
    assert readers.failures == []
    assert readers.missing == []


def test_cachectl_explains_where_a_key_lives(cluster: Cluster) -> None:
    done = cluster.cachectl("explain", NAMESPACE, "item 7", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    named = {replica["leaf"] for replica in found["replicas"]}
    for leaf in cluster.leaves:
        with leaf.client() as client:
            (status,) = client.batch_get({NAMESPACE: [b"item 7"]})[NAMESPACE].statuses.tolist()
        assert (status != Status.WRONG_SHARD) == (leaf.name in named)


def test_a_root_is_ready_with_its_first_map(cluster: Cluster) -> None:
    root = cluster.make_root("late")
    try:
        root.start().wait()
        assert root.daemon.health() == "SERVING"
        with root.client() as client:
            values = client.batch_get({NAMESPACE: _KEYS})[NAMESPACE].to_bytes()
            assert values == list(ITEMS.values())
        assert root.stop() == 0
    finally:
        root.kill()


def test_without_zookeeper_nothing_is_affected(server: ZooKeeperServer, cluster: Cluster) -> None:
    """Last, as the server is killed and comes back."""
    with Readers(cluster.root.target) as readers:
        server.kill()
        time.sleep(4)  # four sessions' timeouts
        root = cluster.root.cluster()
        assert root.session != "connected"
        assert root.map_version > 0
        assert cluster.root.daemon.http("/readyz")[0] == 200
        done = cluster.cachectl("nodes", "--timeout", "1s")
        assert done.returncode == 3
        assert "Traceback" not in done.stderr
        server.start()
        for node in (cluster.root, *cluster.leaves):
            wait_until(
                lambda node=node: node.cluster().session == "connected",  # type: ignore[misc]
                30,
                f"{node.name} has a session again",
            )
        cluster.wait_settled()
    assert readers.failures == []
    assert readers.missing == []
    leaf = cluster.leaves[0]
    assert cluster.cachectl("drain", leaf.name).returncode == 0
    cluster.wait_settled(without=(leaf.name,))  # changes go on
    assert cluster.cachectl("undrain", leaf.name).returncode == 0


def test_a_root_without_a_map_is_not_ready(hosts: str, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, hosts, leaves=0)
    with cluster:
        root = cluster.root.start()
        wait_until(lambda: root.cluster().session == "connected", 20, "a session")
        assert not (root.folder / "ready.json").exists()
        with root.client(retry=RetryPolicy(attempts=1)) as client, pytest.raises(Unavailable):
            client.batch_get({NAMESPACE: [b"x"]})
        root.daemon.signal()
        assert root.daemon.wait() == 0


def test_nodes_of_another_cluster_take_no_part(hosts: str, tmp_path: Path) -> None:
    with Cluster(tmp_path, hosts, leaves=2) as cluster:
        cluster.start()
        stranger = cluster.leaf(3, cluster="other")
        root = cluster.make_root("stranger")
        root.config["sharding"]["cluster"] = "other"
        try:
            stranger.start().wait()
            wait_until(lambda: "test" in stranger.cluster().registration, 20, "a refusal")
            root.start()
            wait_until(lambda: any("test" in p for p in root.cluster().problems), 20, "a refusal")
            assert not (root.folder / "ready.json").exists()
            assert cluster.root.cluster().leaves == 2
        finally:
            stranger.kill()
            root.kill()


def test_a_second_leaf_of_a_name_waits_until_the_first_is_gone(hosts: str, tmp_path: Path) -> None:
    with Cluster(tmp_path, hosts, leaves=2) as cluster:
        cluster.start()
        twin = cluster.leaf(3)
        twin.config["sharding"]["leaf"]["name"] = "leaf-2"
        try:
            twin.start().wait()
            wait_until(lambda: twin.cluster().registration != "", 20, "a refusal")
            assert cluster.leaves[1].cluster().registration == ""
            cluster.leaves[1].kill()
            wait_until(lambda: twin.cluster().shards_online > 0, 30, "the twin takes over")
            assert twin.cluster().registration == ""
        finally:
            twin.kill()


def test_the_topology_changes_by_one_file_and_the_client_does_not(
    hosts: str, tmp_path: Path
) -> None:
    """Colocated, separate, then a cluster behind the same address."""
    with Cluster(tmp_path, hosts, leaves=2) as cluster:

        def read(client: Client) -> None:
            assert client.batch_get({NAMESPACE: _KEYS})[NAMESPACE].to_bytes() == list(
                ITEMS.values()
            )
            assert client.batch_put({NAMESPACE: ([b"k"], [b"v"])}).all_stored
            assert client.batch_get({NAMESPACE: [b"k"]})[NAMESPACE].to_bytes() == [b"v"]

        with Client(cluster.root.target, timeout=10) as client:
            for topology in ("colocated", "separate"):
                listen = cluster.root.config["listen"]
                config = {"topology": topology, "listen": listen, **cluster.values()}
                folder = tmp_path / topology
                folder.mkdir()
                alone = Daemon(folder, config)
                try:
                    alone.wait_until_ready()
                    read(client)
                finally:
                    alone.signal()
                    assert alone.wait() == 0
            cluster.start()
            read(client)
