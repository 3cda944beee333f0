"""What `cachectl cluster` prints: tables for people, plain objects for scripts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from cache_daemon.cachectl_view import empty_table

if TYPE_CHECKING:
    from sharding.cluster_admin import Move, NodeInfo, ShardInfo, ShardsSummary
    from sharding.model import ClusterConfig

__all__ = [
    "explain_dict",
    "explain_table",
    "moves_dict",
    "moves_table",
    "nodes_dict",
    "nodes_table",
    "shards_dict",
    "shards_tables",
]

_STYLES = {"live": "green", "away": "red", "disabled": "red"}
_NUMBERS_SHOWN = 20
_MOVES_SHOWN = 200


def nodes_dict(config: ClusterConfig, nodes: Sequence[NodeInfo]) -> dict[str, Any]:
    return {
        "config": config.model_dump(),
        "nodes": [
            {
                "name": node.name,
                "state": node.state,
                "address": node.live.address if node.live else None,
                "zone": node.live.zone if node.live else None,
                "version": node.live.version if node.live else None,
                "capacity": node.live.capacity if node.live else None,
                "weight": node.weight,
                "enabled": node.override.enabled,
                "draining": node.override.draining,
                "online": node.online,
                "warming": node.warming,
                "target": node.target,
                "ideal": node.ideal,
                "problems": list(node.problems),
            }
            for node in nodes
        ],
    }


def nodes_table(config: ClusterConfig, nodes: Sequence[NodeInfo]) -> Table:
    """A row a leaf; the cluster's settings above."""
    table = empty_table(
        f"{config.cluster}: {config.shard_count:,} shards on {config.replicas} leaves each; "
        f"{config.max_moves:,} move at a time, {config.rebalance_delay_seconds:g} s after a loss"
    )
    for name in ("leaf", "state", "address", "zone"):
        table.add_column(name)
    for name in ("weight", "online", "warming", "to hold", "wanted"):
        table.add_column(name, justify="right")
    table.add_column("version")
    for node in nodes:
        live = node.live
        table.add_row(
            node.name,
            Text(node.state, _STYLES.get(node.state, "yellow")),
            live.address if live else "",
            live.zone if live else "",
            "" if node.weight is None else f"{node.weight:g}",
            *(f"{count:,}" for count in (node.online, node.warming, node.target, node.ideal)),
            live.version if live else "",
        )
        for problem in node.problems:
            table.add_row("", Text(problem, "red"))
    return table


def shards_dict(shards: ShardsSummary) -> dict[str, Any]:
    return {
        "view_version": shards.view_version,
        "shard_count": shards.shard_count,
        "replicas": shards.replicas,
        "by_online": {str(online): count for online, count in sorted(shards.by_online.items())},
        "without_online": list(shards.without_online),
        "short": list(shards.short),
    }


def shards_tables(shards: ShardsSummary) -> Iterator[Table | Text]:
    """How many shards have how many replicas, then those that lack some."""
    title = f"{shards.shard_count:,} shards, view {shards.view_version}"
    table = empty_table(title if shards.view_version else f"{title}: nothing is published yet")
    table.add_column("online replicas", justify="right")
    table.add_column("shards", justify="right")
    table.add_column("")
    for online, count in sorted(shards.by_online.items(), reverse=True):
        note = Text("")
        if online == 0:
            note = Text("answered by the store alone", "red")
        elif online < shards.replicas:
            note = Text(f"of {shards.replicas}", "yellow")
        table.add_row(str(online), f"{count:,}", note)
    yield table
    if shards.without_online:
        yield Text(f"without a leaf: {_numbers(shards.without_online)}", "red")
    if shards.short:
        yield Text(f"with too few: {_numbers(shards.short)}", "yellow")


def moves_dict(moves: Sequence[Move]) -> list[dict[str, Any]]:
    return [
        {
            "shard": move.shard,
            "node": move.node,
            "direction": move.direction,
            "stage": move.stage,
        }
        for move in moves
    ]


def moves_table(moves: Sequence[Move]) -> Table:
    """A row a replica that comes or goes, the first few hundred."""
    table = empty_table(f"{len(moves):,} replicas on their way")
    table.add_column("shard", justify="right")
    for name in ("leaf", "", "stage"):
        table.add_column(name)
    for move in moves[:_MOVES_SHOWN]:
        table.add_row(str(move.shard), move.node, move.direction, move.stage)
    if len(moves) > _MOVES_SHOWN:
        table.add_row("…", f"{len(moves) - _MOVES_SHOWN:,} more; --json has all")
    return table


def explain_dict(config: ClusterConfig, found: ShardInfo) -> dict[str, Any]:
    return {
        "shard": found.shard,
        "shard_count": config.shard_count,
        "replicas": [
            {"leaf": leaf.name, "address": leaf.address, "zone": leaf.zone, "state": state.name}
            for leaf, state in found.view
        ],
        "ideal": list(found.ideal),
        "target": list(found.target),
        "current": {name: state.name for name, state in found.current},
        "notes": list(found.notes),
    }


def explain_table(config: ClusterConfig, found: ShardInfo, key: str) -> Table:
    """A row a leaf that has to do with the shard: what each party says of it."""
    table = empty_table(f"{key} is of shard {found.shard} of {config.shard_count:,}")
    for name in ("leaf", "roots see", "leaf says", "told to hold", "placed", "address", "zone"):
        table.add_column(name)
    shown = {leaf.name: (leaf, state) for leaf, state in found.view}
    says = dict(found.current)
    for name in dict.fromkeys((*found.ideal, *shown, *found.target, *says)):
        leaf, state = shown.get(name, (None, None))
        said = says.get(name)
        table.add_row(
            name,
            state.name if state is not None else "–",  # noqa: RUF001
            said.name if said is not None else "–",  # noqa: RUF001
            "yes" if name in found.target else "no",
            "yes" if name in found.ideal else "no",
            leaf.address if leaf else "",
            leaf.zone if leaf else "",
        )
    for note in found.notes:
        table.add_row("", Text(note, "yellow"))
    return table


def _numbers(shards: Sequence[int]) -> str:
    more = f", … ({len(shards):,} named by --json)" if len(shards) > _NUMBERS_SHOWN else ""
    return ", ".join(map(str, shards[:_NUMBERS_SHOWN])) + more
