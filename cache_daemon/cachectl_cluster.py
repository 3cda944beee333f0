"""cachectl cluster: look at a sharded cluster, and change it, through ZooKeeper.

No daemon need run. ZooKeeper is found by the config of any node (--config), or by --zookeeper.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache_daemon.cachectl_cluster_view import (
    explain_dict,
    explain_table,
    moves_dict,
    moves_table,
    nodes_dict,
    nodes_table,
    shards_dict,
    shards_tables,
)
from cache_daemon.cachectl_common import (
    ExitCode,
    console,
    duration_argument,
    emit_json,
    fail,
)
from cache_daemon.cachectl_data import encode_keys
from cache_daemon.config import Config, ConfigError, load_config
from cache_daemon.config_sharded import SecretError, read_secret
from sharding.errors import AuthenticationFailed, ClusterError, Disconnected

if TYPE_CHECKING:  # numpy and kazoo, which other commands of cachectl do without
    from sharding.cluster_admin import ClusterAdmin
    from sharding.model import NodeOverride
    from sharding.znodes import ZooKeeperConfig

__all__ = ["app"]

_DEFAULT_CONFIG = Path("/etc/feature-cache/config.yaml")
_WAIT_POLL_S = 0.5
_SESSION_S = 10.0

app = typer.Typer(
    name="cluster",
    help="Look at a sharded cluster, and change it.",
    no_args_is_help=True,
)

# What every command takes; see `_command`.
_COMMON: dict[str, tuple[Any, Any]] = {
    "config": (
        Annotated[
            Path | None,
            typer.Option(
                "--config",
                "-c",
                envvar="FEATURE_CACHE_CONFIG",
                help=f"The config of a node of the cluster; {_DEFAULT_CONFIG} if none is given.",
                show_default=False,
            ),
        ],
        None,
    ),
    "zookeeper": (
        Annotated[
            str | None,
            typer.Option(
                "--zookeeper",
                metavar="HOSTS/PATH",
                help="In place of a config: zk1:2181,zk2:2181/feature-cache/prod.",
            ),
        ],
        None,
    ),
    "scheme": (
        Annotated[str, typer.Option("--auth", help="With --user: digest or sasl.")],
        "digest",
    ),
    "user": (Annotated[str | None, typer.Option("--user", help="As whom to log in.")], None),
    "password_file": (
        Annotated[
            Path | None,
            typer.Option("--password-file", help="Holds the password in one line."),
        ],
        None,
    ),
    "as_json": (
        Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")],
        False,
    ),
    "timeout": (
        Annotated[
            float,
            typer.Option(
                "--timeout",
                parser=duration_argument,
                metavar="DURATION",
                help="How long ZooKeeper may take to answer.",
            ),
        ],
        "10s",
    ),
}


class _Context:
    """What a command works with."""

    def __init__(self, admin: ClusterAdmin, config: Config | None, as_json: bool) -> None:
        self.admin = admin
        self.config = config  # where one was given
        self.as_json = as_json

    def show(self, data: Any, *renderables: Any) -> None:
        """Prints `data` as JSON, or the rest for people."""
        if self.as_json:
            emit_json(data)
        for renderable in () if self.as_json else renderables:
            console().print(renderable)


def _command(work: Callable[..., None]) -> Callable[..., None]:
    """Makes a command of `work(context, ...)`: it gets the common options, and plain errors."""

    @functools.wraps(work)
    def run(**arguments: Any) -> None:
        common = {name: arguments.pop(name) for name in _COMMON}
        as_json = common.pop("as_json")
        with _plain_errors(), _cluster(**common) as (admin, config):
            work(_Context(admin, config, as_json), **arguments)

    own = list(inspect.signature(work, eval_str=True).parameters.values())[1:]
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        *(parameter.replace(kind=keyword) for parameter in own),
        *(
            inspect.Parameter(name, keyword, default=default, annotation=annotation)
            for name, (annotation, default) in _COMMON.items()
        ),
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(work.__name__.strip("_"))(run)
    return run


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except (Disconnected, AuthenticationFailed) as error:
        fail(str(error), ExitCode.UNREACHABLE)
    except ClusterError as error:
        fail(str(error), ExitCode.REFUSED)
    except (ConfigError, SecretError) as error:
        fail(str(error), ExitCode.USAGE)


@contextlib.contextmanager
def _cluster(
    config: Path | None,
    zookeeper: str | None,
    scheme: str,
    user: str | None,
    password_file: Path | None,
    timeout: float,
) -> Iterator[tuple[ClusterAdmin, Config | None]]:
    """The cluster that the options mean, while it is looked at."""
    from cache_daemon.cluster_settings import zookeeper_config
    from sharding.cluster_admin import ClusterAdmin
    from sharding.connection import Connection

    settings: Config | None = None
    if zookeeper is not None:
        if config is not None:
            fail("say --config or --zookeeper, not both", ExitCode.USAGE)
        target = _target(zookeeper, scheme, user, password_file)
    else:
        if user is not None or password_file is not None:
            fail("--user and --password-file go with --zookeeper", ExitCode.USAGE)
        path = config or _DEFAULT_CONFIG
        settings = load_config(path)
        if settings.sharding is None:
            fail(f"{path} is of topology {settings.topology}: it is in no cluster", ExitCode.USAGE)
        target = zookeeper_config(settings.sharding.zookeeper)
    connection = Connection(target)
    connection.start()
    try:
        if not connection.wait_connected(timeout):
            raise Disconnected(
                f"cannot reach ZooKeeper: {connection.problem or f'no answer in {timeout:g} s'}"
            )
        yield ClusterAdmin(connection), settings
    finally:
        connection.close()


def _target(
    zookeeper: str, scheme: str, user: str | None, password_file: Path | None
) -> ZooKeeperConfig:
    from sharding.znodes import Credentials, ZooKeeperConfig

    if scheme not in ("digest", "sasl"):
        fail(f"--auth {scheme} is not known; use digest or sasl", ExitCode.USAGE)
    if (user is None) != (password_file is None):
        fail("--user and --password-file go together", ExitCode.USAGE)
    try:
        credentials = None
        if user is not None and password_file is not None:
            credentials = Credentials(
                "sasl" if scheme == "sasl" else "digest", user, read_secret(password_file)
            )
        # What an operator makes must be as closed as what nodes make.
        acl = "open" if credentials is None else "creator"
        return ZooKeeperConfig(zookeeper, _SESSION_S, credentials, acl)  # type: ignore[arg-type]
    except ValueError as error:
        fail(str(error), ExitCode.USAGE)


_NodeArgument = Annotated[str, typer.Argument(help="The leaf's name.")]
_ForceOption = Annotated[
    bool, typer.Option("--force", help="Although there are too few leaves for all replicas.")
]


@_command
def _init(context: _Context) -> None:
    """Write the settings of a new cluster, as a leaf's config has them."""
    from cache_daemon.cluster_settings import cluster_config

    if context.config is None or context.config.sharding is None:
        fail("init takes what it writes from a leaf's config: say --config", ExitCode.USAGE)
    if context.config.is_root:
        fail(
            "a root's config does not say how many shards and replicas there are; give a leaf's",
            ExitCode.USAGE,
        )
    config = cluster_config(context.config.sharding)
    made = context.admin.init(config)
    what = f"{config.cluster}: {config.shard_count:,} shards on {config.replicas} leaves each"
    context.show(
        {"made": made} | config.model_dump(), f"{'made' if made else 'there already'}: {what}"
    )


@_command
def _nodes(context: _Context) -> None:
    """List the leaves: where they are, what they hold, what operators said of them."""
    config, found = context.admin.config(), context.admin.nodes()
    context.show(nodes_dict(config, found), nodes_table(config, found))


@_command
def _shards(context: _Context) -> None:
    """Show how many shards have all of their replicas, and which do not."""
    found = context.admin.shards()
    context.show(shards_dict(found), *shards_tables(found))


@_command
def _moves(context: _Context) -> None:
    """List the replicas that are on their way, and what they wait for."""
    found = context.admin.moves()
    context.show(moves_dict(found), moves_table(found) if found else "nothing moves")


@_command
def _drain(
    context: _Context,
    node: _NodeArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Until it holds nothing.")] = False,
    force: _ForceOption = False,
) -> None:
    """Move all shards of a leaf elsewhere, while it serves on."""
    override = context.admin.drain(node, force=force)
    if wait:
        while (held := _held(context.admin, node)) > 0:
            if not context.as_json:
                print(f"{node}: {held:,} shards left", flush=True)
            time.sleep(_WAIT_POLL_S)
    _say(context, node, override, "holds nothing: stop it" if wait else "gives its shards away")


@_command
def _undrain(context: _Context, node: _NodeArgument) -> None:
    """Let a leaf have shards again."""
    _say(context, node, context.admin.undrain(node), "gets shards again")


@_command
def _disable(context: _Context, node: _NodeArgument, force: _ForceOption = False) -> None:
    """Take a leaf out at once: nobody asks it any more, and its shards are placed elsewhere."""
    _say(context, node, context.admin.disable(node, force=force), "is asked for nothing any more")


@_command
def _enable(context: _Context, node: _NodeArgument) -> None:
    """Take a disabled leaf back."""
    _say(context, node, context.admin.enable(node), "takes part again")


@_command
def _weight(
    context: _Context,
    node: _NodeArgument,
    weight: Annotated[
        float | None, typer.Argument(help="In relation to the others', such as 2.0.")
    ] = None,
    own: Annotated[bool, typer.Option("--own", help="What its own config says again.")] = False,
) -> None:
    """Set a leaf's share of the shards."""
    if (weight is None) == (not own):
        fail("say a weight, or --own for what its config says", ExitCode.USAGE)
    override = context.admin.set_weight(node, weight)
    of = "what its config says" if weight is None else f"{weight:g}"
    _say(context, node, override, f"its weight is {of}")


@_command
def _replicas(
    context: _Context,
    count: Annotated[int, typer.Argument(help="Leaves that hold each shard.")],
    force: Annotated[
        bool, typer.Option("--force", help="Although there are fewer leaves.")
    ] = False,
) -> None:
    """Set how many leaves hold each shard."""
    config = context.admin.set_replicas(count, force=force)
    context.show(
        config.model_dump(), f"{config.cluster}: each shard on {config.replicas} leaves from now on"
    )


@_command
def _forget(context: _Context, node: _NodeArgument) -> None:
    """Remove a leaf that will not come back, so that nobody waits for it."""
    context.admin.forget(node)
    context.show({"node": node, "forgotten": True}, f"{node}: forgotten")


@_command
def _explain(
    context: _Context,
    namespace: Annotated[str, typer.Argument(help="The namespace.")],
    key: Annotated[str, typer.Argument(help="The key.")],
    as_id: Annotated[bool, typer.Option("--id", help="The key is an integer id.")] = False,
    as_hex: Annotated[bool, typer.Option("--hex", help="The key is bytes in hex.")] = False,
) -> None:
    """Show which shard a key is of, who holds it, and in which state."""
    from cache_daemon._native import shard_of

    (encoded,) = encode_keys([key], as_id, as_hex)
    config = context.admin.config()
    shard = shard_of(namespace, encoded, config.shard_count)
    found = context.admin.explain(shard)
    context.show(
        {"namespace": namespace, "key": key} | explain_dict(config, found),
        explain_table(config, found, f"{namespace}/{key}"),
    )


def _say(context: _Context, node: str, override: NodeOverride, what: str) -> None:
    context.show({"node": node} | override.model_dump(), f"{node}: {what}")


def _held(admin: ClusterAdmin, name: str) -> int:
    """Shards that a leaf is to hold, or holds still."""
    for node in admin.nodes():
        if node.name == name:
            return max(node.target, node.online + node.warming)
    return 0
