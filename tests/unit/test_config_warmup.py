"""The `warmup` section: what it takes, what it refuses and how, what it asks of other sections."""

import json
import os
from pathlib import Path

import jsonschema
import pytest
import yaml

from cache_daemon.config import ConfigError, effective_settings, parse_config
from cache_daemon.config_model import Config
from cache_daemon.config_schema import json_schema
from cache_daemon.config_warmup import RecordSettings, WarmupSettings, warmup_warnings

_NODE = """\
listen: {grpc: [127.0.0.1:7070]}
memory: {size: 64MiB}
namespaces:
  pin: {store: features, domains: {all: {budget: 60%}}}
  user: {domains: {all: {budget: 30%}}}
stores:
  features: {type: lmdb, options: {path: features}}
"""
_SHARDING = """\
topology: sharded
sharding: {role: ROLE, cluster: test, zookeeper: {hosts: 'a:2181/cache'}}
"""
_LEAF = _SHARDING.replace("ROLE", "leaf") + _NODE
_ROOT = (
    _SHARDING.replace("ROLE", "root")
    + "listen: {grpc: [127.0.0.1:7070]}\nnamespaces: {pin: {}, user: {}}\n"
)
_SNAPSHOTS = "snapshots: {url: 's3://bucket/prefix'}"


def _with(warmup: str, base: str = _NODE) -> str:
    return f"{base}warmup: {{{warmup}}}\n"


def _read(warmup: str, base: str = _NODE) -> tuple[Config, WarmupSettings]:
    config = parse_config(_with(warmup, base))
    assert config.warmup is not None
    return config, config.warmup


def test_everything_has_a_default() -> None:
    config, warmup = _read(f"record: {{dir: /log}}, {_SNAPSHOTS}")
    assert config.warms
    assert warmup.record is not None
    assert (warmup.record.sample, warmup.record.window, warmup.record.size) == (0.1, 600, 1 << 30)
    assert (warmup.plan, warmup.on_failure, warmup.max_duration) == ("auto", "serve_cold", 600)
    assert warmup.target_hit_ratio == 0.95
    assert (warmup.replay.rate, warmup.replay.fleet_rate) == (20_000, None)
    assert warmup.peer_copy.serve_rate == 256 << 20


@pytest.mark.parametrize(
    ("warmup", "base", "warms"),
    [
        ("record: {dir: /log}", _NODE, False),
        (_SNAPSHOTS, _NODE, True),
        (f"plan: none, {_SNAPSHOTS}", _NODE, False),
        (f"plan: peer_copy, peers: ['a:1'], {_SNAPSHOTS}", _NODE, True),
        ("peers: ['a:1']", _NODE, True),
        ("", _LEAF, True),
        (f"plan: replay, {_SNAPSHOTS}", _LEAF, True),
        (f"record: {{dir: /log}}, {_SNAPSHOTS}", _ROOT, False),
    ],
)
def test_a_node_warms_up_if_there_is_something_to_warm_from(
    warmup: str, base: str, warms: bool
) -> None:
    assert _read(warmup, base)[0].warms is warms


def test_without_the_section_nothing_warms() -> None:
    assert not parse_config(_NODE).warms


@pytest.mark.parametrize(
    ("warmup", "base", "expected"),
    [
        ("recrod: {dir: /log}", _NODE, "warmup.recrod: unknown key; did you mean 'record'?"),
        ("record: {}", _NODE, "warmup.record.dir: missing"),
        ("record: {dir: log}", _NODE, "'log' must be an absolute path"),
        (
            "record: {dir: /log, sample: 0}",
            _NODE,
            "warmup.record.sample: 0 is out of range; it must be above 0",
        ),
        ("record: {dir: /log, by: key}", _NODE, "did you mean 'keys'?"),
        ("record: {dir: /log, window: 10}", _NODE, "write it with its unit"),
        (
            "record: {dir: /log, namespaces: {usr: exclude}}",
            _NODE,
            "warmup.record.namespaces.usr: no namespace 'usr'; did you mean 'user'?",
        ),
        (
            "record: {dir: /log, namespaces: {user: hash}}",
            _NODE,
            "warmup.record.hash_key: missing; without a secret of your own",
        ),
        ("record: {dir: /log, hash_key: sixteen letters!}", _NODE, "no namespace is hashed"),
        (
            "record: {dir: /log, namespaces: {user: hash}, hash_key: short}",
            _NODE,
            "warmup.record.hash_key: ",
        ),
        ("snapshots: {url: 'http://x/y'}", _NODE, "write s3://bucket/prefix or file:///absolute"),
        ("snapshots: {url: 's3:///y'}", _NODE, "names no bucket"),
        ("snapshots: {url: 'file://host/y'}", _NODE, "names no directory"),
        ("snapshots: {url: 's3://bucket/x?y'}", _NODE, "ends with its path"),
        (
            "snapshots: {url: 'file:///x', endpoint: 'http://a:1'}",
            _NODE,
            "endpoint is for s3:// alone",
        ),
        ("snapshots: {url: 's3://bucket', endpoint: 'a:1'}", _NODE, "'a:1' is no endpoint"),
        (
            "snapshots: {url: 's3://bucket', endpoint: 'http://me:secret@a:1'}",
            _NODE,
            "an endpoint carries no credentials",
        ),
        ("snapshots: {url: 's3://bucket', part_size: 1MiB}", _NODE, "it must be at least 5MiB"),
        (
            "snapshots: {url: 's3://bucket', retention: 15m}",
            _NODE,
            "15m is too short for windows of 10m",
        ),
        (f"{_SNAPSHOTS}, replay: {{max_age: 5m}}", _NODE, "no complete window of 10m is younger"),
        ("plan: replay", _NODE, "replay reads snapshots, and warmup.snapshots is missing"),
        (
            f"plan: replay, {_SNAPSHOTS}",
            _NODE.replace("store: features, ", ""),
            "replay asks stores, and no namespace has one",
        ),
        ("plan: peer_copy", _NODE, "peer_copy needs a warm node to copy from"),
        (
            f"{_SNAPSHOTS}, replay: {{rate: 0}}",
            _NODE,
            "warmup.replay.rate: 0 is out of range; it must",
        ),
        (
            f"{_SNAPSHOTS}, replay: {{fleet: zookeeper, fleet_rate: 1}}",
            _NODE,
            "only a leaf knows a ZooKeeper",
        ),
        (f"{_SNAPSHOTS}, replay: {{fleet: snapshots}}", _NODE, "replay.fleet_rate: missing"),
        (
            "peers: ['a:1'], replay: {fleet_rate: 1000}",
            _NODE,
            "there is no replay without warmup.snapshots",
        ),
        ("peers: ['127.0.0.1:7070']", _NODE, "warmup.peers[0]: 127.0.0.1:7070 is this node itself"),
        ("peers: ['a:0']", _NODE, "a:0 is no address to call"),
        ("peers: ['a']", _NODE, "'a' is not an address"),
        ("peers: ['a:1']", _LEAF, "a leaf asks the replicas of its shards"),
        ("on_failure: die", _NODE, "warmup.on_failure"),
        ("target_hit_ratio: 120%", _NODE, "warmup.target_hit_ratio"),
        ("max_duration: 0", _NODE, "warmup.max_duration: 0 is out of range; it must"),
        ("plan: auto", _ROOT, "a root keeps no values, so there is nothing to warm up"),
        ("max_duration: 1m", _ROOT, "warmup.max_duration: a root keeps no values"),
    ],
)
def test_one_slip_gives_one_clear_line(warmup: str, base: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(_with(warmup, base), "test.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 1, lines
    assert expected in lines[0]
    assert lines[0].startswith("test.yaml:")


@pytest.mark.parametrize("base", [_NODE, _LEAF, _ROOT])
def test_what_is_in_effect_is_a_config_again(base: str) -> None:
    config, _ = _read(f"record: {{dir: /log}}, {_SNAPSHOTS}", base)
    effective = effective_settings(config)
    assert parse_config(json.dumps(effective)).warmup == config.warmup
    jsonschema.Draft202012Validator(json_schema()).validate(yaml.safe_load(json.dumps(effective)))


def test_the_key_of_hashes_is_a_secret() -> None:
    record = "record: {dir: /log, namespaces: {user: hash}, hash_key: '${FC_KEY}'}"
    config = parse_config(_with(record), environment={"FC_KEY": "open sesame, please"})
    assert config.warmup is not None
    assert config.warmup.record is not None
    assert config.warmup.record.hash_key is not None
    assert config.warmup.record.hash_key.get_secret_value() == "open sesame, please"
    assert "sesame" not in json.dumps(effective_settings(config)) + repr(config)


def test_what_the_machine_lacks_is_told_before_the_start(tmp_path: Path) -> None:
    assert warmup_warnings(None) == []
    assert warmup_warnings(WarmupSettings()) == []
    there = RecordSettings(dir=str(tmp_path / "a" / "log"), size=1 << 20)
    assert warmup_warnings(WarmupSettings(record=there)) == []
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    large = there.model_copy(update={"size": free + (1 << 30)})
    (warning,) = warmup_warnings(WarmupSettings(record=large))
    assert "when it is full, log is dropped" in warning
    nowhere = there.model_copy(update={"dir": "/proc/feature-cache/log"})
    (warning,) = warmup_warnings(WarmupSettings(record=nowhere))
    assert "/proc" in warning


@pytest.mark.parametrize("name", ["colocated", "separate", "sharded-leaf", "sharded-root"])
def test_the_example_in_each_shipped_config_works(name: str) -> None:
    text = (Path(__file__).resolve().parents[2] / "configs" / f"{name}.yaml").read_text()
    before, _, rest = text.partition("# warmup:\n")
    example, _, after = rest.partition("\n\n")
    lines = [line.removeprefix("# ") for line in example.splitlines()]
    config = parse_config(before + "warmup:\n" + "\n".join(lines) + "\n\n" + after)
    assert config.warmup is not None
    assert config.warmup.record is not None
    assert config.warms is (name != "sharded-root")
