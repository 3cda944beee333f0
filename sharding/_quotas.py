"""How many replicas each node is to hold: shares by weight under capacities and zone limits.

Water-filling: one level for the whole cluster, one of its own for each zone that is full; then
whole numbers, given first to whoever holds a replica more already, so that rounding moves nothing.
"""

import numpy as np
import numpy.typing as npt

__all__ = ["whole_quotas"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# A weight below this share of the heaviest counts as this share: the level stays a finite number.
_LEAST_WEIGHT = 1e-9
_BISECTIONS = 100  # halves a double's range down to its last bit
_EPSILON = 1e-6  # of a replica: what bisection and sums leave


def whole_quotas(
    total: int,
    weight: Floats,
    cap: Ints,
    zone: Ints,
    zone_cap: Ints,
    held: Ints,
    least: Ints | None = None,
) -> Ints:
    """Replicas a node, summing to `total` or to what fits if that is less.

    `cap` bounds a node (0: it gets none), `zone_cap` each zone's sum. `held` is what the nodes have
    now: of two equal claims to the odd replica, it goes to who has it. `least` is what they keep
    in any case (at most `cap`).
    """
    zones = len(zone_cap)
    floor = np.zeros_like(cap) if least is None else least
    shares = _shares(total, weight, cap, zone, zone_cap, floor)
    zone_share: Floats = np.bincount(zone, shares, zones).astype(np.float64)
    zone_quota = np.floor(zone_share + _EPSILON).astype(np.int64)
    zone_most = np.minimum(zone_cap, np.bincount(zone, cap, zones).astype(np.int64))
    zone_held = np.bincount(zone, held, zones).astype(np.int64)
    fits = min(total, int(zone_most.sum()))
    everything = np.zeros(zones, np.int64)
    _give(
        np.array([fits - zone_quota.sum()]),
        zone_quota,
        zone_most,
        everything,
        zone_share,
        zone_held,
    )
    quota = np.floor(shares + _EPSILON).astype(np.int64)
    odd = zone_quota - np.bincount(zone, quota, zones).astype(np.int64)
    _give(odd, quota, cap, zone, shares, held)
    return quota


def _shares(
    total: int, weight: Floats, cap: Ints, zone: Ints, zone_cap: Ints, floor: Ints
) -> Floats:
    """The exact shares: level x weight between `floor` and `cap`, each zone within its limit."""
    heaviest = weight[cap > 0].max(initial=0.0)
    if heaviest <= 0:
        return floor.astype(np.float64)
    relative = np.maximum(weight / heaviest, _LEAST_WEIGHT)
    zones = len(zone_cap)

    def by_zone(level: Floats) -> Floats:
        filled = np.clip(level[zone] * relative, floor, cap)
        return np.bincount(zone, filled, zones).astype(np.float64)

    most = total / _LEAST_WEIGHT + 1.0
    low, high = 0.0, most
    for _ in range(_BISECTIONS):
        level = (low + high) / 2
        if np.minimum(by_zone(np.full(zones, level)), zone_cap).sum() < total:
            low = level
        else:
            high = level
    # A zone above its limit comes down to it, on a level of its own.
    lows, highs = np.zeros(zones), np.full(zones, high)
    over = by_zone(highs) > zone_cap
    for _ in range(_BISECTIONS):
        levels = (lows + highs) / 2
        above = by_zone(levels) > zone_cap
        highs = np.where(over & above, levels, highs)
        lows = np.where(over & ~above, levels, lows)
    shares: Floats = np.clip(np.where(over, lows, high)[zone] * relative, floor, cap)
    return shares


def _give(odd: Ints, quota: Ints, cap: Ints, group: Ints, share: Floats, held: Ints) -> None:
    """Adds `odd[g]` to the quotas of each group g, one a member and turn, none beyond its cap."""
    left = np.maximum(odd, 0)
    while True:
        open_to = np.flatnonzero((quota < cap) & (left[group] > 0))
        if not len(open_to):
            return
        has_it = held[open_to] > quota[open_to]
        fraction = share[open_to] - quota[open_to]
        order = open_to[np.lexsort((open_to, -np.round(fraction, 6), ~has_it, group[open_to]))]
        first = np.searchsorted(group[order], group[order], "left")
        takers = order[np.arange(len(order)) - first < left[group[order]]]
        quota[takers] += 1
        left -= np.bincount(group[takers], minlength=len(left)).astype(np.int64)
