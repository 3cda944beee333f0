"""What `cachectl cluster` prints, and how it fails before it reaches anybody."""

from pathlib import Path

import pytest
from rich.console import Console, RenderableType
from typer.testing import CliRunner, Result

from cache_daemon.cachectl import app
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
from sharding.cluster_admin import Move, NodeInfo, ShardInfo, ShardsSummary
from sharding.model import ClusterConfig, Leaf, LiveNode, NodeOverride, ReplicaState

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_CONFIG = ClusterConfig(cluster="prod", shard_count=4096, replicas=2)
_LIVE = LiveNode(
    name="leaf-1", address="10.0.0.1:7070", zone="a", version="1.2", cluster="prod", instance_id="x"
)
_NODES = [
    NodeInfo("leaf-1", _LIVE, NodeOverride(), 1400, 1400, 1380, 20, ()),
    NodeInfo("leaf-2", None, NodeOverride(weight=2.0), 1300, 1300, 0, 0, ("/current is garbage",)),
    NodeInfo("leaf-3", _LIVE, NodeOverride(draining=True), 0, 12, 12, 0, ()),
    NodeInfo("leaf-4", _LIVE, NodeOverride(enabled=False), 0, 0, 0, 0, ()),
]
_SHARDS = ShardsSummary(17, 100, 2, {0: 1, 1: 9, 2: 90}, (4,), tuple(range(30)))
_MOVES = [Move(7, "leaf-1", "comes", "is warmed"), Move(7, "leaf-3", "goes", "answers late")]
_EXPLAINED = ShardInfo(
    shard=7,
    ideal=("leaf-1", "leaf-2"),
    view=((Leaf("leaf-1", "10.0.0.1:7070", "a"), ReplicaState.ONLINE),),
    target=("leaf-1", "leaf-2"),
    current=(("leaf-1", ReplicaState.ONLINE), ("leaf-2", ReplicaState.WARMING)),
    notes=("leaf-2 is away",),
)


def _shown(*renderables: RenderableType) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        for renderable in renderables:
            console.print(renderable)
    return capture.get()


def _row(text: str, name: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.strip().startswith(name))


def test_nodes_are_listed_with_what_they_hold() -> None:
    text = _shown(nodes_table(_CONFIG, _NODES))
    assert "prod: 4,096 shards on 2 leaves each" in text
    assert _row(text, "leaf-1")[1:] == [
        *("live", "10.0.0.1:7070", "a", "1", "1,380", "20", "1,400", "1,400", "1.2"),
    ]
    assert _row(text, "leaf-2")[1:] == ["away", "2", "0", "0", "1,300", "1,300"]
    assert _row(text, "leaf-3")[1] == "draining"
    assert _row(text, "leaf-4")[1] == "disabled"
    assert "/current is garbage" in text
    found = nodes_dict(_CONFIG, _NODES)
    assert found["config"]["replicas"] == 2
    assert [node["state"] for node in found["nodes"]] == ["live", "away", "draining", "disabled"]
    assert found["nodes"][1]["address"] is None


def test_shards_are_summed_by_replicas_and_those_in_need_are_named() -> None:
    text = _shown(*shards_tables(_SHARDS))
    assert _row(text, "2")[:2] == ["2", "90"]
    assert _row(text, "0")[:2] == ["0", "1"]
    assert "answered by the store alone" in text
    assert "without a leaf: 4" in text
    assert "0, 1, 2" in text
    assert "30 named by --json" in text
    assert shards_dict(_SHARDS)["by_online"] == {"0": 1, "1": 9, "2": 90}
    none = ShardsSummary(0, 100, 2, {0: 100}, (), ())
    assert "nothing is published yet" in _shown(*shards_tables(none))


def test_moves_are_listed_and_a_flood_is_cut() -> None:
    text = _shown(moves_table(_MOVES))
    assert "2 replicas on their way" in text
    assert "is warmed" in text
    assert moves_dict(_MOVES)[1] == {
        "shard": 7,
        "node": "leaf-3",
        "direction": "goes",
        "stage": "answers late",
    }
    many = [Move(shard, "leaf-1", "comes", "is warmed") for shard in range(1000)]
    assert "800 more; --json has all" in _shown(moves_table(many))
    assert len(moves_dict(many)) == 1000


def test_a_key_is_explained_by_what_each_party_says() -> None:
    text = _shown(explain_table(_CONFIG, _EXPLAINED, "pin/7"))
    assert "pin/7 is of shard 7 of 4,096" in text
    assert _row(text, "leaf-1")[1:] == ["ONLINE", "ONLINE", "yes", "yes", "10.0.0.1:7070", "a"]
    assert _row(text, "leaf-2")[2:5] == ["WARMING", "yes", "yes"]
    assert "leaf-2 is away" in text
    found = explain_dict(_CONFIG, _EXPLAINED)
    assert [replica["leaf"] for replica in found["replicas"]] == ["leaf-1"]
    assert found["current"] == {"leaf-1": "ONLINE", "leaf-2": "WARMING"}


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["cluster", *arguments])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nodes", "--config", "/nowhere.yaml"], "No such file"),
        (["nodes", "--config", str(_CONFIGS / "colocated.yaml")], "it is in no cluster"),
        (["nodes", "--config", "x", "--zookeeper", "zk:1/c"], "not both"),
        (["nodes", "--user", "u"], "go with --zookeeper"),
        (["nodes", "--zookeeper", "zk:1/c", "--user", "u"], "go together"),
        (["nodes", "--zookeeper", "zk:1/c", "--auth", "kerberos"], "use digest or sasl"),
        (["nodes", "--zookeeper", "zk:x/c"], "is not a server"),
        (
            ["nodes", "--zookeeper", "zk:1/c", "--user", "u", "--password-file", "/nowhere"],
            "password_file /nowhere: No such file",
        ),
    ],
)
def test_wrong_usage_ends_with_2_and_says_why(arguments: list[str], expected: str) -> None:
    result = _run(*arguments)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert "Traceback" not in result.output


def test_a_zookeeper_that_is_not_there_ends_with_3() -> None:
    result = _run("nodes", "--zookeeper", "127.0.0.1:1/c", "--timeout", "300ms")
    assert result.exit_code == 3
    assert "cannot reach ZooKeeper" in result.stderr
    assert "127.0.0.1:1/c" in result.stderr


def test_every_command_has_help() -> None:
    for command in (
        *("init", "nodes", "shards", "moves", "drain", "undrain", "disable", "enable"),
        *("weight", "replicas", "forget", "explain"),
    ):
        result = _run(command, "--help")
        assert result.exit_code == 0, command
        assert "--zookeeper" in result.stdout
