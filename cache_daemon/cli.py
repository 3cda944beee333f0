"""`cache-daemon`: runs the daemon, checks a config, prints its schema; hooks for autoscalers.

Exit codes: 0 stopped after every accepted request was answered; 1 could not start; 2 bad config or
command line; 3 stopped before every accepted request was answered. The hooks' own: `cli_warmup`.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from cache_daemon import cli_warmup
from cache_daemon.config import (
    Config,
    ConfigError,
    effective_settings,
    free_memory_bytes,
    load_config,
    service_manager,
)
from cache_daemon.config_nvm import NvmPlan, nvm_plan
from cache_daemon.config_persist import persist_warnings
from cache_daemon.config_schema import json_schema
from cache_daemon.config_units import format_size
from cache_daemon.config_warmup import warmup_warnings
from cache_daemon.log_format import set_up_logging

__all__ = ["main"]

_EXIT_START_FAILED = 1
_EXIT_BAD_CONFIG = 2
_EXIT_NOT_DRAINED = 3

_app = typer.Typer(
    name="cache-daemon",
    help="A tiered, inference-side feature cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_app.add_typer(cli_warmup.app)

_ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="The YAML config file.", show_default=False)
]


@_app.command()
def run(
    config: _ConfigOption,
    ready_file: Annotated[
        Path | None,
        typer.Option(help="Holds pid and addresses as JSON while the daemon serves."),
    ] = None,
) -> None:
    """Serves until SIGTERM or SIGINT, which drain; a second one stops at once."""
    settings = _load(config)
    set_up_logging(settings.log)
    # Loads the native extension, which check-config --no-engine and schema do not need.
    from cache_daemon.app import Daemon, StartError

    try:
        outcome = Daemon(settings, service_manager(), ready_file=ready_file).run()
    except ConfigError as error:
        _fail(_EXIT_BAD_CONFIG, str(ConfigError(error.problems, str(config))))
    except StartError as error:
        _fail(_EXIT_START_FAILED, f"cannot start: {error}")
    code = 0 if outcome.drained else _EXIT_NOT_DRAINED
    if outcome.threads_left:
        # A thread that sits in a store's library must not be unwound by the interpreter's end.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code)


@_app.command("check-config")
def check_config(
    config: Annotated[Path, typer.Argument(help="The YAML config file.", show_default=False)],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, which is a valid config again.")
    ] = False,
) -> None:
    """Validates a config as a whole and prints the effective settings, defaults included."""
    settings = _load(config)
    from cache_daemon.config_node import budgets, node_config

    try:
        bytes_of = budgets(settings)
        nvm = nvm_plan(settings)
    except ConfigError as error:
        _fail(_EXIT_BAD_CONFIG, str(ConfigError(error.problems, str(config))))
    warnings = persist_warnings(settings, free_memory_bytes())
    warnings += warmup_warnings(settings.warmup)
    for warning in warnings:
        typer.echo(f"{config}: warning: {warning}", err=True)
    effective = effective_settings(settings)
    if as_json:
        typer.echo(json.dumps(effective, indent=2))
        return
    console = Console()
    console.print(_settings_table(effective))
    if bytes_of:
        console.print(_domain_table(settings, bytes_of))
        console.print(_instance_line(settings), highlight=False)
    if nvm is not None:
        console.print(_nvm_table(settings, nvm, node_config(settings).nvm_memory_bytes()))


@_app.command()
def schema() -> None:
    """Prints the JSON Schema of the config file, for editors."""
    typer.echo(json.dumps(json_schema(), indent=2))


@_app.command()
def version() -> None:
    """Prints versions of the daemon and of its native build."""
    from cache_daemon._native import build_info
    from cache_daemon.daemon_status import version as package_version

    typer.echo(f"cache-daemon {package_version()}")
    for name, value in build_info().items():
        typer.echo(f"{name}: {value}")


def main() -> None:
    """Entry point of the console script."""
    _app()


def _load(path: Path) -> Config:
    try:
        return load_config(path)
    except ConfigError as error:
        _fail(_EXIT_BAD_CONFIG, str(error))


def _fail(code: int, message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(code)


def _settings_table(effective: dict[str, Any]) -> Table:
    table = Table("setting", "value", title="effective settings", title_justify="left")
    for path, value in _leaves(effective, ""):
        table.add_row(path, value)
    return table


def _leaves(node: Any, path: str) -> list[tuple[str, str]]:
    if isinstance(node, dict) and node:
        return [
            leaf
            for key, value in node.items()
            for leaf in _leaves(value, f"{path}.{key}" if path else str(key))
        ]
    if isinstance(node, list) and any(isinstance(item, dict) for item in node):
        return [
            leaf for index, item in enumerate(node) for leaf in _leaves(item, f"{path}[{index}]")
        ]
    if isinstance(node, list):
        return [(path, ", ".join(map(str, node)) or "-")]
    if isinstance(node, bool):
        return [(path, str(node).lower())]
    return [(path, "-" if node is None or node == {} else str(node))]


def _domain_table(settings: Config, bytes_of: dict[tuple[str, str], int]) -> Table:
    table = Table(
        "namespace", "domain", "policy", "ttl", "bytes", title="domains", title_justify="left"
    )
    effective = settings.model_dump(mode="json")["namespaces"]
    for (namespace, domain), size in bytes_of.items():
        shown = effective[namespace]["domains"][domain]
        ttl = shown["ttl"] if settings.namespaces[namespace].domains[domain].ttl else "-"
        table.add_row(namespace, domain, shown["policy"], ttl, _size(size))
    return table


def _instance_line(settings: Config) -> str:
    memory = settings.memory
    count = memory.instance_count
    return f"{count} instance{'s' if count > 1 else ''} of {_size(memory.size // count)}"


def _nvm_table(settings: Config, plan: NvmPlan, memory_bytes: int) -> Table:
    table = Table("of the NVM tier", "bytes", "regions", title="NVM", title_justify="left")
    for path, size in plan.devices:
        regions = plan.regions_of(size)
        table.add_row(f"device {path}", _size(size), str(regions))
    for name, size in plan.budgets.items():
        asked = settings.namespaces[name].nvm
        label = f"namespace {name} ({asked.budget})" if asked else f"namespace {name}"
        table.add_row(label, _size(size), str(size // plan.region_bytes))
    table.add_row("one region", format_size(plan.region_bytes), "1")
    table.add_row("of memory.size: index slots, buffers, tables", _size(memory_bytes), "")
    return table


def _size(size: int) -> str:
    if size >= 10 << 30:
        return f"{size / (1 << 30):.1f}GiB"
    return f"{size / (1 << 20):.1f}MiB"


if __name__ == "__main__":
    main()
