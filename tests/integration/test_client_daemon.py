"""The client against our own server in this process, and the same calls on the embedded node."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from cache_daemon._native import (
    Channel,
    DomainConfig,
    NamespaceConfig,
    Node,
    NodeConfig,
    RpcError,
    Server,
)
from cache_daemon.client import (
    AsyncClient,
    Client,
    InvalidRequest,
    RetryPolicy,
    Status,
    Transport,
    Unavailable,
    UnknownName,
)
from tests.servers import free_port

_DIM = 50

# A server of its own process: one in this process would poll the client's connections, too.
_SERVER = """
import sys
from cache_daemon._native import DomainConfig, NamespaceConfig, Node, NodeConfig, Server
domain = DomainConfig(name="all", budget_bytes=1 << 20)
pin = NamespaceConfig(name="pin", domains=[domain], default_domain="all")
server = Server(Node(NodeConfig(memory_bytes=8 << 20, namespaces=[pin])), [sys.argv[1]])
print("up", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def node() -> Iterator[Node]:
    domains = [DomainConfig(name=name, budget_bytes=8 << 20) for name in ("long", "short")]
    pin = NamespaceConfig(name="pin", domains=domains, default_domain="long")
    running = Node(NodeConfig(memory_bytes=64 << 20, namespaces=[pin], max_batch_keys=5000))
    yield running
    running.stop()


@pytest.fixture
def server(node: Node) -> Iterator[Server]:
    running = Server(node, ["127.0.0.1:0"])
    running.set_serving(True)
    yield running
    running.stop()


@pytest.fixture(params=["tcp", "embedded"])
def target(request: pytest.FixtureRequest, node: Node, server: Server) -> str | Transport:
    return server.addresses[0] if request.param == "tcp" else node


@pytest.fixture
def client(target: str | Transport) -> Iterator[Client]:
    with Client(target, timeout=5.0) as connected:
        yield connected


def test_what_was_put_comes_back_as_one_matrix(client: Client) -> None:
    rows = np.random.default_rng(1).random((1000, _DIM), np.float32)
    keys = [b"%016d" % i for i in range(1000)]
    assert client.batch_put({"pin": (keys, rows)}).all_stored
    reply = client.batch_get({"pin": keys})
    matrix, valid = reply["pin"].to_numpy("float32", dim=_DIM)
    assert valid.all()
    assert (matrix == rows).all()
    assert reply["pin"].to_bytes() == [row.tobytes() for row in rows]
    assert reply.hit_ratio == 1.0


def test_an_id_is_the_key_of_its_eight_bytes(client: Client) -> None:
    ids = np.array([0, 1, 2**63, 2**64 - 1], np.uint64)
    assert client.batch_put({"pin": (ids, [b"a", b"", b"c", b"d"])}).all_stored
    keys = [int(i).to_bytes(8, "little") for i in ids]
    assert client.batch_get({"pin": keys})["pin"].to_bytes() == [b"a", b"", b"c", b"d"]


def test_absent_and_deleted_keys_are_misses(client: Client) -> None:
    assert client.batch_put({"pin": (["a", "b"], [b"1", b"2"])}, domains={"pin": "short"})
    assert client.batch_delete({"pin": ["a", "never"]}).all_stored
    column = client.batch_get({"pin": ["a", "b", "c"]}, cache_only=True)["pin"]
    assert list(column.statuses) == [Status.MISS, Status.HIT_DRAM, Status.MISS]
    assert column.to_bytes() == [None, b"2", None]


def test_values_of_all_sizes_survive(client: Client) -> None:
    sizes = [0, 1, 63, 64, 65, 4096, 100_000, 1_000_000]
    values = [np.random.default_rng(size).bytes(size) for size in sizes]
    keys = [f"{size}" for size in sizes]
    assert client.batch_put({"pin": (keys, values)}).all_stored
    assert client.batch_get({"pin": keys})["pin"].to_bytes() == values


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"nothing": ["a"]}, UnknownName),
        ({"pin": [b""]}, InvalidRequest),
        ({"pin": [b"x" * 1025]}, InvalidRequest),
        ({"pin": np.arange(5001)}, InvalidRequest),
    ],
)
def test_bad_requests_are_refused_and_harm_nothing(
    client: Client, columns: dict[str, list[bytes]], error: type[Exception]
) -> None:
    assert client.batch_put({"pin": (["kept"], [b"1"])}).all_stored
    with pytest.raises(error):
        client.batch_get(columns)
    with pytest.raises(error):
        client.batch_delete(columns)
    assert client.batch_get({"pin": ["kept"]})["pin"].to_bytes() == [b"1"]


def test_an_unknown_domain_is_named(client: Client) -> None:
    with pytest.raises(UnknownName, match="nowhere"):
        client.batch_put({"pin": (["a"], [b"1"])}, domains={"pin": "nowhere"})


def test_asyncio_calls_overlap(target: str | Transport) -> None:
    async def main() -> None:
        async with AsyncClient(target, timeout=5.0) as client:
            ids = np.arange(2000).reshape(20, 100)
            await asyncio.gather(
                *(client.batch_put({"pin": (row, row.reshape(-1, 1))}) for row in ids)
            )
            replies = await asyncio.gather(*(client.batch_get({"pin": row}) for row in ids))
            for row, reply in zip(ids, replies, strict=True):
                values, valid = reply["pin"].to_numpy("int64")
                assert valid.all()
                assert (values == row).all()

    asyncio.run(main())


def test_garbage_on_the_wire_is_an_invalid_argument(node: Node, server: Server) -> None:
    channel = Channel(server.addresses[0])
    for garbage in (b"\xff" * 50, b"\x12\x05\x0a", b"\x12\x7f\x0a\x03pin"):
        for call in (channel.batch_get, channel.batch_put, channel.batch_delete, node.batch_get):
            with pytest.raises(RpcError) as caught:
                call(garbage, 5.0)
            assert caught.value.code == 3, caught.value.details
    channel.close()


def test_a_client_finds_a_daemon_that_came_back(node: Node) -> None:
    first = Server(node, ["127.0.0.1:0"])
    address = first.addresses[0]
    with Client(address, timeout=5.0) as client:
        assert client.batch_put({"pin": (["a"], [b"1"])}).all_stored
        first.stop()
        with pytest.raises(Unavailable):
            client.batch_get({"pin": ["a"]}, timeout=0.3)
        second = Server(node, [address])
        try:
            for _ in range(20):  # reconnects back off for at most a second
                try:
                    reply = client.batch_get({"pin": ["a"]}, timeout=0.5)
                    break
                except Unavailable:
                    continue
            assert reply["pin"].to_bytes() == [b"1"]
        finally:
            second.stop()


def test_a_client_that_was_refused_for_long_finds_the_daemon_within_two_seconds() -> None:
    address = f"127.0.0.1:{free_port()}"
    with Client(address, timeout=1.0, retry=RetryPolicy(attempts=1)) as client:
        end = time.monotonic() + 2.5  # so that gRPC has backed off as far as it does
        while time.monotonic() < end:
            with pytest.raises(Unavailable):
                client.batch_get({"pin": ["a"]})
            time.sleep(0.01)
        command = [sys.executable, "-c", _SERVER, address]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == b"up\n"
            up = time.monotonic()
            while True:
                try:
                    client.batch_get({"pin": ["a"]})
                    break
                except Unavailable:
                    assert time.monotonic() - up < 2.0
                    time.sleep(0.01)
            assert server.stdin is not None
            server.stdin.close()
