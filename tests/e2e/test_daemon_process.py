"""The daemon as a process: real sockets, a real LMDB, real signals, a real Redis that dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cache_daemon.client import (
    Client,
    FeatureCacheError,
    RetryPolicy,
    Status,
    Unavailable,
    WriteStatus,
)
from cache_daemon.embedded import EmbeddedCache
from cache_daemon.stores.lmdb import LmdbWriter
from tests.servers import RedisServer, free_port, wait_until

_START_S = 30.0
_STOP_S = 20.0
_ITEMS = {b"item %d" % number: b"value of %d" % number for number in range(3000)}
_KEYS = list(_ITEMS)
_ONCE = RetryPolicy(attempts=1)

# A slow store that leaves a file at each call, named by how many keys it asks: so a test knows
# which reads the daemon has accepted.
_STORE_MODULE = """\
import pathlib
import time


class SlowStore:
    def __init__(self, folder, seconds):
        self._folder = pathlib.Path(folder)
        self._seconds = seconds

    def get_many(self, groups, timeout_s):
        asked = sum(len(keys) for _, keys in groups)
        (self._folder / f"{time.monotonic_ns()} {asked}").touch()
        time.sleep(self._seconds)
        return [list(keys) for _, keys in groups]

    def close(self):
        (self._folder / "closed").touch()
"""


class Daemon:
    """One `cache-daemon run` process."""

    def __init__(self, folder: Path, config: dict[str, Any], **environment: str) -> None:
        self.folder = folder
        self.config_path = folder / "config.yaml"
        self.config_path.write_text(yaml.safe_dump(config, sort_keys=False))
        self.ready_path = folder / "ready.json"
        self.log_path = folder / "daemon.log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("cache-daemon")),
                    *("run", "--config", str(self.config_path)),
                    *("--ready-file", str(self.ready_path)),
                ],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(folder)} | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_until_ready(self) -> "Daemon":
        def ready() -> bool:
            assert self.process.poll() is None, f"ended at once:\n{self.log}"
            return self.ready_path.exists()

        wait_until(ready, _START_S, "the ready file")
        return self

    @property
    def addresses(self) -> dict[str, Any]:
        addresses: dict[str, Any] = json.loads(self.ready_path.read_text())
        return addresses

    @property
    def tcp(self) -> str:
        return str(next(a for a in self.addresses["grpc"] if not a.startswith("unix:")))

    def client(self, **options: Any) -> Client:
        return Client(self.tcp, **({"timeout": 10.0} | options))

    def http(self, path: str) -> tuple[int, str]:
        url = f"http://{self.addresses['http']}{path}"
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                return int(reply.status), str(reply.read().decode())
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def health(self) -> str:
        with grpc.insecure_channel(self.tcp) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = _STOP_S) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.log}") from None


Start = Callable[..., Daemon]


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A small colocated node on an LMDB with `_ITEMS` in namespaces `pin` and `user`."""
    with LmdbWriter(tmp_path / "features", sync=False, map_size=64 << 20) as writer:
        writer.write_many("pin", _ITEMS)
        writer.write_many("user", {b"u": b"user value"})
    return {
        "listen": {
            "grpc": ["127.0.0.1:0", f"unix:{tmp_path}/data.sock"],
            "admin": f"unix:{tmp_path}/admin.sock",
            "http": "127.0.0.1:0",
        },
        "memory": {"size": "32MiB"},
        "namespaces": {
            "pin": {
                "store": "features",
                "default_domain": "main",
                "domains": {"main": {"budget": "60%"}, "other": {"budget": "20%"}},
            },
            "user": {"store": "features", "domains": {"main": {"budget": "20%"}}},
        },
        "stores": {"features": {"type": "lmdb", "options": {"path": str(tmp_path / "features")}}},
        "drain_timeout": "15s",
    }


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Start]:
    """Starts daemons without waiting for them; they do not outlive the test."""
    with ExitStack() as stack:

        def start(config: dict[str, Any], **environment: str) -> Daemon:
            (tmp_path / "slow_store.py").write_text(_STORE_MODULE)
            daemon = Daemon(tmp_path, config, **environment)
            stack.callback(daemon.process.wait)
            stack.callback(daemon.process.kill)
            return daemon

        yield start


@pytest.fixture
def start(launch: Start) -> Start:
    def start_and_wait(config: dict[str, Any], **environment: str) -> Daemon:
        return launch(config, **environment).wait_until_ready()

    return start_and_wait


def slow(config: dict[str, Any], folder: Path, seconds: float) -> dict[str, Any]:
    """The same with a `SlowStore` whose calls take `seconds`; its files are in `folder`/calls."""
    (folder / "calls").mkdir()
    config["stores"]["features"] = {
        "type": "slow_store:SlowStore",
        "options": {"folder": str(folder / "calls"), "seconds": seconds},
        "guard": {"timeout": "60s", "concurrency": 4},
    }
    for namespace in config["namespaces"].values():
        namespace["fetch_timeout"] = "60s"
    return config


def statuses(client: Client, namespace: str, keys: list[bytes]) -> list[int]:
    found: list[int] = client.batch_get({namespace: keys})[namespace].statuses.tolist()
    return found


# ---- serving -------------------------------------------------------------------------------------


def test_it_serves_reads_through_and_stops(config: dict[str, Any], start: Start) -> None:
    daemon = start(config)
    addresses = daemon.addresses
    assert addresses["pid"] == daemon.process.pid
    targets = addresses["grpc"]
    assert len(targets) == 2
    expected = list(_ITEMS.values())

    with Client(targets[0], timeout=10) as tcp, Client(targets[1], timeout=10) as unix:
        reply = tcp.batch_get({"pin": [*_KEYS, b"missing"], "user": [b"u"]})
        assert reply["pin"].to_bytes() == [*expected, None]
        assert reply["user"].to_bytes() == [b"user value"]
        assert set(reply["pin"].statuses[:-1].tolist()) == {Status.FETCHED}
        assert reply["pin"].statuses[-1] == Status.NOT_FOUND

        again = unix.batch_get({"pin": _KEYS})
        assert again["pin"].to_bytes() == expected
        assert set(again["pin"].statuses.tolist()) == {Status.HIT_DRAM}

        put = unix.batch_put({"pin": ([b"new", _KEYS[0]], [b"put", b"changed"])})
        assert set(put["pin"].tolist()) == {WriteStatus.STORED}
        assert tcp.batch_get({"pin": [b"new", _KEYS[0]]})["pin"].to_bytes() == [b"put", b"changed"]
        tcp.batch_delete({"pin": [b"new", _KEYS[0]]})
        assert tcp.batch_get({"pin": [b"new", _KEYS[0]]})["pin"].to_bytes() == [None, expected[0]]

    assert daemon.health() == "SERVING"
    assert daemon.http("/readyz")[0] == 200
    assert daemon.http("/healthz")[0] == 200
    status, metrics = daemon.http("/metrics")
    assert status == 200
    assert 'feature_cache_state{state="SERVING"} 1.0' in metrics
    assert 'feature_cache_domain_items{domain="main",namespace="pin"} 3000.0' in metrics

    daemon.signal()
    assert daemon.wait() == 0, daemon.log
    assert not daemon.ready_path.exists()
    assert not (daemon.folder / "data.sock").exists()
    assert not (daemon.folder / "admin.sock").exists()
    assert "Traceback" not in daemon.log


def test_it_can_start_again_where_one_was_killed(config: dict[str, Any], start: Start) -> None:
    first = start(config)
    first.process.kill()
    first.wait()
    first.ready_path.unlink()
    second = start(config)  # over the sockets that the first left behind
    with Client(f"unix:{second.folder}/data.sock", timeout=10) as client:
        assert statuses(client, "pin", _KEYS[:1]) == [Status.FETCHED]


def test_embedded_answers_like_the_daemon(config: dict[str, Any], start: Start) -> None:
    daemon = start(config)
    keys = [*_KEYS[:100], b"missing"]
    with daemon.client() as client, EmbeddedCache(daemon.config_path) as cache:
        for _ in range(2):
            remote = client.batch_get({"pin": keys})["pin"]
            local = cache.client.batch_get({"pin": keys}, timeout=10)["pin"]
            assert local.to_bytes() == remote.to_bytes()
            assert local.statuses.tolist() == remote.statuses.tolist()
        names = {sample.name for sample in cache.samples()}
        assert "feature_cache_domain_items" in names
        assert any(name.startswith("feature_cache_store_") for name in names)


def test_an_embedded_cache_that_nobody_closes_lets_its_process_end(
    config: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    code = (
        "import sys\n"
        "from cache_daemon.embedded import EmbeddedCache\n"
        "cache = EmbeddedCache(sys.argv[1])\n"
        "print(cache.client.batch_get({'pin': [b'item 1']}, timeout=10)['pin'].to_bytes())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "[b'value of 1']\n"), done.stderr
    assert done.stderr == ""


def test_the_service_manager_hears_of_it(
    config: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        daemon = start(config, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC=str(200_000))
        assert manager.recv(4096).startswith(b"READY=1\nSTATUS=serving on 127.0.0.1:")
        for _ in range(3):
            assert manager.recv(4096) == b"WATCHDOG=1"
        daemon.signal(signal.SIGINT)
        heard = [manager.recv(4096)]
        while heard[-1] == b"WATCHDOG=1" and len(heard) < 20:
            heard.append(manager.recv(4096))
        assert heard[-1].startswith(b"STOPPING=1\nSTATUS=draining")
        assert daemon.wait() == 0


# ---- stopping ------------------------------------------------------------------------------------


def keys_asked(folder: Path) -> int:
    """How many keys the slow store has been asked for."""
    return sum(int(path.name.split()[1]) for path in (folder / "calls").glob("* *"))


def begin_reads(daemon: Daemon, count: int, results: list[Any]) -> list[threading.Thread]:
    """Reads of one cold key each, under way when this returns; what they get goes to `results`."""

    def read(number: int) -> None:
        with daemon.client(timeout=30, retry=_ONCE) as client:
            try:
                results.append(client.batch_get({"pin": [b"cold %d" % number]})["pin"].to_bytes())
            except FeatureCacheError as error:
                results.append(error)

    threads = [threading.Thread(target=read, args=[number]) for number in range(count)]
    for thread in threads:
        thread.start()
    wait_until(lambda: keys_asked(daemon.folder) >= count, what="all reads accepted")
    return threads


def test_no_accepted_request_is_lost_by_sigterm_under_load(
    config: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    daemon = start(slow(config, tmp_path, 1.0))
    with daemon.client() as client:
        client.batch_put({"pin": (_KEYS[:500], list(_ITEMS.values())[:500])})

    # Readers that go on all the time, hits only, before and after the signal.
    others: list[Any] = []

    def load() -> None:
        with daemon.client(timeout=30, retry=_ONCE) as client:
            try:
                while len(others) < 1_000_000:
                    others.append(client.batch_get({"pin": _KEYS[:500]})["pin"].to_bytes())
            except FeatureCacheError as error:
                others.append(error)

    loaders = [threading.Thread(target=load) for _ in range(2)]
    for thread in loaders:
        thread.start()
    wait_until(lambda: len(others) > 10, what="hits")
    # And reads that wait for the store when the signal comes.
    accepted: list[Any] = []
    threads = begin_reads(daemon, 20, accepted)
    daemon.signal()
    assert daemon.wait() == 0, daemon.log
    for thread in [*threads, *loaders]:
        thread.join(30)

    assert sorted(accepted) == sorted([b"cold %d" % number] for number in range(20))
    replies = [other for other in others if isinstance(other, list)]
    refusals = [other for other in others if not isinstance(other, list)]
    assert all(reply == list(_ITEMS.values())[:500] for reply in replies)
    assert [type(refusal) for refusal in refusals] == [Unavailable, Unavailable], refusals


def test_while_draining_it_says_so_and_refuses_new_calls(
    config: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    daemon = start(slow(config, tmp_path, 2.0))
    accepted: list[Any] = []
    threads = begin_reads(daemon, 1, accepted)
    with daemon.client(retry=_ONCE) as client:
        client.batch_put({"pin": ([b"k"], [b"v"])})
        daemon.signal()
        wait_until(lambda: daemon.http("/readyz")[0] == 503, what="not ready")
        assert daemon.http("/healthz")[0] == 200
        with pytest.raises(FeatureCacheError):
            client.batch_get({"pin": [b"k"]})
    assert daemon.wait() == 0
    threads[0].join(10)
    assert accepted == [[b"cold 0"]]


def test_a_drain_takes_bounded_time(config: dict[str, Any], start: Start, tmp_path: Path) -> None:
    config["drain_timeout"] = "500ms"
    daemon = start(slow(config, tmp_path, 50.0))
    accepted: list[Any] = []
    threads = begin_reads(daemon, 2, accepted)
    started = time.monotonic()
    daemon.signal()
    assert daemon.wait() == 0, daemon.log
    assert time.monotonic() - started < 6  # the hanging store call did not hold it up
    for thread in threads:
        thread.join(10)
    assert accepted == [[None], [None]]  # late, but not without a reply
    assert "time is over" in daemon.log


def test_a_second_signal_stops_at_once(
    config: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    config["drain_timeout"] = "1m"
    daemon = start(slow(config, tmp_path, 50.0))
    threads = begin_reads(daemon, 1, [])
    daemon.signal()
    wait_until(lambda: "draining for at most 1m" in daemon.log)
    started = time.monotonic()
    daemon.signal(signal.SIGINT)
    assert daemon.wait() == 3, daemon.log
    assert time.monotonic() - started < 6
    for thread in threads:
        thread.join(10)


def test_an_operator_can_drain_it(config: dict[str, Any], start: Start) -> None:
    daemon = start(config)
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("cachectl")),
            *("drain", "--admin", daemon.addresses["admin"]),
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert daemon.wait() == 0
    assert "an operator asks for it" in daemon.log


# ---- what goes wrong -----------------------------------------------------------------------------


def assert_ends_with(daemon: Daemon, code: int, *words: str) -> None:
    assert daemon.wait(_START_S) == code, daemon.log
    for word in words:
        assert word in daemon.log
    assert "Traceback" not in daemon.log
    assert not daemon.ready_path.exists()


@pytest.mark.parametrize("listener", ["grpc", "admin", "http"])
def test_a_port_in_use_is_told(config: dict[str, Any], launch: Start, listener: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config["listen"][listener] = [address] if listener == "grpc" else address
        assert_ends_with(launch(config), 1, "cannot start: ", address)


def test_two_daemons_cannot_share_a_port(config: dict[str, Any], start: Start) -> None:
    first = start(config)
    config["listen"]["grpc"] = [first.tcp]
    config["listen"]["admin"] = None
    folder = first.folder / "second"
    folder.mkdir()
    second = Daemon(folder, config)
    try:
        assert_ends_with(second, 1, "cannot start: ", first.tcp)
    finally:
        second.process.kill()
        second.process.wait()
    with first.client() as client:
        assert statuses(client, "pin", _KEYS[:1]) == [Status.FETCHED]


def test_a_directory_that_is_not_there_is_told(config: dict[str, Any], launch: Start) -> None:
    config["listen"]["grpc"] = ["unix:/nonexistent/data.sock"]
    assert_ends_with(launch(config), 1, "cannot start: ", "/nonexistent/data.sock")


@pytest.mark.parametrize(
    ("memory", "budget", "words"),
    [
        ("100TiB", "60%", ["memory.size", "this machine"]),
        ("32MiB", "40MiB", ["namespaces", "more than memory.size"]),
        ("32MiB", "31.9MiB", ["namespaces", "index and tables leave"]),
        ("64KiB", "60%", ["memory.size", "at least 1MiB"]),
        ("8MiB", "20KiB", ["namespaces.pin.domains.main.budget", "the least is 64KiB"]),
    ],
)
def test_a_budget_beyond_memory_is_a_config_error(
    config: dict[str, Any], launch: Start, memory: str, budget: str, words: list[str]
) -> None:
    config["memory"]["size"] = memory
    config["namespaces"]["pin"]["domains"] = {"main": {"budget": budget}}
    del config["namespaces"]["user"]
    assert_ends_with(launch(config), 2, "config.yaml", *words)


def test_a_bad_config_is_told(config: dict[str, Any], launch: Start) -> None:
    config["memroy"] = config.pop("memory")
    assert_ends_with(launch(config), 2, "memroy: unknown key; did you mean 'memory'?")


def test_a_store_that_cannot_be_opened_is_told(config: dict[str, Any], launch: Start) -> None:
    config["stores"]["features"]["options"]["path"] = "nowhere"
    assert_ends_with(launch(config), 1, "cannot start: store features: ", "nowhere")


def test_a_store_class_that_fails_is_told(config: dict[str, Any], launch: Start) -> None:
    config["stores"]["features"] = {"type": "slow_store:SlowStore", "options": {"nonsense": 1}}
    assert_ends_with(launch(config), 1, "cannot start: store ", "nonsense")


def test_check_config_prints_what_is_in_effect(config: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("cache-daemon")), "check-config", str(path)]
    table = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "drain_timeout" in table
    assert "15s" in table
    command.append("--json")
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    effective = json.loads(text)
    assert effective["namespaces"]["pin"]["domains"]["main"]["policy"] == "s3fifo"
    assert effective["limits"]["max_batch_keys"] == 16384
    config["namespaces"]["user"]["domains"]["main"]["budget"] = "20.1%"
    path.write_text(yaml.safe_dump(config))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "100.1% of the arena" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_store_that_dies_costs_misses_and_not_the_daemon(
    config: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "redis"
    folder.mkdir()
    redis = RedisServer(folder)
    config["stores"]["features"] = {
        "type": "redis",
        "options": {"port": redis.port, "connect_timeout": "200ms"},
        "guard": {"timeout": "500ms", "retries": 0, "breaker_pause": "200ms"},
    }
    daemon = start(config)  # the store is not even there yet

    def fill() -> None:
        with redis.client() as connection:
            connection.mset({b"pin:" + key: value for key, value in _ITEMS.items()})

    try:
        with daemon.client() as client:
            assert statuses(client, "pin", _KEYS[:5]) == [Status.ERROR] * 5
            redis.start()
            fill()
            wait_until(
                lambda: statuses(client, "pin", _KEYS[:100]) == [Status.HIT_DRAM] * 100,
                what="values of the store that came up",
            )
            redis.kill()
            assert statuses(client, "pin", _KEYS[:100]) == [Status.HIT_DRAM] * 100
            for number in range(10):
                keys = _KEYS[200 + number * 50 : 250 + number * 50]
                assert statuses(client, "pin", keys) == [Status.ERROR] * 50
            assert daemon.http("/readyz")[0] == 200
            redis.start()
            fill()
            wait_until(
                lambda: statuses(client, "pin", _KEYS) == [Status.HIT_DRAM] * len(_KEYS),
                what="values of the store that came back",
            )
    finally:
        redis.stop()
    assert daemon.process.poll() is None
    daemon.signal()
    assert daemon.wait() == 0


def test_a_client_that_leaves_in_the_middle_harms_nobody(
    config: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    daemon = start(slow(config, tmp_path, 1.0))
    code = (
        "import sys\n"
        "from cache_daemon.client import Client\n"
        "Client(sys.argv[1]).batch_get({'pin': [b'abandoned']}, timeout=30)\n"
    )
    leaving = subprocess.Popen([sys.executable, "-c", code, daemon.tcp])
    wait_until(lambda: keys_asked(tmp_path) == 1, what="its store call")
    leaving.kill()
    leaving.wait()
    with daemon.client() as client:
        # The flight outlives the one who began it.
        wait_until(lambda: statuses(client, "pin", [b"abandoned"]) == [Status.HIT_DRAM])
        assert statuses(client, "pin", [b"another"]) == [Status.FETCHED]
    daemon.signal()
    assert daemon.wait() == 0


def test_bytes_that_are_no_grpc_harm_nobody(config: dict[str, Any], start: Start) -> None:
    daemon = start(config)
    host, _, port = daemon.tcp.rpartition(":")
    for garbage in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0" * 4096,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff",
    ):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(garbage)
    with daemon.client() as client:
        assert statuses(client, "pin", _KEYS[:10]) == [Status.FETCHED] * 10
    assert daemon.process.poll() is None


def test_a_free_port_is_what_the_config_says(config: dict[str, Any], start: Start) -> None:
    port = free_port()
    config["listen"]["grpc"] = [f"127.0.0.1:{port}"]
    assert start(config).tcp == f"127.0.0.1:{port}"
