"""A new daemon is filled before it serves: by snapshots, by a peer, or by neither in time.

Real daemons on a real store; snapshots on a disk that they share (S3 is in test_warmup_s3.py).
"""

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cache_daemon.client import Status
from tests.servers import wait_until
from tests.warmup_daemons import ITEMS, KEYS, Fleet, WarmNode


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path, f"file://{tmp_path}/snapshots") as fleet:
        yield fleet


def http(node: WarmNode, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://{node.http_target}{path}", timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def health(node: WarmNode) -> str:
    with grpc.insecure_channel(node.target) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


def wrong_clock(offset: str) -> dict[str, str]:
    """The environment of a process whose time of day is off by so much."""
    (library,) = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME": offset,
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DONT_RESET": "1",
    }


def slow(rate: int = 100) -> dict[str, Any]:
    """A replay that lasts for as long as a test wants."""
    return {"replay": {"rate": rate}, "max_duration": "60s"}


def test_a_new_node_serves_with_what_others_were_asked_for(fleet: Fleet) -> None:
    hot = KEYS[:3000]
    recorder = fleet.recorder().start()
    fleet.record(recorder, hot)
    warm, cold = fleet.node("warm").start(), fleet.node("cold", plan="none").start()
    assert warm.warmup.state == "warmed", warm.daemon.log
    assert warm.warmup.predicted_hit_ratio >= 0.95
    assert warm.warmup.keys_fetched >= 0.95 * len(hot)
    assert warm.hits(hot) >= 0.95
    assert cold.hits(hot) == 0
    assert cold.warmup.state == "off"
    assert warm.hits(KEYS[3000:]) == 0  # nobody asked for these
    warm.ask(hot)  # and values are right


def test_nobody_is_told_to_send_requests_while_it_warms_up(fleet: Fleet) -> None:
    recorder = fleet.recorder().start()
    fleet.record(recorder)
    node = fleet.node("new", **slow()).launch().wait_for("WARMING")
    assert (http(node, "/healthz"), http(node, "/readyz"), http(node, "/startupz")) == (
        200,
        503,
        503,
    )
    assert health(node) == "NOT_SERVING"
    assert not (node.folder / "ready.json").exists()
    # What comes all the same is answered.
    with node.client() as client:
        assert client.batch_get({"pin": KEYS[-1:]})["pin"].to_bytes() == [ITEMS[KEYS[-1]]]
        client.batch_put({"pin": ([b"mine"], [b"written meanwhile"])})
    wait_until(lambda: node.warmup.keys_done > 0, 10, "the replay goes on")
    running = node.warmup
    assert (running.state, running.keys_total) == ("running", len(KEYS))
    with node.admin() as admin:
        assert admin.stop_warmup()
    node.wait_for("SERVING", timeout_s=5)
    assert (http(node, "/readyz"), health(node)) == (200, "SERVING")
    assert node.warmup.state == "stopped"
    with node.client() as client:
        reply = client.batch_get({"pin": [b"mine"]}, cache_only=True)["pin"]
        assert reply.to_bytes() == [b"written meanwhile"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_warm_up_at_once(fleet: Fleet, number: signal.Signals) -> None:
    recorder = fleet.recorder().start()
    fleet.record(recorder)
    node = fleet.node("new", **slow()).launch().wait_for("WARMING")
    began = time.monotonic()
    node.daemon.signal(number)
    assert node.daemon.wait() == 0, node.daemon.log
    assert time.monotonic() - began < 8
    assert "before it served" in node.daemon.log
    assert "-> SERVING" not in node.daemon.log


def test_a_drain_ends_a_warm_up_at_once(fleet: Fleet) -> None:
    recorder = fleet.recorder().start()
    fleet.record(recorder)
    node = fleet.node("new", **slow()).launch().wait_for("WARMING")
    with node.admin() as admin:
        admin.drain(30)
    assert node.daemon.wait(8) == 0, node.daemon.log


def test_the_service_manager_is_asked_for_more_time(fleet: Fleet, tmp_path: Path) -> None:
    recorder = fleet.recorder().start()
    fleet.record(recorder)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        node = fleet.node("new", **slow()).launch(NOTIFY_SOCKET=str(tmp_path / "notify"))
        told = manager.recv(4096).decode()
        while "warming up" not in told:
            told = manager.recv(4096).decode()
        assert "EXTEND_TIMEOUT_USEC=" in told
        assert "READY" not in told
        node.daemon.signal()
        assert node.daemon.wait() == 0


def test_without_a_snapshot_it_serves_cold_and_says_so(fleet: Fleet) -> None:
    began = time.monotonic()
    node = fleet.node("new", max_duration="3s").start()
    assert time.monotonic() - began < 15
    assert node.warmup.state == "failed"
    assert node.warmup.serving_cold
    assert "snapshot" in node.warmup.reason
    assert "serves cold" in node.daemon.log
    # Later there are some, and an operator has it filled.
    recorder = fleet.recorder().start()
    fleet.record(recorder)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "cache_daemon.cachectl", "warmup", "start", "--watch"),
            *("--max-duration", "20s", "--admin", f"unix:{node.folder}/admin.sock"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("warmed, "), done.stdout
    assert node.state == "SERVING"
    assert not node.warmup.serving_cold
    assert node.hits() >= 0.95


def test_without_a_snapshot_it_does_not_start_where_that_is_wanted(fleet: Fleet) -> None:
    node = fleet.node("new", max_duration="2s", on_failure="fail").launch()
    assert node.daemon.wait() == 1
    assert "the warm-up brought nothing" in node.daemon.log
    assert "-> SERVING" not in node.daemon.log


def test_one_that_does_not_end_in_time_serves_with_what_came(fleet: Fleet) -> None:
    recorder = fleet.recorder().start()
    fleet.record(recorder)
    began = time.monotonic()
    node = fleet.node("new", replay={"rate": 500}, max_duration="3s").start()
    assert 3 <= time.monotonic() - began < 15
    assert node.warmup.state == "partial", node.daemon.log
    assert 0.1 < node.hits() < 0.95


def test_damaged_snapshots_are_left_out(fleet: Fleet) -> None:
    recorder = fleet.recorder().start()
    fleet.record(recorder)
    logs = sorted((fleet.folder / "snapshots").rglob("*.fcrl"))
    assert logs
    for number, log in enumerate(logs):
        data = bytearray(log.read_bytes())
        if number % 2:
            del data[len(data) // 2 :]
        else:
            data[len(data) // 2] ^= 1
        log.write_bytes(data)
    node = fleet.node("new", max_duration="5s").start()
    assert node.warmup.state == "failed", node.daemon.log
    assert node.warmup.serving_cold
    assert node.hits() == 0
    node.ask(KEYS[:100])


def test_snapshots_of_other_namespaces_are_of_no_use_and_no_harm(fleet: Fleet) -> None:
    recorder = fleet.recorder()
    recorder.config["namespaces"] = {"other": recorder.config["namespaces"]["pin"]}
    recorder.start()
    with recorder.client() as client:
        client.batch_get({"other": KEYS[:100]})
        time.sleep(1.2)
        client.batch_get({"other": KEYS[:1]})
    wait_until(lambda: recorder.warmup.uploads.uploaded > 0, 20, "an upload")
    node = fleet.node("new", max_duration="5s").start()
    assert node.warmup.state == "failed", (node.warmup, node.daemon.log)
    assert node.warmup.serving_cold


def test_a_store_that_is_down_in_the_replay_delays_no_start(fleet: Fleet) -> None:
    recorder = fleet.recorder().start()
    fleet.record(recorder)
    node = fleet.node("new", max_duration="4s")
    # Nobody listens there.
    node.config["stores"] = {
        "features": {
            "type": "redis",
            "options": {"host": "127.0.0.1", "port": 1, "connect_timeout": "100ms"},
            "guard": {"timeout": "200ms", "retries": 0},
        }
    }
    began = time.monotonic()
    node.start()
    assert time.monotonic() - began < 16
    assert node.warmup.state == "failed", (node.warmup, node.daemon.log)
    assert node.warmup.serving_cold


def test_snapshots_of_a_host_whose_clock_is_wrong_do_no_harm(fleet: Fleet) -> None:
    """Its windows lie in the future, or in the past; its keys are asked for all the same, or not
    at all: the node starts in time."""
    ahead = fleet.recorder("ahead").start(**wrong_clock("+20m"))
    fleet.record(ahead)
    node = fleet.node("new", max_duration="10s").start()
    assert node.warmup.state in ("warmed", "failed"), node.daemon.log
    behind = fleet.recorder("behind").start(**wrong_clock("-20m"))
    fleet.record(behind)
    second = fleet.node("second", max_duration="10s").start()
    assert second.warmup.state == "warmed", second.daemon.log
    assert second.hits() >= 0.95


def test_one_that_is_killed_goes_on_where_it_was(fleet: Fleet, shared: Path) -> None:
    recorder = fleet.recorder().start()
    fleet.record(recorder)
    node = fleet.node("new", **slow(1000))
    node.config["memory"] = {"size": "16MiB"}
    node.config["persist"] = {"dir": str(shared), "name": "warm"}
    node.launch().wait_for("WARMING")
    wait_until(lambda: node.warmup.keys_done >= 1000, 20, "a part is there")
    node.kill()
    node.config["warmup"]["replay"]["rate"] = 100_000
    node.start()
    assert node.warmup.state == "warmed", node.daemon.log
    assert node.hits() >= 0.95
    # What was held already was not asked for again.
    assert node.warmup.keys_fetched <= len(KEYS) - 900


def test_begun_while_it_serves_and_ended(fleet: Fleet) -> None:
    recorder = fleet.recorder().start()
    fleet.record(recorder)
    node = fleet.node("new", **slow()).launch().wait_for("WARMING")
    with node.admin() as admin:
        admin.stop_warmup()
        node.wait_for("SERVING")
        admin.start_warmup(30)
        wait_until(lambda: node.warmup.state == "running", 5, "it runs")
        assert node.state == "SERVING"
        with node.client() as client:
            statuses = client.batch_get({"pin": KEYS[-5:]})["pin"].statuses.tolist()
        assert Status.ERROR not in statuses
        assert node.warmup.max_seconds == 30
        assert admin.stop_warmup()
        wait_until(lambda: node.warmup.state == "stopped", 5, "it has ended")
        admin.start_warmup(0)
        wait_until(lambda: node.warmup.state == "running", 5, "it runs again")
    began = time.monotonic()
    node.daemon.signal()  # and a stop ends it, too
    assert node.daemon.wait() == 0
    assert time.monotonic() - began < 8
    assert "Traceback" not in node.daemon.log
