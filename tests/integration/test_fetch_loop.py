"""The fetch loop between a real node and a store: batches, bounds and stops.

What stores that fail or lie do to it is in test_store_faults.py.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from cache_daemon._native import (
    DomainConfig,
    NamespaceConfig,
    Node,
    NodeConfig,
    StoreConfig,
    encode_get,
)
from cache_daemon.fetch import FetchLoop
from cache_daemon.stores import Groups, StoreUnavailable, Values

HIT_DRAM, FETCHED, TIMED_OUT = 1, 3, 7
_NAMESPACES = ("a", "b")


class RecordingStore:
    """Answers each key with itself and remembers what it was asked, and by how many at once."""

    def __init__(self, before: Callable[[Groups], None] = lambda _: None) -> None:
        self.batches: list[list[tuple[str, list[bytes]]]] = []
        self.asked: Counter[tuple[str, bytes]] = Counter()
        self.most_at_once = 0
        self._before = before
        self._at_once = 0
        self._lock = threading.Lock()

    def get_many(self, groups: Groups, timeout_s: float) -> Values:
        assert timeout_s > 0
        with self._lock:
            self.batches.append(list(groups))
            self.asked.update((namespace, key) for namespace, keys in groups for key in keys)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self._before(groups)
        finally:
            with self._lock:
                self._at_once -= 1
        return [list(keys) for _, keys in groups]

    def close(self) -> None:
        pass


def make_node(*, concurrency: int, max_batch_keys: int, timeout_ms: int) -> Node:
    return Node(
        NodeConfig(
            memory_bytes=64 << 20,
            namespaces=[
                NamespaceConfig(
                    name=name,
                    domains=[DomainConfig(name="main", budget_bytes=16 << 20)],
                    default_domain="main",
                    store="s",
                )
                for name in _NAMESPACES
            ],
            stores=[
                StoreConfig(
                    name="s",
                    concurrency=concurrency,
                    max_batch_keys=max_batch_keys,
                    timeout_ms=timeout_ms,
                )
            ],
        )
    )


@contextmanager
def looping(
    store: RecordingStore,
    *,
    concurrency: int = 2,
    max_batch_keys: int = 2000,
    timeout_ms: int = 10_000,
) -> Iterator[Node]:
    node = make_node(concurrency=concurrency, max_batch_keys=max_batch_keys, timeout_ms=timeout_ms)
    loop = FetchLoop(node, "s", store, concurrency)
    loop.start()
    try:
        yield node
    finally:
        loop.request_stop()
        node.stop()
        assert loop.join(10)


def read(node: Node, namespace: str, keys: list[bytes], timeout_s: float = 10) -> list[int]:
    reply = node.batch_get(encode_get([(namespace, keys, "")]), timeout_s)
    for status, key, value in zip(reply.statuses(0), keys, reply.as_bytes(0), strict=True):
        assert value == (key if status in (HIT_DRAM, FETCHED) else None)
    statuses: list[int] = reply.statuses(0).tolist()
    return statuses


def test_every_miss_is_asked_once_in_bounded_batches() -> None:
    store = RecordingStore()
    keys = [b"key %d" % number for number in range(5000)]
    with looping(store, max_batch_keys=700) as node:
        assert set(read(node, "a", keys)) == {FETCHED}
        # A read that comes before the values are installed joins their flights.
        assert set(read(node, "a", keys)) <= {HIT_DRAM, FETCHED}
    sizes = [sum(len(keys) for _, keys in groups) for groups in store.batches]
    assert max(sizes) <= 700
    assert sum(sizes) == 5000
    assert store.asked == Counter(("a", key) for key in keys)


def test_misses_of_several_namespaces_share_a_call() -> None:
    entered, go_on = threading.Event(), threading.Event()

    def hold_the_first(groups: Groups) -> None:
        if groups[0][1] == [b"first"]:
            entered.set()
            assert go_on.wait(30)

    store = RecordingStore(hold_the_first)
    with looping(store, concurrency=1) as node:
        first = threading.Thread(target=read, args=[node, "a", [b"first"]])
        first.start()
        assert entered.wait(10)
        columns = [(name, [b"x", b"y"], "") for name in _NAMESPACES]
        replies: list[object] = []
        node.batch_get_async(encode_get(columns), 10, replies.append)
        go_on.set()
        first.join(10)
        deadline = time.monotonic() + 10
        while not replies and time.monotonic() < deadline:
            time.sleep(0.005)
        assert len(replies) == 1
    assert len(store.batches) == 2
    assert sorted(store.batches[1]) == [("a", [b"x", b"y"]), ("b", [b"x", b"y"])]


def test_calls_run_at_once_but_never_more_than_allowed() -> None:
    both = threading.Barrier(2)

    def meet(_groups: Groups) -> None:
        both.wait(10)  # passes only when two calls run at a time

    store = RecordingStore(meet)
    with looping(store, concurrency=2, max_batch_keys=100) as node:
        assert set(read(node, "a", [b"%d" % number for number in range(400)])) == {FETCHED}
    assert store.most_at_once == 2
    assert len(store.batches) == 4


def test_misses_that_wait_are_taken_together() -> None:
    entered, go_on = threading.Event(), threading.Event()

    def hold_the_first(groups: Groups) -> None:
        if groups[0][1] == [b"first"]:
            entered.set()
            assert go_on.wait(30)

    store = RecordingStore(hold_the_first)
    done: list[object] = []
    with looping(store, concurrency=1) as node:
        node.batch_get_async(encode_get([("a", [b"first"], "")]), 10, done.append)
        assert entered.wait(10)
        for number in range(50):
            ids = np.arange(number * 10, number * 10 + 10, dtype=np.uint64)
            node.batch_get_async(encode_get([("a", ids, "")]), 10, done.append)
        go_on.set()
        deadline = time.monotonic() + 10
        while len(done) < 51 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert len(done) == 51
    assert [sum(len(keys) for _, keys in groups) for groups in store.batches] == [1, 500]


def test_an_idle_loop_stops_at_once() -> None:
    node = make_node(concurrency=8, max_batch_keys=10, timeout_ms=1000)
    loop = FetchLoop(node, "s", RecordingStore(), 8)
    loop.start()
    time.sleep(0.05)  # all threads wait by now; if not, the test is only weaker
    started = time.monotonic()
    loop.request_stop()
    node.stop()
    assert loop.join(5)
    assert time.monotonic() - started < 0.5


def test_a_stop_does_not_wait_for_a_call_that_hangs() -> None:
    entered, leave = threading.Event(), threading.Event()

    def hang(_groups: Groups) -> None:
        entered.set()
        assert leave.wait(30)

    node = make_node(concurrency=1, max_batch_keys=10, timeout_ms=30_000)
    loop = FetchLoop(node, "s", RecordingStore(hang), 1)
    loop.start()
    replies: list[object] = []
    node.batch_get_async(encode_get([("a", [b"k"], "")]), 30, replies.append)
    try:
        assert entered.wait(10)
        loop.request_stop()
        node.stop()
        started = time.monotonic()
        assert not loop.join(0.1)
        assert time.monotonic() - started < 1
        # Who waited was answered by the stop, not by the store.
        deadline = time.monotonic() + 5
        while not replies and time.monotonic() < deadline:
            time.sleep(0.005)
        (reply,) = replies
        assert reply.statuses(0).tolist() == [TIMED_OUT]  # type: ignore[attr-defined]
    finally:
        leave.set()
        loop.request_stop()
        node.stop()
        assert loop.join(10)  # the late answer is dropped and the thread ends


def test_an_unknown_store_does_not_take_a_core(caplog: pytest.LogCaptureFixture) -> None:
    node = make_node(concurrency=1, max_batch_keys=10, timeout_ms=1000)
    loop = FetchLoop(node, "no such store", RecordingStore(), 1)
    with caplog.at_level(logging.ERROR, "cache_daemon.fetch"):
        loop.start()
        before = time.process_time()
        time.sleep(0.5)
        cpu_s = time.process_time() - before
        loop.request_stop()
        node.stop()
        assert loop.join(5)
    assert cpu_s < 0.25
    assert 1 <= len(caplog.records) <= 10


def test_a_store_that_is_down_does_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def down(_groups: Groups) -> None:
        raise StoreUnavailable("nobody home")

    with (
        caplog.at_level(logging.WARNING, "cache_daemon.fetch"),
        looping(RecordingStore(down)) as node,
    ):
        for number in range(50):
            read(node, "a", [b"%d" % number])
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "store s: StoreUnavailable: nobody home" in lines[0]
