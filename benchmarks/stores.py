"""What a batch of 1,000 keys costs on the way to a store, without the daemon around it."""

import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lmdb
import redis

from benchmarks._harness import Figure, Metric, Settings, alternate, median
from benchmarks._servers import redis_server
from cache_daemon.stores import make_store
from cache_daemon.stores.guard import GuardedStore, GuardOptions
from cache_daemon.stores.lmdb import LmdbWriter
from cache_daemon.stores.redis import field_of

__all__ = ["BENCH", "StoresBench"]

_KEYS = 1000
_VALUE_BYTES = 200
_NAMESPACE, _OTHER = "pin_text", "pin_visual"
_METRICS = (
    Metric("mget_ids", "Redis strings, 16-byte keys, through the guard; peer: redis-py mget"),
    Metric("mget_texts", "the same with keys of 8 to 24 bytes; peer: redis-py mget"),
    Metric("hashes_one", "Redis hashes, one namespace; peer: redis-py pipeline of hmget"),
    Metric("hashes_two", "Redis hashes, two namespaces of the same entities; peer: the same"),
    Metric("lmdb", "LMDB through the guard; peer: py-lmdb getmulti, put in order by a dict"),
)

_Call = Callable[[], Any]


class StoresBench:
    """Time and CPU of this process for one batch; the same answers are checked on both sides."""

    name = "stores"
    metrics: Sequence[Metric] = _METRICS

    def run(self, metrics: Sequence[str], settings: Settings) -> Iterator[Figure]:
        rounds = 7 if settings.quick else 21
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            sides: dict[str, tuple[_Call, _Call, str]] = {}
            if set(metrics) - {"lmdb"}:
                sides |= _redis_sides(stack, directory)
            if "lmdb" in metrics:
                sides["lmdb"] = _lmdb_sides(stack, directory / "lmdb")
            for metric in metrics:
                yield _measure(metric, *sides[metric], rounds)


def _keys(seed: int, *, fixed: bool) -> list[bytes]:
    chance = random.Random(seed)
    return [
        (b"%08d" % n) + chance.randbytes(8 if fixed else chance.randint(0, 16))
        for n in range(_KEYS)
    ]


def _redis_sides(stack: ExitStack, directory: Path) -> dict[str, tuple[_Call, _Call, str]]:
    server = stack.enter_context(redis_server(directory))
    ids, texts, entities = _keys(1, fixed=True), _keys(2, fixed=False), _keys(3, fixed=True)
    client = stack.enter_context(redis.Redis(host=server.host, port=server.port))
    value = random.Random(4).randbytes
    client.mset({b"pin_text:" + key: value(_VALUE_BYTES) for key in ids + texts})
    fields = [field_of(_NAMESPACE), field_of(_OTHER)]
    filling = client.pipeline(transaction=False)
    for entity in entities:
        filling.hset(entity, mapping={field: value(_VALUE_BYTES) for field in fields})
    filling.execute()

    strings = _guarded(stack, "redis", {"port": server.port})
    hashes = _guarded(stack, "redis", {"port": server.port, "layout": "hashes"})

    def mget(keys: list[bytes]) -> tuple[_Call, _Call, str]:
        redis_keys = [b"pin_text:" + key for key in keys]
        return (
            lambda: strings.get_many([(_NAMESPACE, keys)], 5.0)[0],
            lambda: client.mget(redis_keys),
            "redis-py mget",
        )

    def hmget(count: int) -> tuple[_Call, _Call, str]:
        asked = fields[:count]
        groups = [(namespace, entities) for namespace in (_NAMESPACE, _OTHER)[:count]]

        def peer() -> Any:
            pipeline = client.pipeline(transaction=False)
            for entity in entities:
                pipeline.hmget(entity, asked)
            return [value for row in pipeline.execute() for value in row]

        def ours() -> Any:
            columns = hashes.get_many(groups, 5.0)
            return columns[0] if count == 1 else list(zip(*columns, strict=True))

        flat = ours if count == 1 else lambda: [value for row in ours() for value in row]
        return flat, peer, "redis-py pipeline of hmget"

    return {
        "mget_ids": mget(ids),
        "mget_texts": mget(texts),
        "hashes_one": hmget(1),
        "hashes_two": hmget(2),
    }


def _lmdb_sides(stack: ExitStack, path: Path) -> tuple[_Call, _Call, str]:
    chance = random.Random(5)
    stored = {n.to_bytes(8, "little"): chance.randbytes(_VALUE_BYTES) for n in range(100_000)}
    for name in ("ours", "peer"):  # one process may open an environment once
        with LmdbWriter(path / name, sync=False) as writer:
            writer.write_many(_NAMESPACE, stored)
    asked = chance.sample(list(stored), _KEYS)
    guarded = _guarded(stack, "lmdb", {"path": str(path / "ours")})
    environment = stack.enter_context(
        lmdb.open(str(path / "peer"), readonly=True, max_dbs=8, readahead=False)
    )
    database = environment.open_db(_NAMESPACE.encode(), create=False)

    def peer() -> Any:
        with environment.begin(db=database) as transaction, transaction.cursor() as cursor:
            found = dict(cursor.getmulti(asked))
            return list(map(found.get, asked))

    return lambda: guarded.get_many([(_NAMESPACE, asked)], 5.0)[0], peer, "py-lmdb getmulti"


def _guarded(stack: ExitStack, type_: str, options: dict[str, object]) -> GuardedStore:
    guarded = GuardedStore("bench", make_store("bench", type_, options), GuardOptions())
    stack.callback(guarded.close)
    return guarded


def _measure(metric: str, ours: _Call, peer: _Call, peer_name: str, rounds: int) -> Figure:
    answer, expected = list(ours()), list(peer())
    if answer != expected or None in answer:
        raise RuntimeError(f"stores · {metric}: ours and {peer_name} answer differently")
    cpu = {ours: 0.0, peer: 0.0}
    calls = 10

    def timed(call: _Call) -> float:
        cpu_before, before = time.process_time(), time.perf_counter()
        for _ in range(calls):
            call()
        cpu[call] += time.process_time() - cpu_before
        return (time.perf_counter() - before) / calls

    our_times, peer_times = alternate(lambda: timed(ours), lambda: timed(peer), rounds)
    return Figure(
        bench="stores",
        metric=metric,
        value=median(our_times) * 1e6,
        unit="µs per 1,000 keys",
        peer=peer_name,
        peer_value=median(peer_times) * 1e6,
        lower_is_better=True,
        extra={
            "cpu_us": round(cpu[ours] / rounds / calls * 1e6),
            "peer_cpu_us": round(cpu[peer] / rounds / calls * 1e6),
        },
    )


BENCH = StoresBench()
