"""The units of deploy/hooks: read by systemd's own tools, their command under what they allow."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cache_daemon import cli_warmup
from cache_daemon.config import load_config
from cache_daemon.config_persist import STOP_GRACE_S
from cache_daemon.config_units import parse_duration
from cache_daemon.config_warmup import WarmupSettings
from cache_daemon.hooks import HookExit
from tests.aws_server import AwsServer
from tests.deploy_checks import DEPLOY, ROOT, confined, run, scripts, settings_of, unit_here

_HOOKS = DEPLOY / "hooks"
_LAUNCHING = _HOOKS / "feature-cache-aws-lifecycle.service"
_TERMINATING = _HOOKS / "feature-cache-aws-terminating.service"
_UNITS = pytest.mark.parametrize("unit", sorted(_HOOKS.glob("*.service")), ids=lambda p: p.stem)


def arguments(unit: Path) -> list[str]:
    (command,) = settings_of(unit)["ExecStart"]
    return command.split()[1:]


def option(unit: Path, name: str) -> str:
    words = arguments(unit)
    return words[words.index(name) + 1]


def test_both_hooks_have_a_unit() -> None:
    assert {path.name for path in _HOOKS.iterdir()} == {
        "README.md",
        _LAUNCHING.name,
        _TERMINATING.name,
    }


@_UNITS
def test_a_unit_verifies_without_a_word(unit: Path, tmp_path: Path) -> None:
    done = run("systemd-analyze", "verify", str(unit_here(unit, tmp_path)))
    # It exits with 0 on an unknown key, so that any output is a failure.
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@_UNITS
def test_verify_would_have_found_a_wrong_key(unit: Path, tmp_path: Path) -> None:
    copy = unit_here(unit, tmp_path)
    copy.write_text(copy.read_text().replace("RestartSec=", "RestartSecs="))
    assert "RestartSecs" in run("systemd-analyze", "verify", str(copy)).stderr


@_UNITS
def test_a_unit_is_hardened(unit: Path, tmp_path: Path) -> None:
    copy = unit_here(unit, tmp_path)
    done = run(
        *("systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager"),
        str(copy),
    )
    assert done.returncode == 0, done.stdout[-300:]


@_UNITS
def test_a_units_command_is_one_that_the_daemon_knows(unit: Path) -> None:
    group, command, *options = arguments(unit)
    done = run(str(scripts() / "cache-daemon"), group, command, "--help")
    assert done.returncode == 0, done.stderr
    for word in options:
        if word.startswith("--"):
            assert word in done.stdout
    assert ("--terminating" in options) == ("--watch" in options) == (unit == _TERMINATING)


@_UNITS
def test_a_unit_gets_what_it_names_from_one_file(unit: Path) -> None:
    settings = settings_of(unit)
    assert settings["EnvironmentFile"] == ["/etc/feature-cache/aws.env"]
    guide = (_HOOKS / "README.md").read_text()
    names = {*re.findall(r"\$\{(\w+)\}", settings["ExecStart"][0]), "FEATURE_CACHE_AWS_GROUP"}
    assert len(names) == 2
    for name in names:
        assert f"{name}=" in guide
    # The group comes by the environment, which the command reads.
    done = CliRunner().invoke(cli_warmup.app, ["aws-lifecycle", "--help"], env={"COLUMNS": "200"})
    assert "FEATURE_CACHE_AWS_GROUP" in done.stdout


@_UNITS
def test_a_unit_runs_as_the_daemons_user_and_leaves_its_memory_alone(unit: Path) -> None:
    settings = settings_of(unit)
    daemon = settings_of(DEPLOY / "systemd" / "feature-cache.service")
    assert (settings["User"], settings["Group"]) == (daemon["User"], daemon["Group"])
    # RemoveIPC=yes would remove the cache of that user in /dev/shm.
    assert settings.get("RemoveIPC", ["no"]) == ["no"]


def test_the_launching_hook_does_not_wait_for_the_unit_that_is_ready_when_warm() -> None:
    settings = settings_of(_LAUNCHING)
    assert settings["After"] == ["network-online.target"]
    for key in ("Requires", "BindsTo", "Requisite"):
        assert key not in settings


def test_the_hooks_leave_the_daemon_its_time() -> None:
    config = load_config(ROOT / "configs" / "colocated.yaml")
    max_duration_s = WarmupSettings().max_duration
    assert parse_duration(option(_LAUNCHING, "--timeout")) >= max_duration_s + 120
    assert config.persistence is not None
    stop_s = config.drain_timeout + config.persistence.shutdown_limit + STOP_GRACE_S
    assert parse_duration(option(_TERMINATING, "--timeout")) > stop_s


def test_what_was_told_is_not_told_again() -> None:
    """Restarts are for exit code 6 and for crashes alone."""
    told = {"2", "3", "5"}
    for unit, codes in ((_LAUNCHING, told | {"4"}), (_TERMINATING, told)):
        settings = settings_of(unit)
        assert settings["Restart"] == ["on-failure"]
        assert set(settings["RestartPreventExitStatus"][0].split()) == codes
        assert settings["SuccessExitStatus"] == ["143"]


def test_every_exit_code_is_described() -> None:
    guide = (ROOT / "docs" / "hooks.md").read_text()
    described = {int(code) for code in re.findall(r"^\| (\d+) \|", guide, re.M)}
    assert described == set(HookExit)
    for code in set(HookExit) - {HookExit.USAGE}:
        assert re.search(rf"^\| {int(code)} \| `{code.name.lower()}` \|", guide, re.M)


@_UNITS
def test_the_command_runs_under_the_units_restrictions(unit: Path, tmp_path: Path) -> None:
    settings = settings_of(unit)
    assert settings["MemoryDenyWriteExecute"] == ["yes"]
    assert settings["NoNewPrivileges"] == ["yes"]
    names = {"LAUNCHING": "warm", "TERMINATING": "drain"}
    words = [re.sub(r"\$\{\w+_(\w+)_HOOK\}", lambda m: names[m[1]], w) for w in arguments(unit)]
    with AwsServer() as aws:
        if unit == _TERMINATING:
            aws.hook["LifecycleHookName"] = "drain"
            aws.hook["LifecycleTransition"] = "autoscaling:EC2_INSTANCE_TERMINATING"
            aws.metadata["latest/meta-data/autoscaling/target-lifecycle-state"] = "Terminated"
        done = subprocess.run(
            [
                *confined(int(settings["UMask"][0], 8)),
                *("-m", "cache_daemon.cli", *words),
                *("--reach", "1s", "--admin", f"unix:{tmp_path}/admin.sock"),
            ],
            env=os.environ | aws.environment | {"FEATURE_CACHE_AWS_GROUP": "fleet"},
            capture_output=True,
            text=True,
            timeout=60,
        )
    # Nobody answers at that address: the instance is abandoned, and one that ends goes on.
    assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr
    assert aws.results == ["CONTINUE" if unit == _TERMINATING else "ABANDON"]
    assert aws.calls[-1]["AutoScalingGroupName"] == "fleet"
