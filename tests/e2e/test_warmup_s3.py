"""Warm-ups by snapshots in a real S3, and what S3 can do to them: silence, slowness, no rights.

Whatever it does, a start takes `max_duration` at most and serving nodes do not notice.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.proxy import TcpProxy
from tests.s3_server import BUCKET, S3Server, credentials
from tests.servers import wait_until
from tests.warmup_daemons import KEYS, Fleet

_URL = f"s3://{BUCKET}/"
_LIMIT_S = 4.0
_START_S = 12.0  # of a process on a busy machine, beside its warm-up


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        assert isinstance(server, S3Server)
        yield server


def fleet_of(folder: Path, endpoint: str, **snapshots: Any) -> Fleet:
    """`folder` names the prefix, so that no test sees the snapshots of another."""
    settings = {"endpoint": endpoint, "region": "us-east-1", "timeout": "1s", **snapshots}
    return Fleet(folder, _URL + folder.name, **settings)


def test_a_new_node_is_filled_from_s3(s3: S3Server, tmp_path: Path) -> None:
    with credentials(), fleet_of(tmp_path, s3.endpoint) as fleet:
        recorder = fleet.recorder().start()
        fleet.record(recorder)
        node = fleet.node("new").start()
        assert node.warmup.state == "warmed", node.daemon.log
        assert node.hits() >= 0.95
        node.ask()


def test_a_fleet_shares_its_rate_by_the_snapshots(s3: S3Server, tmp_path: Path) -> None:
    with credentials(), fleet_of(tmp_path, s3.endpoint) as fleet:
        recorder = fleet.recorder().start()
        fleet.record(recorder)
        shared = {"rate": 100_000, "fleet_rate": 1500}
        nodes = [fleet.node(name, replay=shared, max_duration="60s") for name in ("a", "b")]
        began = time.monotonic()
        for node in nodes:
            node.launch()
        for node in nodes:
            node.wait_for("SERVING", timeout_s=60)
        seconds = time.monotonic() - began
        asked = sum(node.warmup.keys_fetched for node in nodes)
        assert [node.warmup.state for node in nodes] == ["warmed", "warmed"]
        assert asked >= 2 * 0.95 * len(KEYS)
        assert asked / seconds <= 1.02 * 1500


def test_a_node_that_kept_its_items_waits_for_no_s3(
    s3: S3Server, tmp_path: Path, shared: Path
) -> None:
    with (
        credentials(),
        TcpProxy(s3.port) as proxy,
        fleet_of(tmp_path, f"http://{proxy.address}") as fleet,
    ):
        recorder = fleet.recorder().start()
        fleet.record(recorder)
        node = fleet.node("new", max_duration="60s", on_failure="fail")
        node.config["persist"] = {"dir": str(shared), "name": "kept"}
        node.start()
        assert node.warmup.state == "warmed", node.daemon.log
        node.daemon.signal()
        assert node.daemon.wait() == 0
        proxy.refuse()
        began = time.monotonic()
        node.start()
        assert time.monotonic() - began < 30
        assert node.warmup.state == "failed", node.daemon.log
        assert not node.warmup.serving_cold
        assert node.hits() >= 0.95


@pytest.mark.parametrize("fault", ["silent", "refused", "slow"])
def test_an_s3_that_does_not_answer_delays_no_start(
    s3: S3Server, tmp_path: Path, fault: str
) -> None:
    with credentials(), TcpProxy(s3.port) as proxy:
        if fault == "slow":
            proxy.delay_s = 3.0
        elif fault == "silent":
            proxy.black_hole()
        else:
            proxy.refuse()
        with fleet_of(tmp_path, f"http://{proxy.address}") as fleet:
            began = time.monotonic()
            node = fleet.node("new", max_duration=f"{_LIMIT_S:g}s").start()
            assert time.monotonic() - began < _LIMIT_S + _START_S
            assert node.warmup.state == "failed", node.daemon.log
            assert node.warmup.serving_cold
            node.ask(KEYS[:100])


def test_wrong_credentials_are_told_and_delay_no_start(s3: S3Server, tmp_path: Path) -> None:
    with credentials(secret="not it"), fleet_of(tmp_path, s3.endpoint) as fleet:
        began = time.monotonic()
        node = fleet.node("new", max_duration=f"{_LIMIT_S:g}s").start()
        assert time.monotonic() - began < _LIMIT_S + _START_S
        assert node.warmup.state == "failed"
        assert "credentials" in node.warmup.reason or "denied" in node.warmup.reason.lower()
        assert "not it" not in node.daemon.log


def test_a_bucket_that_is_not_there_is_told(s3: S3Server, tmp_path: Path) -> None:
    with credentials():
        fleet = Fleet(tmp_path, "s3://nowhere/x", endpoint=s3.endpoint, region="us-east-1")
        with fleet:
            node = fleet.node("new", max_duration=f"{_LIMIT_S:g}s", on_failure="fail").launch()
            assert node.daemon.wait() == 1
            assert "nowhere" in node.daemon.log


def test_serving_does_not_notice_an_s3_that_is_away(s3: S3Server, tmp_path: Path) -> None:
    with (
        credentials(),
        TcpProxy(s3.port) as proxy,
        fleet_of(tmp_path, f"http://{proxy.address}") as fleet,
    ):
        recorder = fleet.recorder().start()
        proxy.refuse()
        recorder.ask()
        time.sleep(1.2)
        recorder.ask(KEYS[:10])
        wait_until(lambda: recorder.warmup.uploads.failed > 0, 20, "it tells")
        assert recorder.warmup.uploads.problem
        assert recorder.warmup.uploads.pending > 0
        began = time.monotonic()
        recorder.ask(KEYS[:500], times=20)
        assert time.monotonic() - began < 5
        # It is back: what waited is uploaded.
        proxy.forward()
        wait_until(
            lambda: recorder.warmup.uploads.uploaded > 0 and not recorder.warmup.uploads.pending,
            40,
            "what waited is uploaded",
        )
        # Killed with a window unsent: the next process brings it.
        proxy.refuse()
        recorder.ask()
        time.sleep(1.2)
        recorder.ask(KEYS[:10])
        recorder.kill()
        proxy.forward()
        recorder.start()
        wait_until(lambda: recorder.warmup.uploads.uploaded > 0, 40, "uploaded after a kill")
