"""`cachectl cluster` against a real ZooKeeper, with leaves that only say they are there."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from cache_daemon.cachectl import app
from sharding import layout
from sharding.model import LiveNode, NodeOverride
from tests.cluster import connected_to


def _config(hosts: str, role: str = "leaf", **sharding: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "topology": "sharded",
        "listen": {"grpc": ["127.0.0.1:7070"]},
        "sharding": {
            "role": role,
            "cluster": "test",
            "zookeeper": {"hosts": hosts, "session_timeout": "2s"},
            "shard_count": 32,
            **sharding,
        },
        "namespaces": {"pin": {"domains": {"main": {"budget": "100%"}}}},
    }
    return config | ({"memory": {"size": "8MiB"}} if role == "leaf" else {})


class Cachectl:
    """`cachectl cluster` with the config of a leaf."""

    def __init__(self, folder: Path, hosts: str) -> None:
        self.hosts = hosts
        self.config = folder / "leaf.yaml"
        self.config.write_text(yaml.safe_dump(_config(hosts)))

    def __call__(self, *arguments: str) -> Result:
        return CliRunner().invoke(app, ["cluster", *arguments, "--config", str(self.config)])

    def json(self, *arguments: str) -> Any:
        result = self(*arguments, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)


@pytest.fixture
def cachectl(tmp_path: Path, zookeeper_hosts: str) -> Cachectl:
    return Cachectl(tmp_path, zookeeper_hosts)


@pytest.fixture
def two_leaves(cachectl: Cachectl) -> Cachectl:
    """A cluster in which leaf-1 and leaf-2 have been registered, and are away."""
    assert cachectl.json("init")["made"]
    with connected_to(cachectl.hosts) as connection:
        for name in ("leaf-1", "leaf-2"):
            live = LiveNode(
                name=name, address=f"{name}:7070", zone="a", cluster="test", instance_id="x"
            )
            connection.create(f"{layout.LIVE}/{name}", layout.encode_live(live))
    return cachectl


def _node(cachectl: Cachectl, name: str) -> dict[str, Any]:
    nodes = cachectl.json("nodes")["nodes"]
    found: dict[str, Any] = next(node for node in nodes if node["name"] == name)
    return found


def test_a_cluster_is_made_once(cachectl: Cachectl, tmp_path: Path) -> None:
    before = cachectl("nodes")
    assert before.exit_code == 1
    assert "there is no cluster at" in before.stderr
    made = cachectl("init")
    assert made.exit_code == 0
    assert "made: test: 32 shards on 2 leaves each" in made.stdout
    assert not cachectl.json("init")["made"]
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(_config(cachectl.hosts, shard_count=64)))
    refused = CliRunner().invoke(app, ["cluster", "init", "--config", str(other)])
    assert refused.exit_code == 1
    assert "shard_count is 32, not 64" in refused.stderr


def test_a_root_does_not_make_a_cluster(cachectl: Cachectl, tmp_path: Path) -> None:
    root = tmp_path / "root.yaml"
    root.write_text(yaml.safe_dump(_config(cachectl.hosts, "root")))
    refused = CliRunner().invoke(app, ["cluster", "init", "--config", str(root)])
    assert refused.exit_code == 2
    assert "give a leaf's" in refused.stderr
    assert cachectl("nodes").exit_code == 1, "nothing was made"


def test_zookeeper_is_found_without_a_config(two_leaves: Cachectl) -> None:
    arguments = ["cluster", "nodes", "--json", "--zookeeper", two_leaves.hosts]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert "leaf-1:7070" in result.stdout


def test_operators_say_what_a_leaf_may_do(two_leaves: Cachectl) -> None:
    refused = two_leaves("drain", "leaf-1")
    assert refused.exit_code == 1
    assert "or force it" in refused.stderr
    done = two_leaves("drain", "leaf-1", "--force")
    assert done.exit_code == 0
    assert done.stdout == "leaf-1: gives its shards away\n"
    assert _node(two_leaves, "leaf-1")["draining"]
    assert two_leaves("drain", "leaf-1", "--force", "--wait").exit_code == 0
    assert two_leaves.json("undrain", "leaf-1")["draining"] is False
    assert two_leaves.json("disable", "leaf-1", "--force")["enabled"] is False
    assert _node(two_leaves, "leaf-1")["state"] == "disabled"
    assert two_leaves("enable", "leaf-1").exit_code == 0
    assert two_leaves.json("weight", "leaf-2", "2.5")["weight"] == 2.5
    assert _node(two_leaves, "leaf-2")["weight"] == 2.5
    assert two_leaves.json("weight", "leaf-2", "--own")["weight"] is None
    assert two_leaves("weight", "leaf-2").exit_code == 2
    assert two_leaves("weight", "leaf-2", "0").exit_code == 1


def test_an_unknown_leaf_is_refused_with_the_nearest(two_leaves: Cachectl) -> None:
    refused = two_leaves("drain", "leaf1", "--force")
    assert refused.exit_code == 1
    assert "did you mean leaf-1" in refused.stderr


def test_replicas_are_changed_within_what_there_is(two_leaves: Cachectl) -> None:
    assert two_leaves("replicas", "1").exit_code == 0
    assert two_leaves.json("shards")["replicas"] == 1
    refused = two_leaves("replicas", "3")
    assert refused.exit_code == 1
    assert "add or enable nodes first" in refused.stderr
    assert two_leaves.json("replicas", "3", "--force")["replicas"] == 3
    assert two_leaves("replicas", "0").exit_code == 1


def test_shards_moves_and_keys_of_a_cluster_that_nobody_leads(two_leaves: Cachectl) -> None:
    assert "nothing is published yet" in two_leaves("shards").stdout
    assert two_leaves("moves").stdout == "nothing moves\n"
    found = two_leaves.json("explain", "pin", "42", "--id")
    assert 0 <= found["shard"] < 32
    assert found["replicas"] == []
    assert any("is a controller running?" in note for note in found["notes"])
    text = two_leaves("explain", "pin", "item 7").stdout
    assert "pin/item 7 is of shard" in text
    assert two_leaves("explain", "pin", "zz", "--hex").exit_code == 2


def test_a_leaf_that_is_gone_for_good_is_forgotten(two_leaves: Cachectl) -> None:
    refused = two_leaves("forget", "leaf-1")
    assert refused.exit_code == 1
    assert "stop it first" in refused.stderr
    with connected_to(two_leaves.hosts) as connection:
        connection.delete(f"{layout.LIVE}/leaf-1")
        connection.create(f"{layout.NODES}/leaf-1", layout.encode_override(NodeOverride()))
    assert two_leaves("forget", "leaf-1").exit_code == 0
    assert [node["name"] for node in two_leaves.json("nodes")["nodes"]] == ["leaf-2"]
