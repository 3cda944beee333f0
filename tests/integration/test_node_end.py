"""The data service before there is a node, and a node after its orderly end, by the bindings."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_daemon import _native
from cache_daemon.client import AsyncClient, Client, InvalidRequest, Status, Unavailable
from tests.daemon_process import ONCE

KEYS = [b"key %d" % number for number in range(500)]
VALUES = [b"value %d" % number for number in range(500)]


def config_of(
    *, store: str = "", persist: _native.PersistConfig | None = None
) -> _native.NodeConfig:
    domain = _native.DomainConfig(name="main", budget_bytes=8 << 20)
    namespace = _native.NamespaceConfig(
        name="pin", domains=[domain], default_domain="main", store=store
    )
    stores = [_native.StoreConfig(name=store)] if store else []
    return _native.NodeConfig(
        memory_bytes=32 << 20, namespaces=[namespace], stores=stores, persist=persist
    )


@pytest.fixture
def node() -> Iterator[_native.Node]:
    made = _native.Node(config_of())
    yield made
    made.stop()


def put(node: _native.Node) -> None:
    node.batch_put(_native.encode_put([("pin", KEYS, "", VALUES, None)]), 5.0)


GET = _native.encode_get([("pin", KEYS, "")])


# ---- a server without a node ---------------------------------------------------------------------


def test_calls_are_refused_until_a_node_is_attached(node: _native.Node, tmp_path: Path) -> None:
    server = _native.Server(None, [f"unix:{tmp_path}/data.sock"])
    with Client(server.addresses[0], timeout=5, retry=ONCE) as client:
        for call in (
            lambda: client.batch_get({"pin": KEYS}),
            lambda: client.batch_put({"pin": (KEYS, VALUES)}),
            lambda: client.batch_delete({"pin": KEYS}),
        ):
            with pytest.raises(Unavailable, match="recovering: try again"):
                call()
        server.attach(node)
        client.batch_put({"pin": (KEYS, VALUES)})
        assert client.batch_get({"pin": KEYS})["pin"].to_bytes() == VALUES
    server.stop()


def test_reads_may_be_misses_until_a_node_is_attached(node: _native.Node, tmp_path: Path) -> None:
    server = _native.Server(
        None, [f"unix:{tmp_path}/data.sock"], misses_until_attached=True, max_batch_keys=600
    )
    put(node)
    with Client(server.addresses[0], timeout=5, retry=ONCE) as client:
        reply = client.batch_get({"pin": KEYS, "any": KEYS[:1]})
        assert reply["pin"].statuses.tolist() == [Status.MISS] * len(KEYS)
        assert reply["any"].to_bytes() == [None]
        assert client.batch_get({"pin": []})["pin"].to_bytes() == []
        with pytest.raises(InvalidRequest):
            client.batch_get({"pin": KEYS * 2})  # more than max_batch_keys
        with pytest.raises(Unavailable, match="recovering: try again"):
            client.batch_put({"pin": (KEYS, VALUES)})
        server.attach(node)
        assert client.batch_get({"pin": KEYS})["pin"].to_bytes() == VALUES
    server.stop()


def test_a_node_is_handed_over_under_load(node: _native.Node, tmp_path: Path) -> None:
    server = _native.Server(None, [f"unix:{tmp_path}/data.sock"], misses_until_attached=True)
    put(node)
    seen: list[list[int]] = []
    stop = threading.Event()

    def read() -> None:
        mine: list[int] = []
        with Client(server.addresses[0], timeout=5, retry=ONCE) as client:
            while not stop.is_set():
                (status,) = set(client.batch_get({"pin": KEYS})["pin"].statuses.tolist())
                mine.append(status)
        seen.append(mine)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    server.attach(node)
    time.sleep(0.2)
    stop.set()
    for thread in threads:
        thread.join(10)
    server.stop()
    assert len(seen) == len(threads)
    for mine in seen:
        # Misses, then hits, and never a miss again.
        assert mine == sorted(mine, reverse=Status.MISS > Status.HIT_DRAM)
        assert {mine[0], mine[-1]} == {Status.MISS, Status.HIT_DRAM}


def test_a_server_has_one_node(node: _native.Node, tmp_path: Path) -> None:
    server = _native.Server(node, [f"unix:{tmp_path}/data.sock"])
    with pytest.raises(RuntimeError, match="has a node already"):
        server.attach(node)
    server.stop()


# ---- a node after its end ------------------------------------------------------------------------


def test_an_ended_node_refuses_calls_and_shows_nothing() -> None:
    node = _native.Node(config_of(store="features"))
    put(node)
    assert node.samples()
    assert node.shutdown()
    assert node.shutdown()  # says the same again
    with Client(node, retry=ONCE) as client:
        for call in (
            lambda: client.batch_get({"pin": KEYS}, timeout=1),
            lambda: client.batch_put({"pin": (KEYS, VALUES)}, timeout=1),
            lambda: client.batch_delete({"pin": KEYS}, timeout=1),
        ):
            with pytest.raises(Unavailable, match="shut down"):
                call()
    answers: list[object] = []
    node.batch_get_async(GET, 1.0, answers.append)
    assert isinstance(answers[0], _native.RpcError)
    assert node.samples() == []
    assert node.histograms() == []
    assert node.take_fetch("features", 1.0) is None
    with pytest.raises(RuntimeError, match="shut down"):
        node.flush_namespace("pin")
    with pytest.raises(RuntimeError, match="shut down"):
        node.resize_domain("pin", "main", 4 << 20)
    assert node.start_report().memory == "off"
    node.stop()


def test_what_waits_is_answered_when_a_node_ends() -> None:
    node = _native.Node(config_of(store="features"))
    statuses: list[set[int]] = []

    def read() -> None:
        reply = node.batch_get(GET, 30.0)
        statuses.append(set(reply.statuses(0).tolist()))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    batch = node.take_fetch("features", 5.0)
    assert batch is not None
    waiting = threading.Thread(target=node.take_fetch, args=["features", 30.0])
    waiting.start()
    began = time.monotonic()
    assert node.shutdown()
    for thread in (*readers, waiting):
        thread.join(10)
    assert time.monotonic() - began < 5
    assert statuses == [{Status.TIMED_OUT}] * 3
    # A store that answers only now harms nobody.
    batch.complete([[b"late"] * len(KEYS)])
    batch.fail("error")
    del batch


async def _ask(node: _native.Node) -> None:
    async with AsyncClient(node) as client:
        with pytest.raises(Unavailable):
            await client.batch_get({"pin": KEYS}, timeout=1)


def test_an_async_client_of_an_ended_node_is_refused() -> None:
    node = _native.Node(config_of())
    node.shutdown()
    asyncio.run(_ask(node))


def test_a_server_over_an_ended_node_cannot_be_made(tmp_path: Path) -> None:
    node = _native.Node(config_of())
    node.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        _native.Server(node, [f"unix:{tmp_path}/data.sock"])


def test_the_memory_is_free_for_the_next_as_soon_as_a_node_has_ended() -> None:
    persist = _native.PersistConfig(dir="/dev/shm", name=f"fc-node-end-{time.monotonic_ns()}")
    try:
        first = _native.Node(config_of(persist=persist))
        put(first)
        assert first.shutdown()
        progress = _native.RecoveryProgress()
        second = _native.Node(config_of(persist=persist), progress)
        assert second.start_report().memory == "clean"
        assert set(second.batch_get(GET, 5.0).statuses(0).tolist()) == {Status.HIT_DRAM}
        assert second.shutdown()
    finally:
        for path in Path("/dev/shm").glob(f"{persist.name}.*"):
            path.unlink()


def test_what_the_system_refuses_is_an_os_error(tmp_path: Path) -> None:
    persist = _native.PersistConfig(dir=str(tmp_path))
    with pytest.raises(OSError, match=r"persist\.dir"):
        _native.Node(config_of(persist=persist))
