"""Who this instance is, asked of a real metadata server over HTTP, and the region that follows."""

from collections.abc import Iterator

import pytest
from botocore.session import Session

from cache_daemon.hooks_aws import InstanceMetadata, MetadataError, Refused, make_action
from tests.aws_server import AwsServer

_TARGET = "latest/meta-data/autoscaling/target-lifecycle-state"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[AwsServer]:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)
    with AwsServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def metadata() -> InstanceMetadata:
    return InstanceMetadata(Session())


def test_an_instance_knows_itself_by_a_token(aws: AwsServer) -> None:
    assert metadata().instance_id() == "i-0123456789abcdef0"
    assert metadata().region() == "eu-north-1"
    assert metadata().target_state() == "InService"
    assert aws.reads == [
        "latest/meta-data/instance-id",
        "latest/meta-data/placement/region",
        _TARGET,
    ]


def test_without_a_token_nothing_is_asked(aws: AwsServer) -> None:
    aws.has_tokens = False
    with pytest.raises(MetadataError, match=r"no token from the metadata service.*hop limit"):
        metadata().instance_id()
    assert aws.reads == []


def test_a_metadata_service_that_stumbles_is_asked_again(aws: AwsServer) -> None:
    aws.failures_left = 2
    assert metadata().instance_id() == "i-0123456789abcdef0"
    aws.failures_left = 100
    with pytest.raises(MetadataError, match="does not say latest/meta-data/instance-id"):
        metadata().instance_id()
    assert aws.failures_left == 97  # bounded


def test_an_instance_of_no_group_has_no_target(aws: AwsServer) -> None:
    del aws.metadata[_TARGET]
    assert metadata().target_state() == ""
    del aws.metadata["latest/meta-data/instance-id"]
    with pytest.raises(MetadataError, match="knows no latest/meta-data/instance-id"):
        metadata().instance_id()


def test_nobody_there_is_told_with_the_way_out(
    aws: AwsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert aws
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(MetadataError, match="give --instance-id and --region"):
        make_action(group="fleet", hook="warm", instance=None, region=None)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(MetadataError):
        make_action(group="fleet", hook="warm", instance=None, region=None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "not an address"),
        ("AWS_METADATA_SERVICE_TIMEOUT", "long"),
        ("AWS_PROFILE", "nobody"),
        ("AWS_ENDPOINT_URL_AUTO_SCALING", "not an address"),
    ],
)
def test_wrong_settings_of_aws_are_told_as_such(
    aws: AwsServer, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    assert aws
    monkeypatch.setenv(name, value)
    with pytest.raises(Refused, match="the AWS settings are wrong"):
        make_action(group="fleet", hook="warm", instance="i-1", region="eu-north-1")


@pytest.mark.parametrize(
    ("said", "environment", "expected"),
    [
        ("us-east-1", {"AWS_DEFAULT_REGION": "us-west-2"}, "us-east-1"),
        (None, {"AWS_DEFAULT_REGION": "us-west-2"}, "us-west-2"),
        (None, {}, "eu-north-1"),
    ],
)
def test_the_region_is_what_is_said_then_boto3s_then_the_instances(
    aws: AwsServer,
    monkeypatch: pytest.MonkeyPatch,
    said: str | None,
    environment: dict[str, str],
    expected: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    action, _ = make_action(group="fleet", hook="warm", instance=None, region=said)
    assert action.instance == "i-0123456789abcdef0"
    action.beat()
    (call,) = aws.of("RecordLifecycleActionHeartbeat")
    assert call["AutoScalingGroupName"] == "fleet"
    assert call["LifecycleHookName"] == "warm"
    assert call["InstanceId"] == action.instance
    # Signed for that region, by the role's credentials from the metadata service.
    (signed,) = aws.credentials
    assert "Credential=AKIDEXAMPLE/" in signed
    assert f"/{expected}/autoscaling/" in signed


def test_an_instance_and_a_region_that_are_said_need_no_metadata(
    aws: AwsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    aws.has_tokens = False
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    action, _ = make_action(group="fleet", hook="warm", instance="i-9", region="eu-north-1")
    action.beat()
    assert [call["InstanceId"] for call in aws.calls] == ["i-9"]
