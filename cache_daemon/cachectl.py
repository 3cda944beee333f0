"""cachectl: look into a running feature cache daemon, and change it.

Tables for people, `--json` for scripts, on every command. Exit codes: 0 done; 1 refused by the
daemon or the cluster, or no value for a key; 2 wrong usage; 3 the daemon or ZooKeeper cannot be
reached.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.live import Live

from cache_daemon import cachectl_cluster, cachectl_snapshot, cachectl_warmup
from cache_daemon._proto.feature_cache.v1 import admin_pb2
from cache_daemon.cachectl_admin import AdminClient, DaemonUnreachable, RequestRefused
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
from cache_daemon.cachectl_data import delete, get, put
from cache_daemon.cachectl_nvm import nvm_tables, nvm_view
from cache_daemon.cachectl_view import (
    human_bytes,
    human_count,
    namespaces_table,
    stats_table,
    stats_view,
    status_dict,
    status_table,
)
from cache_daemon.config_units import parse_size

__all__ = ["app", "main"]

_WATCHES_MAX = 1_000_000
_DRAIN_POLL_SECONDS = 0.2
_DRAIN_WAIT_SECONDS_MAX = 3600.0

app = typer.Typer(
    name="cachectl",
    help="Look into a running feature cache daemon, and change it.",
    epilog="Exit codes: 0 done, 1 refused or no value, 2 wrong usage, 3 daemon not reachable.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(get)
app.command()(put)
app.command()(delete)
app.add_typer(cachectl_cluster.app)
app.add_typer(cachectl_warmup.app)
app.add_typer(cachectl_snapshot.app)


def main() -> None:
    """The console script."""
    app()


@app.command()
def status(
    admin: AdminOption = DEFAULT_ADMIN,
    as_json: JsonOption = False,
    timeout: TimeoutOption = "5s",  # type: ignore[assignment]
) -> None:
    """Show the daemon's state, addresses and stores."""
    with plain_errors(), AdminClient(admin, timeout) as client:
        reply = client.status()
    if as_json:
        emit_json(status_dict(reply))
    else:
        console().print(status_table(reply))


@app.command()
def namespaces(
    admin: AdminOption = DEFAULT_ADMIN,
    as_json: JsonOption = False,
    timeout: TimeoutOption = "5s",  # type: ignore[assignment]
) -> None:
    """List namespaces and eviction domains with their policies, TTLs and budgets."""
    with plain_errors(), AdminClient(admin, timeout) as client:
        view = stats_view(client.stats())
    if as_json:
        emit_json(view.to_dict()["namespaces"])
    else:
        console().print(namespaces_table(view))


_Stats = admin_pb2.GetStatsResponse
_WatchOption = Annotated[bool, typer.Option("--watch", "-w", help="Refresh until interrupted.")]
_IntervalOption = Annotated[
    float,
    typer.Option(parser=duration_argument, metavar="DURATION", help="Time between refreshes."),
]
_CountOption = Annotated[
    int, typer.Option(min=1, max=_WATCHES_MAX, help="End a watch after so many refreshes.")
]


@app.command()
def stats(
    admin: AdminOption = DEFAULT_ADMIN,
    as_json: JsonOption = False,
    timeout: TimeoutOption = "5s",  # type: ignore[assignment]
    watch: _WatchOption = False,
    interval: _IntervalOption = "2s",  # type: ignore[assignment]
    count: _CountOption = _WATCHES_MAX,
    every: Annotated[
        bool, typer.Option("--all", help="Print every counter as a list of samples (with --json).")
    ] = False,
) -> None:
    """Show hit ratios, items and bytes by namespace and domain; --watch adds rates."""
    with plain_errors(), AdminClient(admin, timeout) as client:
        if watch:
            _show_watch(
                client,
                (interval, count),
                as_json,
                lambda now, before: stats_view(now, before).to_dict(),
                lambda now, before: stats_table(stats_view(now, before)),
            )
            return
        reply = client.stats()
    view = stats_view(reply)
    if as_json:
        emit_json(view.to_dict() | ({"samples": _samples(reply)} if every else {}))
    else:
        console().print(stats_table(view))


@app.command()
def nvm(
    admin: AdminOption = DEFAULT_ADMIN,
    as_json: JsonOption = False,
    timeout: TimeoutOption = "5s",  # type: ignore[assignment]
    watch: _WatchOption = False,
    interval: _IntervalOption = "2s",  # type: ignore[assignment]
    count: _CountOption = _WATCHES_MAX,
) -> None:
    """Show the NVM tier: devices, what namespaces have there, speculative lookups."""
    with plain_errors(), AdminClient(admin, timeout) as client:
        reply = client.stats()
        view = nvm_view(reply)
        if not view.devices and not as_json:
            print("this daemon has no NVM tier; docs/configuration.md says how to give it one")
        elif watch:
            _show_watch(
                client,
                (interval, count),
                as_json,
                lambda now, before: nvm_view(now, before).to_dict(),
                lambda now, before: nvm_tables(nvm_view(now, before)),
            )
        elif as_json:
            emit_json(view.to_dict())
        else:
            console().print(nvm_tables(view))


def _show_watch(
    client: AdminClient,
    pace: tuple[float, int],
    as_json: bool,
    to_dict: Callable[[_Stats, _Stats], Any],
    to_table: Callable[[_Stats, _Stats], RenderableType],
) -> None:
    """Shows what changed from one reply to the next, `pace` being seconds and how often."""
    interval_s, count = pace
    with interrupted() as ended:
        replies = _watch(client, max(interval_s, 0.1), count, ended)
        if as_json:
            for before, now in replies:
                emit_json(to_dict(now, before))
            return
        with Live(console=console(), auto_refresh=False, vertical_overflow="visible") as live:
            for before, now in replies:
                live.update(to_table(now, before), refresh=True)


def _watch(
    client: AdminClient, interval_s: float, count: int, ended: threading.Event
) -> Iterator[tuple[_Stats, _Stats]]:
    before = client.stats()
    for _ in range(count):
        if ended.wait(interval_s):
            return
        now = client.stats()
        yield before, now
        before = now


def _samples(reply: admin_pb2.GetStatsResponse) -> list[dict[str, object]]:
    return [
        {"name": s.name, "labels": dict(s.labels), "value": s.value, "kind": s.kind}
        for s in reply.samples
    ]


@app.command()
def resize(
    namespace: Annotated[str, typer.Argument(help="The namespace.")],
    domain: Annotated[str, typer.Argument(help="Its eviction domain.")],
    size: Annotated[str, typer.Argument(help="The new budget, such as 512MiB.")],
    admin: AdminOption = DEFAULT_ADMIN,
    as_json: JsonOption = False,
    timeout: TimeoutOption = "60s",  # type: ignore[assignment]
) -> None:
    """Change the byte budget of an eviction domain while it serves (until the next restart)."""
    try:
        budget_bytes = parse_size(int(size) if size.isdigit() else size)
    except ValueError as error:
        fail(str(error), ExitCode.USAGE)
    with plain_errors(), AdminClient(admin, timeout) as client:
        old_bytes = client.resize(namespace, domain, budget_bytes)
    if as_json:
        emit_json({"old_budget_bytes": old_bytes, "new_budget_bytes": budget_bytes})
        return
    print(
        f"{namespace}/{domain}: {human_bytes(old_bytes)} → {human_bytes(budget_bytes)}\n"
        "This holds until the daemon restarts; change the config, too, to keep it."
    )


@app.command()
def flush(
    namespace: Annotated[str, typer.Argument(help="The namespace whose items are dropped.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    admin: AdminOption = DEFAULT_ADMIN,
    as_json: JsonOption = False,
    timeout: TimeoutOption = "60s",  # type: ignore[assignment]
) -> None:
    """Drop every cached item of a namespace; its reads then go to the feature store."""
    if not yes:
        if not sys.stdin.isatty():
            fail("flush asks before it drops a namespace; say --yes in scripts", ExitCode.USAGE)
        typer.confirm(f"Drop every cached item of {namespace!r}?", abort=True)
    with plain_errors(), AdminClient(admin, timeout) as client:
        items = client.flush(namespace)
    if as_json:
        emit_json({"namespace": namespace, "items": items})
    else:
        print(f"{namespace}: dropped {human_count(items)} items")


@app.command()
def drain(
    within: Annotated[
        float,
        typer.Option(
            parser=duration_argument,
            metavar="DURATION",
            help="How long accepted requests may take; 0: as configured.",
        ),
    ] = "0",  # type: ignore[assignment]
    wait: Annotated[bool, typer.Option(help="Wait until the daemon has stopped.")] = True,
    admin: AdminOption = DEFAULT_ADMIN,
    as_json: JsonOption = False,
    timeout: TimeoutOption = "5s",  # type: ignore[assignment]
) -> None:
    """Refuse new requests, finish those that were accepted, then stop the daemon."""
    started = time.monotonic()
    with plain_errors(), AdminClient(admin, timeout) as client:
        client.drain(within)
        stopped = _wait_until_gone(client) if wait else False
    if wait and not stopped:
        fail(f"the daemon still answers after {_DRAIN_WAIT_SECONDS_MAX:g} s", ExitCode.REFUSED)
    seconds = time.monotonic() - started
    if as_json:
        emit_json({"draining": True, "stopped": stopped, "seconds": seconds})
    else:
        print(f"stopped after {seconds:.1f} s" if stopped else "draining")


def _wait_until_gone(client: AdminClient) -> bool:
    """True when nobody answers at the admin address any more."""
    for _ in range(int(_DRAIN_WAIT_SECONDS_MAX / _DRAIN_POLL_SECONDS)):
        try:
            if client.status().state == "STOPPED":
                return True
        except DaemonUnreachable:
            return True
        except RequestRefused:
            pass  # the call was cut when the listener closed: ask once more
        time.sleep(_DRAIN_POLL_SECONDS)
    return False


if __name__ == "__main__":
    main()
