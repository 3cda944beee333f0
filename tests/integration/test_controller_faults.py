"""Controllers that pause, are killed and superseded; ensembles that lose members or restart."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

from kazoo.client import KazooClient

from sharding import layout
from tests.cluster_of import SESSION_S, Cluster, cluster_on
from tests.controller_process import ControllerProcess
from tests.servers import wait_until
from tests.zookeeper import ZooKeeperEnsemble, ZooKeeperServer, client_of, new_chroot


def _leader(cluster: Cluster) -> str | None:
    """Who the first of the candidates is."""
    names = sorted(cluster.connection.children(layout.LEADER) or [], key=lambda n: n[-10:])
    znode = cluster.connection.get(f"{layout.LEADER}/{names[0]}") if names else None
    return None if znode is None else znode.data.decode()


def _writes(client: KazooClient) -> dict[str, int]:
    """All that leaders write, with the transaction of the last write to each."""
    found = {}
    for root in (layout.IDEAL, layout.VIEW, layout.TARGET, layout.EPOCH):
        waiting = [root]
        while waiting:
            path = waiting.pop()
            found[path] = client.exists(path).mzxid
            waiting += [f"{path}/{name}" for name in client.get_children(path)]
    return found


def test_a_leader_that_was_paused_does_not_write_over_its_successor(
    zookeeper_hosts: str, tmp_path: Path
) -> None:
    """The first leader is stopped between its decision and the write, with a session that ends
    meanwhile. Woken, it sends the write in its new session: only the epoch stands against it."""
    pause_file = tmp_path / "pause"
    with (
        cluster_on(zookeeper_hosts, controllers=0, rebalance_delay_seconds=0) as cluster,
        client_of(zookeeper_hosts) as client,
        ControllerProcess(zookeeper_hosts, "a", cluster.config, pause_file) as first,
    ):
        cluster.wait_settled()
        assert _leader(cluster) == "a"
        with ControllerProcess(zookeeper_hosts, "b", cluster.config):
            wait_until(lambda: len(client.get_children(layout.LEADER)) == 2, 20, "two of them")
            pause_file.touch()
            cluster.add_leaf("n3", "z0")  # `a` decides what moves to it, and sleeps
            wait_until(lambda: first.is_stopped, 20, "the pause")
            wait_until(lambda: _leader(cluster) == "b", 20, "another leader")
            cluster.wait_loaded("n3")
            cluster.leaves["n1"].stop()
            wait_until(lambda: cluster.load("n1") == 0, 20, "what `a` does not know of")
            cluster.wait_settled()
            before, rows = _writes(client), cluster.rows()

            first.send(signal.SIGCONT)
            assert first.line() == f"refused {layout.EPOCH}"
            wait_until(lambda: len(client.get_children(layout.LEADER)) == 2, 20, "two again")
            time.sleep(1)
            assert _leader(cluster) == "b"
            assert _writes(client) == before
            assert cluster.rows() == rows
        # Its turn comes again, and then it knows what is so.
        wait_until(lambda: _leader(cluster) == "a", 20, "the first to lead again")
        cluster.add_leaf("n1", "z1")
        cluster.wait_loaded("n1")


def test_a_leader_stopped_for_less_than_its_session_goes_on(zookeeper_hosts: str) -> None:
    with (
        cluster_on(zookeeper_hosts, controllers=0) as cluster,
        ControllerProcess(zookeeper_hosts, "a", cluster.config) as first,
    ):
        cluster.wait_settled()
        first.send(signal.SIGSTOP)
        cluster.add_leaf("n3", "z0")
        time.sleep(0.3)
        first.send(signal.SIGCONT)
        cluster.wait_loaded("n3")
        assert _leader(cluster) == "a"


def test_a_killed_leader_is_replaced_in_the_midst_of_moves(zookeeper_hosts: str) -> None:
    with (
        cluster_on(
            zookeeper_hosts, leaves=4, controllers=0, shard_count=128, max_moves=4
        ) as cluster,
        ControllerProcess(zookeeper_hosts, "a", cluster.config) as first,
    ):
        cluster.wait_settled()
        cluster.forget_ownerless()
        with ControllerProcess(zookeeper_hosts, "b", cluster.config):
            for leaf in cluster.leaves.values():
                leaf.warm_s = 0.05
            cluster.add_leaf("n4", "z4").warm_s = 0.05
            wait_until(lambda: cluster.load("n4") > 8, 20, "some moves")
            first.send(signal.SIGKILL)
            cluster.wait_loaded("n4")
            assert _leader(cluster) == "b"
            assert cluster.load("n4") in (51, 52)
            assert cluster.longest_ownerless_s() == 0


def test_a_candidate_that_somebody_deletes_leads_no_more(zookeeper_hosts: str) -> None:
    with cluster_on(zookeeper_hosts, controllers=2) as cluster:
        first = cluster.leader()
        names = sorted(cluster.connection.children(layout.LEADER) or [], key=lambda n: n[-10:])
        cluster.connection.delete(f"{layout.LEADER}/{names[0]}")
        wait_until(lambda: not first.status().leader, 10, "its end as a leader")
        assert cluster.leader() is not first
        cluster.add_leaf("n3", "z3")
        cluster.wait_loaded("n3")


def test_the_leader_of_the_ensemble_is_killed_in_the_midst_of_a_rebalance(
    zookeeper_ensemble: ZooKeeperEnsemble,
) -> None:
    with cluster_on(
        _chroot(zookeeper_ensemble), leaves=4, controllers=2, shard_count=128, max_moves=4
    ) as cluster:
        for leaf in cluster.leaves.values():
            leaf.warm_s = 0.05
        cluster.add_leaf("n4", "z4").warm_s = 0.05
        wait_until(lambda: cluster.load("n4") > 4, 20, "some moves")
        zookeeper_ensemble.leader().kill()
        assert cluster.load("n4") < 51, "the rebalance was over too soon"
        wait_until(lambda: cluster.load("n4") >= 51, 60, "the rebalance to complete")
        cluster.wait_settled()
        assert cluster.load("n4") in (51, 52)
        assert cluster.longest_ownerless_s() <= SESSION_S


def _chroot(ensemble: ZooKeeperEnsemble) -> str:
    return new_chroot(ensemble.hosts)


def test_an_outage_of_the_whole_ensemble_moves_nothing(
    zookeeper_ensemble: ZooKeeperEnsemble,
) -> None:
    with cluster_on(_chroot(zookeeper_ensemble), controllers=2) as cluster:
        before, targets = cluster.rows(), cluster.targets()
        zookeeper_ensemble.kill()
        time.sleep(2 * SESSION_S)
        zookeeper_ensemble.start()
        wait_until(lambda: any(one.status().leader for one in cluster.controllers), 30, "a leader")
        time.sleep(SESSION_S + 1)
        cluster.wait_settled()
        assert cluster.rows() == before
        assert cluster.targets() == targets
        assert cluster.longest_ownerless_s() == 0
        cluster.add_leaf("n3", "z3")  # and changes resume
        cluster.wait_loaded("n3")


def test_a_restart_of_zookeeper_moves_nothing(
    start_zookeeper: Callable[..., ZooKeeperServer],
) -> None:
    server = start_zookeeper()
    with cluster_on(new_chroot(server.address)) as cluster:
        before, targets = cluster.rows(), cluster.targets()
        server.stop()
        server.start()
        cluster.leader()
        time.sleep(SESSION_S + 1)
        cluster.wait_settled()
        assert cluster.rows() == before
        assert cluster.targets() == targets
        assert cluster.longest_ownerless_s() == 0
