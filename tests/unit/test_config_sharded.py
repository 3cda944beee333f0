"""Topologies in the config: what each asks for, and what is refused."""

from pathlib import Path

import jsonschema
import pytest
import yaml

from cache_daemon.config import ConfigError, effective_settings, parse_config
from cache_daemon.config_model import Config
from cache_daemon.config_node import budgets
from cache_daemon.config_schema import json_schema
from cache_daemon.config_sharded import (
    SecretError,
    ShardingSettings,
    advertised,
    node_name,
    read_secret,
)

_ZOOKEEPER = "zookeeper: {hosts: 'a:2181,b:2181/cache'}"
_LEAF = f"""\
topology: sharded
listen: {{grpc: [127.0.0.1:7070]}}
memory: {{size: 64MiB}}
sharding:
  role: leaf
  cluster: test
  {_ZOOKEEPER}
namespaces:
  pin: {{domains: {{all: {{budget: 100%}}}}}}
"""
_ROOT = f"""\
topology: sharded
listen: {{grpc: [127.0.0.1:7070]}}
sharding:
  role: root
  cluster: test
  {_ZOOKEEPER}
namespaces:
  pin: {{}}
"""
_SEPARATE = """\
topology: separate
listen: {grpc: [127.0.0.1:7070]}
memory: {size: 64MiB}
namespaces:
  pin: {domains: {all: {budget: 100%}}}
"""


def _problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "test.yaml")
    return str(caught.value).splitlines()


def _schema_errors(text: str) -> list[str]:
    validator = jsonschema.Draft202012Validator(json_schema())
    return [error.message for error in validator.iter_errors(yaml.safe_load(text))]


def _sharding(config: Config) -> ShardingSettings:
    assert config.sharding is not None
    return config.sharding


@pytest.mark.parametrize("text", [_LEAF, _ROOT, _SEPARATE])
def test_each_topology_is_read_and_written_back(text: str) -> None:
    config = parse_config(text)
    assert _schema_errors(text) == []
    again = parse_config(yaml.safe_dump(effective_settings(config)))
    assert effective_settings(again) == effective_settings(config)
    assert again.topology == config.topology


def test_a_leaf_leads_and_a_root_does_not_unless_told() -> None:
    assert _sharding(parse_config(_LEAF)).stands_for_election
    assert not _sharding(parse_config(_ROOT)).stands_for_election
    told = _ROOT.replace("role: root", "role: root\n  controller: true")
    assert _sharding(parse_config(told)).stands_for_election


def test_a_root_keeps_nothing() -> None:
    config = parse_config(_ROOT)
    assert config.is_root
    assert config.memory.size == 0
    assert budgets(config) == {}
    assert config.namespaces["pin"].entry_domain == ""


def test_a_root_takes_the_namespaces_of_a_leaf() -> None:
    domains = "domains: {a: {budget: 60%}, b: {budget: 4GiB}}, default_domain: a"
    text = _ROOT.replace("pin: {}", f"pin: {{{domains}, nvm: {{budget: 9%}}}}")
    text = text.replace("cluster: test", "cluster: test\n  root: {hot_tier: {memory: 8MiB}}")
    assert list(parse_config(text).namespaces["pin"].domains) == ["a", "b"]


def _in_leaf(addition: str) -> str:
    return _LEAF.replace("  cluster: test\n", f"  cluster: test\n  {addition}\n")


def _in_root(addition: str) -> str:
    return _ROOT.replace("  cluster: test\n", f"  cluster: test\n  {addition}\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            _SEPARATE + "sharding: {role: leaf, cluster: c, zookeeper: {hosts: 'a:1/c'}}\n",
            "sharding: it has no meaning with topology: separate; write topology: sharded, "
            "or remove it",
        ),
        (_LEAF.replace("memory: {size: 64MiB}\n", ""), "memory: missing; it has no default"),
        (_LEAF.replace("memory:", "memroy:"), "unknown key; did you mean 'memory'?"),
        (
            _LEAF.replace("{domains: {all: {budget: 100%}}}", "{}"),
            "test.yaml:9: namespaces.pin.domains: missing; it has no default",
        ),
        (_SEPARATE.replace("domains:", "domans:"), "unknown key; did you mean 'domains'?"),
        (_ROOT + "memory: {size: 64MiB}\n", "for a hot tier write sharding.root.hot_tier"),
        (_ROOT + "persist: {}\n", "persist: a root keeps no values of its own"),
        (_in_leaf("root: {}"), "sharding.root: this node's role is leaf; remove it, or write"),
        (_in_root("leaf: {}"), "sharding.leaf: this node's role is root; remove it, or write"),
        (
            _in_root("root: {store_fallback_budget: 5%}"),
            "no namespace has a store to ask; give one a store, or remove this",
        ),
        (_in_root("root: {hot_tier: {memory: 64MiB, max_age: 2s}}"), "it must be at most 1s"),
        (_in_root("root: {hot_tier: {memory: 64TiB}}"), "sharding.root.hot_tier.memory: 64TiB is"),
        (_in_root("root: {hedge: {after: 95}}"), "write a quantile of recent reads (p99)"),
        (_LEAF.replace("role: leaf", "role: leave"), "did you mean 'leaf'?"),
        (_LEAF.replace("cluster: test", "cluster: a/b"), "'a/b' is no name"),
        (_LEAF.replace("a:2181,b:2181/cache", "zk1"), "'zk1' is no server of ZooKeeper"),
        (_LEAF.replace("a:2181,b:2181/cache", "zk:1/"), "'/' is no path; write it as"),
        (_LEAF.replace("a:2181,b:2181/cache", "zk:1/a//b"), "'/a//b' is no path"),
        (_LEAF.replace("2181/cache'", "2181/cache', acl: creator"), "acl: creator needs auth"),
        (_in_leaf("replicas: 17"), "it must be at most 16"),
        (_in_leaf("replica: 2"), "did you mean 'replicas'?"),
        (_in_leaf("rebalance_delay: 120"), "write it with its unit"),
        (_in_leaf("leaf: {weight: 0}"), "it must be above 0"),
        (
            _LEAF.replace("[127.0.0.1:7070]}", "['0.0.0.0:7070']}\ninsecure: true"),
            "sharding.leaf.advertise: missing; 0.0.0.0:7070 is no address that a root could call",
        ),
        (_LEAF.replace("127.0.0.1:7070", "unix:/run/x.sock"), "sharding.leaf.advertise: missing"),
        (_in_leaf("leaf: {advertise: '0.0.0.0:7070'}"), "0.0.0.0:7070 is no address that a root"),
        (_in_leaf("leaf: {advertise: 'host:0'}"), "host:0 is no address that a root could call"),
        (_in_leaf("leaf: {advertise: 'leaf-1:7070'}"), "nothing listens at leaf-1:7070"),
    ],
)
def test_one_slip_gives_one_clear_line(text: str, expected: str) -> None:
    lines = _problems(text)
    assert len(lines) == 1, lines
    assert expected in lines[0]
    assert lines[0].startswith("test.yaml:")


@pytest.mark.parametrize(
    "text",
    [
        _LEAF.replace("memory: {size: 64MiB}\n", ""),
        _LEAF.replace("{domains: {all: {budget: 100%}}}", "{}"),
        _LEAF.replace("topology: sharded\n", ""),
        _SEPARATE.replace("separate", "sharded"),
    ],
)
def test_the_schema_finds_these_slips_too(text: str) -> None:
    assert _schema_errors(text)


def test_a_leaf_is_reached_where_it_listens_unless_it_says_otherwise() -> None:
    settings = _sharding(parse_config(_LEAF))
    assert advertised(settings, ["unix:/x", "0.0.0.0:1", "127.0.0.1:4711"]) == "127.0.0.1:4711"
    assert advertised(settings, ["unix:/x"]) == ""
    told = _sharding(parse_config(_in_leaf("leaf: {advertise: 'unix:/run/leaf.sock'}")))
    assert advertised(told, ["127.0.0.1:4711"]) == "unix:/run/leaf.sock"


def test_a_leaf_is_named_after_its_host_unless_it_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "host-7")
    assert node_name(_sharding(parse_config(_LEAF))) == "host-7"
    assert node_name(_sharding(parse_config(_in_leaf("leaf: {name: l1}")))) == "l1"


def test_a_password_comes_from_a_file_of_one_line(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("open sesame\n")
    assert read_secret(path) == "open sesame"
    for content, expected in (
        (b"", "in one line"),
        (b"a\nb\n", "in one line"),
        (b"\xff\xfe", "not UTF-8"),
        (b"x" * 5000, "larger than"),
    ):
        path.write_bytes(content)
        with pytest.raises(SecretError, match=expected):
            read_secret(path)
    with pytest.raises(SecretError, match="No such file"):
        read_secret(tmp_path / "missing")
