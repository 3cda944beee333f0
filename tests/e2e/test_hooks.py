"""The hooks of autoscalers as processes beside real daemons: `cache-daemon warmup ...`."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.aws_server import AwsServer
from tests.daemon_process import Start, begin_reads, keys_asked, slow
from tests.hook_process import Hook, RunHook
from tests.servers import wait_until


@pytest.fixture
def hook(tmp_path: Path) -> Iterator[RunHook]:
    with ExitStack() as stack:

        def run(*arguments: str, **environment: str) -> Hook:
            made = Hook(tmp_path, *arguments, **environment)
            stack.callback(made.process.wait)
            stack.callback(made.process.kill)
            return made

        yield run


@pytest.fixture
def aws() -> Iterator[AwsServer]:
    with AwsServer() as server:
        yield server


@pytest.fixture
def lifecycle(hook: RunHook, aws: AwsServer) -> RunHook:
    def run(*arguments: str, **environment: str) -> Hook:
        names = ("--group", "fleet", "--hook", "warm")
        return hook("aws-lifecycle", *names, *arguments, **(aws.environment | environment))

    return run


# ---- any autoscaler ------------------------------------------------------------------------------


def test_a_wait_that_began_before_the_daemon_ends_when_it_serves(
    config: dict[str, Any], launch: Start, hook: RunHook
) -> None:
    waiting = hook("wait", "--json", "--reach", "60s")
    wait_until(lambda: "is it running?" in waiting.text, 30, "the first asking")
    daemon = launch(config)
    assert waiting.wait() == 0, waiting.text
    assert daemon.http("/startupz")[0] == 200
    assert daemon.http("/readyz")[0] == 200
    result = json.loads(waiting.text.splitlines()[-1])
    assert (result["result"], result["state"]) == ("done", "SERVING")


def test_a_drain_lets_requests_end_and_then_the_daemon(
    config: dict[str, Any], start: Start, hook: RunHook, tmp_path: Path
) -> None:
    daemon = start(slow(config, tmp_path, 5.0))
    results: list[Any] = []
    readers = begin_reads(daemon, 2, results)
    draining = hook("drain")
    # What a start probe says must not make somebody restart a daemon that drains.
    wait_until(lambda: daemon.http("/readyz")[0] == 503, what="the drain")
    assert daemon.http("/startupz") == (200, '{"state": "DRAINING"}\n')
    assert draining.wait() == 0, draining.text
    assert draining.text.splitlines()[-1].startswith("drained after ")
    for reader in readers:
        reader.join(10)
    assert sorted(results) == [[b"cold 0"], [b"cold 1"]]
    # The admin service goes last, just before the process.
    assert daemon.wait(5) == 0


def test_a_drain_that_is_given_up_goes_on(
    config: dict[str, Any], start: Start, hook: RunHook, tmp_path: Path
) -> None:
    daemon = start(slow(config, tmp_path, 7.0))
    results: list[Any] = []
    readers = begin_reads(daemon, 1, results)
    draining = hook("drain", "--timeout", "1s")
    assert draining.wait() == 3, draining.text
    assert daemon.process.poll() is None
    assert daemon.wait() == 0
    for reader in readers:
        reader.join(10)
    assert results == [[b"cold 0"]]


def test_a_drain_may_have_less_time_than_the_config_gives(
    config: dict[str, Any], start: Start, hook: RunHook, tmp_path: Path
) -> None:
    daemon = start(slow(config, tmp_path, 20.0))
    readers = begin_reads(daemon, 1, [])
    began = time.monotonic()
    draining = hook("drain", "--within", "500ms")
    assert draining.wait() == 0, draining.text
    assert time.monotonic() - began < 12
    daemon.wait()
    for reader in readers:
        reader.join(10)
    assert keys_asked(tmp_path) == 1


def test_a_killed_daemon_ends_a_drain_and_not_a_silent_one(
    config: dict[str, Any], start: Start, hook: RunHook, tmp_path: Path
) -> None:
    daemon = start(slow(config, tmp_path, 30.0))
    readers = begin_reads(daemon, 1, [])
    draining = hook("drain")
    wait_until(lambda: "DRAINING" in draining.text, what="the drain")
    daemon.signal(signal.SIGSTOP)
    wait_until(lambda: "did not answer within" in draining.text, 30, "a call without an answer")
    assert draining.process.poll() is None, draining.text
    daemon.process.kill()
    assert draining.wait() == 0, draining.text
    for reader in readers:
        reader.join(10)


# ---- AWS -----------------------------------------------------------------------------------------


def test_a_launch_goes_on_when_the_daemon_serves(
    config: dict[str, Any], launch: Start, lifecycle: RunHook, aws: AwsServer
) -> None:
    waiting = lifecycle("--reach", "60s", "--heartbeat", "1s", "--json")
    wait_until(lambda: len(aws.of("RecordLifecycleActionHeartbeat")) >= 3, 30, "heartbeats")
    assert aws.results == []
    launch(config)
    assert waiting.wait() == 0, waiting.text
    (call,) = aws.of("CompleteLifecycleAction")
    assert call["LifecycleActionResult"] == "CONTINUE"
    assert call["InstanceId"] == "i-0123456789abcdef0"
    result = json.loads(waiting.text.splitlines()[-1])
    assert (result["lifecycle_result"], result["result"]) == ("CONTINUE", "done")
    # Whoever is told goes on at once: no heartbeat comes after it.
    assert aws.calls[-1]["Action"] == "CompleteLifecycleAction"


def test_a_launch_without_a_daemon_is_abandoned(lifecycle: RunHook, aws: AwsServer) -> None:
    waiting = lifecycle("--reach", "1s")
    assert waiting.wait() == 5, waiting.text
    assert aws.results == ["ABANDON"]
    assert "ABANDON told" in waiting.text


def test_an_action_that_comes_late_is_completed(
    config: dict[str, Any], start: Start, lifecycle: RunHook, aws: AwsServer
) -> None:
    start(config)
    early = (400, "ValidationError", "No active Lifecycle Action found with instance ID i-0")
    aws.state = "Pending"
    aws.answers = {
        "CompleteLifecycleAction": [early, early, None],
        "RecordLifecycleActionHeartbeat": [early],
    }
    waiting = lifecycle()
    assert waiting.wait() == 0, waiting.text
    assert aws.results == ["CONTINUE"] * 3


def test_after_a_reboot_nothing_is_told(
    config: dict[str, Any], start: Start, lifecycle: RunHook, aws: AwsServer
) -> None:
    start(config)
    gone = (400, "ValidationError", "No active Lifecycle Action found with instance ID i-0")
    aws.state = "InService"
    aws.answers = {"CompleteLifecycleAction": [gone], "RecordLifecycleActionHeartbeat": [gone] * 9}
    waiting = lifecycle()
    assert waiting.wait() == 0, waiting.text
    assert "no lifecycle action waits for i-0123456789abcdef0" in waiting.text


def test_a_missing_permission_has_a_code_of_its_own(
    config: dict[str, Any], start: Start, lifecycle: RunHook, aws: AwsServer
) -> None:
    start(config)
    aws.answers = {"CompleteLifecycleAction": [(403, "AccessDenied", "not authorized")]}
    waiting = lifecycle()
    assert waiting.wait() == 6, waiting.text
    assert "CONTINUE could not be told: CompleteLifecycleAction: not authorized" in waiting.text
    assert "Traceback" not in waiting.text


def test_outside_of_aws_it_says_what_to_give(lifecycle: RunHook) -> None:
    waiting = lifecycle(AWS_EC2_METADATA_SERVICE_ENDPOINT="http://127.0.0.1:1")
    assert waiting.wait() == 6
    assert "give --instance-id and --region" in waiting.text
    assert "Traceback" not in waiting.text


def test_a_signal_leaves_the_decision_to_the_group(lifecycle: RunHook, aws: AwsServer) -> None:
    waiting = lifecycle("--reach", "60s")
    wait_until(lambda: bool(aws.of("RecordLifecycleActionHeartbeat")), 30, "a heartbeat")
    began = time.monotonic()
    waiting.process.send_signal(signal.SIGTERM)
    assert waiting.wait() == 143, waiting.text
    assert time.monotonic() - began < 5
    assert aws.results == []


def test_an_end_is_watched_for_drained_and_told(
    config: dict[str, Any], start: Start, lifecycle: RunHook, aws: AwsServer
) -> None:
    daemon = start(config)
    aws.hook["LifecycleTransition"] = "autoscaling:EC2_INSTANCE_TERMINATING"
    watching = lifecycle("--terminating", "--watch")
    target = "latest/meta-data/autoscaling/target-lifecycle-state"
    wait_until(lambda: target in aws.reads, 30, "the watch")
    assert daemon.process.poll() is None
    assert aws.of("RecordLifecycleActionHeartbeat") == []
    aws.state = "Terminating:Wait"
    aws.metadata[target] = "Terminated"
    assert watching.wait() == 0, watching.text
    assert daemon.wait() == 0
    assert aws.results == ["CONTINUE"]
    assert aws.of("RecordLifecycleActionHeartbeat")


def test_a_watch_ends_by_a_signal_and_finds_a_wrong_hook_at_once(
    config: dict[str, Any], start: Start, lifecycle: RunHook, aws: AwsServer
) -> None:
    daemon = start(config)
    wrong = lifecycle("--terminating", "--watch")  # the hook is for launching instances
    assert wrong.wait() == 6
    assert "call this without --terminating" in wrong.text
    aws.hook["LifecycleTransition"] = "autoscaling:EC2_INSTANCE_TERMINATING"
    watching = lifecycle("--terminating", "--watch")
    wait_until(lambda: any("target" in path for path in aws.reads), 30, "the watch")
    watching.process.send_signal(signal.SIGTERM)
    assert watching.wait() == 143
    assert daemon.http("/readyz")[0] == 200
    assert aws.results == []
