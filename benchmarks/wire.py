"""A batch of a thousand values over TCP, against redis-py[hiredis] and MGET.

Both servers hold the same 100,000 items of a 16-byte key and a 200-byte value (50 float32). Every
client process asks for batches of 1,000 keys, one after the other, over its own connection. Each
side hands over what it naturally does: ours columns, redis-py a list of bytes; or, by metric, a
list of bytes or one matrix on both sides.

The batches ask for the same 1,000 items in changing order, which suits Redis best: all that it
touches stays in its processor's cache. `batch_get_large_set` draws from all items instead.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import redis

from benchmarks._harness import Figure, Metric, Settings, alternate, median
from benchmarks._load_clients import Clients
from benchmarks._servers import RunningServer, feature_cache, redis_server
from cache_daemon.client import Client

__all__ = ["BENCH", "WireBench"]

_ITEMS = 100_000
_BATCH = 1_000
_BATCHES = 64  # different ones
_DIM = 50
_NAMESPACE = "pin"
_CALL_TIMEOUT_S = 10.0

_METRICS = (
    Metric("batch_get_1_client", "requests/s of 1 client process, as each hands over", 2.0),
    Metric("batch_get_4_clients", "requests/s of 4 client processes, as each hands over", 2.0),
    Metric("batch_get_as_bytes", "requests/s of 1 client process, 1,000 bytes objects made", 1.4),
    Metric("to_matrix", "requests/s of 1 client process, one float32 matrix made", 1.8),
    Metric("batch_get_large_set", "requests/s of 1 client process, keys drawn from 100,000"),
)


@dataclass(frozen=True)
class _Load:
    """What the client processes of one metric do."""

    form: str = "natural"  # natural | bytes | matrix: what is made of a reply
    clients: int = 1
    asked_items: int = _BATCH  # of how many items the batches are drawn

    def batches(self, seed: int) -> list[list[bytes]]:
        chance = np.random.default_rng(seed)
        drawn = [chance.permutation(self.asked_items)[:_BATCH].tolist() for _ in range(_BATCHES)]
        return [[_key(number) for number in numbers] for numbers in drawn]


_LOADS = {
    "batch_get_1_client": _Load(),
    "batch_get_4_clients": _Load(clients=4),
    "batch_get_as_bytes": _Load(form="bytes"),
    "to_matrix": _Load(form="matrix"),
    "batch_get_large_set": _Load(asked_items=_ITEMS),
}


def _key(number: int) -> bytes:
    return b"pin:%012d" % number


def _values() -> "np.ndarray[Any, np.dtype[np.float32]]":
    return np.random.default_rng(7).random((_ITEMS, _DIM), np.float32)


def _our_call(target: RunningServer, form: str) -> Callable[[list[bytes]], Any]:
    client = Client(target.target, timeout=_CALL_TIMEOUT_S)
    if form == "bytes":
        return lambda keys: client.batch_get({_NAMESPACE: keys})[_NAMESPACE].to_bytes()
    if form == "matrix":
        return lambda keys: client.batch_get({_NAMESPACE: keys})[_NAMESPACE].to_numpy(
            "float32", dim=_DIM
        )[0]
    return lambda keys: client.batch_get({_NAMESPACE: keys})[_NAMESPACE]


def _redis_call(target: RunningServer, form: str) -> Callable[[list[bytes]], Any]:
    client = redis.Redis(target.host, target.port)
    if form == "matrix":
        # mget is typed for the asyncio client too.
        return lambda keys: np.frombuffer(
            b"".join(client.mget(keys)),  # type: ignore[arg-type]
            np.float32,
        ).reshape(len(keys), _DIM)
    return client.mget


def _check_same_answers(ours: RunningServer, peer: RunningServer) -> None:
    bytes_of, values_of = _our_call(ours, "bytes"), _redis_call(peer, "bytes")
    for keys in _Load(asked_items=_ITEMS).batches(0)[:8]:
        answer = bytes_of(keys)
        if answer != values_of(keys) or None in answer:
            raise RuntimeError("wire: the daemon and Redis answer differently")


class WireBench:
    """The daemon and Redis side by side, each with client processes of its own."""

    name = "wire"
    metrics: Sequence[Metric] = _METRICS

    def run(self, metrics: Sequence[str], settings: Settings) -> Iterator[Figure]:
        seconds, rounds = (0.4, 5) if settings.quick else (2.0, 11)
        bars = {metric.name: metric.bar for metric in _METRICS}
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            peer = stack.enter_context(redis_server(directory))
            ours = stack.enter_context(
                feature_cache(
                    directory,
                    memory="128MiB",
                    namespaces={_NAMESPACE: {"domains": {"all": {"budget": "100%"}}}},
                )
            )
            _fill(ours, peer)
            _check_same_answers(ours, peer)
            for metric in metrics:
                with ExitStack() as clients:
                    us = Clients(clients, _our_call, ours, _LOADS[metric])
                    them = Clients(clients, _redis_call, peer, _LOADS[metric])
                    our_rates, peer_rates = alternate(
                        lambda us=us: us.round(seconds),  # type: ignore[misc]
                        lambda them=them: them.round(seconds),  # type: ignore[misc]
                        rounds,
                    )
                    yield Figure(
                        bench=self.name,
                        metric=metric,
                        value=median(our_rates),
                        unit="requests/s",
                        peer="redis-py[hiredis] mget, Redis over TCP",
                        peer_value=median(peer_rates),
                        bar=bars[metric],
                        extra=us.extra("") | them.extra("peer_"),
                    )


def _fill(ours: RunningServer, peer: RunningServer) -> None:
    values = _values()
    with Client(ours.target, timeout=_CALL_TIMEOUT_S) as client, redis.Redis(port=peer.port) as r:
        for start in range(0, _ITEMS, _BATCH):
            keys = [_key(number) for number in range(start, start + _BATCH)]
            rows = values[start : start + _BATCH]
            if not client.batch_put({_NAMESPACE: (keys, rows)}).all_stored:
                raise RuntimeError("wire: the daemon has no room for the items")
            r.mset({key: row.tobytes() for key, row in zip(keys, rows, strict=True)})


BENCH = WireBench()
