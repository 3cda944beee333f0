"""The controller against a real ZooKeeper, with real participants: what it does, and does not."""

from __future__ import annotations

import time

import numpy as np
import pytest

from sharding import layout
from sharding.model import ReplicaState
from tests.cluster_of import SESSION_S, cluster_on
from tests.servers import wait_until


def test_a_new_cluster_is_placed_and_comes_online(zookeeper_hosts: str) -> None:
    with cluster_on(zookeeper_hosts) as cluster:
        assert sorted(cluster.load(f"n{i}") for i in range(3)) == [42, 43, 43]
        assert all(len(row) == 2 for row in cluster.rows())
        status = cluster.leader().status()
        assert status.leader
        assert not status.problems
        assert (status.moves, status.waiting, status.without_online) == ((), 0, 0)
        assert cluster.admin.explain(0).notes == ()


def test_a_node_added_takes_no_more_than_its_share(zookeeper_hosts: str) -> None:
    with cluster_on(zookeeper_hosts, shard_count=256, max_moves=64) as cluster:
        before = cluster.rows()
        cluster.add_leaf("n3", "z0")
        cluster.wait_loaded("n3")
        after = cluster.rows()
        assert cluster.load("n3") == 128
        moved = sum(len(set(new) - set(old)) for old, new in zip(before, after, strict=True))
        assert moved <= 1.05 * 128
        assert cluster.longest_ownerless_s() == 0


def test_a_node_lost_and_back_within_the_delay_moves_nothing(zookeeper_hosts: str) -> None:
    with cluster_on(zookeeper_hosts, rebalance_delay_seconds=30) as cluster:
        before, targets = cluster.rows(), cluster.targets()
        cluster.leaves["n1"].stop(leave=False)
        wait_until(lambda: cluster.load("n1") == 0, 10, "the view to leave it out")
        time.sleep(0.5)
        cluster.add_leaf("n1", "z1")
        cluster.wait_loaded("n1")
        assert cluster.rows() == before
        assert cluster.targets() == targets
        assert cluster.longest_ownerless_s() == 0


def test_a_node_lost_for_longer_is_replaced(zookeeper_hosts: str) -> None:
    with cluster_on(zookeeper_hosts, leaves=4, rebalance_delay_seconds=1) as cluster:
        cluster.leaves["n1"].stop()
        wait_until(lambda: cluster.load("n1") == 0, 10, "the view to leave it out")
        cluster.wait_settled()
        assert cluster.load("n1") == 0
        assert cluster.longest_ownerless_s() == 0


def test_draining_and_disabling_empty_a_node(zookeeper_hosts: str) -> None:
    with cluster_on(zookeeper_hosts, leaves=5) as cluster:
        cluster.admin.drain("n1")
        wait_until(lambda: cluster.load("n1") == 0, 20, "n1 to be drained")
        cluster.wait_settled()
        cluster.admin.disable("n2")
        wait_until(lambda: cluster.load("n2") == 0, 20, "n2 to be empty")
        cluster.wait_settled()
        assert cluster.admin.explain(0).notes == ()
        cluster.admin.undrain("n1")
        cluster.admin.enable("n2")
        wait_until(lambda: cluster.load("n1") > 0 and cluster.load("n2") > 0, 20, "their return")
        cluster.wait_settled()
        assert cluster.longest_ownerless_s() == 0


def test_a_mass_loss_freezes(zookeeper_hosts: str) -> None:
    with cluster_on(zookeeper_hosts, leaves=5, rebalance_delay_seconds=0.5) as cluster:
        targets = cluster.targets()
        for name in ("n0", "n1", "n2"):
            cluster.leaves[name].stop(leave=False)
        wait_until(lambda: cluster.leader().status().frozen is not None, 10, "the freeze")
        time.sleep(2)
        status = cluster.leader().status()
        assert status.frozen is not None
        assert status.frozen_since is not None
        assert abs(time.time() - 2 - status.frozen_since) < 2
        assert any("freeze_below" in problem for problem in status.problems)
        assert cluster.targets() == targets
        assert cluster.longest_ownerless_s() == 0, "the last owners of a shard stay in the view"
        for number in range(3):
            cluster.add_leaf(f"n{number}", f"z{number}")
        cluster.wait_settled()
        assert cluster.leader().status().frozen is None


def test_more_replicas_than_nodes_is_reported(zookeeper_hosts: str) -> None:
    with cluster_on(zookeeper_hosts, leaves=2, replicas=3) as cluster:
        (problem,) = cluster.leader().status().problems
        assert "3 replicas are wanted, but only 2 nodes" in problem
        cluster.add_leaf("n2", "z2")
        cluster.wait_loaded("n2")
        assert not cluster.leader().status().problems


def test_another_number_of_replicas_takes_effect(zookeeper_hosts: str) -> None:
    with cluster_on(zookeeper_hosts) as cluster:
        cluster.admin.set_replicas(3)
        cluster.wait_settled(replicas=3)
        assert cluster.load("n0") == 64
        cluster.admin.set_replicas(1)
        cluster.wait_settled(replicas=1)
        assert cluster.longest_ownerless_s() == 0


def test_a_new_leader_goes_on_where_the_old_one_was(zookeeper_hosts: str) -> None:
    with cluster_on(zookeeper_hosts, controllers=2) as cluster:
        first = cluster.leader()
        before, targets, version = cluster.rows(), cluster.targets(), cluster.view().version
        first.stop()
        cluster.controllers.remove(first)
        second = cluster.leader()
        assert second is not first
        wait_until(lambda: second.status().steps > 0, 10, "its first step")
        time.sleep(0.5)
        assert cluster.targets() == targets
        assert cluster.view().version == version, "nothing was to be written"
        cluster.add_leaf("n3", "z3")
        cluster.wait_loaded("n3")
        assert cluster.view().version > version
        assert cluster.rows() != before
        assert cluster.versions == sorted(set(cluster.versions))


def test_one_of_three_leads(zookeeper_hosts: str) -> None:
    with cluster_on(zookeeper_hosts, controllers=3) as cluster:
        cluster.leader()
        assert sum(one.status().leader for one in cluster.controllers) == 1


def test_a_config_of_another_cluster_is_not_led(zookeeper_hosts: str) -> None:
    with cluster_on(zookeeper_hosts, leaves=0, controllers=0) as cluster:
        cluster.admin.init(cluster.config)
        stranger = cluster.add_controller(
            config=cluster.config.model_copy(update={"cluster": "other"})
        )
        wait_until(lambda: bool(stranger.status().problems), 10, "its complaint")
        (problem,) = stranger.status().problems
        assert "belongs to cluster 'test', and this node's config says 'other'" in problem
        assert not stranger.status().leader
        assert not cluster.connection.children(layout.LEADER)
        assert cluster.add_controller() is not None
        wait_until(lambda: cluster.controllers[1].status().leader, 10, "the right one to lead")


def test_a_changed_shard_count_is_not_followed(zookeeper_hosts: str) -> None:
    with cluster_on(zookeeper_hosts) as cluster:
        before = cluster.rows()
        good = layout.encode_config(cluster.config)
        wrong = layout.encode_config(cluster.config.model_copy(update={"shard_count": 65}))
        cluster.connection.put(layout.CONFIG, wrong)
        (controller,) = cluster.controllers
        wait_until(lambda: bool(controller.status().problems), 10, "its complaint")
        assert "shard_count" in controller.status().problems[0]
        cluster.connection.put(layout.CONFIG, good)
        cluster.leader()
        cluster.wait_settled()
        assert cluster.rows() == before


@pytest.mark.parametrize("restarted", [False, True], ids=["same leader", "new leader"])
@pytest.mark.parametrize(
    "where", ["config", "override", "live", "current", "target", "ideal", "view", "chunk", "epoch"]
)
def test_garbage_in_a_znode_moves_nothing(
    zookeeper_hosts: str, where: str, restarted: bool
) -> None:
    with cluster_on(zookeeper_hosts, rebalance_delay_seconds=0.5) as cluster:
        before = cluster.rows()
        chunk = cluster.connection.children(f"{layout.VIEW}/chunks")
        assert chunk
        path = {
            "config": layout.CONFIG,
            "override": layout.override_path("n1"),
            "live": layout.live_path("n1"),
            "current": layout.current_path("n1"),
            "target": layout.target_path("n1"),
            "ideal": layout.head_path(layout.IDEAL),
            "view": layout.head_path(layout.VIEW),
            "chunk": f"{layout.VIEW}/chunks/{chunk[-1]}",
            "epoch": layout.EPOCH,
        }[where]
        if restarted:
            cluster.controllers.pop().stop()
        cluster.connection.put(path, b"\x00garbage\xff")
        if restarted:
            cluster.add_controller()
        if where == "config" and restarted:
            (controller,) = cluster.controllers
            wait_until(lambda: bool(controller.status().problems), 10, "its complaint")
            assert not controller.status().leader, "by whose numbers would it?"
        else:
            time.sleep(2.5)
            assert cluster.leader().status().leader
            # What the controller itself writes, it makes anew.
            mine = where in ("target", "ideal", "view", "chunk", "epoch")
            if where != "live" and not mine:  # a node writes its registration again itself
                assert cluster.leader().status().corrupt_reads > 0
            elif restarted:
                znode = cluster.connection.get(path)
                assert znode is not None
                assert where == "chunk" or b"garbage" not in znode.data
        assert cluster.rows() == before
        assert cluster.longest_ownerless_s() == 0


def test_all_that_the_leader_wrote_is_lost_and_nothing_moves(zookeeper_hosts: str) -> None:
    """Ideal state and view are made anew from what nodes were told and hold."""
    with cluster_on(zookeeper_hosts) as cluster:
        before, version = cluster.rows(), cluster.view().version
        cluster.controllers.pop().stop()
        for root in (layout.IDEAL, layout.VIEW):
            cluster.connection.put(layout.head_path(root), b"garbage")
        cluster.add_controller()
        wait_until(lambda: cluster.view().version > version, 10, "a view that can be read")
        cluster.wait_settled()
        assert [set(row) for row in cluster.rows()] == [set(row) for row in before]
        assert cluster.longest_ownerless_s() == 0


def test_a_leader_whose_clock_is_behind_does_not_go_back(
    zookeeper_hosts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster_on(zookeeper_hosts) as cluster:
        version = cluster.view().version
        cluster.controllers.pop().stop()
        monkeypatch.setattr("sharding._decisions.time.time_ns", lambda: 1)
        cluster.add_controller()
        cluster.add_leaf("n3", "z3")
        cluster.wait_loaded("n3")
        assert version < cluster.view().version < version + 1000
        assert cluster.versions == sorted(set(cluster.versions))
        assert all(not leaf.participant.status().problems for leaf in cluster.leaves.values())


def test_what_a_leader_wrote_is_restored_when_it_looks_again(
    zookeeper_hosts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharding.controller._POLL_S", 0.3)
    with cluster_on(zookeeper_hosts) as cluster:
        before = cluster.rows()
        paths = [layout.target_path("n1"), layout.head_path(layout.VIEW)]
        for path in paths:
            cluster.connection.put(path, b"garbage")
        garbage = cluster.connection.get(paths[0])
        wait_until(
            lambda: all(
                znode is not None and garbage is not None and znode.data != garbage.data
                for znode in cluster.connection.get_many(paths)
            ),
            10,
            "both to be written again",
        )
        cluster.wait_settled()
        assert cluster.rows() == before
        assert cluster.longest_ownerless_s() == 0
        assert cluster.leader().status().corrupt_reads > 0


def test_a_registration_for_another_cluster_gets_nothing(zookeeper_hosts: str) -> None:
    with cluster_on(zookeeper_hosts) as cluster:
        path = layout.live_path("n0")
        znode = cluster.connection.get(path)
        assert znode is not None
        node = layout.decode_live(path, znode.data)
        stranger = node.model_copy(update={"name": "n9", "cluster": "other"})
        cluster.connection.create(layout.live_path("n9"), layout.encode_live(stranger))
        wait_until(lambda: bool(cluster.leader().status().problems), 10, "a complaint")
        assert "n9 says that it is of cluster 'other'" in cluster.leader().status().problems[0]
        assert "n9" not in cluster.targets()


def test_sessions_that_end_all_at_once_leave_every_shard_an_owner(zookeeper_hosts: str) -> None:
    with cluster_on(zookeeper_hosts) as cluster:
        before = cluster.rows()
        for name in cluster.leaves:
            cluster.connection.delete(layout.live_path(name))
        time.sleep(SESSION_S)
        cluster.wait_settled()
        assert cluster.rows() == before
        assert cluster.longest_ownerless_s() == 0


def test_a_view_of_many_chunks_is_written_and_read(zookeeper_hosts: str) -> None:
    with cluster_on(zookeeper_hosts, shard_count=5000, replicas=3) as cluster:
        view = cluster.view()
        assert (np.diff(view.first.astype(np.int64)) == 3).all()
        assert (view.state == ReplicaState.ONLINE).all()
