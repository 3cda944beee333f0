"""The board on which placement works: an assignment, and rounds of vectorised exchanges on it."""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Board"]

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_NONE = -1
_SEED = 20_240_607  # any: the same input shall give the same placement
_MIX_ROUNDS = 24
_SWAP_ROUNDS = 200
_HAND_OVER_ROUNDS = 60
_SCANNED_MAX = 50_000_000  # entries that the exact search for partners may look at
_BATCHES = 16


class Board:
    """`assignment[shard, column]` is a node number or -1; every method keeps rows free of doubles.

    `limit` is how many replicas of a shard may lie in one zone, `cap` how many shards a node may
    hold; `pinned` ones give nothing away. Not thread-safe; lives for one call of `place`.
    """

    def __init__(
        self,
        assignment: npt.NDArray[np.signedinteger[Any]],
        zone: Ints,
        limit: int,
        cap: Ints,
        pinned: Bools,
    ) -> None:
        self.assignment = assignment.astype(np.int64)
        self.zone = zone
        self.limit = limit
        self.cap = cap
        self.pinned = pinned
        # Replicas that are above the zone limit: shard and node.
        self._crowded_rows = np.empty(0, np.int64)
        self._crowded_nodes = np.empty(0, np.int64)
        # Placed in this call: to move them again costs nothing.
        self._fresh = np.zeros(self.assignment.shape, bool)
        # Placed above the first zone limit: they go to the end of their rows.
        self._late = np.zeros(self.assignment.shape, bool)
        self._random = np.random.default_rng(_SEED)

    @property
    def shard_count(self) -> int:
        return len(self.assignment)

    @property
    def width(self) -> int:
        return int(self.assignment.shape[1])

    def load(self) -> Ints:
        """Replicas a node."""
        held = self.assignment[self.assignment != _NONE]
        return np.bincount(held, minlength=len(self.cap)).astype(np.int64)

    def holes(self) -> int:
        return int(np.count_nonzero(self.assignment == _NONE))

    def crowded_shards(self, limit: int) -> int:
        """Shards with more than `limit` replicas in one zone."""
        return int(np.count_nonzero((self._seen_before() >= limit).any(axis=1)))

    # ---- the shape -------------------------------------------------------------------------------

    def widen(self, wanted: int) -> None:
        """Drops doubles in a row; makes at least `wanted` columns."""
        row = self.assignment
        for column in range(1, self.width):
            double = (row[:, :column] == row[:, column : column + 1]).any(axis=1)
            row[double, column] = _NONE
        if self.width < wanted:
            more = np.full((self.shard_count, wanted - self.width), _NONE, np.int64)
            self.assignment = np.hstack([row, more])
        self._forget_marks()

    def narrow(self, wanted: int, quota: Ints) -> None:
        """Leaves at most `wanted` replicas a shard: those on the fullest nodes go, in batches."""
        batches = np.arange(self.shard_count) % _BATCHES
        while True:
            excess = np.count_nonzero(self.assignment != _NONE, axis=1) > wanted
            if not excess.any():
                break
            for batch in range(_BATCHES):
                rows = np.flatnonzero(excess & (batches == batch))
                fullness = self.load() / np.maximum(quota, 0.5)
                held = self.assignment[rows]
                full = np.where(held == _NONE, -1.0, fullness[held])
                self.assignment[rows, full.argmax(axis=1)] = _NONE
        self.assignment = self.compact()[:, :wanted].copy()
        self._forget_marks()

    def compact(self) -> Ints:
        """The assignment with holes last, before them what shares a zone; else the order is kept.

        So the next placement sets the same replicas aside, and moves none.
        """
        order = np.argsort(np.where(self.assignment == _NONE, 2, self._late), axis=1, kind="stable")
        return np.take_along_axis(self.assignment, order, axis=1)

    def _forget_marks(self) -> None:
        self._fresh = np.zeros(self.assignment.shape, bool)
        self._late = np.zeros(self.assignment.shape, bool)

    # ---- zones -----------------------------------------------------------------------------------

    def set_aside_crowded(self) -> None:
        """Takes out what is above the zone limit: its shard's later replicas in that zone."""
        crowded = self._seen_before() >= self.limit
        self._crowded_rows = np.nonzero(crowded)[0]
        self._crowded_nodes = self.assignment[crowded]
        self.assignment = np.where(crowded, _NONE, self.assignment)

    def raise_limit(self) -> None:
        """One more replica of a shard may lie in a zone; puts back what was set aside, where there
        still are a hole and room. What is placed from here on is late."""
        self.limit += 1
        self._fresh[:] = False
        for _ in range(self.width):
            rows, nodes = self._crowded_rows, self._crowded_nodes
            columns = self._first_hole()[rows]
            good = (self.assignment[rows, columns] == _NONE) & self._legal(rows, columns, nodes)
            good &= _rank(rows) < 1
            chosen = np.flatnonzero(good)
            room = self.cap - self.load()
            chosen = chosen[_rank(nodes[chosen]) < room[nodes[chosen]]]
            if not len(chosen):
                return
            self.assignment[rows[chosen], columns[chosen]] = nodes[chosen]
            self._late[rows[chosen], columns[chosen]] = True
            left = np.ones(len(rows), bool)
            left[chosen] = False
            self._crowded_rows, self._crowded_nodes = rows[left], nodes[left]

    def _zones(self, nodes: Ints) -> Ints:
        return np.where(nodes == _NONE, _NONE, self.zone[nodes])

    def _seen_before(self) -> Ints:
        """For each replica: how many of its row's earlier ones lie in its zone (holes: 0)."""
        zones = self._zones(self.assignment)
        seen = np.zeros(zones.shape, np.int64)
        for column in range(1, self.width):
            same = zones[:, :column] == zones[:, column : column + 1]
            seen[:, column] = np.where(zones[:, column] == _NONE, 0, same.sum(axis=1))
        return seen

    def _legal(self, rows: Ints, columns: Ints, nodes: Ints) -> Bools:
        """Whether each node may stand at its place: no double, and within the zone limit."""
        others = self.assignment[rows]
        others[np.arange(len(rows)), columns] = _NONE
        double = (others == nodes[:, None]).any(axis=1)
        near = (self._zones(others) == self.zone[nodes][:, None]).sum(axis=1)
        legal: Bools = ~double & (near < self.limit)
        return legal

    # ---- a first placement -----------------------------------------------------------------------

    def deal(self, quota: Ints) -> None:
        """Fills an empty board: nodes in order of zone, each as often as its quota, dealt to the
        shards in turn. A zone whose quota is at most limit x shards meets no shard more often than
        the limit; no node meets one twice. Then random swaps part those who were dealt together.
        """
        order = np.argsort(self.zone, kind="stable")
        dealt = np.repeat(order, quota[order])
        flat = np.full(self.assignment.size, _NONE, np.int64)
        flat[: len(dealt)] = dealt
        self.assignment = flat.reshape(self.width, self.shard_count).T.copy()
        half = self.shard_count // 2
        for _ in range(_MIX_ROUNDS):
            rows = self._random.permutation(self.shard_count)
            ones, others = rows[:half], rows[half : 2 * half]
            columns = self._random.integers(0, self.width, (2, half))
            self._swap(ones, columns[0], others, columns[1], 2)

    def _swap(
        self, ones: Ints, one_at: Ints, others: Ints, other_at: Ints, least: int
    ) -> tuple[Bools, Bools]:
        """Swaps the pairs of places of which at least `least` are legal after it; tells for each
        side where it was swapped to a legal place. All rows are distinct."""
        mine, theirs = self.assignment[ones, one_at], self.assignment[others, other_at]
        there = (mine != _NONE) & (theirs != _NONE)
        good = there & self._legal(ones, one_at, theirs)
        also = there & self._legal(others, other_at, mine)
        swapped = good.astype(int) + also >= least
        self.assignment[ones[swapped], one_at[swapped]] = theirs[swapped]
        self.assignment[others[swapped], other_at[swapped]] = mine[swapped]
        return good & swapped, also & swapped

    # ---- holes -----------------------------------------------------------------------------------

    def fill_holes(self, quota: Ints, late: bool = False) -> None:
        """Fills holes from the nodes below their quota; shards with the fewest replicas first.

        Afterwards every entry is legal; holes are left where no exchange was found.
        """
        rows, columns = np.nonzero(self.assignment == _NONE)
        slots = np.repeat(np.arange(len(quota)), np.maximum(quota - self.load(), 0))
        if not len(rows) or not len(slots):
            return
        self._random.shuffle(slots)
        held = np.count_nonzero(self.assignment != _NONE, axis=1)[rows]
        # A row's second hole comes after the first holes of all.
        later_hole = columns - self._first_hole()[rows]
        order = np.lexsort((self._random.permutation(len(rows)), held + later_hole))
        count = min(len(rows), len(slots))
        rows, columns = rows[order[:count]], columns[order[:count]]
        self.assignment[rows, columns] = slots[:count]
        self._fresh[rows, columns] = True
        self._late[rows, columns] = late
        self._swap_misplaced(slots[count:])
        self._search_partners()
        self.take_back_misplaced()

    def _first_hole(self) -> Ints:
        first: Ints = np.argmax(self.assignment == _NONE, axis=1)
        return first

    def _misplaced(self) -> tuple[Ints, Ints]:
        """Fresh entries that are not legal, at most one a row."""
        rows, columns = np.nonzero(self._fresh & (self.assignment != _NONE))
        bad = ~self._legal(rows, columns, self.assignment[rows, columns])
        rows, columns = rows[bad], columns[bad]
        rows, index = np.unique(rows[::-1], return_index=True)
        return rows, columns[::-1][index]

    def _swap_misplaced(self, spare: Ints) -> None:
        """Lets misplaced entries swap round by round: in turn with random fresh ones, with each
        other, where it is enough that one of the two is settled, and with slots nobody took."""
        rows, columns = self._misplaced()
        fresh_rows, fresh_columns = np.nonzero(self._fresh & (self.assignment != _NONE))
        for turn in range(_SWAP_ROUNDS):
            if not len(rows):
                rows, columns = self._misplaced()
                if not len(rows):
                    return
            left = np.ones(len(rows), bool)
            if turn % 3 == 0:
                picked = self._random.integers(0, len(fresh_rows), len(rows))
                partners, partner_at = fresh_rows[picked], fresh_columns[picked]
                # Each row takes part in one swap a round.
                chosen = np.flatnonzero((_rank(partners) < 1) & ~np.isin(partners, rows))
                partners, partner_at = partners[chosen], partner_at[chosen]
                good, _ = self._swap(rows[chosen], columns[chosen], partners, partner_at, 2)
                left[chosen[good]] = False
            elif turn % 3 == 1:
                half = len(rows) // 2
                order = self._random.permutation(len(rows))
                ones, others = order[:half], order[half : 2 * half]
                good, also = self._swap(rows[ones], columns[ones], rows[others], columns[others], 1)
                left[ones[good]] = False
                left[others[also]] = False
            else:
                self._random.shuffle(spare)
                count = min(len(spare), len(rows))
                good = self._legal(rows[:count], columns[:count], spare[:count])
                taken = np.flatnonzero(good)
                places = rows[taken], columns[taken]
                self.assignment[places], spare[taken] = spare[taken], self.assignment[places]
                left[taken] = False
            rows, columns = rows[left], columns[left]

    def _search_partners(self) -> None:
        """For what is still misplaced: any entry to swap with, fresh ones first, others as an
        extra move. One at a time, under a bound of work."""
        budget = _SCANNED_MAX
        rows, columns = self._misplaced()
        for fresh_only in (True, False):
            left = []
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
                node = self.assignment[row, column]
                where = (self._fresh if fresh_only else True) & (self.assignment != _NONE)
                where &= ~self.pinned[self.assignment]
                others, at = np.nonzero(where)
                budget -= len(others) * self.width
                if budget < 0:
                    return
                here = np.full(len(others), row)
                good = others != row
                good &= self._legal(here, np.full(len(others), column), self.assignment[others, at])
                good[good] = self._legal(
                    others[good], at[good], np.full(int(good.sum()), node, np.int64)
                )
                found = np.flatnonzero(good)
                if not len(found):
                    left.append((row, column))
                    continue
                other, place = others[found[0]], at[found[0]]
                self.assignment[row, column] = self.assignment[other, place]
                self.assignment[other, place] = node
                self._fresh[other, place] = True
            rows = np.array([row for row, _ in left], np.int64)
            columns = np.array([column for _, column in left], np.int64)

    def take_back_misplaced(self) -> None:
        """Makes holes again of fresh entries that found no legal place."""
        for _ in range(self.width):
            rows, columns = self._misplaced()
            self.assignment[rows, columns] = _NONE

    # ---- surplus ---------------------------------------------------------------------------------

    def hand_over(self, quota: Ints) -> None:
        """Moves replicas of nodes above their quota straight to nodes below theirs; within a zone
        first, where that is always legal. What finds no legal pair becomes a hole."""
        for turn in range(_HAND_OVER_ROUNDS):
            load = self.load()
            surplus = np.maximum(load - quota, 0)
            wanting = np.maximum(quota - load, 0)
            if not surplus.any() or not wanting.any():
                break
            rows, columns = self._on(surplus > 0)
            targets = self._targets(self.assignment[rows, columns], wanting, turn % 2 == 0)
            rows, columns = rows[targets != _NONE], columns[targets != _NONE]
            targets = targets[targets != _NONE]
            legal = self._legal(rows, columns, targets)
            chosen = np.flatnonzero(legal)
            chosen = chosen[_rank(rows[chosen]) < 1]
            givers = self.assignment[rows, columns]
            chosen = chosen[_rank(givers[chosen]) < surplus[givers[chosen]]]
            chosen = chosen[_rank(targets[chosen]) < wanting[targets[chosen]]]
            rows, columns, targets = rows[chosen], columns[chosen], targets[chosen]
            self.assignment[rows, columns] = targets
            self._fresh[rows, columns] = True
        for _ in range(_HAND_OVER_ROUNDS):
            if not self._hand_over_by_fresh(quota):
                break
        surplus = np.maximum(self.load() - quota, 0)
        rows, columns = self._on(surplus > 0)
        nodes = self.assignment[rows, columns]
        over = _rank(nodes) < surplus[nodes]
        self.assignment[rows[over], columns[over]] = _NONE

    def _hand_over_by_fresh(self, quota: Ints) -> bool:
        """One round of: a replica of a node with surplus takes the place of a fresh one, which
        goes on to a node in want; that costs no more than going there itself. False: no surplus."""
        load = self.load()
        surplus = np.maximum(load - quota, 0)
        slots = np.repeat(np.arange(len(quota)), np.maximum(quota - load, 0))
        fresh_rows, fresh_columns = np.nonzero(self._fresh & (self.assignment != _NONE))
        if not surplus.any() or not len(slots) or not len(fresh_rows):
            return False
        rows, columns = self._on(surplus > 0)
        picked = self._random.integers(0, len(fresh_rows), len(rows))
        partners, partner_at = fresh_rows[picked], fresh_columns[picked]
        targets = slots[self._random.integers(0, len(slots), len(rows))]
        stops = self.assignment[partners, partner_at]
        good = (partners != rows) & self._legal(rows, columns, stops)
        good &= self._legal(partners, partner_at, targets)
        chosen = np.flatnonzero(good)
        chosen = chosen[_rank(rows[chosen]) < 1]
        chosen = chosen[(_rank(partners[chosen]) < 1) & ~np.isin(partners[chosen], rows[chosen])]
        givers = self.assignment[rows, columns]
        chosen = chosen[_rank(givers[chosen]) < surplus[givers[chosen]]]
        chosen = chosen[_rank(targets[chosen]) < np.maximum(quota - load, 0)[targets[chosen]]]
        self.assignment[rows[chosen], columns[chosen]] = stops[chosen]
        self.assignment[partners[chosen], partner_at[chosen]] = targets[chosen]
        self._fresh[rows[chosen], columns[chosen]] = True
        return True

    def _on(self, nodes: Bools) -> tuple[Ints, Ints]:
        """The places of all replicas on some nodes, in random order."""
        rows, columns = np.nonzero((self.assignment != _NONE) & nodes[self.assignment])
        order = self._random.permutation(len(rows))
        return rows[order], columns[order]

    def _targets(self, givers: Ints, wanting: Ints, same_zone: bool) -> Ints:
        """A random node in want for each giver, of its own zone or of any; -1 where none is."""
        slots = np.repeat(np.arange(len(wanting)), wanting)
        self._random.shuffle(slots)
        if not same_zone:
            return slots[self._random.integers(0, len(slots), len(givers))]
        slots = slots[np.argsort(self.zone[slots], kind="stable")]
        zones = np.arange(int(self.zone.max()) + 1)
        first = np.searchsorted(self.zone[slots], zones, "left")
        count = np.searchsorted(self.zone[slots], zones, "right") - first
        mine = self.zone[givers]
        pick = first[mine] + (self._random.random(len(givers)) * count[mine]).astype(np.int64)
        return np.where(count[mine] > 0, slots[np.minimum(pick, len(slots) - 1)], _NONE)

    # ---- afterwards ------------------------------------------------------------------------------

    def feed_the_empty(self) -> None:
        """No shard goes without while another has two: it takes over one of them."""
        self.assignment = self.compact()
        self._forget_marks()
        held = np.count_nonzero(self.assignment != _NONE, axis=1)
        empty = np.flatnonzero(held == 0)
        rich = np.flatnonzero(held > 1)
        rich = rich[np.argsort(-held[rich], kind="stable")][: len(empty)]
        empty = empty[: len(rich)]
        columns = self.width - 1 - np.argmax(self.assignment[rich][:, ::-1] != _NONE, axis=1)
        self.assignment[empty, 0] = self.assignment[rich, columns]
        self.assignment[rich, columns] = _NONE

    def balance_first(self, rounds: int) -> None:
        """Reorders rows so that each node is first for its part of what it holds. Moves nothing.

        Rows with more than the limit in a zone stay as they are: their later one is the odd one.
        """
        self.assignment = self.compact()
        filled = np.count_nonzero(self.assignment != _NONE, axis=1)
        free = np.flatnonzero((filled > 1) & ~(self._seen_before() > 0).any(axis=1))
        parts = np.where(self.assignment != _NONE, 1.0 / np.maximum(filled, 1)[:, None], 0.0)
        share = np.bincount(np.maximum(self.assignment, 0).ravel(), parts.ravel(), len(self.cap))
        for _ in range(rounds):
            leads = self.assignment[:, 0]
            count = np.bincount(leads[leads != _NONE], minlength=len(self.cap))
            slack = share - count  # below 0: is first too often
            options = np.where(
                self.assignment[free] == _NONE, -np.inf, slack[self.assignment[free]]
            )
            best = options.argmax(axis=1)
            here = np.arange(len(free))
            better = (options[here, 0] < -0.5) & (options[here, best] > 0.5)
            better |= options[here, best] - options[here, 0] > 2.0
            candidates = self._random.permutation(np.flatnonzero(better))
            if not len(candidates):
                return
            leaders = self.assignment[free[candidates], 0]
            candidates = candidates[_rank(leaders) < np.ceil(np.maximum(-slack[leaders], 0.5))]
            takers = self.assignment[free[candidates], best[candidates]]
            candidates = candidates[_rank(takers) < np.ceil(np.maximum(slack[takers], 0.5))]
            rows, columns = free[candidates], best[candidates]
            taken = self.assignment[rows, columns].copy()
            self.assignment[rows, columns] = self.assignment[rows, 0]
            self.assignment[rows, 0] = taken


def _rank(keys: Ints) -> Ints:
    """For each element: how many equal ones come before it."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    rank = np.empty(len(keys), np.int64)
    rank[order] = np.arange(len(keys)) - np.searchsorted(ordered, ordered, "left")
    return rank
