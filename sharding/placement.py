"""Which node holds which shard: pure functions from nodes and the old placement to a new one.

Replicas of a shard lie in distinct zones; each node holds its share by weight to one replica;
what lay well stays where it is. The order: whole quotas for all nodes first (`_quotas`), so that
the number of moves is decided before any is chosen; then holes are filled and surplus is handed
over at random among the legal pairs, which also spreads a node's partners over the cluster; pairs
that are not legal swap with others. Everything is in rounds of numpy operations with bounds, and
deterministic for the same input. What cannot be had is reported as data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sharding._board import Board
from sharding._quotas import whole_quotas

__all__ = ["NO_NODE", "Placement", "PlacementNode", "Problem", "count_moves", "place"]

NO_NODE = -1  # in an assignment: this replica has no node

_FIRST_ROUNDS = 32
_PASSES_MAX = 8
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class PlacementNode:
    """A node as placement sees it.

    `capacity` is the most shards that it takes, 0 any number. `usable` is false for nodes that are
    gone for good, disabled or draining: they get nothing and keep nothing. `pinned` ones keep what
    they have and get nothing, whatever their weight: a node that is away for a moment.
    """

    name: str
    zone: str = ""
    weight: float = 1.0
    capacity: int = 0
    usable: bool = True
    pinned: bool = False


@dataclass(frozen=True)
class Problem:
    """What stands against the wish: a word for programs, a sentence for people."""

    kind: str
    text: str


@dataclass(frozen=True)
class Placement:
    """`assignment[shard]` are node numbers, the preferred first, holes (`NO_NODE`) last."""

    assignment: npt.NDArray[np.int32]  # [shard_count, replicas]
    problems: tuple[Problem, ...]


def place(
    nodes: Sequence[PlacementNode],
    shard_count: int,
    replicas: int,
    previous: npt.NDArray[np.int32] | None = None,
) -> Placement:
    """Places `shard_count` x `replicas`, from `previous` with as few moves as the quotas allow.

    `previous` has node numbers of this same `nodes`, `NO_NODE` for a node that is not among them;
    rows and columns in excess are left out. Give nodes in order of name, so that the same cluster
    gives the same result. Never raises for a wish that cannot be met.
    """
    weight = np.array([_sane_weight(node.weight) for node in nodes], np.float64)
    pinned = np.array([node.pinned and node.usable for node in nodes], bool)
    usable = np.array([node.usable for node in nodes], bool) & ((weight > 0) | pinned)
    capacity = np.array([max(node.capacity, 0) for node in nodes], np.int64)
    cap = np.where(capacity > 0, np.minimum(capacity, shard_count), shard_count)
    cap = np.where(usable, cap, 0).astype(np.int64)
    start: npt.NDArray[np.signedinteger[Any]] = _kept(previous, shard_count, cap)
    if pinned.any():
        held = np.bincount(start[start != NO_NODE], minlength=len(nodes))
        cap = np.where(pinned, np.minimum(held, shard_count), cap)
        usable &= cap > 0
    zone_names = sorted({node.zone for node in nodes})
    number = {name: index for index, name in enumerate(zone_names)}
    zone = np.array([number[node.zone] for node in nodes], np.int64)

    takers = int(np.count_nonzero(usable))
    wanted = min(replicas, takers)
    problems = _wishes(nodes, weight, replicas, takers)
    if shard_count == 0 or wanted == 0:
        empty = np.full((shard_count, replicas), NO_NODE, np.int32)
        return Placement(empty, tuple(problems))

    nodes_in_zone = np.bincount(zone[cap > 0], minlength=len(zone_names)).astype(np.int64)
    limit = _zone_limit(nodes_in_zone, wanted)
    share = weight * ((cap > 0) & ~pinned)
    for _ in range(_PASSES_MAX):
        board = Board(start, zone, limit, cap, pinned)
        board.widen(wanted)
        kept = board.assignment
        _fill(board, wanted, weight, nodes_in_zone)
        board.feed_the_empty()
        now = _badness(board, limit, share)
        if (
            kept.shape[1] == wanted
            and _badness(Board(kept, zone, limit, cap, pinned), limit, share) <= now
        ):
            board.assignment = kept  # another arrangement, but none that is worth a move
            break
        if not any(now[:4]):
            break
        # Not all was met: a second look from what it is now may find more, and the next call would.
        start = board.assignment
    board.balance_first(_FIRST_ROUNDS)
    assignment = np.full((shard_count, replicas), NO_NODE, np.int32)
    assignment[:, :wanted] = board.compact()[:, :wanted]

    problems += _findings(nodes, board, share, wanted, limit)
    return Placement(assignment, tuple(problems))


def count_moves(before: npt.NDArray[np.int32], after: npt.NDArray[np.int32]) -> int:
    """Replicas of `after` on nodes that do not hold the shard in `before`."""
    rows = min(len(before), len(after))
    there = (after[:rows, :, None] == before[:rows, None, :]).any(axis=2)
    moved = np.count_nonzero(~there & (after[:rows] != NO_NODE))
    return int(moved) + int(np.count_nonzero(after[rows:] != NO_NODE))


def _sane_weight(weight: float) -> float:
    return float(weight) if np.isfinite(weight) and weight > 0 else 0.0


def _zone_limit(nodes_in_zone: npt.NDArray[np.int64], wanted: int) -> int:
    """The fewest replicas of a shard in one zone with which all of them find distinct nodes."""
    limit = 1
    while np.minimum(nodes_in_zone, limit).sum() < wanted:
        limit += 1
    return limit


def _kept(
    previous: npt.NDArray[np.int32] | None, shard_count: int, cap: npt.NDArray[np.int64]
) -> npt.NDArray[np.int32]:
    """The previous placement without nodes that may hold nothing."""
    kept = np.full((shard_count, 0 if previous is None else previous.shape[1]), NO_NODE, np.int32)
    if previous is None or not len(cap):
        return kept
    rows = min(shard_count, len(previous))
    kept[:rows] = previous[:rows]
    kept[(kept < 0) | (kept >= len(cap))] = NO_NODE
    kept[(kept != NO_NODE) & (cap[kept] == 0)] = NO_NODE
    return kept


def _badness(
    board: Board, limit: int, share: npt.NDArray[np.float64]
) -> tuple[int, int, int, int, float]:
    """What to have little of, the worst first: replicas above a capacity, shards without a node,
    holes, shards with more than `limit` replicas in a zone, and how far loads are from shares."""
    load = board.load()
    free = share > 0
    if free.any():
        ideal = load[free].sum() * share[free] / share[free].sum()
        distance = np.square(load[free] - ideal) / np.maximum(share[free], share.max() * 1e-9)
        far = float(distance.sum())
    else:
        far = 0.0
    return (
        int(np.maximum(load - board.cap, 0).sum()),
        int(np.count_nonzero((board.assignment == NO_NODE).all(axis=1))),
        board.holes(),
        board.crowded_shards(limit),
        round(far, 6),
    )


def _fill(
    board: Board, wanted: int, weight: npt.NDArray[np.float64], nodes_in_zone: npt.NDArray[np.int64]
) -> None:
    """Brings the board to its quotas; what zones forbid is then done with a higher limit."""
    total = board.shard_count * wanted

    def quotas(least: npt.NDArray[np.int64] | None) -> npt.NDArray[np.int64]:
        zone_cap = board.shard_count * np.minimum(nodes_in_zone, board.limit)
        held = board.load()
        if least is None and board.pinned.any():
            least = np.where(board.pinned, held, 0)
        return whole_quotas(total, weight, board.cap, board.zone, zone_cap, held, least)

    board.set_aside_crowded()
    quota = quotas(None)
    if board.width > wanted:
        board.narrow(wanted, quota)
        quota = quotas(None)
    if not board.load().any():
        board.deal(quota)
    else:
        board.fill_holes(quota)
        board.hand_over(quota)
        board.fill_holes(quota)
    board.take_back_misplaced()
    while board.holes() and board.limit < wanted:
        # Fewer replicas would be worse than two in a zone.
        board.raise_limit()
        board.fill_holes(quotas(board.load()), late=True)


# ---- what is said of it --------------------------------------------------------------------------


def _wishes(
    nodes: Sequence[PlacementNode],
    weight: npt.NDArray[np.float64],
    replicas: int,
    takers: int,
) -> list[Problem]:
    problems = []
    odd = [
        node.name
        for node, sane in zip(nodes, weight, strict=True)
        if sane == 0 and node.weight != 0 and node.usable
    ]
    if odd:
        problems.append(
            Problem("bad_weight", f"the weight of {_list(odd)} is no positive number: gets nothing")
        )
    if takers == 0:
        problems.append(Problem("no_nodes", "no node can hold a shard"))
    elif takers < replicas:
        problems.append(
            Problem(
                "replicas_exceed_nodes",
                f"{replicas} replicas are wanted, but only {takers} nodes can hold shards: "
                f"each shard has {takers}",
            )
        )
    return problems


def _findings(
    nodes: Sequence[PlacementNode],
    board: Board,
    share: npt.NDArray[np.float64],
    wanted: int,
    limit: int,
) -> list[Problem]:
    problems = []
    load = board.load()
    missing = board.shard_count * wanted - int(load.sum())
    if missing:
        none = int(np.count_nonzero(~(board.assignment != NO_NODE).any(axis=1)))
        problems.append(
            Problem(
                "capacity",
                f"the nodes' capacities leave {missing} replicas without a node"
                + (f", {none} shards without any" if none else ""),
            )
        )
    if limit > 1:
        zones = len(np.unique(board.zone[board.cap > 0]))
        problems.append(
            Problem(
                "zones_too_few",
                f"{wanted} replicas do not fit into {zones} zones one by one: they are on "
                f"distinct nodes, at most {limit} in a zone",
            )
        )
    crowded = board.crowded_shards(limit)
    if crowded:
        problems.append(
            Problem(
                "zone_shared",
                f"{crowded} shards have more than {limit} replicas in a zone: the other zones "
                "have no room",
            )
        )
    total = board.shard_count * wanted - int(load[share == 0].sum())
    fair = total * share / share.sum() if share.any() else np.full(len(share), np.inf)
    above = np.flatnonzero((share > 0) & (load > np.maximum(fair * 1.05, fair + 1)))
    if len(above):
        worst = above[np.argmax(load[above] / fair[above])]
        problems.append(
            Problem(
                "uneven",
                f"{len(above)} nodes hold more than their share by weight, most of all "
                f"{nodes[worst].name} ({load[worst]} for {fair[worst]:.1f}): zones, capacities "
                "or the number of replicas allow nothing else",
            )
        )
    return problems


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")
