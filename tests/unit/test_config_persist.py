"""The `persist` section: what is read, what is refused, and what this machine has no room for."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from cache_daemon.cli import _app as app
from cache_daemon.config import Config, ConfigError, effective_settings, parse_config
from cache_daemon.config import free_memory_bytes as free_bytes_now
from cache_daemon.config_node import node_config
from cache_daemon.config_persist import persist_warnings, stop_seconds
from cache_daemon.config_schema import json_schema
from cache_daemon.config_units import Durability, parse_durability

_DRAM = """\
listen: {grpc: [127.0.0.1:0]}
memory: {size: 64MiB}
namespaces: {pin: {domains: {main: {budget: 50%}}}}
"""
_NVM = """\
listen: {grpc: [127.0.0.1:0]}
memory: {size: 64MiB}
nvm: {devices: [{path: DEVICE, size: 64MiB}], region_size: 64KiB}
namespaces: {pin: {nvm: {budget: 50%}, domains: {main: {budget: 50%}}}}
"""


def config_of(persist: str, base: str = _DRAM, device: str = "nvm") -> Config:
    return parse_config(f"{base.replace('DEVICE', device)}persist: {persist}\n", "test.yaml")


def problems_of(persist: str, base: str = _DRAM, device: str = "nvm") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config_of(persist, base, device)
    return [line.partition(": ")[2] for line in str(caught.value).splitlines()]


# ---- what is read --------------------------------------------------------------------------------


def test_without_the_section_nothing_outlives_the_process() -> None:
    config = parse_config(_DRAM)
    assert config.persist is None
    assert config.persistence is None
    assert node_config(config).persist is None
    assert stop_seconds(config) == 35.0


def test_an_empty_section_has_sensible_defaults() -> None:
    config = config_of("{}")
    settings = config.persistence
    assert settings is not None
    assert (settings.dir, settings.name) == ("/dev/shm", "feature-cache")
    assert settings.durability == Durability("drop_nvm")
    assert stop_seconds(config) == 55.0
    native = node_config(config).persist
    assert native is not None
    assert (native.dir, native.name, native.durability) == (
        *("/dev/shm", "feature-cache"),
        "drop_nvm",
    )
    assert (native.shutdown_limit_ms, native.spill_on_shutdown) == (20_000, False)
    assert (native.journal, native.keep_on_clock_doubt) == ("", False)


def test_one_key_turns_all_of_it_off() -> None:
    config = config_of("{enabled: false, on_shutdown: spill, durability: sync}", _NVM)
    assert config.persist is not None
    assert config.persistence is None
    assert node_config(config).persist is None
    assert persist_warnings(config, 0) == []


def test_every_key_reaches_the_engine() -> None:
    config = config_of(
        "{dir: /mnt/cache, name: a.b-c_1, on_shutdown: spill, shutdown_limit: 1m30s, "
        "durability: {bounded: 250ms}, journal: log, on_clock_doubt: keep}",
        _NVM,
    )
    native = node_config(config).persist
    assert native is not None
    assert (native.dir, native.name) == ("/mnt/cache", "a.b-c_1")
    assert (native.spill_on_shutdown, native.shutdown_limit_ms) == (True, 90_000)
    assert (native.durability, native.durability_window_ms) == ("bounded", 250)
    assert (native.journal, native.keep_on_clock_doubt) == ("log", True)


@pytest.mark.parametrize(
    ("written", "durability"),
    [
        ("drop_nvm", Durability("drop_nvm")),
        ("sync", Durability("sync")),
        ({"bounded": "1ms"}, Durability("bounded", 0.001)),
        ({"bounded": "10s"}, Durability("bounded", 10.0)),
    ],
)
def test_a_durability_is_written_as_it_was_read(written: object, durability: Durability) -> None:
    assert parse_durability(written) == durability
    assert durability.to_json() == written
    assert parse_durability(durability) is durability


def test_effective_settings_are_a_config_again() -> None:
    config = config_of("{durability: {bounded: 100ms}, shutdown_limit: 30s}", _NVM)
    effective = effective_settings(config)
    assert effective["persist"]["durability"] == {"bounded": "100ms"}
    assert effective["persist"]["shutdown_limit"] == "30s"
    assert parse_config(yaml.safe_dump(effective)) == config
    jsonschema.validate(effective, json_schema())


@pytest.mark.parametrize("durability", ["never", {"bounded": 100}, {"bounded": "1s", "x": "1s"}])
def test_the_schema_refuses_what_the_daemon_refuses(durability: object) -> None:
    raw: dict[str, Any] = yaml.safe_load(_DRAM) | {"persist": {"durability": durability}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(raw, json_schema())


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("persist", "expected"),
    [
        ("{dir: shm}", "persist.dir: 'shm' must be an absolute path, such as /dev/shm"),
        ("{nmae: a}", "persist.nmae: unknown key; did you mean 'name'?"),
        (
            "{on_shutdown: spil}",
            "persist.on_shutdown: 'spil' is not known; did you mean 'spill'?",
        ),
        ("{shutdown_limit: 20}", "persist.shutdown_limit: 20 is not a duration; write it with"),
        ("{shutdown_limit: 10ms}", "persist.shutdown_limit: 10ms is out of range; it must be at"),
        ("{shutdown_limit: 2h}", "persist.shutdown_limit: 2h is out of range; it must be at most"),
        ("{durability: fast}", "persist.durability: 'fast' is no durability; write drop_nvm, sync"),
        ("{durability: bounded}", "persist.durability: 'bounded' is no durability; write"),
        (
            "{on_shutdown: spill}",
            "persist.on_shutdown: spill moves DRAM's items to NVM, and the config has no nvm",
        ),
        ("{durability: sync}", "persist.durability: it says what NVM holds after power loss, and"),
        ("{journal: log}", "persist.journal: there is no invalidation log with durability: drop"),
    ],
)
def test_what_is_wrong_is_told(persist: str, expected: str) -> None:
    (problem,) = problems_of(persist)
    assert problem.startswith(expected), problem


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", '""', "a b", "ä", "x" * 65])
def test_a_name_is_a_plain_file_name(name: str) -> None:
    (problem,) = problems_of(f"{{name: {name}}}")
    assert problem.startswith("persist.name: ")
    assert "no plain file name" in problem


@pytest.mark.parametrize("window", ["0", "0ms", "10001ms", "1m"])
def test_a_window_is_from_a_millisecond_to_ten_seconds(window: str) -> None:
    (problem,) = problems_of(f"{{durability: {{bounded: {window}}}}}", _NVM)
    assert "persist.durability" in problem
    assert "out of range" in problem


def test_a_raw_device_needs_a_journal_elsewhere() -> None:
    for durability in ("sync", "{bounded: 100ms}"):
        (problem,) = problems_of(f"{{durability: {durability}}}", _NVM, "/dev/nvme9n1")
        assert problem.startswith("persist.journal: missing; the first nvm device (/dev/nvme9n1)")
        config_of(f"{{durability: {durability}, journal: /var/log}}", _NVM, "/dev/nvme9n1")
    config_of("{durability: drop_nvm}", _NVM, "/dev/nvme9n1")
    (problem,) = problems_of("{durability: sync, journal: ./nvm}", _NVM)
    assert problem == "persist.journal: ./nvm is one of nvm.devices"


# ---- what does not fit now -----------------------------------------------------------------------


def in_folder(folder: Path, more: str = "") -> Config:
    return config_of(f"{{dir: {folder}, name: cache{more}}}")


def on_tmpfs(_path: str) -> str:
    return "tmpfs"


def test_room_is_no_reason_to_warn() -> None:
    small = config_of("{name: unit-test}", _DRAM.replace("64MiB", "2MiB"))
    assert persist_warnings(small, 1 << 40) == []


def test_a_directory_that_is_not_there_is_warned_of(tmp_path: Path) -> None:
    (warning,) = persist_warnings(in_folder(tmp_path / "nowhere"))
    assert "nowhere: No such file or directory; the daemon will not start" in warning


def test_a_directory_on_a_disk_is_warned_of(tmp_path: Path) -> None:
    (warning,) = persist_warnings(in_folder(tmp_path), None, lambda _: "ext4")
    assert "is on ext4, not on tmpfs or hugetlbfs" in warning


def test_too_little_memory_is_warned_of_less_what_is_there_already(tmp_path: Path) -> None:
    config = in_folder(tmp_path)
    (warning,) = persist_warnings(config, 63 << 20, on_tmpfs)
    assert "must hold up to 64MiB (memory.size)" in warning
    assert "63MiB of memory free now" in warning
    (tmp_path / "cache.arena").write_bytes(b"x" * (2 << 20))  # to be adopted
    assert persist_warnings(config, 63 << 20, on_tmpfs) == []
    # Huge pages are set apart from the memory that is free.
    assert persist_warnings(config, 0, lambda _: "hugetlbfs") == []


def test_a_stop_that_systemd_would_cut_short_is_warned_of(tmp_path: Path) -> None:
    (warning,) = persist_warnings(in_folder(tmp_path, ", shutdown_limit: 1m"), None, on_tmpfs)
    assert "an orderly stop may take 1m35s" in warning
    assert "TimeoutStopSec" in warning


def test_the_machine_says_what_is_free() -> None:
    free = free_bytes_now()
    assert free is not None
    assert free > 0


def test_check_config_warns_and_passes(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"{_DRAM}persist: {{dir: {tmp_path}/nowhere}}\n")
    done = CliRunner().invoke(app, ["check-config", "--json", str(path)])
    assert done.exit_code == 0
    assert f"{path}: warning: persist.dir: {tmp_path}/nowhere" in done.stderr
    assert json.loads(done.stdout)["persist"]["dir"] == f"{tmp_path}/nowhere"
