"""Peer copy between real nodes over a real connection."""

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from cache_daemon._native import (
    DomainConfig,
    LeafConfig,
    NamespaceConfig,
    Node,
    NodeConfig,
    PeerCopy,
    RpcError,
    Server,
    describe_peer,
    encode_get,
    encode_put,
    shard_of,
)
from tests.servers import free_port, wait_until

_DOMAINS = [("pin", "lasting"), ("pin", "brief")]
_SHARDS = 8
_UNAVAILABLE, _FAILED_PRECONDITION, _RESOURCE_EXHAUSTED = 14, 9, 8


def make_node(leaf: bool = False, memory: int = 64 << 20) -> Node:
    domains = [
        DomainConfig(name="lasting", budget_bytes=memory // 2),
        DomainConfig(name="brief", budget_bytes=memory // 8, ttl_ms=60_000, ttl_jitter=0.0),
    ]
    return Node(
        NodeConfig(
            memory_bytes=memory,
            namespaces=[NamespaceConfig(name="pin", domains=domains, default_domain="lasting")],
            leaf=LeafConfig() if leaf else None,
            shard_count=_SHARDS if leaf else 0,
        )
    )


def put(node: Node, keys: list[bytes], size: int = 200, domain: str = "", ttl_ms: int = 0) -> None:
    values = [key.ljust(size, b".") for key in keys]
    request = encode_put([("pin", keys, domain, values, ttl_ms or None)])
    assert set(node.batch_put(request, 10.0).statuses(0)) == {1}


def held(node: Node, keys: list[bytes], size: int = 200) -> int:
    reply = node.batch_get(encode_get([("pin", keys, "")], cache_only=True), 10.0)
    found = 0
    for key, value in zip(keys, reply.as_bytes(0), strict=True):
        assert value in (None, key.ljust(size, b".")), "a value of another key"
        found += value is not None
    return found


KEYS = [b"key %05d" % number for number in range(5000)]


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    servers: list[Server] = []

    def start(node: Node, **options: int) -> str:
        server = Server(node, ["127.0.0.1:0"], **options)  # type: ignore[arg-type]
        servers.append(server)
        return server.addresses[0]

    yield start
    for server in servers:
        server.stop()


def test_a_new_node_gets_all_that_a_warm_one_has(serve: Callable[..., str]) -> None:
    warm, new = make_node(), make_node()
    put(warm, KEYS)
    put(warm, [b"brief"], domain="brief", ttl_ms=30_000)
    copy = PeerCopy(new, serve(warm), _DOMAINS)
    assert copy.run(30.0)
    assert copy.items == copy.installed == len(KEYS) + 1
    assert copy.void == copy.rejected == 0
    assert held(new, KEYS) == len(KEYS)
    assert held(new, [b"brief"]) == 1
    assert copy.run(1.0), "there is no more"


def test_items_keep_what_is_left_of_their_life(serve: Callable[..., str]) -> None:
    warm, new = make_node(), make_node()
    put(warm, [b"short"], ttl_ms=1500)
    put(warm, [b"long"], ttl_ms=30_000)
    time.sleep(0.6)
    assert PeerCopy(new, serve(warm), _DOMAINS).run(10.0)
    assert held(new, [b"short", b"long"]) == 2
    wait_until(lambda: held(new, [b"short"]) == 0, 2.0)
    assert held(new, [b"long"]) == 1


def test_only_the_domains_that_are_wanted_come(serve: Callable[..., str]) -> None:
    warm, new = make_node(), make_node()
    put(warm, [b"lasting"])
    put(warm, [b"brief"], domain="brief")
    assert PeerCopy(new, serve(warm), [("pin", "brief")]).run(10.0)
    assert held(new, [b"brief"]) == 1
    assert held(new, [b"lasting"]) == 0


def test_a_peer_says_what_it_has(serve: Callable[..., str]) -> None:
    warm = make_node()
    put(warm, KEYS)
    put(warm, KEYS[:500], domain="brief")
    lasting, brief = describe_peer(serve(warm), 5.0)
    assert (lasting.namespace, lasting.domain, brief.domain) == ("pin", "lasting", "brief")
    assert lasting.items == len(KEYS) - 500
    assert brief.items == 500
    assert lasting.bytes > lasting.items * 200
    assert lasting.ttl_s == lasting.mean_ttl_left_s == 0
    assert brief.ttl_s == 60
    assert 55 < brief.mean_ttl_left_s <= 60


def test_writes_meanwhile_win(serve: Callable[..., str]) -> None:
    warm, new = make_node(), make_node()
    put(warm, KEYS, size=1000)
    copy = PeerCopy(new, serve(warm), _DOMAINS, bytes_per_second=2 << 20)
    assert not copy.run(0.2)
    put(new, KEYS[:10], size=300)
    assert copy.run(30.0)
    reply = new.batch_get(encode_get([("pin", KEYS[:10], "")], cache_only=True), 10.0)
    assert all(len(value or b"") == 300 for value in reply.as_bytes(0))
    assert held(new, KEYS[10:], 1000) > 0.9 * len(KEYS)


def test_a_copy_goes_on_where_it_was(serve: Callable[..., str]) -> None:
    warm, new = make_node(), make_node()
    put(warm, KEYS, size=2000)
    address = serve(warm)
    first = PeerCopy(new, address, _DOMAINS, bytes_per_second=4 << 20)
    assert not first.run(1.0)
    items, cursor = first.items, first.cursor
    assert 0 < items < len(KEYS)
    first.stop()
    assert not first.run(1.0)
    rest = PeerCopy(new, address, _DOMAINS, cursor=cursor)
    assert rest.run(30.0)
    assert rest.items == len(KEYS) - items
    assert held(new, KEYS, 2000) == len(KEYS)


def test_the_rate_is_bounded_on_both_sides(serve: Callable[..., str]) -> None:
    warm, new = make_node(), make_node()
    put(warm, KEYS, size=2000)  # ten megabytes
    for options, wanted in (({"copy_bytes_per_second": 10 << 20}, 0), ({}, 10 << 20)):
        began = time.monotonic()
        assert PeerCopy(new, serve(warm, **options), _DOMAINS, bytes_per_second=wanted).run(30.0)
        assert 0.7 < time.monotonic() - began < 3.0


def test_copies_at_a_time_are_bounded(serve: Callable[..., str]) -> None:
    warm, new = make_node(), make_node()
    put(warm, KEYS, size=2000)
    address = serve(warm, copies_at_once=1)
    one = PeerCopy(new, address, _DOMAINS, bytes_per_second=1 << 20)
    assert not one.run(0.2)
    with pytest.raises(RpcError) as refused:
        PeerCopy(new, address, _DOMAINS).run(5.0)
    assert refused.value.code == _RESOURCE_EXHAUSTED
    one.stop()
    one.run(1.0)
    other = PeerCopy(new, address, _DOMAINS)

    def accepted() -> bool:
        try:
            return other.run(30.0)
        except RpcError:
            return False

    wait_until(accepted)


def test_a_node_may_give_nothing(serve: Callable[..., str]) -> None:
    warm, new = make_node(), make_node()
    with pytest.raises(RpcError, match="gives no copies") as refused:
        PeerCopy(new, serve(warm, copy_bytes_per_second=0), _DOMAINS).run(5.0)
    assert refused.value.code == _FAILED_PRECONDITION


def test_unknown_domains_are_told(serve: Callable[..., str]) -> None:
    warm, new = make_node(), make_node()
    with pytest.raises(RpcError, match="no eviction domain pin/other"):
        PeerCopy(new, serve(warm), [("pin", "other")]).run(5.0)
    with pytest.raises(RpcError, match="1 to 4,096"):
        PeerCopy(new, serve(warm), []).run(5.0)


def test_nobody_answers() -> None:
    new = make_node()
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(RpcError) as refused:
        PeerCopy(new, address, _DOMAINS).run(10.0)
    assert refused.value.code == _UNAVAILABLE
    with pytest.raises(RpcError):
        describe_peer(address, 1.0)


def test_stop_ends_a_copy_that_waits(serve: Callable[..., str]) -> None:
    warm, new = make_node(), make_node()
    put(warm, KEYS, size=2000)
    copy = PeerCopy(new, serve(warm), _DOMAINS, bytes_per_second=100_000)
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(copy.run(60.0)))
    thread.start()
    wait_until(lambda: copy.items > 0 or thread.is_alive())
    time.sleep(0.2)
    began = time.monotonic()
    copy.stop()
    thread.join(5)
    assert time.monotonic() - began < 1.5
    assert results == [False]


def test_a_drain_ends_copies_at_once() -> None:
    warm, new = make_node(), make_node()
    put(warm, KEYS, size=2000)
    server = Server(warm, ["127.0.0.1:0"])
    copy = PeerCopy(new, server.addresses[0], _DOMAINS, bytes_per_second=1 << 20)
    assert not copy.run(0.3)
    began = time.monotonic()
    assert server.drain(30.0), "no accepted request is left behind"
    assert time.monotonic() - began < 2.0
    with pytest.raises(RpcError) as refused:
        copy.run(10.0)
    assert refused.value.code == _UNAVAILABLE


def test_a_leaf_gives_the_shards_that_it_answers_for(serve: Callable[..., str]) -> None:
    old, new = make_node(leaf=True), make_node(leaf=True)
    everything = np.arange(_SHARDS, dtype=np.uint32)
    old.set_owned(5, _SHARDS, everything)
    new.set_owned(6, _SHARDS, everything)
    put(old, KEYS)
    address = serve(old)
    wanted = np.array([2, 3], np.uint32)
    mine = [key for key in KEYS if shard_of("pin", key, _SHARDS) in (2, 3)]

    def copy(**options: object) -> PeerCopy:
        settings = {"shard_count": _SHARDS, "shards": wanted, **options}
        return PeerCopy(new, address, _DOMAINS, **settings)  # type: ignore[arg-type]

    with pytest.raises(RpcError, match="still goes by shard map 5") as refused:
        copy(map_version=6).run(5.0)
    assert refused.value.code == _FAILED_PRECONDITION
    old.set_owned(6, _SHARDS, everything)
    assert copy(map_version=6).run(10.0)
    assert held(new, mine) == len(mine)
    old.set_owned(7, _SHARDS, np.array([0, 1, 2], np.uint32))
    with pytest.raises(RpcError, match="does not answer for shard 3"):
        copy(map_version=6).run(5.0)
    with pytest.raises(RpcError, match="name those"):
        PeerCopy(new, address, _DOMAINS).run(5.0)
