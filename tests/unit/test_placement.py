"""Placement as properties: legal, complete, balanced, minimal, deterministic; wishes that fail."""

from collections.abc import Sequence
from dataclasses import replace
from time import process_time

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.placement import NO_NODE, Placement, PlacementNode, count_moves, place

Assignment = npt.NDArray[np.int32]


def _cluster(count: int, zones: int, first: int = 0) -> list[PlacementNode]:
    return [PlacementNode(f"n{i:05}", f"z{i % zones:02}") for i in range(first, first + count)]


def _load(nodes: Sequence[PlacementNode], assignment: Assignment) -> npt.NDArray[np.int64]:
    return np.bincount(assignment[assignment >= 0], minlength=len(nodes)).astype(np.int64)


def _most_in_a_zone(nodes: Sequence[PlacementNode], assignment: Assignment) -> int:
    most = 0
    for row in assignment:
        zones = [nodes[node].zone for node in row if node != NO_NODE]
        most = max(most, *(zones.count(zone) for zone in zones), 0)
    return most


def _takers(nodes: Sequence[PlacementNode]) -> list[PlacementNode]:
    return [node for node in nodes if node.usable and 0 < node.weight < np.inf]


def _kinds(placement: Placement) -> set[str]:
    return {problem.kind for problem in placement.problems}


def _check(
    nodes: Sequence[PlacementNode], shards: int, replicas: int, placement: Placement
) -> None:
    """What holds for every placement, whatever was wished."""
    assignment = placement.assignment
    assert assignment.shape == (shards, replicas)
    takers = _takers(nodes)
    for row in assignment.tolist():
        held = [node for node in row if node != NO_NODE]
        assert row == held + [NO_NODE] * (replicas - len(held)), "holes are last"
        assert len(set(held)) == len(held), "a node holds a shard once"
        assert all(nodes[node] in takers for node in held)
    load = _load(nodes, assignment)
    rooms = [min(node.capacity or shards, shards) for node in takers]
    for node, held in zip(nodes, load, strict=True):
        assert node.capacity == 0 or held <= node.capacity
    wished = shards * min(replicas, len(takers))
    assert load.sum() == min(wished, sum(rooms)), "all that fits is placed"
    assert ("capacity" in _kinds(placement)) == (load.sum() < wished)
    assert ("no_nodes" in _kinds(placement)) == (not takers)
    assert ("replicas_exceed_nodes" in _kinds(placement)) == (0 < len(takers) < replicas)
    rows = np.count_nonzero(assignment != NO_NODE, axis=1)
    if len(rows) and rows.max(initial=0) > 1:
        assert rows.min() > 0, "no shard goes without while another has two"
    zones = len({node.zone for node in takers})
    if zones >= replicas and all(node.capacity == 0 for node in takers):
        assert _most_in_a_zone(nodes, assignment) <= 1


_node = st.builds(
    PlacementNode,
    name=st.just(""),
    zone=st.sampled_from(["a", "b", "c", "d", "e"]),
    weight=st.one_of(
        st.just(1.0), st.floats(0.1, 10), st.sampled_from([0.0, -1.0, 1e-12, 1e12, float("nan")])
    ),
    capacity=st.one_of(st.just(0), st.just(0), st.integers(1, 60)),
    usable=st.sampled_from([True, True, True, False]),
)


@st.composite
def _nodes(draw: st.DrawFn) -> list[PlacementNode]:
    drawn = draw(st.lists(_node, max_size=12))
    return [replace(node, name=f"n{i:02}") for i, node in enumerate(drawn)]


@settings(deadline=None, max_examples=100)
@given(_nodes(), st.integers(0, 60), st.integers(1, 4))
def test_any_cluster_is_placed_legally_and_stays(
    nodes: list[PlacementNode], shards: int, replicas: int
) -> None:
    first = place(nodes, shards, replicas)
    _check(nodes, shards, replicas, first)
    again = place(nodes, shards, replicas)
    assert np.array_equal(first.assignment, again.assignment)
    assert first.problems == again.problems
    kept = place(nodes, shards, replicas, first.assignment)
    assert count_moves(first.assignment, kept.assignment) == 0
    assert _kinds(kept) == _kinds(first)


@settings(deadline=None, max_examples=60)
@given(_nodes(), st.integers(1, 60), st.integers(1, 4), st.data())
def test_any_change_gives_a_legal_placement(
    nodes: list[PlacementNode], shards: int, replicas: int, data: st.DataObject
) -> None:
    before = place(nodes, shards, replicas)
    for _ in range(3):
        changes = data.draw(st.lists(_node, min_size=len(nodes), max_size=len(nodes)))
        changed = data.draw(st.lists(st.booleans(), min_size=len(nodes), max_size=len(nodes)))
        nodes = [
            replace(new, name=old.name) if change else old
            for old, new, change in zip(nodes, changes, changed, strict=True)
        ]
        replicas = data.draw(st.integers(1, 4))
        shards = data.draw(st.integers(1, 60))
        after = place(nodes, shards, replicas, before.assignment)
        _check(nodes, shards, replicas, after)
        before = after


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 3), st.integers(1, 300), st.data())
def test_plain_clusters_move_the_minimum(
    count: int, zones: int, replicas: int, shards: int, data: st.DataObject
) -> None:
    nodes = _cluster(count, zones)
    before = place(nodes, shards, replicas)
    added = data.draw(st.integers(0, 3))
    gone = data.draw(st.sets(st.integers(0, count - 1), max_size=count - 1))
    nodes = [replace(n, usable=i not in gone) for i, n in enumerate(nodes)]
    nodes += _cluster(added, zones, count)
    after = place(nodes, shards, replicas, before.assignment)
    _check(nodes, shards, replicas, after)
    kept = np.where([node.usable for node in nodes], _load(nodes, before.assignment), 0)
    least = int(np.maximum(_load(nodes, after.assignment) - kept, 0).sum())
    # Where zones decide almost all, a replica may have to make room for another.
    assert count_moves(before.assignment, after.assignment) <= least * 1.5 + 4


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0.5, 2.0), min_size=8, max_size=16), st.integers(100, 400))
def test_load_follows_weight(weights: list[float], shards: int) -> None:
    nodes = [PlacementNode(f"n{i:02}", f"z{i % 8}", weight) for i, weight in enumerate(weights)]
    fair = shards * 2 * np.array(weights) / sum(weights)
    load = _load(nodes, place(nodes, shards, 2).assignment)
    zone_fair = np.bincount(np.arange(len(nodes)) % 8, fair)
    assert zone_fair.max() <= shards, "no zone is bound to less than its share"
    assert np.abs(load - fair).max() <= 1.0 + 1e-6


def test_a_large_cluster_meets_the_bars() -> None:
    """The figures of `benchmarks.placement`, at a tenth of the size."""
    shards, replicas = 10_000, 3
    nodes = _cluster(500, 20)
    begin = process_time()
    first = place(nodes, shards, replicas)
    lost = [replace(node, usable=node.zone != "z07") for node in nodes]
    after_loss = place(lost, shards, replicas, first.assignment)
    grown = nodes + _cluster(50, 20, 500)
    after_growth = place(grown, shards, replicas, first.assignment)
    assert process_time() - begin < 10

    on_lost = sum(not lost[node].usable for node in first.assignment.ravel())
    assert count_moves(first.assignment, after_loss.assignment) <= 1.1 * on_lost
    fair = shards * replicas * 50 / 550
    assert count_moves(first.assignment, after_growth.assignment) <= 1.1 * fair
    for cluster, placement in ((nodes, first), (lost, after_loss), (grown, after_growth)):
        ideal = shards * replicas / len(_takers(cluster))
        assert _load(cluster, placement.assignment).max() <= 1.05 * ideal
        assert _most_in_a_zone(cluster, placement.assignment) == 1
        assert not placement.problems


@pytest.mark.parametrize("zones", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_a_node_added_to_a_small_cluster_moves_its_fair_share(count: int, zones: int) -> None:
    before = place(_cluster(count, zones), 256, 2)
    after = place(_cluster(count + 1, zones), 256, 2, before.assignment)
    least = _load(_cluster(count + 1, zones), after.assignment)[count]
    assert least <= np.ceil(512 / (count + 1))
    assert count_moves(before.assignment, after.assignment) <= 1.05 * least


def test_added_and_removed_again_returns_near_to_the_old() -> None:
    nodes = _cluster(6, 3)
    before = place(nodes, 512, 2)
    more = [*nodes, PlacementNode("n99", "z00")]
    grown = place(more, 512, 2, before.assignment)
    shrunk = place(nodes, 512, 2, grown.assignment)
    on_new = int((grown.assignment == 6).sum())
    assert count_moves(before.assignment, grown.assignment) == on_new
    assert count_moves(before.assignment, shrunk.assignment) <= on_new
    assert np.array_equal(_load(nodes, before.assignment), _load(nodes, shrunk.assignment))


def test_a_long_life_neither_drifts_nor_crowds() -> None:
    """Many losses and returns: balance and zones are as on the first day, and no more is
    moved than by a tenth above what the loads alone would need."""
    moves = least = 0
    random = np.random.default_rng(7)
    nodes = _cluster(24, 4)
    placement = place(nodes, 600, 3)
    for _ in range(100):
        gone = set(random.choice(24, int(random.integers(0, 4)), replace=False).tolist())
        nodes = [replace(node, usable=i not in gone) for i, node in enumerate(nodes)]
        before, placement = placement, place(nodes, 600, 3, placement.assignment)
        _check(nodes, 600, 3, placement)
        usable = np.array([node.usable for node in nodes])
        kept = np.where(usable, _load(nodes, before.assignment), 0)
        load = _load(nodes, placement.assignment)
        least += int(np.maximum(load - kept, 0).sum())
        moves += count_moves(before.assignment, placement.assignment)
        assert load[usable].max() - load[usable].min() <= 2 or _zone_bound(nodes, 600, 3)
    assert moves <= 1.1 * least


def _zone_bound(nodes: Sequence[PlacementNode], shards: int, replicas: int) -> bool:
    """Whether a zone's share by its nodes is more than one replica of every shard."""
    takers = _takers(nodes)
    zones = [node.zone for node in takers]
    return max(map(zones.count, zones)) * shards * replicas / len(takers) > shards


@pytest.mark.parametrize(("count", "replicas"), [(6, 2), (12, 3)])
def test_each_node_is_preferred_for_its_part(count: int, replicas: int) -> None:
    nodes = _cluster(count, 3)
    placement = place(nodes, 1200, replicas)
    nodes[0] = replace(nodes[0], usable=False)
    for assignment in (
        placement.assignment,
        place(nodes, 1200, replicas, placement.assignment).assignment,
    ):
        share = _load(nodes, assignment) / replicas
        first = _load(nodes, assignment[:, :1])
        assert np.abs(first - share).max() <= 0.1 * share.max() + 1


def test_the_shards_of_a_lost_node_have_their_other_replicas_all_over() -> None:
    nodes = _cluster(40, 4)
    assignment = place(nodes, 4000, 2).assignment
    mates = assignment[(assignment == 0).any(axis=1)]
    load = np.bincount(mates[mates != 0], minlength=40)
    others = [i for i, node in enumerate(nodes) if node.zone != nodes[0].zone]
    assert load[others].max() <= 4 * load[others].mean()
    assert np.count_nonzero(load) >= 0.9 * len(others)


def test_fewer_zones_than_replicas_use_distinct_nodes_spread_evenly() -> None:
    nodes = _cluster(6, 2)
    placement = place(nodes, 100, 3)
    assert _most_in_a_zone(nodes, placement.assignment) == 2
    assert _kinds(placement) == {"zones_too_few"}


def test_fewer_nodes_than_replicas_are_reported() -> None:
    placement = place(_cluster(2, 2), 10, 3)
    assert _kinds(placement) == {"replicas_exceed_nodes"}
    assert (placement.assignment[:, :2] != NO_NODE).all()
    assert (placement.assignment[:, 2] == NO_NODE).all()


def test_a_full_zone_shares_another_rather_than_lose_a_replica() -> None:
    nodes = _cluster(6, 3)
    nodes = [replace(node, capacity=10 if node.zone == "z02" else 0) for node in nodes]
    placement = place(nodes, 100, 3)
    assert "zone_shared" in _kinds(placement)
    assert (placement.assignment != NO_NODE).all()
    assert _most_in_a_zone(nodes, placement.assignment) == 2


def test_capacity_too_small_is_reported_and_used_up() -> None:
    nodes = [replace(node, capacity=5) for node in _cluster(4, 2)]
    placement = place(nodes, 100, 2)
    assert "capacity" in _kinds(placement)
    assert _load(nodes, placement.assignment).tolist() == [5, 5, 5, 5]


def test_a_last_replica_is_not_lost_to_a_second_one() -> None:
    """The nodes of half the shards go, and the rest is full: all shards keep one replica."""
    nodes = [replace(node, capacity=10) for node in _cluster(4, 4)]
    before = place(nodes, 20, 2)
    after = place(nodes[:2], 20, 2, np.where(before.assignment < 2, before.assignment, NO_NODE))
    assert (after.assignment[:, 0] != NO_NODE).all()


def test_a_replica_more_and_one_less() -> None:
    nodes = _cluster(6, 3)
    two = place(nodes, 300, 2)
    three = place(nodes, 300, 3, two.assignment)
    assert count_moves(two.assignment, three.assignment) == 300
    back = place(nodes, 300, 2, three.assignment)
    assert count_moves(three.assignment, back.assignment) <= 6
    assert _load(nodes, back.assignment).max() <= 101


@settings(deadline=None, max_examples=100)
@given(_nodes(), st.integers(1, 60), st.integers(1, 4), st.data())
def test_a_node_that_is_away_for_a_moment_moves_nothing(
    nodes: list[PlacementNode], shards: int, replicas: int, data: st.DataObject
) -> None:
    before = place(nodes, shards, replicas)
    away = data.draw(st.sets(st.integers(0, max(len(nodes) - 1, 0)), max_size=3))
    # What it weighs is not known while it is away.
    nodes = [
        replace(node, pinned=True, weight=5.0) if i in away and node in _takers(nodes) else node
        for i, node in enumerate(nodes)
    ]
    during = place(nodes, shards, replicas, before.assignment)
    if not before.problems:
        assert count_moves(before.assignment, during.assignment) == 0
    for node in away & set(range(len(nodes))):
        held = (before.assignment == node).any(axis=1)
        assert (during.assignment == node).any(axis=1)[held].all() or before.problems


def test_a_node_added_while_another_is_away_takes_from_those_that_are_there() -> None:
    nodes = _cluster(6, 3)
    before = place(nodes, 600, 2)
    nodes[2] = replace(nodes[2], pinned=True)
    grown = [*nodes, PlacementNode("n99", "z00")]
    after = place(grown, 600, 2, before.assignment)
    assert ((after.assignment == 2) == (before.assignment == 2)).sum() > 0
    assert _load(grown, after.assignment)[2] == 200
    assert 160 <= _load(grown, after.assignment)[6] <= 167
    assert count_moves(before.assignment, after.assignment) <= 1.05 * 167


def test_a_zone_that_is_shared_stays_as_it_is() -> None:
    nodes = [PlacementNode(f"n{i:02}", f"z{i % 3}", capacity=0 if i % 3 else 50) for i in range(30)]
    first = place(nodes, 1000, 3)
    assert count_moves(first.assignment, place(nodes, 1000, 3, first.assignment).assignment) == 0


def test_a_cluster_that_grew_from_one_node_is_as_good_as_a_new_one() -> None:
    nodes = _cluster(30, 3)
    alone = place(nodes[:1], 1000, 3)
    grown = place(nodes, 1000, 3, alone.assignment)
    assert _load(nodes, grown.assignment).max() == 100
    assert _most_in_a_zone(nodes, grown.assignment) == 1
    assert (grown.assignment == 0).sum() == 100
    assert count_moves(alone.assignment, grown.assignment) == 2900
