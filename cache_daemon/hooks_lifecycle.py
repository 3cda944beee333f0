"""The two lifecycle hooks of AWS Auto Scaling: wait for a warm daemon, and drain one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from cache_daemon.hooks import HookExit, Outcome
from cache_daemon.hooks_aws import (
    Denied,
    Heartbeats,
    InstanceMetadata,
    LifecycleAction,
    LifecycleError,
    Refused,
    Result,
    Unavailable,
)

__all__ = ["LifecycleHook", "LifecycleSettings", "Told"]

_COMPLETE_S = 120.0  # an instance may be told before the group has it wait
_WATCH_S = 5.0
_BEAT_S_WITHOUT_FACTS = 10.0  # below AWS's shortest timeout of a hook, 30 s, three times


@dataclass(frozen=True)
class LifecycleSettings:
    """How a hook is carried out."""

    terminating: bool = False
    serve_cold: bool = True  # a node that serves cold goes on; else it is abandoned
    heartbeat_s: float | None = None  # None: as the hook's timeout wants it
    complete_s: float = _COMPLETE_S


@dataclass(frozen=True)
class Told:
    """How it ended, and what the group was told; None: nothing."""

    outcome: Outcome
    result: Result | None = None


class LifecycleHook:
    """Carries out one hook: heartbeats while `work` goes on, then its result."""

    def __init__(
        self,
        action: LifecycleAction,
        settings: LifecycleSettings,
        stop: threading.Event,
        tell: Callable[[str], None],
    ) -> None:
        self._action = action
        self._settings = settings
        self._stop = stop
        self._tell = tell

    def wait_for_termination(self, metadata: InstanceMetadata) -> bool:
        """Until the group wants this instance gone; False when a signal came first."""
        told = ""
        while True:
            trouble = ""
            try:
                if metadata.target_state().endswith("Terminated"):
                    return True
            except LifecycleError as error:
                trouble = str(error)
            if trouble and trouble != told:
                self._tell(trouble)
            told = trouble
            if self._stop.wait(_WATCH_S):
                return False

    def carry_out(self, work: Callable[[], Outcome]) -> Told:
        """`work` waits for a warm daemon, or drains one. Raises LifecycleError before it began."""
        with Heartbeats(self._action, self.beat_s(), self._tell):
            outcome = work()
            if outcome.code is HookExit.SIGNALLED:
                # Whoever stops this hook knows no better: the group's own default holds.
                return Told(outcome)
            result = self._result(outcome)
            try:
                done = self._action.complete(
                    result, self._settings.complete_s, self._stop, self._tell
                )
            except LifecycleError as error:
                message = f"{outcome.message}; {result} could not be told: {error}"
                return Told(replace(outcome, code=HookExit.NOT_TOLD, message=message))
        if not done:
            self._tell(f"no lifecycle action waits for {self._action.instance}")
            return Told(outcome)
        return Told(outcome, result)

    def beat_s(self) -> float:
        """Seconds between heartbeats. Raises LifecycleError when there is no such hook."""
        wanted_s = self._settings.heartbeat_s
        try:
            facts = self._action.describe()
        except (Denied, Unavailable) as error:
            beat_s = wanted_s or _BEAT_S_WITHOUT_FACTS
            self._tell(f"the hook's timeout is not known, heartbeats each {beat_s:g} s: {error}")
            return beat_s
        if facts.is_launching == self._settings.terminating:
            is_for = "launching" if facts.is_launching else "terminating"
            way = "without" if facts.is_launching else "with"
            raise Refused(f"that hook is for {is_for} instances; call this {way} --terminating")
        beat_s = facts.beat_s(wanted_s)
        if wanted_s is not None and beat_s < wanted_s:
            self._tell(
                f"heartbeats each {beat_s:g} s, since the hook's timeout is "
                f"{facts.heartbeat_s:g} s: {wanted_s:g} s would be too late"
            )
        return beat_s

    def _result(self, outcome: Outcome) -> Result:
        # An instance that ends goes on to end, whatever became of the daemon.
        if self._settings.terminating or outcome.code is HookExit.DONE:
            return "CONTINUE"
        if outcome.code is HookExit.COLD and self._settings.serve_cold:
            return "CONTINUE"
        return "ABANDON"
