"""The lifecycle action as botocore's Stubber sees it: every call with the parameters that AWS's
own model of the API checks, and every answer."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from botocore.stub import Stubber

from cache_daemon import hooks_aws
from cache_daemon.hooks import HookExit, Outcome
from cache_daemon.hooks_aws import (
    Denied,
    Heartbeats,
    HookFacts,
    LifecycleAction,
    LifecycleError,
    NoAction,
    Refused,
    Unavailable,
)
from cache_daemon.hooks_lifecycle import LifecycleHook, LifecycleSettings

if TYPE_CHECKING:
    from mypy_boto3_autoscaling import AutoScalingClient

_OF = {"AutoScalingGroupName": "fleet", "LifecycleHookName": "warm", "InstanceId": "i-1"}
_GONE = "No active Lifecycle Action found with instance ID i-1"


@pytest.fixture
def client() -> "AutoScalingClient":
    return boto3.client(
        "autoscaling",
        region_name="eu-north-1",
        aws_access_key_id="id",
        aws_secret_access_key="secret",
    )


@pytest.fixture
def stub(client: "AutoScalingClient") -> Iterator[Stubber]:
    with Stubber(client) as stubber:
        yield stubber
        stubber.assert_no_pending_responses()


@pytest.fixture
def action(client: "AutoScalingClient", stub: Stubber) -> LifecycleAction:
    assert stub
    return LifecycleAction(client, "fleet", "warm", "i-1")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks_aws, "_RETRY_S_MIN", 0.01)


def facts(stub: Stubber, timeout_s: int = 300, transition: str = "LAUNCHING") -> None:
    hook = {
        "LifecycleHookName": "warm",
        "HeartbeatTimeout": timeout_s,
        "LifecycleTransition": f"autoscaling:EC2_INSTANCE_{transition}",
    }
    stub.add_response(
        "describe_lifecycle_hooks",
        {"LifecycleHooks": [hook]},
        {"AutoScalingGroupName": "fleet", "LifecycleHookNames": ["warm"]},
    )


def completed(stub: Stubber, result: str) -> None:
    stub.add_response("complete_lifecycle_action", {}, _OF | {"LifecycleActionResult": result})


def refused(
    stub: Stubber, code: str, message: str, call: str = "complete_lifecycle_action"
) -> None:
    stub.add_client_error(call, code, message)


def instance(stub: Stubber, state: str) -> None:
    found = {
        "InstanceId": "i-1",
        "AutoScalingGroupName": "fleet",
        "AvailabilityZone": "eu-north-1a",
        "LifecycleState": state,
        "HealthStatus": "HEALTHY",
        "ProtectedFromScaleIn": False,
    }
    stub.add_response(
        "describe_auto_scaling_instances",
        {"AutoScalingInstances": [found]},
        {"InstanceIds": ["i-1"]},
    )


def complete(action: LifecycleAction, within_s: float = 5.0) -> tuple[bool, list[str]]:
    lines: list[str] = []
    return action.complete("CONTINUE", within_s, threading.Event(), lines.append), lines


# ---- the calls -----------------------------------------------------------------------------------


def test_a_hook_is_described(action: LifecycleAction, stub: Stubber) -> None:
    facts(stub, 90)
    assert action.describe() == HookFacts(heartbeat_s=90.0, is_launching=True)
    facts(stub, 30, "TERMINATING")
    assert action.describe() == HookFacts(heartbeat_s=30.0, is_launching=False)


def test_a_hook_that_is_not_there_is_named(action: LifecycleAction, stub: Stubber) -> None:
    stub.add_response("describe_lifecycle_hooks", {"LifecycleHooks": []})
    with pytest.raises(Refused, match="fleet has no lifecycle hook warm; check --group and --hook"):
        action.describe()


@pytest.mark.parametrize(
    ("wanted_s", "expected_s"), [(None, 30.0), (10.0, 10.0), (30.0, 30.0), (90.0, 30.0)]
)
def test_heartbeats_come_thrice_a_timeout_at_least(
    wanted_s: float | None, expected_s: float
) -> None:
    assert HookFacts(90.0, True).beat_s(wanted_s) == expected_s


@pytest.mark.parametrize(
    ("code", "message", "kind", "advice"),
    [
        ("AccessDenied", "no", Denied, "allow autoscaling:RecordLifecycleActionHeartbeat"),
        ("ExpiredToken", "old", Denied, "old"),
        ("ValidationError", _GONE, NoAction, "i-1"),
        ("ValidationError", "Group name not found", Refused, "check --group, --hook"),
        ("Throttling", "Rate exceeded", Unavailable, "Throttling: Rate exceeded"),
        ("InternalFailure", "", Unavailable, "InternalFailure"),
    ],
)
def test_what_aws_says_is_told_clearly(
    action: LifecycleAction,
    stub: Stubber,
    code: str,
    message: str,
    kind: type[LifecycleError],
    advice: str,
) -> None:
    refused(stub, code, message, "record_lifecycle_action_heartbeat")
    with pytest.raises(LifecycleError, match=advice) as caught:
        action.beat()
    assert type(caught.value) is kind
    assert str(caught.value).startswith("RecordLifecycleActionHeartbeat: ")


def test_no_credentials_are_told_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    bare = boto3.Session().client("autoscaling", region_name="eu-north-1")
    with pytest.raises(Unavailable, match="no AWS credentials; give the instance a profile"):
        LifecycleAction(bare, "fleet", "warm", "i-1").beat()


# ---- completing ----------------------------------------------------------------------------------


def test_an_action_is_completed_once(action: LifecycleAction, stub: Stubber) -> None:
    completed(stub, "CONTINUE")
    assert complete(action) == (True, [])


def test_what_passes_is_tried_again(action: LifecycleAction, stub: Stubber) -> None:
    refused(stub, "Throttling", "Rate exceeded")
    refused(stub, "ServiceUnavailable", "busy")
    completed(stub, "CONTINUE")
    done, lines = complete(action)
    assert done
    assert [line.partition(": ")[2] for line in lines] == [
        "Throttling: Rate exceeded; trying again",
        "ServiceUnavailable: busy; trying again",
    ]


@pytest.mark.parametrize("state", ["Pending", "Pending:Wait", "Terminating", "Warmed:Pending"])
def test_an_instance_that_is_about_to_wait_is_waited_for(
    action: LifecycleAction, stub: Stubber, state: str
) -> None:
    refused(stub, "ValidationError", _GONE)
    instance(stub, state)
    completed(stub, "CONTINUE")
    assert complete(action)[0]


@pytest.mark.parametrize("state", ["InService", "Pending:Proceed", "Standby", "Terminated"])
def test_an_instance_that_waits_for_nothing_is_left_alone(
    action: LifecycleAction, stub: Stubber, state: str
) -> None:
    refused(stub, "ValidationError", _GONE)
    instance(stub, state)
    assert complete(action) == (False, [])


def test_a_state_that_may_not_be_asked_is_no_reason_to_give_up(
    action: LifecycleAction, stub: Stubber
) -> None:
    refused(stub, "ValidationError", _GONE)
    refused(stub, "AccessDenied", "no", "describe_auto_scaling_instances")
    completed(stub, "CONTINUE")
    assert complete(action)[0]


def test_tries_are_bounded_in_time(action: LifecycleAction, stub: Stubber) -> None:
    refused(stub, "Throttling", "Rate exceeded")
    with pytest.raises(Unavailable, match="Rate exceeded"):
        complete(action, within_s=0.0)


def test_a_permission_that_is_missing_is_told_at_once(
    action: LifecycleAction, stub: Stubber
) -> None:
    refused(stub, "AccessDenied", "not authorized")
    with pytest.raises(Denied, match="allow autoscaling:CompleteLifecycleAction"):
        complete(action)


def test_a_signal_ends_the_tries(action: LifecycleAction, stub: Stubber) -> None:
    refused(stub, "Throttling", "Rate exceeded")
    stop = threading.Event()
    stop.set()
    with pytest.raises(Unavailable):
        action.complete("CONTINUE", 60.0, stop, lambda _: None)


# ---- heartbeats ----------------------------------------------------------------------------------


def beats(stub: Stubber, count: int) -> None:
    for _ in range(count):
        stub.add_response("record_lifecycle_action_heartbeat", {}, dict(_OF))


class Counted(LifecycleAction):
    """Counts heartbeats that were answered, or not."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.beaten: list[float] = []

    def beat(self) -> None:
        try:
            super().beat()
        finally:
            self.beaten.append(time.monotonic())


class Silent(Counted):
    """Asks nobody."""

    def beat(self) -> None:
        self.beaten.append(time.monotonic())


@pytest.fixture
def counted(client: "AutoScalingClient", stub: Stubber) -> Counted:
    assert stub
    return Counted(client, "fleet", "warm", "i-1")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_heartbeats_come_at_once_and_at_intervals(client: "AutoScalingClient") -> None:
    action = Silent(client, "fleet", "warm", "i-1")
    began = time.monotonic()
    with Heartbeats(action, 0.2, lambda _: None):
        wait_for(lambda: len(action.beaten) == 4)
    count = len(action.beaten)
    assert action.beaten[3] - began >= 3 * 0.2 * 0.9  # the first one needed no interval
    gaps = [later - sooner for sooner, later in zip(action.beaten, action.beaten[1:], strict=False)]
    assert all(gap >= 0.2 * 0.9 for gap in gaps), gaps
    time.sleep(0.3)
    assert len(action.beaten) == count  # none after the end


def test_the_first_heartbeat_does_not_wait(client: "AutoScalingClient") -> None:
    action = Silent(client, "fleet", "warm", "i-1")
    with Heartbeats(action, 3600.0, lambda _: None):
        wait_for(lambda: bool(action.beaten))


def test_a_heartbeat_that_fails_is_told_once_and_tried_sooner(
    counted: Counted, stub: Stubber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks_aws, "_BEAT_RETRY_S", 0.02)
    for _ in range(3):
        refused(stub, "ValidationError", _GONE, "record_lifecycle_action_heartbeat")
    beats(stub, 1)
    lines: list[str] = []
    with Heartbeats(counted, 60.0, lines.append):
        wait_for(lambda: len(counted.beaten) == 4)
    assert lines == [f"heartbeat: RecordLifecycleActionHeartbeat: {_GONE}"]


# ---- the whole -----------------------------------------------------------------------------------


def carry_out(
    action: LifecycleAction, code: HookExit, **settings: Any
) -> tuple[HookExit, str | None, list[str]]:
    lines: list[str] = []
    hook = LifecycleHook(
        action,
        LifecycleSettings(complete_s=0.2, **settings),
        threading.Event(),
        lines.append,
    )

    def work() -> Outcome:
        wait_for(lambda: isinstance(action, Counted) and bool(action.beaten))
        return Outcome(code, "so it went", 1.0)

    told = hook.carry_out(work)
    return told.outcome.code, told.result, lines


@pytest.mark.parametrize(
    ("code", "serve_cold", "result"),
    [
        (HookExit.DONE, True, "CONTINUE"),
        (HookExit.DONE, False, "CONTINUE"),
        (HookExit.COLD, True, "CONTINUE"),
        (HookExit.COLD, False, "ABANDON"),
        (HookExit.TIMED_OUT, True, "ABANDON"),
        (HookExit.UNREACHABLE, True, "ABANDON"),
        (HookExit.UNREACHABLE, False, "ABANDON"),
    ],
)
def test_a_launch_goes_on_or_not(
    counted: Counted, stub: Stubber, code: HookExit, serve_cold: bool, result: str
) -> None:
    facts(stub)
    beats(stub, 1)
    completed(stub, result)
    assert carry_out(counted, code, serve_cold=serve_cold) == (code, result, [])


@pytest.mark.parametrize("code", [HookExit.DONE, HookExit.TIMED_OUT, HookExit.UNREACHABLE])
def test_an_end_goes_on_whatever_became_of_the_daemon(
    counted: Counted, stub: Stubber, code: HookExit
) -> None:
    facts(stub, transition="TERMINATING")
    beats(stub, 1)
    completed(stub, "CONTINUE")
    assert carry_out(counted, code, terminating=True)[:2] == (code, "CONTINUE")


def test_after_a_signal_the_group_decides(counted: Counted, stub: Stubber) -> None:
    facts(stub)
    beats(stub, 1)
    assert carry_out(counted, HookExit.SIGNALLED)[:2] == (HookExit.SIGNALLED, None)


def test_a_result_that_cannot_be_told_is_an_error_of_its_own(
    counted: Counted, stub: Stubber
) -> None:
    facts(stub)
    beats(stub, 1)
    refused(stub, "AccessDenied", "not authorized")
    assert carry_out(counted, HookExit.DONE)[:2] == (HookExit.NOT_TOLD, None)


def test_after_a_reboot_nothing_waits(counted: Counted, stub: Stubber) -> None:
    facts(stub)
    beats(stub, 1)
    refused(stub, "ValidationError", _GONE)
    instance(stub, "InService")
    code, result, lines = carry_out(counted, HookExit.DONE)
    assert (code, result) == (HookExit.DONE, None)
    assert lines == ["no lifecycle action waits for i-1"]


@pytest.mark.parametrize(
    ("transition", "terminating", "advice"),
    [("LAUNCHING", True, "call this without --term"), ("TERMINATING", False, "with --term")],
)
def test_a_hook_of_the_other_kind_is_refused_before_anything_is_done(
    action: LifecycleAction, stub: Stubber, transition: str, terminating: bool, advice: str
) -> None:
    facts(stub, transition=transition)
    hook = LifecycleHook(
        action, LifecycleSettings(terminating=terminating), threading.Event(), lambda _: None
    )
    worked: list[Outcome] = []

    def work() -> Outcome:
        worked.append(Outcome(HookExit.DONE, "", 0.0))
        return worked[0]

    with pytest.raises(Refused, match=advice):
        hook.carry_out(work)
    assert worked == []


def test_a_timeout_that_may_not_be_asked_is_taken_as_the_shortest(
    action: LifecycleAction, stub: Stubber
) -> None:
    lines: list[str] = []
    hook = LifecycleHook(action, LifecycleSettings(), threading.Event(), lines.append)
    refused(stub, "AccessDenied", "no", "describe_lifecycle_hooks")
    assert hook.beat_s() == 10.0
    assert "heartbeats each 10 s" in lines[0]


def test_an_interval_that_is_too_long_is_shortened(action: LifecycleAction, stub: Stubber) -> None:
    lines: list[str] = []
    settings = LifecycleSettings(heartbeat_s=120.0)
    hook = LifecycleHook(action, settings, threading.Event(), lines.append)
    facts(stub, 90)
    assert hook.beat_s() == 30.0
    assert "120 s would be too late" in lines[0]
