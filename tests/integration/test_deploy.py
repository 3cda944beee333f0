"""The pieces of deploy/, each given to the tool that will read it, and the daemon under the unit's
own restrictions."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_daemon.config import load_config
from cache_daemon.config_persist import STOP_GRACE_S, persist_warnings
from tests.deploy_checks import DEPLOY, ROOT, confined, run, scripts, settings_of, unit_here
from tests.servers import wait_until

UNIT = DEPLOY / "systemd" / "feature-cache.service"
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"


def unit_settings() -> dict[str, list[str]]:
    return settings_of(UNIT)


# ---- systemd -------------------------------------------------------------------------------------


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    return unit_here(UNIT, tmp_path)


def test_the_unit_verifies_without_a_word(unit: Path) -> None:
    done = run("systemd-analyze", "verify", str(unit))
    # It exits with 0 on an unknown key, so that any output is a failure.
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_verify_would_have_found_a_wrong_key(unit: Path) -> None:
    unit.write_text(unit.read_text().replace("WatchdogSec=", "WatchdogSecs="))
    assert "WatchdogSecs" in run("systemd-analyze", "verify", str(unit)).stderr


def test_the_unit_is_hardened(unit: Path) -> None:
    done = run(
        *("systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager"),
        str(unit),
    )
    assert done.returncode == 0, done.stdout[-300:]


def system_calls(group: str) -> set[str]:
    """What a group of systemd's stands for, groups in it included."""
    done = run("systemd-analyze", "syscall-filter", "--no-pager", group)
    assert done.returncode == 0, done.stderr
    words = [line.strip() for line in done.stdout.splitlines()[1:]]
    calls: set[str] = set()
    for word in words:
        if word.startswith("@"):
            calls |= system_calls(word)
        elif word and not word.startswith("#"):
            calls.add(word)
    return calls


def test_the_unit_lets_the_nvm_tier_work() -> None:
    settings = unit_settings()
    allowed: set[str] = set()
    for line in settings["SystemCallFilter"]:
        refuse, groups = line.startswith("~"), line.removeprefix("~").split()
        for group in groups:
            allowed = allowed - system_calls(group) if refuse else allowed | system_calls(group)
    wanted = {"io_uring_setup", "io_uring_enter", "io_uring_register", "pread64", "pwrite64"}
    assert wanted | {"fallocate", "flock", "fsync", "fdatasync", "eventfd2"} <= allowed
    assert {"statfs", "fstatfs", "ftruncate", "fchmod", "madvise", "rename"} <= allowed  # persist
    # The shipped config's file lies where the unit may write.
    config = (ROOT / "configs" / "colocated.yaml").read_text()
    (state,) = settings["StateDirectory"]
    assert f"path: /var/lib/{state}/nvm" in config
    assert settings["LimitMEMLOCK"]


def test_the_units_command_is_one_that_the_daemon_knows() -> None:
    (command,) = unit_settings()["ExecStart"]
    program, subcommand, *options = command.split()
    done = run(str(scripts() / Path(program).name), subcommand, "--help")
    assert done.returncode == 0, done.stderr
    for option in options[::2]:
        assert option in done.stdout


def test_the_unit_leaves_a_drain_its_time() -> None:
    shipped = (ROOT / "configs" / "colocated.yaml").read_text()
    limits = re.findall(r"^(?:drain_timeout|  shutdown_limit): (\d+)s", shipped, re.M)
    assert len(limits) == 2
    stop_s = float(unit_settings()["TimeoutStopSec"][0])
    assert stop_s > sum(map(float, limits)) + STOP_GRACE_S
    # What check-config warns by.
    config = load_config(ROOT / "configs" / "colocated.yaml")
    assert not [line for line in persist_warnings(config) if "TimeoutStopSec" in line]
    slower = config.model_copy(update={"drain_timeout": stop_s})
    assert [line for line in persist_warnings(slower) if f"({stop_s - 60:.0f}m" not in line]


def test_the_unit_leaves_shared_memory_alone() -> None:
    settings = unit_settings()
    assert settings["RemoveIPC"] == ["no"]
    # Each of these would give the daemon a /dev/shm of its own, or none.
    for key in ("PrivateIPC", "TemporaryFileSystem", "InaccessiblePaths", "RootDirectory"):
        assert key not in settings
    config = load_config(ROOT / "configs" / "colocated.yaml")
    assert config.persistence is not None
    assert config.persistence.dir == "/dev/shm"


def test_the_shipped_addresses_are_the_same_everywhere() -> None:
    config = (ROOT / "configs" / "colocated.yaml").read_text()
    (runtime,) = unit_settings()["RuntimeDirectory"]
    for name in ("data", "admin"):
        assert f"unix:/run/{runtime}/{name}.sock" in config
    done = run(str(scripts() / "cachectl"), "status", "--help")
    assert f"unix:/run/{runtime}/ad" in done.stdout
    (port,) = re.findall(r"http: 127\.0\.0\.1:(\d+)", config)
    assert f"127.0.0.1:{port}" in (DEPLOY / "prometheus" / "prometheus.yml").read_text()


def test_the_daemon_runs_under_the_units_restrictions(tmp_path: Path) -> None:
    """As systemd would start it: notify socket, no new privileges, W^X memory, the unit's umask."""
    settings = unit_settings()
    assert settings["MemoryDenyWriteExecute"] == ["yes"]
    assert settings["NoNewPrivileges"] == ["yes"]
    umask = int(settings["UMask"][0], 8)
    (tmp_path / "config.yaml").write_text(
        "memory: {size: 16MiB}\n"
        f"nvm: {{devices: [{{path: {tmp_path}/nvm, size: 4MiB}}], read_memory: 4MiB}}\n"
        "namespaces: {pin_text: {nvm: {budget: 100%}, domains: {long_lasting: {budget: 50%}}}}\n"
        f"listen: {{grpc: ['unix:{tmp_path}/data.sock'], admin: 'unix:{tmp_path}/admin.sock'}}\n"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify.sock"))
        notify.settimeout(20)
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify.sock")}
        command = [*confined(umask), "-m", "cache_daemon.cli", "run", "--config"]
        with (
            (tmp_path / "log").open("wb") as log,
            subprocess.Popen(
                [*command, str(tmp_path / "config.yaml")],
                env=environment,
                stderr=log,
            ) as daemon,
        ):
            try:
                try:
                    assert b"READY=1" in notify.recv(4096)
                except TimeoutError:
                    pytest.fail(f"never ready: {(tmp_path / 'log').read_text()}")
                modes = {
                    name: (tmp_path / name).stat().st_mode & 0o777
                    for name in ("data.sock", "admin.sock")
                }
                # A ranker in the group reaches the data, and only the daemon's user the admin.
                assert modes["data.sock"] & 0o067 == 0o060, oct(modes["data.sock"])
                assert modes["admin.sock"] == 0o600
                status = run(
                    *(str(scripts() / "cachectl"), "status", "--json"),
                    *("--admin", f"unix:{tmp_path}/admin.sock"),
                )
                told = json.loads(status.stdout)
                assert told["pid"] == daemon.pid
                assert [device["in_service"] for device in told["nvm_devices"]] == [True]
                assert (tmp_path / "nvm").stat().st_mode & 0o077 == 0
                daemon.send_signal(signal.SIGTERM)
                assert b"STOPPING=1" in notify.recv(4096)
                assert daemon.wait(20) == 0
            finally:
                daemon.kill()


# ---- docker --------------------------------------------------------------------------------------


def stages() -> list[str]:
    """The Dockerfile's stages as text, continuation lines joined."""
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
    return [stage for stage in re.split(r"^FROM ", text, flags=re.M)[1:] if stage]


def apt_packages(stage: str) -> set[str]:
    (arguments,) = re.findall(r"apt-get install ([^&\n]+)", stage)
    return {word for word in arguments.split() if not word.startswith("-")}


def test_the_dockerfile_is_clean() -> None:
    done = run(str(scripts() / "hadolint"), str(DOCKERFILE))
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_runs_as_nobody_special() -> None:
    build, final = stages()
    assert "USER 10001:10001" in final
    assert not {"g++", "cmake", "python3-dev"} & apt_packages(final)
    assert "COPY --from=build" in final
    assert "AS build" in build


def test_every_path_that_the_image_copies_is_here_and_not_ignored() -> None:
    allowed = {
        line[1:]
        for line in DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", stages()[0], re.M)
        for source in line.split()[:-1]
    }
    assert copied == allowed
    for source in copied:
        assert (ROOT / source).exists(), source


def test_the_image_builds_with_packages_that_the_house_lists() -> None:
    listed = {
        line.partition("|")[0].strip()
        for line in (ROOT / "system-packages.txt").read_text().splitlines()
        if "|" in line and not line.startswith("#")
    }
    assert apt_packages(stages()[0]) <= listed


def shared_libraries() -> Iterator[str]:
    """Paths of what the native extension is linked against."""
    from cache_daemon import _native

    assert _native.__file__ is not None
    for line in run("ldd", _native.__file__).stdout.splitlines():
        match = re.search(r"=> (/\S+)", line)
        if match:
            yield match.group(1)


def test_the_image_has_the_libraries_of_the_extension() -> None:
    """Each library belongs to a package of the final stage, or to one that it depends on."""
    libraries = sorted(set(shared_libraries()))
    assert libraries
    # dpkg knows files by the path they were packed with, before /lib moved into /usr.
    paths = {path: path.removeprefix("/usr") for path in map(os.path.realpath, libraries)}
    lines = run("dpkg", "-S", *paths, *paths.values()).stdout.splitlines()
    owners = {path: package for package, _, path in (line.partition(": ") for line in lines)}
    assert not [path for path, old in paths.items() if not owners.keys() & {path, old}]
    wanted = {package.partition(":")[0] for package in owners.values()}
    closure = run(
        *("apt-cache", "depends", "--recurse", "--no-recommends", "--no-suggests"),
        *("--no-conflicts", "--no-breaks", "--no-replaces", "--no-enhances"),
        *sorted(apt_packages(stages()[1])),
    )
    shipped = set(re.findall(r"^(\S+)$", closure.stdout, re.M))
    assert wanted <= shipped, wanted - shipped


# ---- prometheus ----------------------------------------------------------------------------------


RULES = ("feature-cache", "feature-cache-cluster", "feature-cache-warmup")


def test_prometheus_config_and_rules_are_valid() -> None:
    folder = DEPLOY / "prometheus"
    assert {path.name for path in folder.glob("*.rules.yml")} == {f"{n}.rules.yml" for n in RULES}
    for command in (
        ("check", "config", "prometheus.yml"),
        *(("check", "rules", f"{name}.rules.yml") for name in RULES),
        *(("test", "rules", f"{name}.rules.test.yml") for name in RULES),
    ):
        done = run("promtool", *command, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "SUCCESS" in done.stdout


@pytest.mark.parametrize("name", RULES)
def test_every_alert_is_tested_and_says_what_to_do(name: str) -> None:
    folder = DEPLOY / "prometheus"
    alerts = set(re.findall(r"- alert: (\w+)", (folder / f"{name}.rules.yml").read_text()))
    tested = set(
        re.findall(
            r"alertname: (\w+)\n\s+exp_alerts:\n",
            (folder / f"{name}.rules.test.yml").read_text(),
        )
    )
    assert alerts
    assert tested == alerts
    guide = (ROOT / "docs" / "operations.md").read_text()
    for alert in alerts:
        assert alert in guide, f"docs/operations.md does not explain {alert}"


def test_a_second_daemon_does_not_take_the_first_ones_sockets(tmp_path: Path) -> None:
    """As when an operator starts one by hand beside the service."""
    config = tmp_path / "config.yaml"
    config.write_text(
        "memory: {size: 8MiB}\n"
        "namespaces: {pin_text: {domains: {long_lasting: {budget: 50%}}}}\n"
        f"listen: {{grpc: ['127.0.0.1:0'], admin: 'unix:{tmp_path}/admin.sock'}}\n"
    )
    command = [sys.executable, "-m", "cache_daemon.cli", "run", "--config", str(config)]
    ready = tmp_path / "ready.json"
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen([*command, "--ready-file", str(ready)], stderr=log) as first,
    ):
        try:
            wait_until(ready.is_file, 20, "the first daemon serves")
            second = run(*command)
            assert second.returncode == 1
            assert "another daemon serves there" in second.stderr
            assert "Traceback" not in second.stderr
            assert first.poll() is None
        finally:
            first.terminate()
            assert first.wait(20) == 0
