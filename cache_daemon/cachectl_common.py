"""What all commands of cachectl share: options, output, and the way errors end a command."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterator
from enum import IntEnum
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from cache_daemon.cachectl_admin import DaemonUnreachable, RequestRefused
from cache_daemon.config_units import parse_duration

__all__ = [
    "DEFAULT_ADDRESS",
    "DEFAULT_ADMIN",
    "AddressOption",
    "AdminOption",
    "ExitCode",
    "JsonOption",
    "TimeoutOption",
    "console",
    "duration_argument",
    "emit_json",
    "fail",
    "interrupted",
    "plain_errors",
]

# The same places that configs/ and the systemd unit use.
DEFAULT_ADDRESS = "unix:/run/feature-cache/data.sock"
DEFAULT_ADMIN = "unix:/run/feature-cache/admin.sock"


class ExitCode(IntEnum):
    """What the shell sees. 2 is what typer itself uses for wrong usage."""

    DONE = 0
    REFUSED = 1
    USAGE = 2
    UNREACHABLE = 3


def duration_argument(text: str) -> float:
    """Seconds of `5m`, for options; a wrong one is an error of usage."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


AddressOption = Annotated[
    str,
    typer.Option(
        "--address",
        envvar="FEATURE_CACHE_ADDRESS",
        help="The data service: unix:/path or host:port.",
    ),
]
AdminOption = Annotated[
    str,
    typer.Option(
        "--admin",
        envvar="FEATURE_CACHE_ADMIN",
        help="The admin service: unix:/path or host:port.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
TimeoutOption = Annotated[
    float,
    typer.Option(
        "--timeout",
        parser=duration_argument,
        metavar="DURATION",
        help="How long one call may take.",
    ),
]


def console() -> Console:
    """Standard output for people; made a call, so that tests and pipes get their own stream."""
    return Console(file=sys.stdout, highlight=False)


def emit_json(value: Any) -> None:
    """One JSON document a line."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def fail(message: str, code: ExitCode) -> NoReturn:
    """Ends the command with a line on standard error."""
    print(f"cachectl: {message}", file=sys.stderr)
    raise typer.Exit(int(code))


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turns what the admin client raises into a message and an exit code."""
    try:
        yield
    except DaemonUnreachable as error:
        fail(str(error), ExitCode.UNREACHABLE)
    except RequestRefused as error:
        fail(str(error), ExitCode.REFUSED)


@contextlib.contextmanager
def interrupted() -> Iterator[threading.Event]:
    """Is set by an interrupt, which is how people end a watch.

    As an exception it would be lost where it comes amid a callback of gRPC's.
    """
    ended = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield ended  # no signals here
        return
    before = signal.signal(signal.SIGINT, lambda _number, _frame: ended.set())
    try:
        yield ended
    finally:
        signal.signal(signal.SIGINT, before)
