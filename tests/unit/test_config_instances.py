"""A node over several instances: how many, what each gets, and what is refused."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cache_daemon._native import Node
from cache_daemon.cli import _app as app
from cache_daemon.config import Config, ConfigError, effective_settings, parse_config
from cache_daemon.config_check import check
from cache_daemon.config_node import budgets, node_config
from cache_daemon.config_nvm import nvm_plan

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_TEXT = """\
listen: {{grpc: [127.0.0.1:0]}}
memory: {memory}
namespaces:
  a: {{default_domain: x, domains: {{x: {{budget: {x}}}, y: {{budget: {y}}}}}}}
"""


def _config(memory: str, x: str = "60%", y: str = "40%") -> str:
    return _TEXT.format(memory=memory, x=x, y=y)


def _of_a_large_machine(text: str) -> Config:
    config, problems = check(yaml.safe_load(text))
    assert not problems
    assert config is not None
    return config


def _problems(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        budgets(parse_config(text, "test.yaml"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("memory", "instances"),
    [
        ("{size: 256GiB}", 1),
        ("{size: 257GiB}", 2),
        ("{size: 1536GiB}", 6),
        ("{size: 1536GiB, max_instance_bytes: 512GiB}", 3),
        ("{size: 1536GiB, instances: auto}", 6),
        ("{size: 64MiB, instances: 4}", 4),
        ("{size: 1536GiB, instances: 2, max_instance_bytes: 1GiB}", 2),
    ],
)
def test_as_few_as_their_size_allows_or_as_many_as_said(memory: str, instances: int) -> None:
    config = _of_a_large_machine(_config(memory))
    assert config.memory.instance_count == instances
    assert node_config(config).instance_count() == instances


@pytest.mark.parametrize("instances", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("size", ["33MiB", "64MiB", "1000MiB"])
def test_shares_that_add_up_to_all_fit(size: str, instances: int) -> None:
    config = parse_config(_config(f"{{size: {size}, instances: {instances}}}"))
    bytes_of = budgets(config)
    native = node_config(config)
    total = sum(bytes_of.values())
    assert 0.99 * native.arena_bytes() <= total <= native.arena_bytes() < config.memory.size
    node = Node(native)
    samples = [(sample.name, dict(sample.labels), sample.value) for sample in node.samples()]
    node.stop()
    shown = sum(value for name, _, value in samples if name == "feature_cache_domain_budget_bytes")
    assert shown == pytest.approx(total, abs=2 * MIB)
    by_instance = {
        labels["instance"]: value
        for name, labels, value in samples
        if name == "feature_cache_instance_memory_bytes"
    }
    assert by_instance == {str(i): config.memory.size // instances for i in range(instances)}


def test_too_many_or_too_small_says_the_numbers() -> None:
    text = _config("{size: 1MiB, instances: 65}")
    assert "64" in _problems(text)
    text = _config("{size: 1TiB, max_instance_bytes: 1GiB}")
    assert "1TiB in parts of at most 1GiB makes 1024 instances; a node has at most 64" in _problems(
        text
    )
    said = _problems(_config("{size: 8MiB, instances: 16}"))
    assert "memory of 524288 bytes is too small for 2 domains" in said
    assert "are needed in each of 16 instances" in said
    said = _problems(_config("{size: 64MiB, instances: 4}", x="200KiB"))
    assert "200KiB is 204800 bytes here; the least is 256KiB over 4 instances" in said


def test_settings_are_written_as_they_are_read() -> None:
    config = _of_a_large_machine(_config("{size: 1TiB}"))
    assert effective_settings(config)["memory"]["instances"] == "auto"
    assert effective_settings(config)["memory"]["max_instance_bytes"] == "256GiB"
    given = _of_a_large_machine(_config("{size: 1TiB, instances: 8}"))
    assert effective_settings(given)["memory"]["instances"] == 8
    again = _of_a_large_machine(json.dumps(effective_settings(given)))
    assert again.memory == given.memory


_NVM = """\
listen: {{grpc: [127.0.0.1:0]}}
memory: {{size: 256MiB, instances: {instances}}}
nvm: {{devices: [{devices}], region_size: 64KiB}}
namespaces:
  a: {{nvm: {{budget: {budget}}}, domains: {{x: {{budget: 10%}}}}}}
  b: {{nvm: {{budget: 25%}}, domains: {{x: {{budget: 10%}}}}}}
"""


@pytest.mark.parametrize("instances", [1, 3, 4])
def test_files_are_cut_and_budgets_come_out_even(instances: int) -> None:
    devices = "{path: /none/one, size: 90MiB}, {path: /none/two, size: 60MiB}"
    text = _NVM.format(instances=instances, devices=devices, budget="75%")
    config = parse_config(text)
    plan = nvm_plan(config)
    assert plan is not None
    for part in plan.budgets.values():
        assert part % (instances * plan.region_bytes) == 0
    assert sum(plan.budgets.values()) == pytest.approx(plan.regions * plan.region_bytes, rel=0.01)
    # The engine finds that they fit.
    assert node_config(config).nvm_memory_bytes() > instances * 2 * 4 * MIB


def test_block_devices_go_whole_to_instances() -> None:
    sizes = {"/dev/a": 64 * MIB, "/dev/b": 32 * MIB, "/dev/c": 64 * MIB, "/dev/d": 48 * MIB}
    devices = ", ".join(f"{{path: {path}, size: {size}}}" for path, size in sizes.items())
    config = parse_config(_NVM.format(instances=2, devices=devices, budget="75%"))
    plan = nvm_plan(config, sizes.get)
    assert plan is not None
    # Instance 1 has b and d, 80 MiB less what is kept of each; instance 0 has more.
    assert plan.instance_regions == 2 * ((80 * MIB - 128 * KIB) // (64 * KIB)) // 2
    assert sum(plan.budgets.values()) <= 2 * 80 * MIB
    three = parse_config(_NVM.format(instances=3, devices=devices, budget="75%"))
    with pytest.raises(ConfigError, match="4 of them cannot be divided among 3 instances"):
        nvm_plan(three, sizes.get)


def test_the_least_of_a_namespace_is_that_of_all_instances() -> None:
    devices = "{path: /none/one, size: 90MiB}"
    config = parse_config(_NVM.format(instances=3, devices=devices, budget="512KiB"))
    with pytest.raises(ConfigError, match=r"the least is 12 regions, 768KiB"):
        nvm_plan(config)


def test_check_config_says_how_many_and_how_large(tmp_path: Path) -> None:
    path = tmp_path / "node.yaml"
    path.write_text(_config("{size: 64MiB, instances: 4}"))
    done = CliRunner().invoke(app, ["check-config", str(path)])
    assert done.exit_code == 0, done.output
    assert "4 instances of 16.0MiB" in done.output
    path.write_text(_config("{size: 64MiB}"))
    assert "1 instance of 64.0MiB" in CliRunner().invoke(app, ["check-config", str(path)]).output
