"""How the figures of a cluster are worked out, of maps and batches that are known."""

import numpy as np
import pytest

from benchmarks._cluster_load import Batch, by_second, wrong_values
from benchmarks.sharded import _longest_ownerless, _pairs
from sharding.model import Leaf, ReplicaState, ShardMap


def _map(version: int, *online: str, warming: str = "") -> ShardMap:
    """A map of leaves a and b: `online` has the letters of those that have each shard."""
    rows = [[*((name, ReplicaState.ONLINE) for name in shard)] for shard in online]
    for name in warming:
        rows[0].append((name, ReplicaState.WARMING))
    flat = [replica for row in rows for replica in row]
    return ShardMap(
        version=version,
        leaves=(Leaf("a", "a:1", "z"), Leaf("b", "b:1", "z")),
        first=np.cumsum([0, *map(len, rows)]),
        leaf=np.array(["ab".index(name) for name, _ in flat], np.uint32),
        state=np.array([state for _, state in flat], np.uint8),
    )


def test_a_shard_is_ownerless_from_the_map_without_to_the_map_with_an_owner() -> None:
    maps = [
        (10.0, _map(1, "a", "b")),
        (12.0, _map(2, "", "b", warming="b")),
        (12.5, _map(3, "", "", warming="b")),
        (13.5, _map(4, "b", "")),
        (14.0, _map(5, "b", "a")),
    ]
    assert _longest_ownerless(maps) == pytest.approx(1.5)
    assert _longest_ownerless(maps[:1]) == 0
    assert _longest_ownerless(maps[:3]) == pytest.approx(0.5), "it has none to the end"


def test_what_moved_is_who_holds_it_now_and_did_not() -> None:
    before, after = _pairs(_map(1, "a", "ab")), _pairs(_map(2, "b", "ab", warming="a"))
    assert after - before == {(0, "b")}


def test_batches_are_summed_by_the_second_in_which_they_began() -> None:
    batches = [
        Batch(9.9, 0.1, 10, 10, 10),
        Batch(10.1, 0.2, 10, 8, 5),
        Batch(10.9, 0.3, 10, failure="gone"),
        Batch(12.0, 0.1, 10, 10, 10, wrong=1),
    ]
    seconds = by_second(batches, 10.0)
    assert [second.batches for second in seconds] == [2, 0, 1]
    assert [second.missing for second in seconds] == [12, 0, 0]
    assert [second.failed for second in seconds] == [1, 0, 0]
    assert [second.wrong for second in seconds] == [0, 0, 1]
    assert seconds[0].hit_ratio == 0.25
    assert seconds[0].seconds_max == 0.3


def test_a_value_is_right_when_it_repeats_its_id() -> None:
    ids = np.array([3, 7], np.uint64)
    values = np.repeat(ids, 25).view(np.uint8).copy()
    assert wrong_values(ids, values) == 0
    values[205] ^= 1
    assert wrong_values(ids, values) == 1
    assert wrong_values(ids, values[:-8]) == 2
