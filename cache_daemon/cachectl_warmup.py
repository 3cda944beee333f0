"""`cachectl warmup`: how a node is filled, or was; fill a serving one; end it.

A bar on a terminal, a line now and then elsewhere. Exit code 1 where a warm-up that is waited for
brought nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from cache_daemon._proto.feature_cache.v1 import admin_pb2
from cache_daemon.cachectl_admin import AdminClient
from cache_daemon.cachectl_common import (
    DEFAULT_ADMIN,
    AdminOption,
    ExitCode,
    JsonOption,
    TimeoutOption,
    console,
    duration_argument,
    emit_json,
    fail,
    interrupted,
    plain_errors,
)
from cache_daemon.cachectl_view import empty_table, human_bytes, human_count, message_dict
from cache_daemon.config_units import format_duration

__all__ = ["app", "warmup_dict", "warmup_line", "warmup_table"]

_LINE_S = 5.0  # between lines where no terminal is
_POLL_S = 0.5
_UNDER_WAY = ("pending", "running")
_NONE = "this daemon's config has no warmup section; docs/warmup.md says how to add one"

app = typer.Typer(
    name="warmup",
    help="How a node is filled with what is asked of it: look, begin, end.",
    no_args_is_help=True,
)

_WatchOption = Annotated[
    bool, typer.Option("--watch", "-w", help="Follow it until it ends, or until interrupted.")
]
_Warmup = admin_pb2.WarmupStatus


@app.command()
def status(
    admin: AdminOption = DEFAULT_ADMIN,
    as_json: JsonOption = False,
    timeout: TimeoutOption = "5s",  # type: ignore[assignment]
    watch: _WatchOption = False,
) -> None:
    """Show how far the warm-up is, or how the last one went."""
    with plain_errors(), AdminClient(admin, timeout) as client:
        found = _status(client)
        if watch:
            _follow(client, as_json)
            return
    if as_json:
        emit_json(warmup_dict(found))
    else:
        console().print(warmup_table(found))


@app.command()
def start(
    admin: AdminOption = DEFAULT_ADMIN,
    as_json: JsonOption = False,
    timeout: TimeoutOption = "5s",  # type: ignore[assignment]
    watch: _WatchOption = False,
    max_duration: Annotated[
        float,
        typer.Option(
            parser=duration_argument,
            metavar="DURATION",
            help="How long it may take; 0: as configured.",
        ),
    ] = "0",  # type: ignore[assignment]
) -> None:
    """Fill a node that serves: from snapshots and peers, as a new one is before it serves."""
    with plain_errors(), AdminClient(admin, timeout) as client:
        client.start_warmup(max_duration)
        if watch:
            last = _follow(client, as_json)
            if last is not None and last.state == "failed":
                fail(f"the warm-up brought nothing: {last.reason}", ExitCode.REFUSED)
            return
    if as_json:
        emit_json({"started": True})
    else:
        print("started; `cachectl warmup status --watch` shows how it goes")


@app.command()
def stop(
    admin: AdminOption = DEFAULT_ADMIN,
    as_json: JsonOption = False,
    timeout: TimeoutOption = "5s",  # type: ignore[assignment]
) -> None:
    """End a warm-up; what it brought stays. A node that does not serve yet serves then."""
    with plain_errors(), AdminClient(admin, timeout) as client:
        was_running = client.stop_warmup()
    if as_json:
        emit_json({"was_running": was_running})
    else:
        print("ended" if was_running else "none was running")


def warmup_dict(warmup: _Warmup) -> dict[str, Any]:
    """The status as plain objects that json can write."""
    uploads = message_dict(warmup.uploads) if warmup.HasField("uploads") else None
    return message_dict(warmup, without=("uploads",)) | {"uploads": uploads}


def warmup_line(warmup: _Warmup) -> str:
    """How it goes, in a line."""
    parts = [f"{warmup.state}{f', {warmup.phase}' if warmup.phase else ''}"]
    if warmup.keys_total or warmup.keys_done:
        of = f" of {human_count(warmup.keys_total)}" if warmup.keys_total else ""
        parts.append(f"{human_count(warmup.keys_done)}{of} keys")
    if warmup.state == "running" and warmup.keys_per_second:
        parts.append(f"{human_count(round(warmup.keys_per_second))}/s")
    if warmup.items_copied:
        parts.append(
            f"{human_count(warmup.items_copied)} items ({human_bytes(warmup.bytes_copied)}) copied"
        )
    if warmup.predicted_hit_ratio >= 0:
        parts.append(f"{warmup.predicted_hit_ratio:.1%} of the recorded traffic would hit")
    if warmup.state == "running" and warmup.seconds_left >= 0:
        parts.append(f"{format_duration(float(round(warmup.seconds_left)))} left")
    if warmup.reason:
        parts.append(warmup.reason)
    return ", ".join(parts)


def warmup_table(warmup: _Warmup) -> Table:
    """Names and values, one a row."""
    table = empty_table(None)
    table.add_column(style="dim")
    table.add_column()
    table.show_header = False
    for name, value in _rows(warmup):
        table.add_row(name, value)
    return table


def _rows(warmup: _Warmup) -> Iterator[tuple[str, Text]]:
    style = {"warmed": "green", "failed": "red"}.get(warmup.state, "yellow")
    phase = f", {warmup.phase}" if warmup.phase else ""
    yield "state", Text(f"{warmup.state}{phase}", style)
    if warmup.reason:
        yield "reason", Text(warmup.reason)
    if warmup.serving_cold:
        yield "serves cold", Text("the warm-up at the start brought nothing", "red")
    if warmup.state not in ("off", "pending"):
        of = f" of {human_count(warmup.keys_total)}" if warmup.keys_total else ""
        failed = f", {human_count(warmup.keys_failed)} failed" if warmup.keys_failed else ""
        yield (
            "replayed",
            Text(
                f"{human_count(warmup.keys_done)}{of} keys, {human_count(warmup.keys_fetched)} "
                f"fetched{failed}, from {warmup.snapshots} snapshots"
            ),
        )
        copied = human_bytes(warmup.bytes_copied)
        yield "copied", Text(f"{human_count(warmup.items_copied)} items, {copied}")
        took = format_duration(float(round(warmup.seconds)))
        yield "time", Text(f"{took} of {format_duration(float(round(warmup.max_seconds)))}")
    if warmup.state == "running":
        limit = f", at most {human_count(round(warmup.rate_limit))}/s" if warmup.rate_limit else ""
        if warmup.fleet_members:
            limit += f", shared by {warmup.fleet_members} nodes"
        yield "rate", Text(f"{human_count(round(warmup.keys_per_second))} keys/s{limit}")
    if warmup.predicted_hit_ratio >= 0:
        yield (
            "would hit",
            Text(f"{warmup.predicted_hit_ratio:.1%}, target {warmup.target_hit_ratio:.0%}"),
        )
    if warmup.HasField("uploads"):
        uploads = warmup.uploads
        line = f"{uploads.uploaded} windows, {uploads.pending} wait"
        if uploads.dropped:
            line += f", {uploads.dropped} dropped"
        yield "uploaded", Text(line)
        if uploads.problem:
            yield "upload problem", Text(uploads.problem, "red")


def _status(client: AdminClient) -> _Warmup:
    reply = client.status()
    if not reply.HasField("warmup"):
        fail(_NONE, ExitCode.REFUSED)
    return reply.warmup


def _follow(client: AdminClient, as_json: bool) -> _Warmup | None:
    """Shows a warm-up until it ends; what it was at last, or None where a person ended it."""
    if as_json:
        return _each(client, _LINE_S / 5, lambda warmup: emit_json(warmup_dict(warmup)))
    if not sys.stdout.isatty():
        return _each(client, _LINE_S, lambda warmup: print(warmup_line(warmup), flush=True))
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[line]}"),
    )
    with Progress(*columns, console=console()) as progress:
        task = progress.add_task("", total=None, line="")

        def show(warmup: _Warmup) -> None:
            progress.update(
                task,
                total=warmup.keys_total or None,
                completed=warmup.keys_done,
                line=warmup_line(warmup),
            )

        return _each(client, _POLL_S, show)


def _each(
    client: AdminClient, interval_s: float, show: Callable[[_Warmup], None]
) -> _Warmup | None:
    with interrupted() as ended:
        return _until_over(client, interval_s, show, ended)


def _until_over(
    client: AdminClient,
    interval_s: float,
    show: Callable[[_Warmup], None],
    ended: threading.Event,
) -> _Warmup | None:
    while True:
        warmup = _status(client)
        show(warmup)
        if warmup.state not in _UNDER_WAY:
            return warmup
        left_s = interval_s
        while left_s > 0:  # that it ended is seen soon, however seldom a line comes
            if ended.wait(min(left_s, _POLL_S)):
                return None
            left_s -= _POLL_S
            if _status(client).state not in _UNDER_WAY:
                break
