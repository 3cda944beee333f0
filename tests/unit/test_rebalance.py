"""The controller's step against a cluster in memory: what operators and failures do to it."""

import numpy as np
import pytest

from sharding.model import ReplicaState
from sharding.rebalance import Decided, Memory, step
from tests.rebalance_world import Node, World

_WARMING, _ONLINE = ReplicaState.WARMING, ReplicaState.ONLINE


def _world(count: int = 4, zones: int = 2, **config: object) -> World:
    world = World([Node(f"n{i}", f"z{i % zones}") for i in range(count)], **config)
    world.lead()
    world.settle()
    return world


def test_a_first_placement_goes_out_in_one_step_and_comes_online() -> None:
    world = World([Node(f"n{i}", f"z{i % 2}") for i in range(4)], max_moves=1)
    world.lead()
    assert all(world.asked(name) for name in world.nodes)
    assert world.load("n0") == 0
    world.turn()  # nodes report WARMING
    assert world.replicas(0) == dict.fromkeys(world.wanted(0), _WARMING)
    world.turn()  # and, having seen that, ONLINE
    assert world.replicas(0) == dict.fromkeys(world.wanted(0), _ONLINE)
    world.assert_settled()


def test_nothing_changes_when_nothing_happens() -> None:
    world = _world()
    before = world.decided
    world.turn(1000)
    assert world.decided == before
    assert world.decided.view is before.view
    assert world.last is not None
    assert world.last.wake_in_seconds is None


def test_a_new_leader_moves_nothing() -> None:
    world = _world(5, 3)
    before = world.decided
    world.new_leader()
    world.turn()
    assert world.decided == before


def test_a_node_that_returns_within_the_delay_gets_its_shards_back() -> None:
    world = _world()
    started, wanted = world.started, [world.wanted(s) for s in range(32)]
    held = world.asked("n1")
    world.nodes["n1"].there = False
    made = world.turn()
    assert world.load("n1") == 0, "the view shows only live replicas"
    assert made.wake_in_seconds == pytest.approx(60)
    world.turn(58)
    world.nodes["n1"].restart()
    world.turn()
    assert set(world.replicas(min(held)).values()) == {_WARMING, _ONLINE}, "it warms first"
    world.settle()
    world.assert_settled()
    assert world.started == started
    assert [world.wanted(s) for s in range(32)] == wanted


def test_after_the_delay_the_shards_of_a_lost_node_move_within_the_limit() -> None:
    world = _world(6, 3, max_moves=3)
    held = world.asked("n1")
    world.nodes["n1"].there = False
    world.turn()
    world.turn(59)
    assert world.asked("n1") == held
    most = 0
    for _ in range(60):
        most = max(most, world.turn().moving)
    assert most == 3
    world.settle()
    world.assert_settled()
    assert world.asked("n1") == set()
    assert world.started <= 64 + len(held) + 1


def test_a_limited_move_says_how_many_wait() -> None:
    world = _world(6, 3, max_moves=3)
    held = len(world.asked("n1"))
    world.nodes["n1"].there = False
    world.turn()
    made = world.turn(61)
    assert made.moving == 3
    assert held - 3 <= made.waiting <= held - 2


def test_a_node_added_takes_its_share_make_before_break() -> None:
    world = _world(3, 3, shard_count=256, max_moves=16)
    started = world.started
    world.nodes["n3"] = Node("n3", "z0")
    world.settle(400)
    world.assert_settled()
    assert world.load("n3") == 128
    assert world.started - started <= 1.05 * 128


def test_while_a_move_warms_the_old_replica_answers() -> None:
    world = _world(3, 3, shard_count=24, max_moves=1)
    world.nodes["n3"] = Node("n3", "z0")
    world.turn()
    (moved,) = world.asked("n3")
    before = world.online(moved)
    for _ in range(10):
        world.turn(may_warm=False)
    assert world.replicas(moved) == dict.fromkeys(before, _ONLINE) | {"n3": _WARMING}
    world.turn()
    assert "n3" in world.online(moved)
    assert len(world.replicas(moved)) == 2, "the old one has left the view"
    (old,) = before - world.online(moved)
    assert moved in world.asked(old), "and still answers who has the old view"
    world.turn(3)
    assert moved in world.asked(old)
    world.turn(3)
    assert moved not in world.asked(old)


def test_a_draining_node_hands_over_and_ends_empty() -> None:
    world = _world(5, 3)
    world.override("n2", draining=True)
    world.turn()
    assert world.load("n2") > 0, "not before others have it"
    world.settle()
    world.assert_settled()
    assert world.asked("n2") == set()
    world.override("n2", draining=False)
    world.settle()
    world.assert_settled()
    assert world.load("n2") > 0


def test_a_disabled_node_leaves_the_view_at_once_but_for_what_only_it_has() -> None:
    world = _world(5, 3)
    held = world.asked("n2")
    alone = min(held)
    (other,) = world.online(alone) - {"n2"}
    world.nodes[other].there = False
    world.turn()
    world.override("n2", enabled=False)
    world.turn(may_warm=False)
    only = {shard for shard in held if other in world.wanted(shard) or shard == alone}
    assert {s for s in held if "n2" in world.replicas(s)} <= only
    assert world.online(alone) == {"n2"}
    world.nodes[other].restart()
    world.settle()
    world.assert_settled()
    assert world.asked("n2") == set()


def test_two_replicas_on_disabled_nodes_are_replaced_before_the_last_goes() -> None:
    world = _world(6, 3)
    for name in world.wanted(0):
        world.override(name, enabled=False)
    world.settle()  # every step checks that no shard loses its last replica
    world.assert_settled()


def test_a_mass_loss_freezes_and_the_last_owners_stay_in_the_view() -> None:
    world = _world(6, 3)
    before = world.decided
    for name in ("n0", "n1", "n2"):
        world.nodes[name].there = False
    made = world.turn()
    assert made.frozen is not None
    assert "3 of 6" in made.frozen
    assert "n0, n1, n2" in made.frozen
    assert made.without_online == 0
    alone = [s for s in range(32) if set(world.wanted(s)) <= {"n0", "n1", "n2"}]
    shared = [s for s in range(32) if set(world.wanted(s)) & {"n3", "n4", "n5"}]
    assert alone
    assert all(world.online(s) == set(world.wanted(s)) for s in alone)
    assert all(world.online(s) == set(world.wanted(s)) & {"n3", "n4", "n5"} for s in shared)
    world.turn(1000)
    world.turn(1000)
    assert world.decided.targets == before.targets
    assert world.decided.ideal == before.ideal
    for name in ("n0", "n1", "n2"):
        world.nodes[name].restart()
    world.settle()
    world.assert_settled()
    assert world.started == 64


def test_the_delay_begins_anew_when_a_freeze_ends() -> None:
    world = _world(6, 3)
    for name in ("n0", "n1", "n2"):
        world.nodes[name].there = False
    world.turn(500)
    world.turn(500)
    world.nodes["n0"].restart()
    world.nodes["n1"].restart()
    made = world.turn()
    assert made.frozen is None
    assert made.wake_in_seconds == pytest.approx(60, abs=2)
    world.turn(50)
    assert world.asked("n2")


def test_one_lost_node_of_three_is_no_mass_loss() -> None:
    world = _world(3, 3, rebalance_delay_seconds=10)
    world.nodes["n1"].there = False
    world.turn()
    assert world.turn(11).frozen is None
    world.settle()
    world.assert_settled()
    assert all(world.online(s) == {"n0", "n2"} for s in range(32))


def test_disabling_the_dead_ends_a_freeze() -> None:
    world = _world(6, 3)
    for name in ("n0", "n1", "n2"):
        world.nodes[name].there = False
    assert world.turn().frozen is not None
    for name in ("n0", "n1", "n2"):
        world.override(name, enabled=False)
    assert world.turn().frozen is None
    world.settle()
    world.assert_settled()


def test_a_shard_without_a_replica_gets_a_stand_in_before_the_delay_is_over() -> None:
    world = _world(8, 4, replicas=1, max_moves=1)
    held = world.asked("n1")
    started = world.started
    world.nodes["n1"].there = False
    made = world.turn()
    assert made.without_online == len(held)
    for _ in range(3):
        made = world.turn()
    assert made.without_online == 0
    assert world.asked("n1") == held, "they are still its own"
    world.nodes["n1"].restart()
    world.settle()
    world.assert_settled()
    assert world.asked("n1") == held
    assert world.started == started + len(held)


def test_a_stand_in_keeps_the_shard_when_the_node_does_not_return() -> None:
    world = _world(8, 4, replicas=1)
    held = world.asked("n1")
    world.nodes["n1"].there = False
    for _ in range(4):
        world.turn()
    stands_in = {shard: world.online(shard) for shard in held}
    started = world.started
    world.turn(61)
    world.settle()
    world.assert_settled()
    kept = sum(world.online(shard) == stands_in[shard] for shard in held)
    assert kept >= len(held) - 1
    assert world.started - started <= 1


def test_all_nodes_registering_anew_leaves_every_shard_online() -> None:
    """After an outage of ZooKeeper that ended all sessions."""
    world = _world()
    for node in world.nodes.values():
        node.restart()
    made = world.turn(may_warm=False)
    assert made.without_online == 0
    assert made.decided.view is not None
    assert {leaf.instance for leaf in made.decided.view.leaves} == {f"n{i}-2" for i in range(4)}
    world.settle()
    world.assert_settled()
    assert world.started == 64


def test_one_node_registering_anew_warms_while_the_other_replica_answers() -> None:
    world = _world()
    held = world.asked("n1")
    world.nodes["n1"].restart()
    world.turn(may_warm=False)
    assert all(world.replicas(shard)["n1"] == _WARMING for shard in held)


def test_what_left_the_view_does_not_come_back_without_warming_anew() -> None:
    world = _world(3, 3, shard_count=24, max_moves=1, drop_grace_seconds=20)
    world.nodes["n3"] = Node("n3", "z0")
    for _ in range(3):
        world.turn()
    moved = min(world.asked("n3"))
    (old,) = {n for n in ("n0", "n1", "n2") if moved in world.asked(n)} - world.online(moved)
    assert old not in world.replicas(moved)
    # The new owner is lost within the grace, and the old one still has the shard: stale.
    world.nodes["n3"].there = False
    del world.nodes["n3"]
    world.turn(61)
    for _ in range(100):
        world.turn()  # each step checks that what is online has warmed
    world.assert_settled()


def test_more_replicas_than_nodes_is_reported_and_no_fault() -> None:
    world = _world(2, 2, replicas=3)
    assert world.last is not None
    assert [problem.kind for problem in world.last.problems] == ["replicas_exceed_nodes"]
    assert all(len(world.online(s)) == 2 for s in range(32))
    world.nodes["n2"] = Node("n2", "z2")
    world.settle()
    world.assert_settled()
    assert not world.last.problems
    assert all(len(world.online(s)) == 3 for s in range(32))


def test_another_number_of_replicas() -> None:
    world = _world(6, 3)
    world.config = world.config.model_copy(update={"replicas": 3})
    world.settle()
    world.assert_settled()
    assert all(len(world.online(s)) == 3 for s in range(32))
    world.config = world.config.model_copy(update={"replicas": 1})
    world.settle()
    world.assert_settled()


def test_a_node_that_cannot_be_read_keeps_what_it_has_and_gets_nothing() -> None:
    world = _world()
    before = world.decided
    world.unreadable.add("n1")
    world.new_leader()
    world.turn(1000)
    world.turn(1000)
    assert world.decided == before
    world.nodes["n4"] = Node("n4", "z0")
    world.settle()
    assert world.asked("n1") == set(before.targets["n1"].shards.tolist())
    world.unreadable.clear()
    world.settle()
    world.assert_settled()


def test_shards_that_there_are_not_are_reported_and_taken_back() -> None:
    world = _world()
    target = world.decided.targets["n1"]
    wrong = type(target)(target.version, np.append(target.shards, np.uint32(99)))
    world.decided = Decided(
        world.decided.ideal, {**world.decided.targets, "n1": wrong}, world.decided.view
    )
    world.nodes["n2"].states[77] = int(_ONLINE)
    made = world.lead()
    assert {problem.kind for problem in made.problems} == {"unknown_shard"}
    assert len(made.problems) == 2
    world.settle()
    world.assert_settled()
    assert world.last is not None
    assert not world.last.problems


def test_a_view_that_nobody_can_read_is_made_anew_from_what_nodes_hold() -> None:
    world = _world()
    before = world.decided
    world.decided = Decided(before.ideal, before.targets, None, view_known=False)
    world.new_leader()
    made = step(world.seen(), world.decided, Memory(), world.now, first_version=10**15)
    assert made.decided.view is not None
    assert before.view is not None
    assert made.decided.view.version == 10**15
    assert np.array_equal(made.decided.view.leaf, before.view.leaf)
    assert made.without_online == 0
    assert made.decided.targets == before.targets


def test_slow_moves_are_reported() -> None:
    world = _world(6, 3)
    world.nodes["n6"] = Node("n6", "z0")
    for _ in range(12):
        made = world.turn(60, may_warm=False)
    assert [problem.kind for problem in made.problems] == ["slow_moves"]
    assert "n6" in made.problems[0].text


def test_names_of_the_dead_do_not_pile_up() -> None:
    world = _world(3, 3, shard_count=4, rebalance_delay_seconds=0, drop_grace_seconds=0)
    for number in range(80):
        name = f"x{number}"
        world.nodes[name] = Node(name, "z0")
        world.settle()
        world.nodes[name].there = False
        world.settle()
        del world.nodes[name]
    world.assert_settled()
    assert world.decided.ideal is not None
    assert len(world.decided.ideal.nodes) < 75


@pytest.mark.parametrize("seed", range(20))
def test_a_random_life_hurts_no_shard_and_ends_settled(seed: int) -> None:
    """Nodes come, go, return, stall, are drained, disabled and weighed; leaders change. Every step
    is checked (see `World`); afterwards, all is as placement wants it."""
    random = np.random.default_rng(seed)
    replicas = int(random.integers(1, 4))
    world = World(
        [Node(f"n{i}", f"z{i % 3}") for i in range(6)],
        replicas=replicas,
        shard_count=int(random.integers(1, 40)),
        max_moves=int(random.integers(1, 12)),
        rebalance_delay_seconds=float(random.integers(0, 30)),
        drop_grace_seconds=float(random.integers(0, 8)),
    )
    world.lead()
    for _ in range(250):
        node = world.nodes[str(random.choice(sorted(world.nodes)))]
        event = random.random()
        if event < 0.05:
            node.there = False
        elif event < 0.12 or (not node.there and event < 0.3):
            node.restart()
        elif event < 0.15:
            world.override(node.name, draining=bool(random.integers(0, 2)))
        elif event < 0.18:
            world.override(node.name, enabled=bool(random.integers(0, 4)))
        elif event < 0.2:
            world.override(node.name, weight=float(random.uniform(0.3, 3)))
        elif event < 0.22:
            world.new_leader()
        elif event < 0.24 and len(world.nodes) < 9:
            name = f"n{len(world.nodes)}"
            world.nodes[name] = Node(name, f"z{len(world.nodes) % 3}")
        world.now += float(random.exponential(2.0))
        for other in world.nodes.values():
            if random.random() < 0.6:
                other.take_up(
                    world.asked(other.name), world.decided.view, bool(random.random() < 0.6)
                )
        world.lead()
    for node in world.nodes.values():
        world.override(node.name)
        if not node.there:
            node.restart()
    world.settle(2000)
    world.assert_settled()
    assert world.last is not None
    assert world.last.moving == world.last.waiting == world.last.without_online == 0


def test_with_no_node_to_go_to_the_last_replicas_stay() -> None:
    world = _world(3, 3)
    for name in world.nodes:
        world.override(name, draining=True)
    world.settle()
    assert all(world.online(shard) for shard in range(32))
    world.override("n0")
    world.settle()
    world.assert_settled()


def test_an_old_replica_stays_rather_than_a_third_node_take_over() -> None:
    """A node is lost for good while shards of it are on their way from others to a new node."""
    world = _world(6, 3, shard_count=600, max_moves=500, rebalance_delay_seconds=1)
    world.nodes["n6"] = Node("n6", "z0")
    world.turn(may_warm=False)
    world.nodes["n1"].there = False
    leaving = {
        shard: name
        for name in ("n0", "n3")
        for shard in world.asked(name)
        if name not in world.wanted(shard) and "n1" in world.wanted(shard)
    }
    assert len(leaving) > 5
    world.turn(may_warm=False)
    world.turn(2, may_warm=False)
    stayed = [shard for shard, name in leaving.items() if name in world.wanted(shard)]
    assert len(stayed) > 0.5 * len(leaving)
