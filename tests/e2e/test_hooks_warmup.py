"""What the hooks of autoscalers make of a daemon that warms up: `cache-daemon warmup ...`."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.aws_server import AwsServer
from tests.hook_process import Hook
from tests.servers import wait_until
from tests.warmup_daemons import KEYS, Fleet, WarmNode


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path, f"file://{tmp_path}/snapshots") as fleet:
        yield fleet


@pytest.fixture
def aws() -> Iterator[AwsServer]:
    with AwsServer() as server:
        yield server


def hook(node: WarmNode, *arguments: str, **environment: str) -> Hook:
    return Hook(node.folder, *arguments, **environment)


def lifecycle(node: WarmNode, aws: AwsServer, *arguments: str) -> Hook:
    names = ("--group", "fleet", "--hook", "warm")
    return hook(node, "aws-lifecycle", *names, *arguments, **aws.environment)


def probe(node: WarmNode, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://{node.http_target}{path}", timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture
def slow(fleet: Fleet) -> WarmNode:
    """A node whose warm-up lasts for as long as a test wants; not started."""
    fleet.record(fleet.recorder().start(), KEYS)
    return fleet.node("slow", replay={"rate": 100}, max_duration="60s")


def test_a_warm_node_is_told_with_its_hit_ratio(fleet: Fleet, aws: AwsServer) -> None:
    recorder = fleet.recorder().start()
    fleet.record(recorder, KEYS[:3000])
    node = fleet.node("warm", replay={"rate": 1000}).launch()
    launching = lifecycle(node, aws, "--json", "--min-hit-ratio", "90%", "--heartbeat", "1s")
    node.wait_for("WARMING")
    assert [probe(node, path) for path in ("/healthz", "/startupz", "/readyz")] == [200, 503, 503]
    assert aws.results == []
    assert launching.wait() == 0, launching.text
    assert probe(node, "/startupz") == probe(node, "/readyz") == 200
    assert aws.results == ["CONTINUE"]
    assert len(aws.of("RecordLifecycleActionHeartbeat")) >= 2
    result = json.loads(launching.text.splitlines()[-1])
    assert result["warmup"]["state"] == "warmed"
    assert result["warmup"]["predicted_hit_ratio"] >= 0.9
    assert node.hits(KEYS[:3000]) >= 0.9


def test_a_node_that_serves_cold_has_a_code_of_its_own(fleet: Fleet, aws: AwsServer) -> None:
    node = fleet.node("cold", max_duration="2s").launch()
    waiting = hook(node, "wait")
    assert waiting.wait() == 4, waiting.text
    assert "the daemon serves cold: SERVING: failed" in waiting.text
    assert probe(node, "/readyz") == 200
    # The group's own decision: go on with it, or try another instance.
    for failure, result in (("serve_cold", "CONTINUE"), ("fail", "ABANDON")):
        launching = lifecycle(node, aws, "--on-failure", failure)
        assert launching.wait() == 4, launching.text
        assert aws.results[-1] == result


def test_a_node_that_must_not_serve_cold_is_abandoned(fleet: Fleet, aws: AwsServer) -> None:
    node = fleet.node("fail", max_duration="2s", on_failure="fail").launch()
    launching = lifecycle(node, aws, "--reach", "3s")
    assert launching.wait() == 5, launching.text
    assert node.daemon.wait() == 1
    assert "is it running?" in launching.text
    assert "ABANDON told" in launching.text
    assert aws.results == ["ABANDON"]


def test_a_wait_that_is_too_short_says_how_far_it_is(slow: WarmNode) -> None:
    node = slow.launch().wait_for("WARMING")
    waiting = hook(node, "wait", "--timeout", "1s")
    assert waiting.wait() == 3, waiting.text
    assert "not warm within 1 s: WARMING: running" in waiting.text
    assert node.state == "WARMING"  # nothing of the daemon's is changed by it


def test_a_drain_ends_a_warm_up_at_once(slow: WarmNode) -> None:
    node = slow.launch().wait_for("WARMING")
    waiting = hook(node, "wait", "--reach", "2s")
    wait_until(lambda: "WARMING" in waiting.text, 30, "the wait")
    began = time.monotonic()
    draining = hook(node, "drain")
    assert draining.wait() == 0, draining.text
    assert time.monotonic() - began < 15
    assert node.daemon.wait() == 0
    assert waiting.wait() == 5, waiting.text
