"""Lifecycle hooks of AWS Auto Scaling: who this instance is, and the action that waits for it.

An instance that a group launches or terminates waits until its hook's action is completed, or for
the hook's timeout, which heartbeats begin anew. The errors:

    LifecycleError          AWS could not be told; the text says what to do
    ├── NoAction            no action waits for this instance: not yet, or not any more
    ├── Refused             the hook or the instance does not exist, or the settings are wrong
    │   └── Denied          the credentials do not allow the call
    ├── MetadataError       the instance's metadata service does not answer
    └── Unavailable         the API cannot be reached, or throttles
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.session import Session
from botocore.utils import BadIMDSRequestError, IMDSFetcher, resolve_imds_endpoint_mode

if TYPE_CHECKING:
    from mypy_boto3_autoscaling import AutoScalingClient

__all__ = [
    "Denied",
    "Heartbeats",
    "HookFacts",
    "InstanceMetadata",
    "LifecycleAction",
    "LifecycleError",
    "MetadataError",
    "NoAction",
    "Refused",
    "Result",
    "Unavailable",
    "make_action",
]

Result = Literal["CONTINUE", "ABANDON"]

_CALL_ATTEMPTS = 4  # botocore's own, of one call
_CONNECT_S = 5.0
_READ_S = 10.0
_IMDS_ATTEMPTS_MIN = 3  # botocore's default of one is too few while a host boots
_RETRY_S_MIN, _RETRY_S_MAX = 1.0, 15.0
# A heartbeat that failed is tried again so soon: AWS's shortest timeout of a hook is 30 s.
_BEAT_RETRY_S = 5.0
_BEATS_A_TIMEOUT = 3
_JOIN_S = 2.0

_DENIED = frozenset(
    {
        "AccessDenied",
        "AccessDeniedException",
        "AuthFailure",
        "ExpiredToken",
        "InvalidClientTokenId",
        "OptInRequired",
        "SignatureDoesNotMatch",
        "UnauthorizedOperation",
    }
)


class LifecycleError(Exception):
    """AWS could not be told; the text says what to do."""


class NoAction(LifecycleError):
    """No action of this hook waits for this instance: not yet, or not any more."""


class Refused(LifecycleError):
    """AWS said no, and will again: there is no such hook, or the settings are wrong."""


class Denied(Refused):
    """The credentials do not allow the call."""


class MetadataError(LifecycleError):
    """The instance's metadata service does not answer as it should."""


class Unavailable(LifecycleError):
    """The API cannot be reached, or throttles; another try may help."""


class InstanceMetadata(IMDSFetcher):
    """The metadata service of the instance that this runs on (IMDSv2: a token first).

    Where it is and how long a call may take is configured as for boto3's credentials, such as by
    AWS_EC2_METADATA_SERVICE_ENDPOINT.
    """

    def __init__(self, session: Session) -> None:
        names = ("ec2_metadata_service_endpoint", "ec2_metadata_v1_disabled")
        super().__init__(
            timeout=session.get_config_variable("metadata_service_timeout"),
            num_attempts=max(
                _IMDS_ATTEMPTS_MIN, session.get_config_variable("metadata_service_num_attempts")
            ),
            user_agent=session.user_agent(),
            config={name: session.get_config_variable(name) for name in names}
            | {"ec2_metadata_service_endpoint_mode": resolve_imds_endpoint_mode(session)},
        )

    def instance_id(self) -> str:
        """Raises MetadataError."""
        return self._read("latest/meta-data/instance-id")

    def region(self) -> str:
        """Raises MetadataError."""
        return self._read("latest/meta-data/placement/region")

    def target_state(self) -> str:
        """Where the group wants the instance: InService, Terminated, ...; raises MetadataError.

        "" where no group has it.
        """
        try:
            return self._read("latest/meta-data/autoscaling/target-lifecycle-state")
        except _NotThere:
            return ""

    def _read(self, path: str) -> str:
        # What botocore's own fetchers of credentials and regions are made of, which have no more
        # public way to other paths.
        try:
            token = self._fetch_metadata_token()  # type: ignore[attr-defined]
            if not token:
                raise MetadataError(
                    f"no token from the metadata service at {self.get_base_url()}: is this an EC2 "
                    "instance? In a container the hop limit must be 2. Or give --instance-id and "
                    "--region"
                )
            statuses: list[int] = []

            def again(response: object) -> bool:
                statuses.append(getattr(response, "status_code", 0))
                return statuses[-1] not in (200, 404)

            response = self._get_request(path, again, token=token)  # type: ignore[attr-defined]
        except (
            BotoCoreError,
            BadIMDSRequestError,
            self._RETRIES_EXCEEDED_ERROR_CLS,  # type: ignore[attr-defined]
        ) as error:
            said = f"{type(error).__name__}: {error}".rstrip(": ")
            raise MetadataError(
                f"the metadata service at {self.get_base_url()} does not say {path} ({said})"
            ) from error
        text = str(response.text).strip()
        if response.status_code == 404 or not text:
            raise _NotThere(f"the metadata service knows no {path}")
        return text


class _NotThere(MetadataError):
    pass


@dataclass(frozen=True)
class HookFacts:
    """A hook as the group has it."""

    heartbeat_s: float  # without a heartbeat for so long its default result holds
    is_launching: bool

    def beat_s(self, wanted_s: float | None) -> float:
        """Seconds between heartbeats: as wanted where that is soon enough."""
        latest_s = self.heartbeat_s / _BEATS_A_TIMEOUT
        return latest_s if wanted_s is None else min(wanted_s, latest_s)


class LifecycleAction:
    """The action of one hook that waits for one instance. Thread-safe, as clients are."""

    def __init__(self, client: AutoScalingClient, group: str, hook: str, instance: str) -> None:
        self._client = client
        self._group = group
        self._hook = hook
        self.instance = instance

    def describe(self) -> HookFacts:
        """Raises LifecycleError; Refused where the group has no such hook."""
        try:
            reply = self._client.describe_lifecycle_hooks(
                AutoScalingGroupName=self._group, LifecycleHookNames=[self._hook]
            )
        except (BotoCoreError, ClientError) as error:
            raise self._translate(error, "DescribeLifecycleHooks") from error
        for hook in reply["LifecycleHooks"]:
            if hook.get("LifecycleHookName") == self._hook:
                return HookFacts(
                    heartbeat_s=float(hook.get("HeartbeatTimeout", 3600)),
                    is_launching=hook.get("LifecycleTransition", "").endswith("LAUNCHING"),
                )
        raise Refused(
            f"the Auto Scaling group {self._group} has no lifecycle hook {self._hook}; "
            "check --group and --hook"
        )

    def beat(self) -> None:
        """Begins the hook's timeout anew. Raises LifecycleError."""
        try:
            self._client.record_lifecycle_action_heartbeat(
                AutoScalingGroupName=self._group,
                LifecycleHookName=self._hook,
                InstanceId=self.instance,
            )
        except (BotoCoreError, ClientError) as error:
            raise self._translate(error, "RecordLifecycleActionHeartbeat") from error

    def complete(
        self, result: Result, within_s: float, stop: threading.Event, tell: Callable[[str], None]
    ) -> bool:
        """Lets the instance go on, or not; tries for `within_s` seconds, or until `stop`.

        False where nothing was to be told: the instance is where no action waits for it, such as
        after a reboot. Raises LifecycleError.
        """
        deadline = time.monotonic() + within_s
        pause_s = _RETRY_S_MIN
        while True:
            try:
                self._client.complete_lifecycle_action(
                    AutoScalingGroupName=self._group,
                    LifecycleHookName=self._hook,
                    InstanceId=self.instance,
                    LifecycleActionResult=result,
                )
                return True
            except (BotoCoreError, ClientError) as raised:
                error = self._translate(raised, "CompleteLifecycleAction")
                if isinstance(error, NoAction) and self._is_settled():
                    return False
                if isinstance(error, Refused) or time.monotonic() + pause_s > deadline:
                    raise error from raised
            tell(f"{error}; trying again")
            if stop.wait(pause_s * random.uniform(0.5, 1.0)):
                raise error
            pause_s = min(pause_s * 2, _RETRY_S_MAX)

    def _is_settled(self) -> bool:
        """Whether no action will wait for the instance before it is launched or ended again.

        One that is about to wait has no action for some moments, either.
        """
        try:
            reply = self._client.describe_auto_scaling_instances(InstanceIds=[self.instance])
        except (BotoCoreError, ClientError):
            return False  # not known: go on trying
        states = [found.get("LifecycleState", "") for found in reply["AutoScalingInstances"]]
        return any(
            state and not state.endswith(("Pending", "Terminating", "Wait")) for state in states
        )

    def _translate(self, error: BotoCoreError | ClientError, call: str) -> LifecycleError:
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            return Unavailable(
                f"{call}: no AWS credentials; give the instance a profile whose role may call it"
            )
        if not isinstance(error, ClientError):
            return Unavailable(f"{call}: {error}")
        code = error.response.get("Error", {}).get("Code", "")
        message = error.response.get("Error", {}).get("Message", "") or code
        if code in _DENIED:
            return Denied(f"{call}: {message}; allow autoscaling:{call} to the instance's role")
        if code == "ValidationError":
            if "no active lifecycle action" in message.lower():
                return NoAction(f"{call}: {message}")
            return Refused(f"{call}: {message}; check --group, --hook and --instance-id")
        return Unavailable(f"{call}: {code}: {message}")


class Heartbeats:
    """Sends heartbeats from a thread of its own, from entry to exit; what fails is told."""

    def __init__(
        self, action: LifecycleAction, interval_s: float, tell: Callable[[str], None]
    ) -> None:
        self._action = action
        self._interval_s = interval_s
        self._tell = tell
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)

    def __enter__(self) -> Heartbeats:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join(_JOIN_S)

    def _run(self) -> None:
        told = ""
        while True:
            pause_s = self._interval_s * random.uniform(0.9, 1.0)  # not all nodes at once
            trouble = ""
            try:
                # The first one at once: nobody knows how long the instance has waited already.
                self._action.beat()
            except LifecycleError as error:
                trouble = str(error)
                pause_s = min(pause_s, _BEAT_RETRY_S)
            if self._ended.is_set():
                return  # an action that was completed meanwhile is no trouble
            if trouble and trouble != told:
                self._tell(f"heartbeat: {trouble}")
            told = trouble
            if self._ended.wait(pause_s):
                return


def make_action(
    *, group: str, hook: str, instance: str | None, region: str | None
) -> tuple[LifecycleAction, InstanceMetadata]:
    """The action for `instance`, by default the one that this runs on, in boto3's usual region.

    Where boto3 knows no region it is the instance's own. Raises LifecycleError.
    """
    try:
        session = boto3.Session()
        # boto3 has no public way to it, and the metadata service is configured there.
        metadata = InstanceMetadata(session._session)
        region = region or session.region_name or metadata.region()
        client = session.client(
            "autoscaling",
            region_name=region,
            config=Config(
                connect_timeout=_CONNECT_S,
                read_timeout=_READ_S,
                retries={"mode": "standard", "total_max_attempts": _CALL_ATTEMPTS},
            ),
        )
        return LifecycleAction(client, group, hook, instance or metadata.instance_id()), metadata
    except (BotoCoreError, ValueError) as error:
        raise Refused(f"the AWS settings are wrong: {error}") from error
