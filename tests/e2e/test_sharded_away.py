"""A leaf that is away while others are written to: what it has when it is back, and what not."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pytest
from typer.testing import CliRunner

from cache_daemon.cachectl import app as cachectl
from cache_daemon.client import FeatureCacheError, RetryPolicy, Status
from tests.proxy import TcpProxy
from tests.servers import wait_until
from tests.sharded_daemons import NAMESPACE, Cluster, Node
from tests.zookeeper import ZooKeeperServer, new_chroot

_KEYS = [b"key %d" % number for number in range(400)]
_OLD = [b"old"] * len(_KEYS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZooKeeperServer]:
    server = ZooKeeperServer(tmp_path_factory.mktemp("zookeeper"))
    with server:
        yield server


def _statuses(leaf: Node, keys: list[bytes]) -> list[int]:
    with leaf.client() as client:
        found: list[int] = client.batch_get({NAMESPACE: keys})[NAMESPACE].statuses.tolist()
    return found


def _halves(away: Node) -> tuple[list[bytes], list[bytes]]:
    """The keys that a leaf has, in two halves."""
    own = [
        key
        for key, status in zip(_KEYS, _statuses(away, _KEYS), strict=True)
        if status == Status.HIT_DRAM
    ]
    assert len(own) > 100
    return own[: len(own) // 2], own[len(own) // 2 :]


class _Asker:
    """Asks a leaf for the same keys over and over, from before it starts; keeps what it saw."""

    def __init__(self, leaf: Node, keys: list[bytes]) -> None:
        self.seen: set[int] = set()
        self._leaf = leaf
        self._keys = keys
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            with (
                contextlib.suppress(FeatureCacheError),  # while it is down
                self._leaf.client(timeout=1.0, retry=RetryPolicy(attempts=1)) as client,
            ):
                column = client.batch_get({NAMESPACE: self._keys})[NAMESPACE]
                self.seen |= set(column.statuses.tolist())

    def __enter__(self) -> "_Asker":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()


def test_a_leaf_that_zookeeper_lost_drops_what_it_missed_and_nothing_else(
    server: ZooKeeperServer, tmp_path: Path
) -> None:
    hosts = new_chroot(server.address)
    with (
        TcpProxy(server.port) as proxy,
        Cluster(tmp_path, hosts, store=False, rebalance_delay="60s", freeze_below=0) as cluster,
    ):
        leaf = cluster.leaves[0]
        chroot = hosts.partition("/")[2]
        leaf.config["sharding"]["zookeeper"] = {
            "hosts": f"{proxy.address}/{chroot}",
            "session_timeout": "1s",
        }
        cluster.start()
        with cluster.root.client() as client:
            assert client.batch_put({NAMESPACE: (_KEYS, _OLD)}).all_stored
            missed, kept = _halves(leaf)
            time.sleep(2)  # so that the peers' logs reach further back than the leaf is away
            version = cluster.root.cluster().map_version
            proxy.black_hole()
            wait_until(lambda: cluster.root.cluster().map_version > version, 15, "it is left out")
            wait_until(lambda: leaf.cluster().session == "lost", 15, "it notices")
            assert leaf.cluster().shards_online > 0
            half = len(missed) // 2
            assert client.batch_delete({NAMESPACE: missed[:half]}).all_stored
            assert client.batch_put({NAMESPACE: (missed[half:], [b"new"] * (len(missed) - half))})
            assert set(_statuses(leaf, missed)) == {Status.HIT_DRAM}, "it has not heard of it"
            proxy.forward()
            proxy.reset()
            wait_until(lambda: leaf.cluster().registration == "", 20, "it is registered again")
            cluster.wait_settled()
            assert set(_statuses(leaf, missed)) == {Status.MISS}
            assert set(_statuses(leaf, kept)) == {Status.HIT_DRAM}
            for _ in range(5):  # whichever replica is asked
                column = client.batch_get({NAMESPACE: missed})[NAMESPACE]
                assert set(column.to_bytes()) <= {None, b"new"}


def test_a_leaf_that_was_down_serves_nothing_that_was_deleted_meanwhile(
    server: ZooKeeperServer, tmp_path: Path, shared: Path
) -> None:
    """Its memory outlives the process, and is warm when it is back."""
    hosts = new_chroot(server.address)
    with Cluster(tmp_path, hosts, store=False, rebalance_delay="60s", freeze_below=0) as cluster:
        for leaf in cluster.leaves:
            leaf.config["persist"] = {"dir": str(shared), "name": leaf.name}
        cluster.start()
        leaf = cluster.leaves[0]
        with cluster.root.client() as client:
            assert client.batch_put({NAMESPACE: (_KEYS, _OLD)}).all_stored
            missed, kept = _halves(leaf)
            time.sleep(2)
            leaf.kill()
            half = len(missed) // 2
            wait_until(lambda: cluster.root.cluster().leaves == 2, 15, "it is left out")
            assert client.batch_delete({NAMESPACE: missed[:half]}).all_stored
            assert client.batch_put({NAMESPACE: (missed[half:], [b"new"] * (len(missed) - half))})
            # As roots ask it that have not heard yet that it was down.
            with _Asker(leaf, missed) as asker:
                leaf.start().wait()
                assert leaf.status().start.memory in ("clean", "checked")
                wait_until(lambda: leaf.cluster().shards_online > 0, 20, "it has its shards")
                cluster.wait_settled()
            assert Status.WRONG_SHARD in asker.seen, "it was asked before it had its shards"
            assert Status.HIT_DRAM not in asker.seen
            assert Status.HIT_DRAM not in _statuses(leaf, missed)
            for _ in range(5):
                column = client.batch_get({NAMESPACE: missed})[NAMESPACE]
                assert set(column.to_bytes()) <= {None, b"new"}
            # What was not written meanwhile is there still.
            assert set(_statuses(leaf, kept)) == {Status.HIT_DRAM}


def test_a_leaf_of_another_number_of_shards_takes_no_part(
    server: ZooKeeperServer, tmp_path: Path
) -> None:
    with Cluster(tmp_path, new_chroot(server.address), leaves=2) as cluster:
        cluster.start()
        wrong = cluster.leaf(3, shard_count=32)
        try:
            wrong.start().wait()
            wait_until(lambda: "64 shards" in wrong.cluster().registration, 10, "it says why")
            assert "write sharding.shard_count: 64" in wrong.cluster().registration
            assert cluster.root.cluster().leaves == 2
            wrong.daemon.signal()
            assert wrong.daemon.wait() == 0
        finally:
            wrong.kill()


def test_a_cluster_behind_passwords(tmp_path: Path) -> None:
    """SASL, and nothing that the nodes make is open to others."""
    (tmp_path / "zookeeper").mkdir()
    server = ZooKeeperServer(tmp_path / "zookeeper", sasl_users={"cache": "open sesame"})
    password, wrong = tmp_path / "password", tmp_path / "wrong"
    password.write_text("open sesame\n")
    wrong.write_text("let me in\n")
    with server:
        hosts = f"{server.address}/secured"
        auth = {"scheme": "sasl", "user": "cache", "password_file": str(password)}
        zookeeper = {"hosts": hosts, "session_timeout": "1s", "auth": auth, "acl": "creator"}
        with Cluster(tmp_path, hosts, leaves=2, zookeeper=zookeeper) as cluster:
            cluster.start()
            with cluster.root.client() as client:
                assert client.batch_put({NAMESPACE: ([b"k"], [b"v"])}).all_stored
            assert cluster.cachectl("nodes").returncode == 0
            by_options = ["cluster", "nodes", "--json", "--zookeeper", hosts, "--auth", "sasl"]
            login = ["--user", "cache", "--password-file", str(password)]
            done = CliRunner().invoke(cachectl, [*by_options, *login])
            assert done.exit_code == 0, done.stderr
            login[-1] = str(wrong)
            done = CliRunner().invoke(cachectl, [*by_options, *login, "--timeout", "3s"])
            assert done.exit_code == 3
            assert "sesame" not in done.output
            assert "let me in" not in done.output
            guess = auth | {"password_file": str(wrong)}
            stranger = cluster.leaf(3, zookeeper=zookeeper | {"auth": guess})
            try:
                stranger.start().wait()
                wait_until(lambda: bool(stranger.cluster().problems), 15, "it says why")
                assert stranger.cluster().registration != ""
                assert cluster.root.cluster().leaves == 2
                assert "let me in" not in stranger.daemon.log
            finally:
                stranger.kill()


def test_a_password_file_that_is_missing_ends_the_start(tmp_path: Path) -> None:
    auth = {"user": "cache", "password_file": str(tmp_path / "missing")}
    zookeeper = {"hosts": "127.0.0.1:1/x", "auth": auth}
    with Cluster(tmp_path, "unused", leaves=1, zookeeper=zookeeper) as cluster:
        leaf = cluster.leaves[0].start()
        assert leaf.daemon.wait() == 1
        assert "password_file" in leaf.daemon.log
        assert "Traceback" not in leaf.daemon.log
