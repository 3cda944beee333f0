"""`cachectl snapshot`: which windows of request logs there are, what is in them, if all is whole.

It looks where the daemon's config says, or at a URL; the daemon itself is not asked. Exit code 1
where something is damaged, 3 where the place cannot be reached.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from cache_daemon._native import RequestLogError, inspect_request_log
from cache_daemon.cachectl_common import ExitCode, JsonOption, console, emit_json, fail
from cache_daemon.cachectl_view import empty_table, human_bytes, human_count
from cache_daemon.config import ConfigError, load_config
from warmup.backend import BackendOptions, open_backend
from warmup.errors import AccessDenied, Damaged, NotThere, SnapshotError, Unreachable
from warmup.snapshots import Snapshot, SnapshotStore

__all__ = ["app"]

app = typer.Typer(
    name="snapshot",
    help="Uploaded windows of request logs: list them, look into them, check them.",
    no_args_is_help=True,
)

_ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="A daemon's config: where its snapshots are, and whose."),
]
_UrlOption = Annotated[
    str | None, typer.Option("--url", help="s3://bucket/prefix or file:///path, without a config.")
]
_EndpointOption = Annotated[
    str | None, typer.Option("--endpoint", help="Of a server that speaks S3; with --url.")
]
_RegionOption = Annotated[str | None, typer.Option("--region", help="With --url.")]
_NameOption = Annotated[str, typer.Option("--name", help="Of the cluster; with --url.")]
_TopologyOption = Annotated[
    str, typer.Option("--topology", help="colocated, separate or sharded; with --url.")
]
_WhichArgument = Annotated[
    str, typer.Argument(help="Only snapshots whose key contains this text.", show_default=False)
]
_LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="The freshest so many; none: all.")
]


@dataclass(frozen=True)
class _Place:
    config: Path | None
    url: str | None
    endpoint: str | None
    region: str | None
    name: str
    topology: str

    def open(self) -> SnapshotStore:
        if (self.config is None) == (self.url is None):
            raise typer.BadParameter("give --config FILE or --url URL")
        if self.url is not None:
            options = BackendOptions(endpoint=self.endpoint, region=self.region)
            try:
                return SnapshotStore(open_backend(self.url, options), self.name, self.topology)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from None
        assert self.config is not None
        try:
            config = load_config(self.config)
        except ConfigError as error:
            fail(str(error), ExitCode.USAGE)
        warmup = config.warmup
        if warmup is None or warmup.snapshots is None:
            fail(f"{self.config} has no warmup.snapshots", ExitCode.USAGE)
        snapshots = warmup.snapshots
        options = BackendOptions(snapshots.endpoint, snapshots.region, snapshots.timeout)
        name = warmup.name or (config.sharding.cluster if config.sharding else "default")
        return SnapshotStore(open_backend(snapshots.url, options), name, config.topology)


@app.command("list")
def list_snapshots(
    which: _WhichArgument = "",
    config: _ConfigOption = None,
    url: _UrlOption = None,
    endpoint: _EndpointOption = None,
    region: _RegionOption = None,
    name: _NameOption = "default",
    topology: _TopologyOption = "colocated",
    limit: _LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """List complete snapshots, the freshest first."""
    store = _Place(config, url, endpoint, region, name, topology).open()
    found = _find(store, which, limit)
    if as_json:
        for snapshot in found:
            emit_json(_as_dict(snapshot))
        return
    table = _table("window", "host", "shards", "keys", "distinct", "bytes", "uploaded")
    for snapshot in found:
        manifest = snapshot.manifest
        table.add_row(
            _time(manifest.window_start_s),
            manifest.host,
            manifest.shards or "all",
            human_count(manifest.keys),
            human_count(manifest.distinct_keys),
            human_bytes(manifest.size),
            _time(snapshot.modified),
        )
    console().print(table)
    console().print(f"{len(found)} snapshots in {store.url}", soft_wrap=True)


@app.command()
def inspect(
    which: _WhichArgument = "",
    config: _ConfigOption = None,
    url: _UrlOption = None,
    endpoint: _EndpointOption = None,
    region: _RegionOption = None,
    name: _NameOption = "default",
    topology: _TopologyOption = "colocated",
    limit: _LimitOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Show what snapshots have of each namespace; the freshest one unless told otherwise."""
    store = _Place(config, url, endpoint, region, name, topology).open()
    for snapshot in _find(store, which, limit):
        manifest = snapshot.manifest
        if as_json:
            emit_json(_as_dict(snapshot))
            continue
        out = console()
        out.print(snapshot.key, style="bold", markup=False, soft_wrap=True)
        out.print(
            f"host {manifest.host}, {_time(manifest.window_start_s)} for "
            f"{manifest.window_ms / 1000:g} s, {manifest.sample:.0%} of {manifest.by}, "
            f"{human_count(manifest.requests)} requests, {human_count(manifest.dropped_keys)} keys "
            f"lost, {'ended in order' if manifest.complete else 'cut off'}",
            markup=False,
            soft_wrap=True,
        )
        table = _table("namespace", "privacy", "keys", "distinct")
        for each in manifest.namespaces:
            table.add_row(
                each.name, each.privacy, human_count(each.keys), human_count(each.distinct_keys)
            )
        out.print(table)


@app.command()
def verify(
    which: _WhichArgument = "",
    config: _ConfigOption = None,
    url: _UrlOption = None,
    endpoint: _EndpointOption = None,
    region: _RegionOption = None,
    name: _NameOption = "default",
    topology: _TopologyOption = "colocated",
    limit: _LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read snapshots and check all of them: sizes, checksums, and what the manifests say."""
    store = _Place(config, url, endpoint, region, name, topology).open()
    found = _find(store, which, limit)
    damaged = 0
    with _bar(len(found)) as step:
        for snapshot in found:
            problem = _problem(store, snapshot)
            damaged += bool(problem)
            if as_json:
                emit_json({"key": snapshot.key, "problem": problem})
            elif problem:
                print(f"{snapshot.key}: {problem}")
            step()
    if not as_json:
        console().print(f"{len(found)} snapshots read, {damaged} damaged")
    if damaged:
        raise typer.Exit(ExitCode.REFUSED)


def _find(store: SnapshotStore, which: str, limit: int | None) -> Sequence[Snapshot]:
    try:
        found = store.find(limit=None if which else limit)
    except (AccessDenied, NotThere, Unreachable) as error:
        fail(str(error), ExitCode.UNREACHABLE)
    except SnapshotError as error:
        fail(str(error), ExitCode.REFUSED)
    return [snapshot for snapshot in found if which in snapshot.key][:limit]


def _problem(store: SnapshotStore, snapshot: Snapshot) -> str:
    """What is wrong with it; "": nothing."""
    manifest = snapshot.manifest
    try:
        info = inspect_request_log(store.read(snapshot))
    except (Damaged, RequestLogError) as error:
        return str(error)
    except SnapshotError as error:
        fail(str(error), ExitCode.UNREACHABLE)
    told = (manifest.window_start_ms, manifest.keys, manifest.distinct_keys, manifest.host)
    if told != (info.window_start_ms, info.keys, info.distinct_keys, info.host):
        return "the manifest tells of another log"
    return ""


def _as_dict(snapshot: Snapshot) -> dict[str, Any]:
    manifest = snapshot.manifest.model_dump(mode="json")
    return {"key": snapshot.key, "modified": snapshot.modified, **manifest}


def _table(*columns: str) -> Table:
    table = empty_table(None)
    for column in columns:
        table.add_column(column)
    return table


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")


@contextmanager
def _bar(total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading", total=total)
        yield lambda: progress.advance(task)
