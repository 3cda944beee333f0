"""Endless requests for the warm-up benchmark: Zipf over 64-bit ids, and the demo's."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks._warm_nodes import Ids, Request
from benchmarks.demo import dataset, features
from benchmarks.demo.candidates import ranking_requests

__all__ = ["Trace", "demo_trace", "random_ids", "zipf_trace"]

_SEED = 11
_SKEW = 0.9
_DRAWS_AT_ONCE = 200
_DEMO_STRIDE = 5  # as the demo's


@dataclass(frozen=True)
class Trace:
    """`requests` never end; `per_second` is the pace of a node in service."""

    name: str
    requests: Iterator[Request]
    per_second: float


def random_ids(items: int) -> Ids:
    """Distinct 64-bit ids."""
    rng = np.random.default_rng(_SEED)
    ids = np.unique(rng.integers(1, 1 << 63, items + items // 100, dtype=np.uint64))
    return rng.permutation(ids)[:items]


def zipf_trace(namespace: str, ids: Ids, batch: int, per_second: float) -> Trace:
    """Batches whose keys are drawn from `ids`, the n-th with a weight of n to the power of -0.9."""

    def draw() -> Iterator[Request]:
        rng = np.random.default_rng(_SEED)
        weights = np.arange(1, ids.size + 1, dtype=np.float64) ** -_SKEW
        steps = np.cumsum(weights / weights.sum())
        while True:
            ranks = np.searchsorted(steps, rng.random((_DRAWS_AT_ONCE, batch)))
            for row in np.minimum(ranks, ids.size - 1):
                yield {namespace: ids[row]}

    return Trace("Zipf 0.9", draw(), per_second)


def demo_trace(folder: Path, per_second: float) -> tuple[Trace, int]:
    """The demo's ranking requests; its store is written to `folder`/features.

    Returns the trace, from its beginning again when it is over, and the bytes of all values.
    """
    data = dataset.load()
    tables = features.build(data)
    features.write_store(tables, data, folder / "features")

    def requests() -> Iterator[Request]:
        while True:
            for request in ranking_requests(data, seed=_SEED, stride=_DEMO_STRIDE):
                items = data.item_ids[request.items].astype(np.uint64)
                user = data.user_ids[[request.user]].astype(np.uint64)
                yield {
                    features.ITEM_EMBEDDING: items,
                    features.ITEM_STATS: items,
                    features.USER_SEQUENCE: user,
                }

    return Trace("the demo's", requests(), per_second), tables.total_bytes
