"""Cold keys: what reading through the daemon costs when nothing is cached yet.

A Redis holds the values. Ours asks the daemon, which fetches from that Redis; the peer is redis-py
reading the same keys from the same Redis in batches of the same size, without us. Both read slices
of the keys in turn; each key is asked of the daemon once, so that every one is a miss.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import redis

from benchmarks._harness import Figure, Metric, Settings, alternate, median
from benchmarks._servers import RunningServer, cpu_seconds, feature_cache, redis_server
from cache_daemon.client import Client, Status

__all__ = ["BENCH", "MissesBench"]

_BATCH = 1_000
_SLICES = 10
_VALUE_BYTES = 200
_NAMESPACE = "pin"
_CALL_TIMEOUT_S = 30.0
_METRICS = (Metric("cold_keys", "keys/s of one client reading cold keys through Redis", 0.6),)


class MissesBench:
    """The daemon in front of Redis, against Redis alone."""

    name = "misses"
    metrics: Sequence[Metric] = _METRICS

    def run(self, metrics: Sequence[str], settings: Settings) -> Iterator[Figure]:
        if "cold_keys" not in metrics:
            return
        keys = 100_000 if settings.quick else 1_000_000
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            upstream = stack.enter_context(redis_server(directory))
            ours = stack.enter_context(
                feature_cache(
                    directory,
                    memory="512MiB",
                    namespaces={
                        _NAMESPACE: {"store": "redis", "domains": {"all": {"budget": "100%"}}}
                    },
                    stores={"redis": {"type": "redis", "options": {"port": upstream.port}}},
                )
            )
            yield _cold_keys(stack, ours, upstream, keys)


def _cold_keys(stack: ExitStack, ours: RunningServer, upstream: RunningServer, keys: int) -> Figure:
    # Only the timed reads count: keys and the values to compare with are made before.
    reader = stack.enter_context(redis.Redis(port=upstream.port))
    client = stack.enter_context(Client(ours.target, timeout=_CALL_TIMEOUT_S))
    values = np.random.default_rng(11).integers(0, 256, keys * _VALUE_BYTES, np.uint8).tobytes()
    batches = [
        [b"%016d" % number for number in range(start, start + _BATCH)]
        for start in range(0, keys, _BATCH)
    ]
    stored = [[f"{_NAMESPACE}:".encode() + key for key in batch] for batch in batches]
    for number, batch in enumerate(stored):
        at = number * _BATCH * _VALUE_BYTES
        reader.mset(
            {
                key: values[at + i * _VALUE_BYTES : at + (i + 1) * _VALUE_BYTES]
                for i, key in enumerate(batch)
            }
        )

    def read_ours(number: int) -> None:
        column = client.batch_get({_NAMESPACE: batches[number]})[_NAMESPACE]
        at = number * _BATCH * _VALUE_BYTES
        fetched = bool((column.statuses == Status.FETCHED).all())
        if not fetched or column.values.tobytes() != values[at : at + _BATCH * _VALUE_BYTES]:
            raise RuntimeError(f"misses: batch {number} did not come from the store: {column!r}")

    def read_peer(number: int) -> None:
        if None in reader.mget(stored[number]):
            raise RuntimeError(f"misses: Redis lost values of batch {number}")

    per_slice = len(batches) // _SLICES
    cpu_before = cpu_seconds(ours.pid)
    our_rates, peer_rates = alternate(
        _slices(read_ours, per_slice), _slices(read_peer, per_slice), _SLICES
    )
    cpu = cpu_seconds(ours.pid) - cpu_before
    return Figure(
        bench="misses",
        metric="cold_keys",
        value=median(our_rates),
        unit="keys/s",
        peer="redis-py[hiredis] mget, without the daemon",
        peer_value=median(peer_rates),
        bar=_METRICS[0].bar,
        extra={
            "keys": keys,
            "batch_keys": _BATCH,
            "server_cpu_us_per_1000_keys": round(cpu / keys * 1e9),
        },
    )


def _slices(read: Callable[[int], None], per_slice: int) -> Callable[[], float]:
    """Reads the next slice of batches at each call; keys/s."""
    numbers = iter(range(per_slice * _SLICES))

    def run() -> float:
        started = time.perf_counter()
        for _ in range(per_slice):
            read(next(numbers))
        return per_slice * _BATCH / (time.perf_counter() - started)

    return run


BENCH = MissesBench()
