"""The Redis store against a real Redis: both layouts, transports, faults."""

import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic import ValidationError

from cache_daemon.stores import (
    Store,
    StoreAnswerError,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
    make_store,
)
from cache_daemon.stores.guard import GuardedStore, GuardOptions
from cache_daemon.stores.redis import field_of
from tests.servers import RedisServer, free_port, wait_until

StartRedis = Callable[..., RedisServer]


@contextmanager
def opened(server: RedisServer, **options: object) -> Iterator[Store]:
    store = make_store("features", "redis", {"port": server.port, **options})
    try:
        yield store
    finally:
        store.close()


def commands_of(server: RedisServer, name: str) -> int:
    """How often the server has run a command."""
    with server.client() as client:
        stats = client.info("commandstats")
    assert isinstance(stats, dict)
    found = stats.get(f"cmdstat_{name}", {"calls": 0})
    return int(found["calls"])


def random_keys(chance: random.Random, count: int, *, fixed: bool) -> list[bytes]:
    """Distinct keys with every kind of byte in them, of one length or of many."""
    keys = {chance.randbytes(8 if fixed else chance.randint(1, 60)) for _ in range(count)}
    return list(keys)


@pytest.mark.parametrize("fixed", [True, False], ids=["ids", "texts"])
@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_strings_read_back_in_the_order_asked(
    redis_server: RedisServer, transport: str, fixed: bool
) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    stored = {
        key: chance.randbytes(chance.choice([0, 1, 200, 70_000]))
        for key in random_keys(chance, 500, fixed=fixed)
    }
    asked = [*stored, *random_keys(chance, 300, fixed=fixed)]
    chance.shuffle(asked)
    with redis_server.client() as client:
        client.mset({b"pin_text:" + key: value for key, value in stored.items()})
        client.mset({"user:ann": b"1"})
    options = {"unix_socket": str(redis_server.unix_socket)} if transport == "unix" else {}
    with opened(redis_server, **options) as store:
        before = commands_of(redis_server, "mget")
        answers = store.get_many([("pin_text", asked), ("user", [b"ann", b"bob"])], 5.0)
        assert answers == [[stored.get(key) for key in asked], [b"1", None]]
        assert commands_of(redis_server, "mget") - before == 2


def test_a_key_template_names_the_redis_keys(redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        client.mset({b"\x01\x02": b"raw", "f/{user}/7/v2": b"templated"})
    with opened(redis_server, key_template="{key}") as store:
        assert store.get_many([("any", [b"\x01\x02", b"absent"])], 1.0) == [[b"raw", None]]
    with opened(redis_server, key_template="f/{key}/7/v2") as store:
        assert store.get_many([("any", [b"{user}"])], 1.0) == [[b"templated"]]
    with opened(redis_server, key_template="f/{key}/{namespace}/v2") as store:
        assert store.get_many([("7", [b"{user}", b"x"])], 1.0) == [[b"templated", None]]


@pytest.mark.parametrize("fixed", [True, False], ids=["ids", "texts"])
@pytest.mark.parametrize("field_format", ["decimal", "hex", "binary"])
def test_hashes_answer_several_namespaces_of_an_entity_by_one_command(
    redis_server: RedisServer, field_format: str, fixed: bool
) -> None:
    """Random groups that overlap in part, against a plain map."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    entities = random_keys(chance, 60, fixed=fixed)
    namespaces = ["pin_text", "pin_visual", "stats"]
    stored: dict[tuple[str, bytes], bytes] = {}
    with redis_server.client() as client:
        for entity in entities:
            for namespace in namespaces:
                if chance.random() < 0.6:
                    value = chance.randbytes(20)
                    stored[namespace, entity] = value
                    client.hset(entity, field_of(namespace, field_format), value)  # type: ignore[arg-type]
    with opened(redis_server, layout="hashes", field_format=field_format) as store:
        for _ in range(20):
            groups = [
                (namespace, chance.sample(entities, chance.randint(0, len(entities))))
                for namespace in chance.sample(namespaces, chance.randint(1, 3))
            ]
            before = commands_of(redis_server, "hmget") + commands_of(redis_server, "hget")
            answers = store.get_many(groups, 5.0)
            assert [list(found) for found in answers] == [
                [stored.get((namespace, key)) for key in keys] for namespace, keys in groups
            ]
            ran = commands_of(redis_server, "hmget") + commands_of(redis_server, "hget") - before
            assert ran == len({key for _, keys in groups for key in keys})


def test_fields_are_xxh32_of_the_namespace() -> None:
    # The published test vector of xxh32: "abc", seed 0 gives 32d153ff.
    assert field_of("abc") == b"852579327"
    assert field_of("abc", "hex") == b"32d153ff"
    assert field_of("abc", "binary") == bytes.fromhex("32d153ff")


def test_a_key_of_another_type(redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        client.rpush("n:list", b"x")
        client.set("text", b"x")
    with opened(redis_server) as store:
        assert store.get_many([("n", [b"list"])], 1.0) == [[None]]  # MGET says so
    with opened(redis_server, layout="hashes") as store:
        for groups in ([("n", [b"a", b"text"])], [("n", [b"text"]), ("m", [b"text"])]):
            with pytest.raises(StoreAnswerError, match="WRONGTYPE"):
                store.get_many(groups, 1.0)
        # The replies of the failed batch are not taken for this one's.
        assert [list(v) for v in store.get_many([("n", [b"a", b"b"])], 1.0)] == [[None, None]]


def test_a_value_of_many_reads(redis_server: RedisServer) -> None:
    value = random.randbytes(8 << 20)
    with redis_server.client() as client:
        client.mset({"n:big": value, "n:small": b"s"})
    with opened(redis_server) as store:
        assert store.get_many([("n", [b"small", b"big", b"small2"])], 10.0) == [[b"s", value, None]]


def test_credentials_and_database(start_redis: StartRedis) -> None:
    server = start_redis(password="s3cret pass")
    with server.client() as client:
        client.select(3)
        client.set("n:a", b"1")
    with opened(server, password="s3cret pass", database=3) as store:
        assert store.get_many([("n", [b"a"])], 1.0) == [[b"1"]]
    with (
        opened(server, password="wrong-one") as store,
        pytest.raises(StoreAnswerError, match="WRONGPASS") as caught,
    ):
        store.get_many([("n", [b"a"])], 1.0)
    assert "wrong-one" not in str(caught.value)
    with opened(server) as store, pytest.raises(StoreAnswerError, match="NOAUTH"):
        store.get_many([("n", [b"a"])], 1.0)


def test_tls(start_redis: StartRedis, tmp_path: Path) -> None:
    request = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    names = "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        [*request.split(), *names.split(), "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=30,
    )
    tls_port = free_port()
    server = start_redis(
        *("--tls-port", str(tls_port), "--tls-auth-clients", "no"),
        *("--tls-cert-file", str(tmp_path / "cert.pem")),
        *("--tls-key-file", str(tmp_path / "key.pem")),
    )
    with server.client() as client:
        client.mset({"n:a": b"1", "n:big": bytes(1 << 20)})
    trusted = {"tls": True, "tls_ca": str(tmp_path / "cert.pem")}
    with opened(server, **trusted | {"port": tls_port}) as store:
        assert store.get_many([("n", [b"a", b"big"])], 5.0) == [[b"1", bytes(1 << 20)]]
    with (
        opened(server, tls=True, port=tls_port) as store,
        pytest.raises(StoreUnavailable, match="certificate"),
    ):
        store.get_many([("n", [b"a"])], 5.0)


def test_a_server_that_is_not_there_costs_the_call_only(tmp_path: Path) -> None:
    """Nothing is connected while starting: a store that is down must not stop the daemon."""
    store = make_store("features", "redis", {"port": free_port()})
    with pytest.raises(StoreUnavailable, match="refused"):
        store.get_many([("n", [b"a"])], 1.0)
    store.close()
    store = make_store("features", "redis", {"unix_socket": str(tmp_path / "none.sock")})
    with pytest.raises(StoreUnavailable, match=r"none\.sock"):
        store.get_many([("n", [b"a"])], 1.0)
    store.close()


def test_a_restarted_server_is_found_again_without_an_error(start_redis: StartRedis) -> None:
    server = start_redis()
    with opened(server) as store:
        assert store.get_many([("n", [b"a"])], 1.0) == [[None]]
        server.kill()
        with pytest.raises(StoreUnavailable):
            store.get_many([("n", [b"a"])], 1.0)
        server.start()
        assert store.get_many([("n", [b"a"])], 1.0) == [[None]]
        server.kill()
        server.start()
        # The idle connection is dead; that is noticed and one more try made at once.
        assert store.get_many([("n", [b"a"])], 1.0) == [[None]]


def test_a_server_that_hangs_keeps_no_caller_beyond_its_time(start_redis: StartRedis) -> None:
    server = start_redis()
    with server.client() as client:
        client.mset({"n:a": b"1", "n:b": b"2"})
    with opened(server) as store:
        assert store.get_many([("n", [b"a"])], 1.0) == [[b"1"]]
        server.pause()
        try:
            for _ in range(2):  # on an open connection, then on a new one
                started = time.monotonic()
                with pytest.raises(StoreTimeout):
                    store.get_many([("n", [b"a"])], 0.1)
                assert time.monotonic() - started < 1.0
        finally:
            server.resume()
        # The late reply to "a" must not be given for "b".
        assert store.get_many([("n", [b"b"])], 5.0) == [[b"2"]]


def test_a_loading_or_busy_server_is_unavailable(start_redis: StartRedis) -> None:
    server = start_redis("--busy-reply-threshold", "20")

    def run_forever() -> None:
        with server.client() as client:
            try:
                client.eval("while true do end", 0)
            except Exception as error:
                ended.append(error)

    ended: list[Exception] = []
    script = threading.Thread(target=run_forever)
    script.start()
    with opened(server) as store:

        def is_busy() -> bool:
            try:
                store.get_many([("n", [b"a"])], 2.0)
            except StoreUnavailable as error:
                return "BUSY" in str(error)
            return False

        wait_until(is_busy, what="BUSY from a server that runs a script")
        with server.client() as client:
            client.script_kill()
        script.join(10)
        assert len(ended) == 1
        assert store.get_many([("n", [b"a"])], 2.0) == [[None]]


def test_threads_share_a_store_and_connections_are_reused(redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        client.mset({f"n:{n}": b"%d" % n for n in range(1000)})
        before = int(client.info("stats")["total_connections_received"])
    wrong: list[object] = []

    def read(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(30):
            asked = chance.sample(range(1000), 50)
            found = store.get_many([("n", [b"%d" % n for n in asked])], 5.0)
            if found != [[b"%d" % n for n in asked]]:
                wrong.append(seed)

    with opened(redis_server) as store:
        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        with redis_server.client() as client:
            made = int(client.info("stats")["total_connections_received"]) - before
    assert wrong == []
    assert made <= 4 + 1  # one a thread, and the one that asks


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (b"HTTP/1.0 400 Bad Request\r\n\r\n", StoreAnswerError),
        (b"*1\r\n$3\r\nabc\r\n+extra\r\n", StoreAnswerError),
        (b":1\r\n", StoreAnswerError),
        (b"*2\r\n$3\r\nab", StoreUnavailable),  # then the connection ends
        (b"", StoreUnavailable),
        (b"-LOADING Redis is loading the dataset in memory\r\n", StoreUnavailable),
    ],
)
def test_a_server_that_answers_garbage(reply: bytes, expected: type[StoreError]) -> None:
    """Redis itself cannot be made to do this, so a socket stands in for it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def serve() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer:
                    seen = b""
                    while b"MGET" not in seen:
                        part = peer.recv(4096)
                        if not part:
                            break
                        seen += part
                    peer.sendall(reply)

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        store = make_store("features", "redis", {"port": port})
        with pytest.raises(expected):
            store.get_many([("n", [b"a"])], 2.0)
        store.close()
        listener.shutdown(socket.SHUT_RDWR)
        server.join(10)


def test_a_server_that_drips_is_stopped_at_the_deadline() -> None:
    """A timeout of each read alone would never end this."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            peer, _ = listener.accept()
            with peer:
                try:
                    for _ in range(200):
                        peer.sendall(b"+")
                        time.sleep(0.02)
                except OSError:
                    return

        server = threading.Thread(target=drip, daemon=True)
        server.start()
        port = listener.getsockname()[1]
        store = make_store("features", "redis", {"port": port, "connect_timeout": "5s"})
        started = time.monotonic()
        with pytest.raises(StoreError):
            store.get_many([("n", [b"a"])], 0.2)
        assert time.monotonic() - started < 2.0
        store.close()
        server.join(10)


def test_the_guard_rides_over_a_restart(start_redis: StartRedis) -> None:
    server = start_redis()
    options = GuardOptions.model_validate(
        {"retries": 10, "retry_backoff": "100ms", "timeout": "20s", "breaker_failures": 0}
    )
    store = make_store("features", "redis", {"port": server.port})
    guarded = GuardedStore("features", store, options)
    assert guarded.get_many([("n", [b"a"])], 1.0) == [[None]]
    server.kill()
    restart = threading.Timer(0.2, server.start)
    restart.start()
    assert guarded.get_many([("n", [b"a"])], 20.0) == [[None]]
    restart.join(10)
    guarded.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_template": "static"}, "must contain {key} once"),
        ({"key_template": "{key}:{shard}"}, "may contain only"),
        ({"layout": "hashes", "key_template": "{namespace}:{key}"}, "the namespace is the field"),
        ({"layout": "lists"}, "'strings' or 'hashes'"),
        ({"tls": True, "unix_socket": "/x"}, "tls is for TCP"),
        ({"tls_ca": "x.pem"}, "needs tls: true"),
        ({"port": 70000}, "less than or equal to 65535"),
        ({"hots": "x"}, "Extra inputs"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_store("features", "redis", options)
