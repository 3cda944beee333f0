"""Shards that begin empty on a leaf are filled before they go online. All parts are real."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cache_daemon.cachectl_admin import AdminClient
from cache_daemon.client import Status
from tests.servers import wait_until
from tests.sharded_daemons import ITEMS, NAMESPACE, Cluster, Node
from tests.zookeeper import ZooKeeperServer, new_chroot
from warmup.layout import parse_shards

_KEYS = list(ITEMS)
_HITS = (Status.HIT_DRAM, Status.HIT_NVM)


@pytest.fixture(scope="module")
def zookeeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZooKeeperServer]:
    server = ZooKeeperServer(tmp_path_factory.mktemp("zookeeper"))
    with server:
        yield server


def warms(node: Node, **warmup: Any) -> Node:
    node.config["warmup"] = {"max_duration": "30s", **warmup}
    return node


def ratio(statuses: list[int]) -> float:
    return sum(status in _HITS for status in statuses) / len(statuses)


def read(cluster: Cluster) -> list[int]:
    with cluster.root.client() as client:
        return [
            status
            for first in range(0, len(_KEYS), 500)
            for status in client.batch_get({NAMESPACE: _KEYS[first : first + 500]})[
                NAMESPACE
            ].statuses.tolist()
        ]


def recorded(cluster: Cluster, folder: Path) -> dict[str, Any]:
    """Has the root record; the snapshots' section for leaves."""
    snapshots = {"url": f"file://{folder}/snapshots"}
    record = {"dir": str(folder / "root-log"), "sample": "100%", "window": "1s"}
    cluster.root.config["warmup"] = {"record": record, "snapshots": snapshots}
    return snapshots


def upload(cluster: Cluster) -> None:
    """Waits until what was read is in the snapshots."""
    time.sleep(1.2)
    read(cluster)
    wait_until(lambda: cluster.root.status().warmup.uploads.uploaded > 0, 30, "the root uploads")


@pytest.mark.parametrize("plan", ["replay", "peer_copy", "auto"])
def test_a_shard_that_is_handed_over_keeps_its_hit_ratio(
    tmp_path: Path, zookeeper: ZooKeeperServer, plan: str
) -> None:
    cluster = Cluster(tmp_path, new_chroot(zookeeper.address), leaves=2, replicas=1)
    snapshots = recorded(cluster, tmp_path)
    for leaf in cluster.leaves:
        warms(leaf)  # it gives copies
    with cluster:
        cluster.start()
        read(cluster)
        upload(cluster)
        before = ratio(read(cluster))
        assert before == 1.0
        seen = [1.0]
        ended = threading.Event()

        def keep_reading() -> None:
            while not ended.is_set():
                seen.append(ratio(read(cluster)))

        reader = threading.Thread(target=keep_reading)
        reader.start()
        try:
            new = warms(cluster.leaf(3), snapshots=snapshots, plan=plan)
            cluster.add(new)
            cluster.wait_settled()
            time.sleep(1.0)
        finally:
            ended.set()
            reader.join()
        moved = new.cluster().shards_online / 64
        assert moved > 0.15
        warmup = new.status().warmup
        assert warmup.state == "warmed", new.daemon.log
        assert (warmup.items_copied > 0) is (plan != "replay"), new.daemon.log
        # Of the keys that moved, at least nine in ten hit at any time; the others were not touched.
        assert min(seen) >= 1 - 0.1 * moved, seen
        assert len(seen) > 10


def test_a_leaf_is_warming_until_its_first_shards_are_online(
    tmp_path: Path, zookeeper: ZooKeeperServer
) -> None:
    cluster = Cluster(tmp_path, new_chroot(zookeeper.address), leaves=1, replicas=1)
    leaf = warms(cluster.leaves[0])
    with cluster:
        leaf.start()
        seen: set[str] = set()

        def serves() -> bool:
            try:
                state = leaf.status().state
            except Exception:
                return False
            seen.add(state)
            return state == "SERVING"

        wait_until(serves, 40, "it serves")
        assert "WARMING" in seen
        assert leaf.cluster().shards_online > 0
        # The first of all has nobody to be filled by.
        assert leaf.status().warmup.state == "failed", leaf.daemon.log
        assert leaf.status().warmup.serving_cold


def test_a_leaf_that_zookeeper_does_not_hear_serves_in_time(
    tmp_path: Path, zookeeper: ZooKeeperServer
) -> None:
    cluster = Cluster(tmp_path, new_chroot(zookeeper.address), leaves=1)
    leaf = warms(cluster.leaves[0], max_duration="3s")
    leaf.config["sharding"] = leaf.config["sharding"] | {
        "zookeeper": {"hosts": "127.0.0.1:1/x", "session_timeout": "1s"}
    }
    with cluster:
        leaf.start().wait()
        assert leaf.status().warmup.state == "failed"
        assert "no shard was assigned" in leaf.status().warmup.reason


def test_shards_of_a_dead_leaf_are_filled_from_snapshots(
    tmp_path: Path, zookeeper: ZooKeeperServer
) -> None:
    hosts = new_chroot(zookeeper.address)
    soon: dict[str, Any] = {"rebalance_delay": "500ms", "freeze_below": "10%"}
    cluster = Cluster(tmp_path, hosts, leaves=2, replicas=1, **soon)
    snapshots = recorded(cluster, tmp_path)
    for leaf in cluster.leaves:
        warms(leaf, snapshots=snapshots)
    with cluster:
        cluster.start()
        read(cluster)
        upload(cluster)
        # Nobody else has its shards, but the snapshots tell of their keys.
        gone, heir = cluster.leaves
        gone.kill()
        cluster.wait_settled()
        warmup = heir.status().warmup
        assert warmup.keys_fetched > 0, heir.daemon.log
        assert ratio(read(cluster)) >= 0.95


def test_an_operator_fills_a_leaf_that_serves(tmp_path: Path, zookeeper: ZooKeeperServer) -> None:
    cluster = Cluster(tmp_path, new_chroot(zookeeper.address), leaves=1, replicas=1)
    snapshots = recorded(cluster, tmp_path)
    (leaf,) = cluster.leaves
    # The shared rate is in ZooKeeper.
    replay = {"rate": 50_000, "fleet_rate": 20_000}
    warms(leaf, snapshots=snapshots, replay=replay, max_duration="20s")
    with cluster:
        cluster.start()
        read(cluster)
        upload(cluster)
        with AdminClient(f"unix:{leaf.folder}/admin.sock", 5.0) as admin:
            assert admin.flush(NAMESPACE) > 0
            admin.start_warmup(0)
        wait_until(lambda: leaf.status().warmup.state == "warmed", 20, leaf.daemon.log)
        assert leaf.status().warmup.keys_fetched >= 0.9 * len(_KEYS)
        assert not leaf.status().warmup.serving_cold
        assert ratio(read(cluster)) >= 0.95


def test_a_signal_ends_the_warm_up_of_a_leaf_at_once(
    tmp_path: Path, zookeeper: ZooKeeperServer
) -> None:
    cluster = Cluster(tmp_path, new_chroot(zookeeper.address), leaves=2, replicas=1)
    snapshots = recorded(cluster, tmp_path)
    with cluster:
        cluster.start()
        read(cluster)
        upload(cluster)
        slowly = {"plan": "replay", "replay": {"rate": 20}, "max_duration": "60s"}
        new = warms(cluster.leaf(3), snapshots=snapshots, **slowly)
        cluster.leaves.append(new)
        new.start()
        wait_until(lambda: new.cluster().shards_warming > 0, 30, "it fills shards")
        wait_until(lambda: new.status().warmup.state == "running", 10, "it replays")
        began = time.monotonic()
        assert new.stop() == 0
        assert time.monotonic() - began < 10
        # The owners before answered all the time, and still do.
        cluster.leaves.remove(new)
        assert ratio(read(cluster)) == 1.0


def test_the_log_of_a_leaf_says_of_which_shards_it_is(
    tmp_path: Path, zookeeper: ZooKeeperServer
) -> None:
    cluster = Cluster(tmp_path, new_chroot(zookeeper.address), leaves=2, replicas=1)
    store = tmp_path / "snapshots"
    for leaf in cluster.leaves:
        record = {"dir": str(leaf.folder / "log"), "sample": "100%", "window": "1s"}
        warms(leaf, record=record, snapshots={"url": f"file://{store}"}, plan="none")
    with cluster:
        cluster.start()
        read(cluster)
        time.sleep(1.2)
        read(cluster)
        uploaded = [leaf.status().warmup.uploads for leaf in cluster.leaves]
        wait_until(
            lambda: all(leaf.status().warmup.uploads.uploaded for leaf in cluster.leaves),
            30,
            f"both upload: {uploaded}",
        )
    manifests = [json.loads(path.read_text()) for path in store.rglob("*.json")]
    by_host = {each["host"]: each for each in manifests}
    assert by_host.keys() == {"leaf-1", "leaf-2"}
    shards = [set(parse_shards(by_host[host]["shards"])) for host in sorted(by_host)]
    assert shards[0] | shards[1] == set(range(64))
    assert not shards[0] & shards[1]
    assert {each["shard_count"] for each in manifests} == {64}
