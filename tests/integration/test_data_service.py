"""The data service as other gRPC clients see it: the stream, the row-wise Get, health, reflection,
limits. The client here is grpcio with the generated messages, so the wire contract is the proto's.
"""

import random
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cache_daemon import _native
from cache_daemon._proto.feature_cache.v1 import feature_cache_pb2 as pb
from cache_daemon._proto.feature_cache.v1 import feature_cache_pb2_grpc as pb_grpc

_SERVICE = "feature_cache.v1.FeatureCache"
_MAX_MESSAGE = 1 << 20
_BATCH_KEYS = 2000


class Puppet:
    """Answers a store's misses as told: `b"v" + key`, or not before `release`."""

    def __init__(self, node: _native.Node) -> None:
        self.hold = threading.Event()
        self.taken = threading.Event()
        self._stop = threading.Event()
        self._node = node
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            batch = self._node.take_fetch("store", 0.05)
            if batch is None:
                continue
            self.taken.set()
            while self.hold.is_set() and not self._stop.is_set():
                time.sleep(0.002)
            batch.complete([[b"v" + key for key in keys] for _, keys in batch.groups])

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
def node() -> Iterator[_native.Node]:
    domain = _native.DomainConfig(name="main", budget_bytes=16 << 20)
    node = _native.Node(
        _native.NodeConfig(
            memory_bytes=32 << 20,
            namespaces=[
                _native.NamespaceConfig(
                    name="pin", domains=[domain], default_domain="main", store="store"
                ),
                _native.NamespaceConfig(
                    name="user",
                    domains=[_native.DomainConfig(name="main", budget_bytes=4 << 20)],
                    default_domain="main",
                ),
            ],
            stores=[_native.StoreConfig(name="store", timeout_ms=10_000)],
            max_batch_keys=_BATCH_KEYS,
        )
    )
    yield node
    node.stop()


@pytest.fixture
def store(node: _native.Node) -> Iterator[Puppet]:
    puppet = Puppet(node)
    yield puppet
    puppet.stop()


@pytest.fixture
def server(node: _native.Node) -> Iterator[_native.Server]:
    server = _native.Server(node, ["127.0.0.1:0"], max_message_bytes=_MAX_MESSAGE)
    server.set_serving(True)
    yield server
    server.stop()


@pytest.fixture
def channel(server: _native.Server, store: Puppet) -> Iterator[grpc.Channel]:  # noqa: ARG001
    with grpc.insecure_channel(server.addresses[0]) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> pb_grpc.FeatureCacheStub:
    return pb_grpc.FeatureCacheStub(channel)


def get_request(
    ids: list[int], request_id: int = 0, cache_only: bool = False
) -> pb.BatchGetRequest:
    column = pb.KeyColumn(namespace="pin", ids=ids)
    return pb.BatchGetRequest(request_id=request_id, columns=[column], cache_only=cache_only)


def value_of(key_id: int) -> bytes:
    return b"v" + struct.pack("<Q", key_id)


def test_a_stream_answers_every_request_by_its_number(stub: pb_grpc.FeatureCacheStub) -> None:
    requests = [get_request([n, n + 1], request_id=n) for n in range(1, 301)]
    replies = {reply.request_id: reply for reply in stub.BatchGetStream(iter(requests), timeout=20)}
    assert sorted(replies) == list(range(1, 301))
    for n, reply in replies.items():
        assert reply.columns[0].values == value_of(n) + value_of(n + 1)
        assert list(reply.columns[0].value_lengths) == [9, 9]


def test_a_slow_fetch_does_not_hold_up_the_stream(
    stub: pb_grpc.FeatureCacheStub, store: Puppet
) -> None:
    stub.BatchPut(
        pb.BatchPutRequest(
            columns=[
                pb.PutColumn(
                    keys=pb.KeyColumn(namespace="pin", ids=[7]), values=b"here", value_lengths=[4]
                )
            ]
        )
    )
    store.hold.set()
    more = threading.Event()

    def requests() -> Iterator[pb.BatchGetRequest]:
        yield get_request([1], request_id=1)  # waits for the store
        yield get_request([7], request_id=2)
        more.wait(10)

    replies = stub.BatchGetStream(requests(), timeout=20)
    assert next(replies).request_id == 2
    store.hold.clear()
    assert next(replies).request_id == 1
    more.set()
    assert list(replies) == []


def test_a_malformed_request_ends_its_stream_only(stub: pb_grpc.FeatureCacheStub) -> None:
    with pytest.raises(grpc.RpcError) as error:
        list(
            stub.BatchGetStream(
                iter(
                    [
                        get_request([1]),
                        pb.BatchGetRequest(columns=[pb.KeyColumn(namespace="nowhere", ids=[1])]),
                    ]
                ),
                timeout=10,
            )
        )
    assert error.value.code() == grpc.StatusCode.NOT_FOUND
    assert stub.BatchGet(get_request([1]), timeout=10).columns[0].values == value_of(1)


def test_an_open_stream_does_not_hold_up_a_drain(
    stub: pb_grpc.FeatureCacheStub, server: _native.Server
) -> None:
    end = threading.Event()

    def requests() -> Iterator[pb.BatchGetRequest]:
        yield get_request([1], request_id=1)
        end.wait(20)

    replies = stub.BatchGetStream(requests(), timeout=20)
    assert next(replies).request_id == 1
    started = time.monotonic()
    assert server.drain(10.0)
    assert time.monotonic() - started < 5.0
    with pytest.raises(grpc.RpcError) as error:
        next(replies)
    end.set()
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE


def test_one_key_for_people(stub: pb_grpc.FeatureCacheStub) -> None:
    reply = stub.Get(pb.GetRequest(namespace="pin", key_text="cat"), timeout=10)
    assert (reply.status, reply.value) == (pb.FETCHED, b"vcat")
    deadline = time.monotonic() + 5
    while True:
        reply = stub.Get(pb.GetRequest(namespace="pin", key_bytes=b"cat", cache_only=True))
        if reply.status == pb.HIT_DRAM or time.monotonic() > deadline:
            break
    assert (reply.status, reply.value) == (pb.HIT_DRAM, b"vcat")
    reply = stub.Get(pb.GetRequest(namespace="pin", key_id=5), timeout=10)
    assert reply.value == value_of(5)
    with pytest.raises(grpc.RpcError) as error:
        stub.Get(pb.GetRequest(namespace="pin"), timeout=10)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_health_follows_what_the_daemon_says(channel: grpc.Channel, server: _native.Server) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    for serving in (True, False, True):
        server.set_serving(serving)
        for service in ("", _SERVICE):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert (answer.status == health_pb2.HealthCheckResponse.SERVING) == serving


def test_reflection_names_the_service(channel: grpc.Channel) -> None:
    stub_class: Any = reflection_pb2_grpc.ServerReflectionStub
    reflection = stub_class(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = reflection.ServerReflectionInfo(iter([request]), timeout=10)
    assert _SERVICE in {service.name for service in answer.list_services_response.service}


def test_a_message_above_the_limit_is_refused(stub: pb_grpc.FeatureCacheStub) -> None:
    put = pb.PutColumn(
        keys=pb.KeyColumn(namespace="pin", ids=[1]),
        values=bytes(_MAX_MESSAGE),
        value_lengths=[_MAX_MESSAGE],
    )
    with pytest.raises(grpc.RpcError) as error:
        stub.BatchPut(pb.BatchPutRequest(columns=[put]), timeout=10)
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    reply = stub.BatchGet(get_request([1], cache_only=True), timeout=10)
    assert reply.columns[0].statuses == bytes([pb.MISS])


def test_a_batch_above_the_limit_names_it(stub: pb_grpc.FeatureCacheStub) -> None:
    with pytest.raises(grpc.RpcError) as error:
        stub.BatchGet(get_request(list(range(_BATCH_KEYS + 1))), timeout=10)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"{_BATCH_KEYS} keys (limits.max_batch_keys)" in str(error.value.details())


@pytest.mark.parametrize("method", ["BatchGet", "BatchPut", "BatchDelete"])
def test_random_bytes_are_refused_and_harm_nothing(
    channel: grpc.Channel, stub: pb_grpc.FeatureCacheStub, method: str
) -> None:
    assert stub.BatchGet(get_request([1, 2, 3]), timeout=10).columns[0].values
    valid = get_request([1, 2, 3]).SerializeToString()
    call: Any = channel.unary_unary(f"/{_SERVICE}/{method}")
    seed = random.randrange(1 << 32)
    generator = random.Random(seed)
    codes = set()
    for _ in range(300):
        garbage = bytearray(generator.randbytes(generator.randrange(1, 200)))
        if generator.random() < 0.7:
            garbage = bytearray(valid[: generator.randrange(len(valid))])
            for _ in range(generator.randrange(1, 4)):
                garbage.insert(generator.randrange(len(garbage) + 1), generator.randrange(256))
        try:
            # A mutation may be valid; but it must not write under the names that are read below.
            call(bytes(garbage).replace(b"pin", b"pig"), timeout=10)
        except grpc.RpcError as error:
            codes.add(error.code())
    allowed = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    assert codes <= allowed, f"seed {seed}: {codes}"
    assert grpc.StatusCode.INVALID_ARGUMENT in codes
    again = stub.BatchGet(get_request([1, 2, 3]), timeout=10).columns[0]
    assert again.values == value_of(1) + value_of(2) + value_of(3)


def reply_in_time(
    stub: pb_grpc.FeatureCacheStub, request: pb.BatchGetRequest
) -> pb.BatchGetResponse:
    """A reply, not DEADLINE_EXCEEDED; a busy machine may hold one up past the daemon's margin."""
    for _ in range(20):
        call = stub.BatchGet.future(request, timeout=0.3)
        if call.code() == grpc.StatusCode.OK:
            return call.result()
    pytest.fail("no reply came before its deadline")


def test_a_deadline_is_kept_and_says_what_is_missing(
    stub: pb_grpc.FeatureCacheStub, store: Puppet
) -> None:
    assert stub.BatchGet(get_request([1]), timeout=10).columns[0].values == value_of(1)
    store.hold.set()
    column = reply_in_time(stub, get_request([1, 2])).columns[0]
    assert column.statuses[1] == pb.TIMED_OUT
    assert column.values == value_of(1)
    store.hold.clear()
    # The fetch outlived the call that started it: its value is there for the next one.
    assert stub.BatchGet(get_request([2]), timeout=10).columns[0].values == value_of(2)


def test_a_client_that_leaves_in_the_middle_harms_nobody(
    stub: pb_grpc.FeatureCacheStub, store: Puppet
) -> None:
    store.hold.set()
    calls = [stub.BatchGet.future(get_request([n, 99]), timeout=10) for n in range(20)]
    assert store.taken.wait(10)
    for call in calls[:-1]:
        call.cancel()
    store.hold.clear()
    assert calls[-1].result().columns[0].values == value_of(19) + value_of(99)
    assert stub.BatchGet(get_request([3]), timeout=10).columns[0].values == value_of(3)
