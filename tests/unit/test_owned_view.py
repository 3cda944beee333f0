"""By which maps a leaf takes writes: those that name every replica that there is now."""

import numpy as np

from cache_daemon.owned_view import OwnedView
from sharding.model import Leaf, ReplicaState, ShardMap


def _map(version: int, *holders: str) -> ShardMap:
    """A map in which each shard is held by the leaves of its letters: upper case is online."""
    names = sorted({letter.lower() for letters in holders for letter in letters})
    leaves = tuple(Leaf(name, f"{name}:1", "z") for name in names)
    rows = [(names.index(letter.lower()), letter.isupper()) for row in holders for letter in row]
    return ShardMap(
        version=version,
        leaves=leaves,
        first=np.cumsum([0, *map(len, holders)]),
        leaf=np.array([leaf for leaf, _ in rows], np.uint32),
        state=np.array(
            [ReplicaState.ONLINE if online else ReplicaState.WARMING for _, online in rows],
            np.uint8,
        ),
    )


def _since(view: OwnedView, *shards: int) -> list[int]:
    found: list[int] = view.written_since(np.array(shards, np.uint32)).tolist()
    return found


def test_nothing_is_asked_before_the_first_map() -> None:
    view = OwnedView()
    assert view.version == 0
    assert _since(view, 0, 5) == [0, 0]


def test_the_first_map_counts_for_all_that_it_names() -> None:
    view = OwnedView()
    view.take(_map(7, "AB", "", "b"))
    assert view.version == 7
    assert _since(view, 0, 1, 2) == [7, 0, 7]


def test_a_new_replica_asks_for_the_map_that_names_it_first() -> None:
    view = OwnedView()
    view.take(_map(1, "AB", "AB"))
    view.take(_map(2, "ABc", "AB"))
    assert _since(view, 0, 1) == [2, 1]
    view.take(_map(3, "ABC", "AB"))  # it is online: writes by map 2 reached it, too
    assert _since(view, 0, 1) == [2, 1]


def test_a_replica_that_goes_asks_for_nothing_and_one_that_returns_does() -> None:
    view = OwnedView()
    view.take(_map(1, "AB"))
    view.take(_map(2, "A"))
    assert _since(view, 0) == [1]
    view.take(_map(3, "Ab"))
    assert _since(view, 0) == [3]


def test_leaves_are_known_by_name_wherever_a_map_lists_them() -> None:
    view = OwnedView()
    view.take(_map(1, "BC", "C"))
    view.take(_map(2, "BC", "aC"))  # a new leaf, listed before the others
    assert _since(view, 0, 1) == [1, 2]


def test_shards_beyond_the_map_ask_for_nothing() -> None:
    view = OwnedView()
    view.take(_map(4, "A"))
    assert _since(view, 0, 9) == [4, 0]
