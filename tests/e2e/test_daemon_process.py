"""The daemon as a process: real sockets, a real LMDB, real signals, a real Redis that dies.

How it stops is in test_daemon_stop.py.
"""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cache_daemon.client import Client, Status, WriteStatus
from cache_daemon.embedded import EmbeddedCache
from tests.daemon_process import ITEMS, KEYS, START_S, Daemon, Start, keys_asked, slow, statuses
from tests.servers import RedisServer, free_port, wait_until

# ---- serving -------------------------------------------------------------------------------------


def test_it_serves_reads_through_and_stops(config: dict[str, Any], start: Start) -> None:
    daemon = start(config)
    addresses = daemon.addresses
    assert addresses["pid"] == daemon.process.pid
    targets = addresses["grpc"]
    assert len(targets) == 2
    expected = list(ITEMS.values())

    with Client(targets[0], timeout=10) as tcp, Client(targets[1], timeout=10) as unix:
        reply = tcp.batch_get({"pin": [*KEYS, b"missing"], "user": [b"u"]})
        assert reply["pin"].to_bytes() == [*expected, None]
        assert reply["user"].to_bytes() == [b"user value"]
        assert set(reply["pin"].statuses[:-1].tolist()) == {Status.FETCHED}
        assert reply["pin"].statuses[-1] == Status.NOT_FOUND

        # Values are installed right after those who wait for them are answered.
        wait_until(lambda: set(statuses(unix, "pin", KEYS)) == {Status.HIT_DRAM}, what="hits")
        assert unix.batch_get({"pin": KEYS})["pin"].to_bytes() == expected

        put = unix.batch_put({"pin": ([b"new", KEYS[0]], [b"put", b"changed"])})
        assert set(put["pin"].tolist()) == {WriteStatus.STORED}
        assert tcp.batch_get({"pin": [b"new", KEYS[0]]})["pin"].to_bytes() == [b"put", b"changed"]
        tcp.batch_delete({"pin": [b"new", KEYS[0]]})
        assert tcp.batch_get({"pin": [b"new", KEYS[0]]})["pin"].to_bytes() == [None, expected[0]]

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
        assert statuses(client, "pin", KEYS[:1]) == [Status.FETCHED]


def test_embedded_answers_like_the_daemon(config: dict[str, Any], start: Start) -> None:
    daemon = start(config)
    keys = [*KEYS[:100], b"missing"]
    with daemon.client() as client, EmbeddedCache(daemon.config_path) as cache:
        for _ in range(2):
            remote = client.batch_get({"pin": keys})["pin"]
            local = cache.client.batch_get({"pin": keys}, timeout=10)["pin"]
            assert local.to_bytes() == remote.to_bytes() == [*map(ITEMS.get, keys)]
            # Each fetches for itself; then the values are installed within moments.
            wait_until(
                lambda: all(
                    statuses(each, "pin", keys[:-1]) == [Status.HIT_DRAM] * 100
                    for each in (client, cache.client)
                ),
                what="hits",
            )
            assert statuses(cache.client, "pin", keys[-1:]) == [Status.NOT_FOUND]
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


# ---- what goes wrong -----------------------------------------------------------------------------


def assert_ends_with(daemon: Daemon, code: int, *words: str) -> None:
    assert daemon.wait(START_S) == code, daemon.log
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
        assert statuses(client, "pin", KEYS[:1]) == [Status.FETCHED]


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
            connection.mset({b"pin:" + key: value for key, value in ITEMS.items()})

    try:
        with daemon.client() as client:
            assert statuses(client, "pin", KEYS[:5]) == [Status.ERROR] * 5
            redis.start()
            fill()
            wait_until(
                lambda: statuses(client, "pin", KEYS[:100]) == [Status.HIT_DRAM] * 100,
                what="values of the store that came up",
            )
            redis.kill()
            assert statuses(client, "pin", KEYS[:100]) == [Status.HIT_DRAM] * 100
            for number in range(10):
                keys = KEYS[200 + number * 50 : 250 + number * 50]
                assert statuses(client, "pin", keys) == [Status.ERROR] * 50
            assert daemon.http("/readyz")[0] == 200
            redis.start()
            fill()
            wait_until(
                lambda: statuses(client, "pin", KEYS) == [Status.HIT_DRAM] * len(KEYS),
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
        assert statuses(client, "pin", KEYS[:10]) == [Status.FETCHED] * 10
    assert daemon.process.poll() is None


def test_a_free_port_is_what_the_config_says(config: dict[str, Any], start: Start) -> None:
    port = free_port()
    config["listen"]["grpc"] = [f"127.0.0.1:{port}"]
    assert start(config).tcp == f"127.0.0.1:{port}"
