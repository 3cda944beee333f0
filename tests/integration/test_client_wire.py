"""The native client against a gRPC server of another make (grpcio and protobuf's own messages).

What the client writes must parse there, and what protobuf writes must read here; hostile replies
must end in an error and nothing else.
"""

import asyncio
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from cache_daemon import _native
from cache_daemon._proto.feature_cache.v1 import feature_cache_pb2 as pb
from cache_daemon.client import (
    AsyncClient,
    Client,
    ClientClosed,
    DeadlineExceeded,
    FeatureCacheError,
    InvalidRequest,
    RetryPolicy,
    ServerFault,
    Status,
    Unavailable,
    UnknownName,
    WriteStatus,
)

_SERVICE = "feature_cache.v1.FeatureCache"
Answer = Callable[[bytes, grpc.ServicerContext], bytes]


class _Service:
    """A gRPC server whose answers a test scripts, as functions from bytes to bytes."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {"BatchGet": _echo, "BatchPut": _store}
        self.answers["BatchDelete"] = _store_deletes
        self._server = grpc.server(ThreadPoolExecutor(8))
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    _SERVICE,
                    {
                        name: grpc.unary_unary_rpc_method_handler(self._handler(name))
                        for name in self.answers
                    },
                ),
            )
        )
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _handler(self, name: str) -> Answer:
        return lambda request, context: self.answers[name](request, context)

    def stop(self) -> None:
        self._server.stop(0).wait(10)


def _keys_of(column: pb.KeyColumn) -> list[bytes]:
    if column.ids:
        return [key.to_bytes(8, "little") for key in column.ids]
    ends = np.cumsum(column.key_lengths)
    return [column.keys[e - n : e] for e, n in zip(ends, column.key_lengths, strict=True)]


def _echo(request: bytes, _context: grpc.ServicerContext) -> bytes:
    """Each key's value is the key twice; a key that begins with `-` has none."""
    parsed = pb.BatchGetRequest.FromString(request)
    reply = pb.BatchGetResponse(request_id=parsed.request_id)
    for column in parsed.columns:
        keys = _keys_of(column)
        values = [b"" if key.startswith(b"-") else key * 2 for key in keys]
        statuses = [Status.NOT_FOUND if key.startswith(b"-") else Status.HIT_DRAM for key in keys]
        reply.columns.add(
            values=b"".join(values),
            value_lengths=[len(value) for value in values],
            statuses=bytes(statuses),
        )
    return reply.SerializeToString()


def _store(request: bytes, _context: grpc.ServicerContext) -> bytes:
    reply = pb.BatchWriteResponse()
    for column in pb.BatchPutRequest.FromString(request).columns:
        keys = _keys_of(column.keys)
        assert len(column.value_lengths) == len(keys)
        reply.columns.add(
            statuses=bytes(
                WriteStatus.REJECTED if key.startswith(b"-") else WriteStatus.STORED for key in keys
            )
        )
    return reply.SerializeToString()


def _store_deletes(request: bytes, _context: grpc.ServicerContext) -> bytes:
    reply = pb.BatchWriteResponse()
    for column in pb.BatchDeleteRequest.FromString(request).columns:
        reply.columns.add(statuses=bytes([WriteStatus.STORED] * len(_keys_of(column))))
    return reply.SerializeToString()


def _refuse(code: grpc.StatusCode, times: int, then: Answer) -> Answer:
    """Fails the first calls with `code`, then answers."""
    left = [times]
    lock = threading.Lock()

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        with lock:
            left[0] -= 1
            refused = left[0] >= 0
        if refused:
            context.abort(code, "not now")
        return then(request, context)

    return answer


@pytest.fixture
def service() -> Iterator[_Service]:
    running = _Service()
    yield running
    running.stop()


@pytest.fixture
def client(service: _Service) -> Iterator[Client]:
    with Client(service.target, timeout=5.0) as connected:
        yield connected


def test_columns_of_all_kinds_of_keys_come_back_in_order(client: Client) -> None:
    ids = np.arange(5) + 2**40
    blob = (b"abcdef", np.array([1, 2, 3], "uint32"))
    reply = client.batch_get({"text": ["a", "-b", "c"], "id": ids, "blob": blob, "none": []})
    assert list(reply) == ["text", "id", "blob", "none"]
    assert reply["text"].to_bytes() == [b"aa", None, b"cc"]
    assert list(reply["text"].statuses) == [Status.HIT_DRAM, Status.NOT_FOUND, Status.HIT_DRAM]
    assert list(reply["text"].lengths) == [2, 0, 2]
    assert reply["blob"].to_bytes() == [b"aa", b"bcbc", b"defdef"]
    doubled, valid = reply["id"].to_numpy("uint64", dim=2)
    assert valid.all()
    assert (doubled == np.stack([ids, ids], axis=1)).all()
    assert len(reply["none"]) == 0
    assert reply["none"].to_bytes() == []
    assert reply.hit_ratio == pytest.approx(10 / 11)


def test_a_full_column_becomes_an_aligned_array_without_a_copy(client: Client) -> None:
    column = client.batch_get({"a": ["x"], "pin": [b"%08d" % i for i in range(1000)]})["pin"]
    array, valid = column.to_numpy("float32", dim=4)
    assert array.shape == (1000, 4)
    assert valid.all()
    assert np.shares_memory(array, column.values)
    assert array.flags.aligned
    assert not array.flags.writeable
    del column  # the array alone keeps the reply alive
    assert array[7].tobytes() == b"0000000700000007"


def test_rows_without_a_value_of_that_size_are_zero_and_marked(client: Client) -> None:
    keys = ["12345678", "-", "abcd", "87654321"]
    array, valid = client.batch_get({"pin": keys})["pin"].to_numpy("int64", dim=2)
    assert list(valid) == [True, False, False, True]
    assert array[0].tobytes() == b"1234567812345678"
    assert not array[1:3].any()
    assert array[3].tobytes() == b"8765432187654321"
    scalars, valid = client.batch_get({"pin": ["abcd", "-"]})["pin"].to_numpy("int64")
    assert scalars.shape == (2,)
    assert list(valid) == [True, False]


def test_a_matrix_of_no_values_is_all_zero_and_a_wrong_size_an_error(client: Client) -> None:
    array, valid = client.batch_get({"pin": ["-1", "-2"]})["pin"].to_numpy("float32", dim=64)
    assert array.shape == (2, 64)
    assert not array.any()
    assert not valid.any()
    with pytest.raises(InvalidRequest, match="values have 8 bytes, not the 12"):
        client.batch_get({"pin": ["abcd", "-"]})["pin"].to_numpy("float32", dim=3)
    with pytest.raises(InvalidRequest):
        client.batch_get({"pin": ["abcd"]})["pin"].to_numpy("float32", dim=0)


def test_writes_answer_a_status_a_key(client: Client) -> None:
    reply = client.batch_put(
        {
            "a": (["x", "-y"], [b"1", b"2"]),
            "b": (np.arange(3), np.zeros((3, 64), "float32")),
        },
        ttl={"a": 1.5},
        domains={"b": "ephemeral"},
    )
    assert list(reply["a"]) == [WriteStatus.STORED, WriteStatus.REJECTED]
    assert list(reply["b"]) == [WriteStatus.STORED] * 3
    assert not reply.all_stored
    assert client.batch_delete({"a": ["x"], "b": [1, 2, 3]}).all_stored


def test_ttls_travel_as_milliseconds_rounded_up(service: _Service, client: Client) -> None:
    seen: list[list[int]] = []

    def record(request: bytes, context: grpc.ServicerContext) -> bytes:
        seen.extend(list(c.ttl_ms) for c in pb.BatchPutRequest.FromString(request).columns)
        return _store(request, context)

    service.answers["BatchPut"] = record
    client.batch_put({"a": (["x", "y"], [b"1", b"2"])}, ttl=0.0001)
    client.batch_put({"a": (["x", "y"], [b"1", b"2"])}, ttl=np.array([1.0, 2.5]))
    client.batch_put({"a": (["x", "y"], [b"1", b"2"])})
    assert seen == [[1], [1000, 2500], []]
    for ttl in (0, -1, float("nan"), 2**32):
        with pytest.raises(InvalidRequest, match="ttl"):
            client.batch_put({"a": (["x"], [b"1"])}, ttl=ttl)


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_a_passing_refusal_is_retried(
    service: _Service, client: Client, code: grpc.StatusCode
) -> None:
    service.answers["BatchGet"] = _refuse(code, 3, _echo)
    assert client.batch_get({"pin": ["a"]})["pin"].to_bytes() == [b"aa"]
    service.answers["BatchGet"] = _refuse(code, 4, _echo)
    with pytest.raises(FeatureCacheError, match="not now"):
        client.batch_get({"pin": ["a"]})


def test_an_error_of_the_caller_is_not_retried(service: _Service, client: Client) -> None:
    service.answers["BatchGet"] = _refuse(grpc.StatusCode.NOT_FOUND, 1, _echo)
    with pytest.raises(UnknownName, match=r"batch_get of 127\.0\.0\.1:.*not now"):
        client.batch_get({"pin": ["a"]})


def test_a_call_ends_at_its_deadline(service: _Service, client: Client) -> None:
    released = threading.Event()

    def hang(request: bytes, context: grpc.ServicerContext) -> bytes:
        released.wait(10)
        return _echo(request, context)

    service.answers["BatchGet"] = hang
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        client.batch_get({"pin": ["a"]}, timeout=0.1)
    assert 0.09 < time.monotonic() - started < 2.0
    released.set()


def test_a_daemon_that_is_away_is_unavailable_within_the_timeout() -> None:
    with socket.socket() as reserved:  # bound but not listening: nobody else can answer there
        reserved.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{reserved.getsockname()[1]}"
        started = time.monotonic()
        with Client(target) as client, pytest.raises((Unavailable, DeadlineExceeded)):
            client.batch_get({"pin": ["a"]}, timeout=0.5)
        assert time.monotonic() - started < 2.0


def test_bad_requests_fail_before_they_are_sent(client: Client) -> None:
    for columns in ({"a": "abc"}, {"a": [1.5]}, {"a": np.array([1.5])}):
        with pytest.raises(InvalidRequest):
            client.batch_get(columns)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="domains names"):
        client.batch_get({"a": ["x"]}, domains={"b": "hot"})
    with pytest.raises(InvalidRequest, match="timeout"):
        client.batch_get({"a": ["x"]}, timeout=0)
    with pytest.raises(InvalidRequest, match="2 keys with 1 values"):
        client.batch_put({"a": (["x", "y"], [b"1"])})


def test_a_message_above_the_limit_is_an_invalid_request(service: _Service) -> None:
    with (
        Client(service.target, timeout=5.0, max_message_bytes=10_000) as small,
        pytest.raises(InvalidRequest, match="larger than max"),
    ):
        small.batch_get({"pin": ["x" * 1000] * 20})


def test_a_closed_client_says_so(service: _Service) -> None:
    client = Client(service.target)
    client.close()
    client.close()
    with pytest.raises(ClientClosed):
        client.batch_get({"pin": ["a"]})


def test_closing_ends_the_calls_of_other_threads(service: _Service) -> None:
    arrived, released = threading.Event(), threading.Event()

    def hang(request: bytes, context: grpc.ServicerContext) -> bytes:
        arrived.set()
        released.wait(10)
        return _echo(request, context)

    service.answers["BatchGet"] = hang
    client = Client(service.target)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.batch_get, {"pin": ["a"]}, timeout=30)
        assert arrived.wait(5)
        client.close()
        with pytest.raises(ClientClosed):
            call.result(timeout=5)
    released.set()


def test_threads_share_a_client(client: Client) -> None:
    def ask(number: int) -> bool:
        keys = [f"{number}-{i}" for i in range(100)]
        values = client.batch_get({"pin": keys})["pin"].to_bytes()
        return values == [(key * 2).encode() for key in keys]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(64)))


def _column(**fields: object) -> bytes:
    return pb.BatchGetResponse(columns=[pb.ValueColumn(**fields)]).SerializeToString()  # type: ignore[arg-type]


_HOSTILE = {
    "not protobuf": b"\xff" * 100,
    "truncated": _column(values=b"aaaa", value_lengths=[4], statuses=b"\x01")[:-3],
    "lengths above values": _column(values=b"a", value_lengths=[9], statuses=b"\x01"),
    "lengths below values": _column(values=b"abc", value_lengths=[1], statuses=b"\x01"),
    "lengths that wrap": _column(values=b"", value_lengths=[2**31, 2**31], statuses=b"\x01\x01"),
    "fewer statuses": _column(values=b"ab", value_lengths=[1, 1], statuses=b"\x01"),
    "fewer lengths": _column(values=b"a", value_lengths=[1], statuses=b"\x01\x01"),
    "no column": b"",
    "too many columns": b"\x12\x00" * 5000,
    "half a length": bytes([0x12, 8, 0x12, 3, 0, 0, 0, 0x1A, 1, 1]),
    "length of 2^63": b"\x12" + b"\xff" * 8 + b"\x7f",
    "varint without end": b"\x12" + b"\xff" * 20,
    "column is a number": b"\x10\x05",
    "values twice": bytes([0x12, 6, 0x0A, 1, 65, 0x0A, 1, 65]),
    "fewer keys than asked": _column(values=b"a", value_lengths=[1], statuses=b"\x01"),
}


@pytest.mark.parametrize("name", _HOSTILE)
def test_a_garbled_reply_is_a_server_fault(service: _Service, client: Client, name: str) -> None:
    service.answers["BatchGet"] = lambda _request, _context: _HOSTILE[name]
    with pytest.raises(ServerFault):
        client.batch_get({"pin": ["a", "b", "c"]})
    service.answers["BatchGet"] = _echo
    assert client.batch_get({"pin": ["a"]})["pin"].to_bytes() == [b"aa"]


def test_damaged_replies_never_do_more_than_raise(service: _Service, client: Client) -> None:
    seed = 20240607
    chance = random.Random(seed)
    good = _echo(
        pb.BatchGetRequest(
            columns=[pb.KeyColumn(namespace="p", keys=b"abc", key_lengths=[1, 2])] * 2
        ).SerializeToString(),
        None,  # type: ignore[arg-type]
    )
    outcomes = {"read": 0, "refused": 0}
    for _ in range(400):
        damaged = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        cut = bytes(
            damaged[: chance.randint(0, len(damaged))] if chance.random() < 0.3 else damaged
        )
        service.answers["BatchGet"] = lambda _request, _context, cut=cut: cut  # type: ignore[misc]
        try:
            reply = client.batch_get({"p": ["a", "bc"], "q": ["a", "bc"]})
        except ServerFault:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            for column in reply.values():
                assert column.lengths.sum() == column.values.size, f"seed {seed}"
                assert len(column.to_bytes()) == 2
    assert min(outcomes.values()) > 10, outcomes


def test_fields_of_a_later_version_are_passed_over(service: _Service, client: Client) -> None:
    later = bytes([0x0A | 0x70, 2, 9, 9]) + b"\x78\x05" + b"\x7d\x01\x02\x03\x04"
    plain = _column(values=b"xy", value_lengths=[2], statuses=b"\x01")
    service.answers["BatchGet"] = lambda _request, _context: later + plain + later
    assert client.batch_get({"pin": ["a"]})["pin"].to_bytes() == [b"xy"]


def test_a_large_reply_in_many_pieces_is_read_whole(service: _Service, client: Client) -> None:
    sizes = [0, 1, 100_000, 3_000_000, 7, 5_000_000]
    values = [random.Random(size).randbytes(size) for size in sizes]
    big = _column(values=b"".join(values), value_lengths=sizes, statuses=b"\x03" * len(sizes))
    service.answers["BatchGet"] = lambda _request, _context: big
    assert client.batch_get({"pin": [f"{s}" for s in sizes]})["pin"].to_bytes() == values


def test_asyncio_calls_overlap_and_retry(service: _Service) -> None:
    service.answers["BatchGet"] = _refuse(grpc.StatusCode.UNAVAILABLE, 3, _echo)

    async def main() -> None:
        async with AsyncClient(service.target, timeout=5.0) as client:
            replies = await asyncio.gather(
                *(client.batch_get({"pin": [f"{i}"]}) for i in range(50))
            )
            assert [r["pin"].to_bytes() for r in replies] == [
                [f"{i}{i}".encode()] for i in range(50)
            ]
            assert (await client.batch_put({"a": (["x"], [b"1"])})).all_stored
            assert (await client.batch_delete({"a": ["x"]})).all_stored
        with pytest.raises(ClientClosed):
            await client.batch_get({"pin": ["a"]})

    asyncio.run(main())


def test_an_asyncio_call_can_be_cancelled_and_times_out(service: _Service) -> None:
    released = threading.Event()

    def hang(request: bytes, context: grpc.ServicerContext) -> bytes:
        released.wait(10)
        return _echo(request, context)

    service.answers["BatchGet"] = hang

    async def main() -> None:
        async with AsyncClient(service.target, retry=RetryPolicy(attempts=1)) as client:
            with pytest.raises(DeadlineExceeded):
                await client.batch_get({"pin": ["a"]}, timeout=0.1)
            task = asyncio.create_task(client.batch_get({"pin": ["a"]}, timeout=30))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            released.set()
            service.answers["BatchGet"] = _echo
            assert (await client.batch_get({"pin": ["a"]}, timeout=5))["pin"].to_bytes() == [b"aa"]

    asyncio.run(main())


_EXIT_WITH_CALLS = """
import sys
from cache_daemon._native import Channel, encode_get
channel = Channel(sys.argv[1])
request = encode_get([("pin", [b"a"], "")])
for _ in range(50):
    channel.batch_get_async(request, 5.0, lambda reply: None)
"""


def test_a_process_may_end_with_calls_under_way(service: _Service) -> None:
    for _ in range(3):
        command = [sys.executable, "-c", _EXIT_WITH_CALLS, service.target]
        ended = subprocess.run(command, capture_output=True, timeout=30, check=False)
        assert ended.returncode == 0, ended.stderr


def test_a_channel_may_end_inside_its_own_callback(service: _Service) -> None:
    for _ in range(20):
        ended = threading.Event()
        held = [_native.Channel(service.target)]

        def done(_reply: object, held: list[_native.Channel] = held) -> None:
            held.clear()
            ended.set()  # noqa: B023  (the loop waits for it)

        held[0].batch_get_async(_native.encode_get([("pin", [b"a"], "")]), 5.0, done)
        assert ended.wait(5)
