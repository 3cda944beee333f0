"""`cache-daemon warmup`: what autoscalers run beside a daemon, once for each event.

Exit codes: 0 warm, or drained; 2 wrong usage; 3 timed out; 4 the daemon serves cold: its warm-up
failed, or brought less than asked for; 5 nobody answers, or the daemon ends; 6 AWS could not be
told; 143 a signal ended the wait. docs/hooks.md has the details.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cache_daemon.config import ConfigError, load_config
from cache_daemon.config_units import parse_duration, parse_share

if TYPE_CHECKING:
    from cache_daemon.hooks import Outcome, Tell
    from cache_daemon.hooks_lifecycle import Told

__all__ = ["app"]

_LINE_S = 10.0  # between lines where no terminal is


class _OnFailure(str, Enum):
    """The same words as warmup.on_failure in the config."""

    SERVE_COLD = "serve_cold"
    FAIL = "fail"


app = typer.Typer(
    name="warmup",
    help="Hooks for autoscalers: wait until a daemon is warm, drain one.",
    epilog="Exit codes: 0 warm or drained, 2 wrong usage, 3 timed out, 4 serves cold, "
    "5 not reachable or about to end, 6 AWS could not be told.",
    no_args_is_help=True,
)


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _share(text: str) -> float:
    try:
        return parse_share(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


_AdminOption = Annotated[
    str | None,
    typer.Option(
        "--admin",
        envvar="FEATURE_CACHE_ADMIN",
        help="The daemon's admin service: unix:/path or host:port; by default "
        "unix:/run/feature-cache/admin.sock.",
    ),
]
_ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="The daemon's config file, which says listen.admin."),
]
_JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_TimeoutOption = Annotated[
    float,
    typer.Option(
        "--timeout",
        parser=_duration,
        metavar="DURATION",
        help="How long this waits at most; more than warmup.max_duration and a start take.",
    ),
]
_ReachOption = Annotated[
    float,
    typer.Option(
        parser=_duration,
        metavar="DURATION",
        help="How long nobody may answer, at first and while the daemon restarts.",
    ),
]
_RatioOption = Annotated[
    float | None,
    typer.Option(
        parser=_share,
        metavar="SHARE",
        help="Less of the recorded traffic that would hit counts as cold: 80%.",
    ),
]
_WithinOption = Annotated[
    float,
    typer.Option(
        parser=_duration,
        metavar="DURATION",
        help="How long accepted requests may take; 0: as the daemon's config says.",
    ),
]


@app.command()
def wait(
    context: typer.Context,
    admin: _AdminOption = None,
    config: _ConfigOption = None,
    timeout: _TimeoutOption = "15m",  # type: ignore[assignment]
    reach: _ReachOption = "30s",  # type: ignore[assignment]
    min_hit_ratio: _RatioOption = None,
    as_json: _JsonOption = False,
) -> None:
    """Wait until a daemon serves after its warm-up. Exit code 0: it is warm."""
    address = _address(context, admin, config)
    from cache_daemon.hooks import WaitLimits, stop_signals, wait_until_warm

    with stop_signals() as stop, _progress() as tell:
        outcome = wait_until_warm(address, WaitLimits(timeout, reach, min_hit_ratio), stop, tell)
    _end(outcome, "warm", as_json)


@app.command()
def drain(
    context: typer.Context,
    admin: _AdminOption = None,
    config: _ConfigOption = None,
    within: _WithinOption = "0",  # type: ignore[assignment]
    delay: Annotated[
        float,
        typer.Option(
            parser=_duration,
            metavar="DURATION",
            help="Waits so long first, so that balancers send nothing more.",
        ),
    ] = "0",  # type: ignore[assignment]
    timeout: Annotated[
        float,
        typer.Option(
            parser=_duration,
            metavar="DURATION",
            help="How long this waits; more than drain_timeout and persist.shutdown_limit.",
        ),
    ] = "2m",  # type: ignore[assignment]
    as_json: _JsonOption = False,
) -> None:
    """Drain a daemon, and wait until it has ended. For a preStop hook."""
    address = _address(context, admin, config)
    from cache_daemon.hooks import HookExit, Outcome, drain_until_gone, stop_signals

    with stop_signals() as stop, _progress() as tell:
        if stop.wait(delay):
            outcome = Outcome(HookExit.SIGNALLED, "a signal came before the drain began", delay)
        else:
            outcome = drain_until_gone(address, within, timeout, stop, tell)
    _end(outcome, "drained", as_json)


@app.command("aws-lifecycle")
def aws_lifecycle(
    context: typer.Context,
    group: Annotated[
        str,
        typer.Option(
            envvar="FEATURE_CACHE_AWS_GROUP",
            help="The Auto Scaling group's name.",
            show_default=False,
        ),
    ],
    hook: Annotated[
        str,
        typer.Option(
            envvar="FEATURE_CACHE_AWS_HOOK", help="The lifecycle hook's name.", show_default=False
        ),
    ],
    instance_id: Annotated[
        str | None, typer.Option(help="By default the instance that this runs on.")
    ] = None,
    region: Annotated[
        str | None, typer.Option(help="By default boto3's, else the instance's own.")
    ] = None,
    terminating: Annotated[
        bool, typer.Option("--terminating", help="The hook of an end: drain, then go on.")
    ] = False,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help="With --terminating: first wait until the group ends this instance."
        ),
    ] = False,
    on_failure: Annotated[
        _OnFailure,
        typer.Option(
            help="What becomes of a node that serves cold: CONTINUE or ABANDON. One that does not "
            "serve is abandoned.",
        ),
    ] = _OnFailure.SERVE_COLD,
    heartbeat: Annotated[
        float | None,
        typer.Option(
            parser=_duration,
            metavar="DURATION",
            help="Between heartbeats; by default a third of the hook's timeout.",
        ),
    ] = None,
    admin: _AdminOption = None,
    config: _ConfigOption = None,
    timeout: _TimeoutOption = "15m",  # type: ignore[assignment]
    reach: _ReachOption = "30s",  # type: ignore[assignment]
    min_hit_ratio: _RatioOption = None,
    within: _WithinOption = "0",  # type: ignore[assignment]
    as_json: _JsonOption = False,
) -> None:
    """Carry out a lifecycle hook of AWS Auto Scaling: wait or drain, heartbeats, then its result.

    A launching hook goes on (CONTINUE) when the daemon is warm, or is abandoned (ABANDON). With
    --terminating the daemon is drained, and the hook goes on.
    """
    address = _address(context, admin, config)
    if watch and not terminating:
        raise typer.BadParameter("--watch waits for the end of an instance; add --terminating")
    if watch and instance_id is not None:
        raise typer.BadParameter("--watch sees this instance alone; remove --instance-id")
    if heartbeat is not None and heartbeat < 1:
        raise typer.BadParameter("--heartbeat must be at least 1s")
    from cache_daemon import hooks
    from cache_daemon.hooks_aws import LifecycleError, make_action
    from cache_daemon.hooks_lifecycle import LifecycleHook, LifecycleSettings, Told

    began = time.monotonic()
    with hooks.stop_signals() as stop, _progress() as tell:

        def work() -> Outcome:
            if terminating:
                return hooks.drain_until_gone(address, within, timeout, stop, tell)
            limits = hooks.WaitLimits(timeout, reach, min_hit_ratio)
            return hooks.wait_until_warm(address, limits, stop, tell)

        try:
            action, metadata = make_action(
                group=group, hook=hook, instance=instance_id, region=region
            )
            lifecycle = LifecycleHook(
                action,
                LifecycleSettings(
                    terminating=terminating,
                    serve_cold=on_failure is _OnFailure.SERVE_COLD,
                    heartbeat_s=heartbeat,
                ),
                stop,
                lambda line: tell(line, None),
            )
            if watch:
                lifecycle.beat_s()  # a wrong hook is told now, not when it is needed
            if watch and not lifecycle.wait_for_termination(metadata):
                seconds = time.monotonic() - began
                told = Told(hooks.Outcome(hooks.HookExit.SIGNALLED, "a signal came", seconds))
            else:
                told = lifecycle.carry_out(work)
        except LifecycleError as error:
            seconds = time.monotonic() - began
            told = Told(hooks.Outcome(hooks.HookExit.NOT_TOLD, str(error), seconds))
    _end(told.outcome, "drained" if terminating else "warm", as_json, told)


def _address(context: typer.Context, admin: str | None, config: Path | None) -> str:
    """Of the admin service: what is said, else the config's, else where it is by default."""
    if config is not None:
        source = context.get_parameter_source("admin")
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter("the address is said twice; remove --admin or --config")
        try:
            address = load_config(config).listen.admin
        except ConfigError as error:
            raise typer.BadParameter(str(error)) from None
        if address is None:
            raise typer.BadParameter(f"{config} has no listen.admin; add it to the daemon's config")
        admin = address
    if admin is None:
        from cache_daemon.cachectl_common import DEFAULT_ADMIN

        return DEFAULT_ADMIN
    if admin.endswith(":0"):
        raise typer.BadParameter(f"{admin} is any free port; give the admin service a fixed one")
    return admin


@contextmanager
def _progress() -> Iterator[Tell]:
    """A bar on a terminal; elsewhere a line when something changed, or now and then."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    console = Console(stderr=True, highlight=False)
    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.fields[line]}", markup=False))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None, line="")

        def show(line: str, status: Any) -> None:
            if status is None:
                progress.print(line, markup=False)
                return
            total = status.warmup.keys_total or None
            progress.update(task, total=total, completed=status.warmup.keys_done, line=line)

        yield show


class _Lines:
    """Lines on standard error; the same kind of news not too often."""

    def __init__(self) -> None:
        self._shown: dict[str, float] = {}

    def __call__(self, line: str, status: Any) -> None:
        kind = line if status is None else f"{status.state} {status.warmup.phase}"
        now = time.monotonic()
        if now - self._shown.get(kind, -_LINE_S) >= _LINE_S:
            self._shown = {kind: now} if len(self._shown) > 100 else self._shown | {kind: now}
            print(line, file=sys.stderr, flush=True)


def _end(outcome: Outcome, done: str, as_json: bool, told: Told | None = None) -> NoReturn:
    result = told.result if told is not None else None
    if as_json:
        extra = {"lifecycle_result": result} if told is not None else {}
        print(json.dumps(outcome.as_dict() | extra, ensure_ascii=False), flush=True)
    else:
        line = f"{outcome.message}{f'; {result} told' if result else ''}"
        if outcome.code == 0:
            print(f"{done} after {outcome.seconds:.1f} s: {line}", flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
    raise typer.Exit(int(outcome.code))
