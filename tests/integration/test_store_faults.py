"""Stores that refuse, hang or answer garbage behind a real node: they cost misses only."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from cache_daemon._native import (
    DomainConfig,
    HintedValue,
    NamespaceConfig,
    Node,
    NodeConfig,
    StoreConfig,
    encode_get,
)
from cache_daemon.fetch import FetchLoop
from cache_daemon.stores import (
    Groups,
    Store,
    StoreAnswerError,
    StoreError,
    StoreThrottled,
    StoreTimeout,
    StoreUnavailable,
    make_store,
)
from cache_daemon.stores.guard import GuardedStore, GuardOptions
from tests.servers import RedisServer, wait_until

# CellStatus of proto/feature_cache/v1/feature_cache.proto
HIT_DRAM, FETCHED, NOT_FOUND, TIMED_OUT, THROTTLED, ERROR = 1, 3, 5, 7, 8, 10

Cells = list[tuple[int, bytes | None]]
Answer = Callable[[Groups], Any]


class PuppetStore:
    """Answers as the test says, which may change while it runs."""

    def __init__(self, answer: Answer | None = None) -> None:
        self.answer: Answer = answer or good
        self.calls = 0

    def get_many(self, groups: Groups, timeout_s: float) -> Any:  # noqa: ARG002
        self.calls += 1
        return self.answer(groups)

    def close(self) -> None:
        pass


def good(groups: Groups) -> list[list[bytes]]:
    return [[value_of(namespace, key) for key in keys] for namespace, keys in groups]


def value_of(namespace: str, key: bytes) -> bytes:
    return b"%b of %b" % (key, namespace.encode())


def raising(error: BaseException) -> Answer:
    """Raises the same object each time: its traceback keeps the frames of earlier calls alive."""

    def answer(groups: Groups) -> Any:  # noqa: ARG001
        raise error

    return answer


@contextmanager
def serving(stores: Mapping[str, Store], **guard: Any) -> Iterator[Node]:
    """A node whose namespace `x_n` or `x_m` is read through to store `x`, with its fetch loops."""
    options = GuardOptions.model_validate(
        {"retries": 0, "breaker_failures": 0, "concurrency": 2, **guard}
    )
    node = Node(
        NodeConfig(
            memory_bytes=64 << 20,
            namespaces=[
                NamespaceConfig(
                    name=f"{store}_{suffix}",
                    domains=[
                        DomainConfig(name="main", budget_bytes=4 << 20),
                        DomainConfig(name="hinted", budget_bytes=4 << 20),
                    ],
                    default_domain="main",
                    store=store,
                )
                for store in stores
                for suffix in ("n", "m")
            ],
            stores=[
                StoreConfig(
                    name=store,
                    concurrency=options.concurrency,
                    timeout_ms=round(options.timeout * 1000),
                )
                for store in stores
            ],
        )
    )
    loops = [
        FetchLoop(node, name, GuardedStore(name, store, options), options.concurrency)
        for name, store in stores.items()
    ]
    try:
        for loop in loops:
            loop.start()
        yield node
    finally:
        for loop in loops:
            loop.request_stop()
        node.stop()
        for loop in loops:
            assert loop.join(10)


def read(node: Node, columns: Mapping[str, Sequence[bytes]], timeout_s: float = 5.0) -> list[Cells]:
    request = encode_get([(namespace, keys, "") for namespace, keys in columns.items()])
    reply = node.batch_get(request, timeout_s)
    cells = [
        list(zip(reply.statuses(i).tolist(), reply.as_bytes(i), strict=True))
        for i in range(reply.columns)
    ]
    for (namespace, keys), column in zip(columns.items(), cells, strict=True):
        arrived = [key for key, (status, _) in zip(keys, column, strict=True) if status == FETCHED]
        _wait_until_cached(node, namespace, arrived)
    return cells


def _wait_until_cached(node: Node, namespace: str, keys: Sequence[bytes]) -> None:
    """Who waits is answered first, then the values enter: a read right after may join the fetch."""
    request = encode_get([(namespace, keys, "")], cache_only=True)
    deadline = time.monotonic() + 5.0
    while keys and not (node.batch_get(request, 5.0).statuses(0) == HIT_DRAM).all():
        assert time.monotonic() < deadline, "fetched values did not enter the cache"
        time.sleep(0.001)


def fetched(namespace: str, *keys: bytes) -> Cells:
    return [(FETCHED, value_of(namespace, key)) for key in keys]


def hits(namespace: str, *keys: bytes) -> Cells:
    return [(HIT_DRAM, value_of(namespace, key)) for key in keys]


def failed(status: int, count: int) -> Cells:
    return [(status, None)] * count


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StoreUnavailable("down"), ERROR),
        (StoreAnswerError("odd"), ERROR),
        (StoreError("?"), ERROR),
        (StoreTimeout("late"), TIMED_OUT),
        (StoreThrottled("429"), THROTTLED),
        (ConnectionRefusedError("nobody"), ERROR),
        (KeyError("a bug"), ERROR),
        (SystemExit(3), ERROR),
        (MemoryError(), ERROR),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_store_that_fails_costs_its_misses_only(error: BaseException, status: int) -> None:
    store = PuppetStore()
    with serving({"s": store}) as node:
        assert read(node, {"s_n": [b"a", b"b"]}) == [fetched("s_n", b"a", b"b")]
        store.answer = raising(error)
        for _ in range(3):  # more often than there are slots: none is lost
            assert read(node, {"s_n": [b"a", b"c"], "s_m": [b"d"]}) == [
                hits("s_n", b"a") + failed(status, 1),
                failed(status, 1),
            ]
        store.answer = good  # a failure was not remembered as an answer
        assert read(node, {"s_n": [b"b", b"c"], "s_m": [b"d"]}) == [
            hits("s_n", b"b") + fetched("s_n", b"c"),
            fetched("s_m", b"d"),
        ]


def in_second_group(garble: Callable[[list[Any]], Any]) -> Answer:
    def answer(groups: Groups) -> Any:
        # Both namespaces may come in one call or in two.
        return [
            garble(values) if namespace == "s_m" else values
            for (namespace, _), values in zip(groups, good(groups), strict=True)
        ]

    return answer


@pytest.mark.parametrize(
    "garble",
    [
        lambda values: values[:-1],
        lambda values: [*values, b"one more"],
        lambda _: [],
        lambda _: None,
        lambda _: 7,
        lambda _: b"xyz",  # a sequence of the right length, of integers
        lambda _: "xyz",
        lambda values: [*values[:2], 7],
        lambda values: [*values[:2], "text"],
        lambda values: [*values[:2], [values[2]]],
        lambda values: dict(enumerate(values)),
        lambda values: [HintedValue(b"x", domain="no such domain"), *values[1:]],
    ],
    ids=[
        "fewer", "more", "none", "None", "number", "bytes", "text", "number in it", "text in it",
        "list in it", "dict", "unknown domain",
    ],
)  # fmt: skip
def test_a_garbled_group_is_an_error_and_leaves_the_others_good(
    garble: Callable[[list[Any]], Any], request: pytest.FixtureRequest
) -> None:
    store = PuppetStore(in_second_group(garble))
    with serving({"s": store}) as node:
        found = read(node, {"s_n": [b"a"], "s_m": [b"x", b"y", b"z"]})
        assert found[0] == fetched("s_n", b"a")
        if "unknown domain" in request.node.name:
            # A wrong hint is no wrong value: that it is used or refused, but nothing else breaks.
            assert found[1][1:] == fetched("s_m", b"y", b"z")
            return
        assert found[1] == failed(ERROR, 3)
        store.answer = good
        assert_fetches_again(node, "s_m", b"x", b"y", b"z")


def assert_fetches_again(node: Node, namespace: str, *keys: bytes) -> None:
    """A garbled answer is not remembered: the next read asks anew.

    Its flight ends a moment after those who waited were answered. Until then a read joins it, and
    gets the same error.
    """
    for key in keys:
        wait_until(
            lambda key=key: (  # type: ignore[misc]
                read(node, {namespace: [key]}) == [fetched(namespace, key)]
            ),
            what=f"{key!r} is fetched again",
        )


@pytest.mark.parametrize(
    "answer",
    [lambda _: None, lambda _: 7, lambda _: [], lambda _: "garbage", lambda _: object()],
    ids=["None", "number", "empty", "text", "object"],
)
def test_an_answer_that_is_none_at_all_is_an_error(answer: Answer) -> None:
    store = PuppetStore(answer)
    with serving({"s": store}) as node:
        assert read(node, {"s_n": [b"a"], "s_m": [b"b", b"c"]}) == [
            failed(ERROR, 1),
            failed(ERROR, 2),
        ]
        store.answer = good
        assert_fetches_again(node, "s_n", b"a")


def test_answers_may_be_any_sequences_with_hints_and_gaps() -> None:
    store = PuppetStore(
        lambda _: ((b"plain", None, HintedValue(b"hinted", domain="hinted"), HintedValue(None)),)
    )
    with serving({"s": store}) as node:
        keys = [b"p", b"q", b"r", b"s"]
        assert read(node, {"s_n": keys}) == [
            [(FETCHED, b"plain"), (NOT_FOUND, None), (FETCHED, b"hinted"), (NOT_FOUND, None)]
        ]
        items = {
            sample.labels["domain"]: sample.value
            for sample in node.samples()
            if sample.name == "feature_cache_domain_items" and sample.labels["namespace"] == "s_n"
        }
        assert items == {"main": 1, "hinted": 1}


def test_a_store_that_hangs_is_left_at_the_deadline_and_others_go_on() -> None:
    leave = threading.Event()

    def hang(groups: Groups) -> Any:
        assert leave.wait(30)
        return good(groups)

    hanging, healthy = PuppetStore(), PuppetStore()
    with serving({"s": hanging, "t": healthy}, timeout="300ms") as node:
        try:
            assert read(node, {"s_n": [b"kept"]}) == [fetched("s_n", b"kept")]
            hanging.answer = hang
            started = time.monotonic()
            found = read(node, {"s_n": [b"kept", b"a"], "t_n": [b"b"]}, timeout_s=0.1)
            assert found == [
                hits("s_n", b"kept") + failed(TIMED_OUT, 1),
                fetched("t_n", b"b"),
            ]
            assert time.monotonic() - started < 1.0
            # The store's timeout bounds it; then all slots hang, it is not even asked any more, and
            # the caller's deadline does.
            for key in (b"c", b"d", b"e"):
                started = time.monotonic()
                found = read(node, {"s_n": [key], "t_n": [b"of " + key]}, timeout_s=1.0)
                assert found == [failed(TIMED_OUT, 1), fetched("t_n", b"of " + key)]
                assert time.monotonic() - started < 3.0
        finally:
            leave.set()
        hanging.answer = good

        def is_back() -> bool:
            (cell,) = read(node, {"s_n": [b"new"]}, timeout_s=1.0)[0]
            return cell[1] == value_of("s_n", b"new")

        wait_until(is_back, what="the slots of the calls that hung")


def test_an_open_breaker_fails_at_once_and_hits_go_on() -> None:
    store = PuppetStore()
    with serving({"s": store}, breaker_failures=2, breaker_pause="300ms") as node:
        assert read(node, {"s_n": [b"a"]}) == [fetched("s_n", b"a")]
        store.answer = raising(StoreUnavailable("down"))
        for _ in range(2):
            assert read(node, {"s_n": [b"b"]}) == [failed(ERROR, 1)]
        calls = store.calls
        store.answer = good
        assert read(node, {"s_n": [b"a", b"b"]}) == [hits("s_n", b"a") + failed(ERROR, 1)]
        assert store.calls == calls
        wait_until(lambda: read(node, {"s_n": [b"b"]})[0][0][1] is not None, what="the probe")
        assert read(node, {"s_n": [b"b"]}) == [hits("s_n", b"b")]


def test_a_rate_limit_shows_as_throttled() -> None:
    store = PuppetStore()
    with serving({"s": store}, rate_limit=10, burst=10) as node:
        keys = [b"%d" % n for n in range(10)]
        assert read(node, {"s_n": keys}) == [fetched("s_n", *keys)]
        more = [b"more %d" % n for n in range(10)]
        assert read(node, {"s_n": [keys[0], *more]}) == [
            hits("s_n", keys[0]) + failed(THROTTLED, 10)
        ]
        assert store.calls == 1


def test_a_redis_that_is_killed_costs_misses_until_it_is_back(
    start_redis: Callable[..., RedisServer],
) -> None:
    server = start_redis()
    values = {f"s_n:{n}".encode(): random.randbytes(200) for n in range(2000)}

    def fill() -> None:
        with server.client() as client:
            client.mset(values)

    def expect(low: int, high: int, status: int) -> None:
        keys = [b"%d" % n for n in range(low, high)]
        found = [None if status == ERROR else values[b"s_n:" + key] for key in keys]
        assert read(node, {"s_n": keys}) == [[(status, value) for value in found]]

    fill()
    store = make_store("s", "redis", {"port": server.port})
    with serving({"s": store}) as node:
        expect(0, 1000, FETCHED)
        server.kill()
        expect(0, 1000, HIT_DRAM)
        expect(1000, 1500, ERROR)
        server.start()
        fill()
        expect(1000, 2000, FETCHED)
        expect(0, 2000, HIT_DRAM)
    store.close()
