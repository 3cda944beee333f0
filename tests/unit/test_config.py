"""The config file: what is read, what is refused, and how well the refusal helps."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cache_daemon.config import (
    Config,
    ConfigError,
    effective_settings,
    load_config,
    machine_memory_bytes,
    parse_config,
    service_manager,
)
from cache_daemon.config_check import is_loopback, nearest
from cache_daemon.config_schema import json_schema

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"

_GOOD = """\
listen:
  grpc: [127.0.0.1:0]
memory: {size: 64MiB}
namespaces:
  pin_text:
    store: features
    default_domain: ephemeral
    domains:
      long_lasting: {budget: 50%, ttl: 1h}
      ephemeral: {budget: 8MiB}
stores:
  features: {type: lmdb, options: {path: features}}
"""


def _problems(text: str, **environment: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "test.yaml", environment)
    return str(caught.value).splitlines()


def _changed(old: str, new: str) -> str:
    assert old in _GOOD
    return _GOOD.replace(old, new)


def test_a_good_config_is_read() -> None:
    config = parse_config(_GOOD)
    assert config.memory.size == 64 << 20
    namespace = config.namespaces["pin_text"]
    assert namespace.entry_domain == "ephemeral"
    assert namespace.domains["long_lasting"].ttl == 3600
    assert namespace.domains["long_lasting"].policy == "s3fifo"
    assert config.drain_timeout == 30


def test_settings_cannot_be_changed_afterwards() -> None:
    config = parse_config(_GOOD)
    with pytest.raises(ValueError, match="frozen"):
        config.memory.size = 1


def test_one_domain_is_the_default_by_itself() -> None:
    text = _changed("    default_domain: ephemeral\n", "").replace(
        "      ephemeral: {budget: 8MiB}\n", ""
    )
    assert parse_config(text).namespaces["pin_text"].entry_domain == "long_lasting"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("memory:", "memroy:", "test.yaml:3: memroy: unknown key; did you mean 'memory'?"),
        ("{size:", "{sice:", "test.yaml:3: memory.sice: unknown key; did you mean 'size'?"),
        (
            "ttl: 1h",
            "tll: 1h",
            "test.yaml:9: namespaces.pin_text.domains.long_lasting.tll: unknown key; "
            "did you mean 'ttl'?",
        ),
        (
            "{path:",
            "{pth:",
            "test.yaml:12: stores.features.options.pth: unknown key; did you mean 'path'?",
        ),
        (
            "type: lmdb",
            "guard: {concurency: 2}, type: lmdb",
            "test.yaml:12: stores.features.guard.concurency: unknown key; "
            "did you mean 'concurrency'?",
        ),
        (
            "store: features",
            "store: featurs",
            "test.yaml:6: namespaces.pin_text.store: no store 'featurs'; did you mean 'features'?",
        ),
        (
            "default_domain: ephemeral",
            "default_domain: ephemral",
            "test.yaml:7: namespaces.pin_text.default_domain: no domain 'ephemral'; "
            "did you mean 'ephemeral'?",
        ),
        (
            "    default_domain: ephemeral\n",
            "",
            "test.yaml:5: namespaces.pin_text.default_domain: missing; "
            "say which of long_lasting, ephemeral values enter by default",
        ),
        (
            "default_domain: ephemeral",
            "default_domain: ephemeral\n    rules: [{asked_at_least: 2, domain: long}]",
            "test.yaml:8: namespaces.pin_text.rules[0].domain: no domain 'long'; "
            "did you mean 'long_lasting'?",
        ),
        (
            "default_domain: ephemeral",
            "default_domain: ephemeral\n    rules: [{domain: ephemeral}]",
            "test.yaml:8: namespaces.pin_text.rules[0]: a rule needs prefix or asked_at_least; "
            "for all keys set default_domain instead",
        ),
        (
            "budget: 50%",
            "budget: 101%",
            "test.yaml:9: namespaces.pin_text.domains.long_lasting.budget: "
            "'101%' is not a share; write 10%, or a number from 0 to 1",
        ),
        (
            "budget: 8MiB",
            "budget: 60%",
            "test.yaml:4: namespaces: the domains' budgets add up to 110% of the arena; "
            "at most 100%",
        ),
        (
            "budget: 8MiB",
            "budget: 40MiB",
            "test.yaml:4: namespaces: the domains' budgets add up to 72.0MiB, "
            "more than memory.size (64MiB)",
        ),
        ("ttl: 1h", "ttl: 60", "is not a duration; write it with its unit"),
        ("ttl: 1h", "ttl: 400d", "400d is out of range; it must be at most 366d"),
        ("ttl: 1h", "policy: lfu", "'lfu' is not known; did you mean 'lru'?"),
        ("budget: 8MiB", "budget: 8MiB, refresh_ahead: 5%", "has no effect without a ttl"),
        ("size: 64MiB", "size: 64Mb", "unknown unit 'Mb'"),
        ("size: 64MiB", "segment_size: 64KiB", "test.yaml:3: memory.size: missing"),
        ("size: 64MiB", "size: 64MiB, segment_size: 100KiB", "a power of two"),
        ("size: 64MiB", "size: 64MiB, huge_pages: always", "'always' is not known"),
        ("type: lmdb", "type: ldmb", "unknown store type 'ldmb'; use lmdb, redis or module:Class"),
        ("type: lmdb", "type: no_such_module:Store", "cannot import 'no_such_module'"),
        ("pin_text:", "pin text:", "'pin text' is no name"),
        ("[127.0.0.1:0]", "[]", "at least one is needed"),
        ("[127.0.0.1:0]", "[127.0.0.1]", "'127.0.0.1' is not an address"),
        ("[127.0.0.1:0]", "[127.0.0.1:70000]", "is not an address"),
        ("[127.0.0.1:0]", "['unix:data.sock']", "must be absolute"),
        ("[127.0.0.1:0]", f"['unix:/{'x' * 120}']", "at most 107 bytes"),
        ("[127.0.0.1:0]", "[127.0.0.1:0]\n  http: unix:/x", "HTTP is served on TCP only"),
        (
            "listen:",
            "topology: sharded\nlisten:",
            "sharding: missing; topology: sharded needs it, with role, cluster and zookeeper",
        ),
        ("listen:", "topology: colo\nlisten:", "did you mean 'colocated'?"),
        ("memory: {size: 64MiB}", "memory: 64MiB", "memory: a mapping is expected here"),
        (
            "memory: {size: 64MiB}",
            "memory: {size: 64MiB}\nlimits: {max_value_size: 9MiB}",
            "9MiB is out of range; it must be at most 8MiB",
        ),
        (
            "memory: {size: 64MiB}",
            "memory: {size: 64MiB}\nlimits: {max_message_size: 1MiB}",
            "limits: max_message_size (1MiB) cannot carry a value of max_value_size (8MiB)",
        ),
    ],
)
def test_one_slip_gives_one_clear_line(old: str, new: str, expected: str) -> None:
    lines = _problems(_changed(old, new))
    assert len(lines) == 1
    assert expected in lines[0]
    assert lines[0].startswith("test.yaml:")


def test_all_problems_are_told_at_once_in_the_order_of_the_file() -> None:
    text = (
        _changed("memory:", "memory: {size: 64Mb}\nx:")
        .replace("store: features", "store: featurs")
        .replace("ttl: 1h", "ttl: 5")
        .replace("path:", "pth:")
    )
    lines = _problems(text)
    where = [line.split(": ")[1] for line in lines]
    assert where == [
        "memory.size",
        "x",
        "namespaces.pin_text.store",
        "namespaces.pin_text.domains.long_lasting.ttl",
        "stores.features.options.pth",
    ]
    numbers = [int(line.split(":")[1]) for line in lines]
    assert numbers == sorted(numbers)


def test_a_broken_section_does_not_hide_what_else_is_wrong_with_it() -> None:
    text = _changed("store: features", "stor: x\n    store: featurs")
    assert [line.split(": ", 2)[1] for line in _problems(text)] == [
        "namespaces.pin_text.stor",
        "namespaces.pin_text.store",
    ]


@pytest.mark.parametrize("address", ["0.0.0.0:7070", "[::]:7070", "10.0.0.1:7070", "host:7070"])
@pytest.mark.parametrize("key", ["grpc", "admin", "http"])
def test_beyond_loopback_only_when_told(address: str, key: str) -> None:
    value = f"['{address}']" if key == "grpc" else f"'{address}'"
    grpc = "" if key == "grpc" else "  grpc: [127.0.0.1:0]\n"
    text = _changed("  grpc: [127.0.0.1:0]\n", f"{grpc}  {key}: {value}\n")
    lines = _problems(text)
    assert len(lines) == 1
    assert "set insecure: true" in lines[0]
    assert parse_config(text + "insecure: true\n").insecure


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1"])
def test_loopback_is_known(address: str) -> None:
    assert is_loopback(address)
    assert parse_config(_changed("127.0.0.1:0", f'"{address}"')).listen.grpc == (address,)


def test_two_listeners_cannot_share_an_address() -> None:
    lines = _problems(
        _changed("[127.0.0.1:0]", "[127.0.0.1:7070, 127.0.0.1:0]\n  http: localhost:7070")
    )
    assert lines == ["test.yaml:3: listen.http: localhost:7070 is taken by listen.grpc[0]"]
    free = _changed("[127.0.0.1:0]", "[127.0.0.1:0, 127.0.0.1:0]\n  http: 127.0.0.1:0")
    assert len(parse_config(free).listen.grpc) == 2


def test_more_memory_than_the_machine_has_is_refused() -> None:
    limit = machine_memory_bytes()
    assert limit is not None
    assert limit <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = _problems(_changed("64MiB", f"{limit + (1 << 30)}"))
    assert len(lines) == 1
    assert "memory.size" in lines[0]
    assert "this machine or its cgroup allows" in lines[0]


def test_keys_given_twice_are_refused() -> None:
    lines = _problems(_GOOD + "memory: {size: 32MiB}\n")
    assert lines == ["test.yaml:13: memory: this key is given twice"]


def test_yaml_words_that_look_like_booleans_stay_text() -> None:
    text = _changed("{size: 64MiB}", "{size: 64MiB, huge_pages: off}")
    text = (
        text.replace("pin_text", "no")
        .replace("features:", "yes:")
        .replace("store: features", "store: yes")
    )
    config = parse_config(text)
    assert config.memory.huge_pages == "off"
    assert config.namespaces["no"].store == "yes"


def test_secrets_come_from_the_environment() -> None:
    text = _changed(
        "{type: lmdb, options: {path: features}}",
        "{type: redis, options: {password: '${SECRET}', username: 'a$$b'}}",
    )
    config = parse_config(text, environment={"SECRET": "open sesame"})
    assert config.stores["features"].options == {"password": "open sesame", "username": "a$b"}
    assert "sesame" not in json.dumps(effective_settings(config))
    assert "environment variable SECRET is not set" in _problems(text)[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "test.yaml:1: (top level): not YAML"),
        ("a: 1\n\tb: 2", "test.yaml:2: (top level): not YAML"),
        ("- 1\n- 2", "a config is a mapping of sections"),
        ("just text", "a config is a mapping of sections"),
        ("a: !!python/object:os.system x", "not YAML"),
        ("a: &a [*a]", "a: unknown key"),
        ("", "listen: missing"),
        ("{1: 2}", "a key must be text"),
        ("? [a, b]\n: 1", "not YAML"),
        ("a: \x00", "not YAML"),
    ],
)
def test_what_is_no_config_is_refused_without_a_traceback(text: str, expected: str) -> None:
    assert any(expected in line for line in _problems(text))


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="directory"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "latin.yaml")
    (tmp_path / "huge.yaml").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="larger than"):
        load_config(tmp_path / "huge.yaml")


def test_the_nearest_word_is_named() -> None:
    assert nearest("Grpc", ["http", "grpc"]) == "did you mean 'grpc'?"
    assert nearest("zzz", ["http", "grpc"]) == "known here: grpc, http"


# ---- the files that we ship ----------------------------------------------------------------------


_SHIPPED = sorted(path.name for path in _CONFIGS.glob("*.yaml"))


@pytest.fixture(params=_SHIPPED)
def shipped(request: pytest.FixtureRequest) -> Path:
    return _CONFIGS / str(request.param)


def _schema_errors(settings: Any) -> list[str]:
    validator = jsonschema.Draft202012Validator(json_schema())
    return [error.message for error in validator.iter_errors(settings)]


def test_shipped_configs_are_valid(shipped: Path) -> None:
    topology = load_config(shipped).topology
    assert topology == ("colocated" if shipped.stem == "demo" else shipped.stem.split("-")[0])
    assert _schema_errors(yaml.safe_load(shipped.read_text())) == []


def test_there_is_a_config_for_each_topology() -> None:
    expected = {"colocated", "separate", "sharded-leaf", "sharded-root"}
    assert expected <= {name.removesuffix(".yaml") for name in _SHIPPED}


def test_effective_settings_are_a_valid_config_again(shipped: Path) -> None:
    config = load_config(shipped)
    effective = effective_settings(config)
    assert _schema_errors(effective) == []
    again = parse_config(yaml.safe_dump(effective))
    assert effective_settings(again) == effective
    assert again.namespaces == config.namespaces


def test_every_setting_is_in_the_docs() -> None:
    text = (_CONFIGS.parent / "docs" / "configuration.md").read_text()
    schema = json_schema()
    models = [schema, *schema["$defs"].values()]
    names = {name for model in models for name in model.get("properties", {})}
    assert len(names) > 50
    assert not [name for name in sorted(names) if f"`{name}`" not in text]


def test_the_shipped_schema_is_the_one_that_the_models_make() -> None:
    shipped = json.loads((_CONFIGS / "schema.json").read_text())
    assert shipped == json_schema(), "run `cache-daemon schema > configs/schema.json`"
    jsonschema.Draft202012Validator.check_schema(shipped)


@pytest.mark.parametrize(
    ("old", "new"),
    [("ttl: 1h", "tll: 1h"), ("64MiB", "64Mb"), ("{path:", "{pth:"), ("budget: 50%", "budget: x")],
)
def test_the_schema_finds_slips_too(old: str, new: str) -> None:
    assert _schema_errors(yaml.safe_load(_GOOD)) == []
    assert _schema_errors(yaml.safe_load(_changed(old, new))) != []


# ---- the command line ----------------------------------------------------------------------------


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from cache_daemon.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("command", ["check-config", "run"])
def test_a_bad_config_ends_with_2_and_no_traceback(tmp_path: Path, command: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(_changed("memory:", "memroy:"))
    done = _command(command, *(["--config"] if command == "run" else []), str(path))
    assert done.returncode == 2
    assert done.stderr == f"{path}:3: memroy: unknown key; did you mean 'memory'?\n"
    assert done.stdout == ""


def test_the_schema_command_prints_the_schema() -> None:
    done = _command("schema")
    assert done.returncode == 0
    assert json.loads(done.stdout) == json_schema()


def test_check_config_takes_what_we_ship(shipped: Path) -> None:
    done = _command("check-config", str(shipped))
    assert done.returncode == 0, done.stderr
    assert "topology" in done.stdout
    again = _command("check-config", "--json", str(shipped))
    assert parse_config(again.stdout).topology == load_config(shipped).topology


@pytest.mark.parametrize("command", ["run", "check-config", "schema", "version"])
def test_every_command_has_help(command: str) -> None:
    assert command in _command("--help").stdout
    done = _command(command, "--help")
    assert done.returncode == 0
    assert len(done.stdout) > 100


# ---- the environment -----------------------------------------------------------------------------


def test_the_service_manager_is_read_from_the_environment() -> None:
    assert service_manager({}).notify_socket == ""
    assert service_manager({}).watchdog_seconds == 0
    told = {"NOTIFY_SOCKET": "/run/notify", "WATCHDOG_USEC": "3000000"}
    assert service_manager(told).notify_socket == "/run/notify"
    assert service_manager(told).watchdog_seconds == 3
    assert service_manager(told | {"WATCHDOG_PID": str(os.getpid())}).watchdog_seconds == 3
    assert service_manager(told | {"WATCHDOG_PID": "1"}).watchdog_seconds == 0
    assert service_manager({"WATCHDOG_USEC": "soon"}).watchdog_seconds == 0


def test_the_model_lists_what_the_config_takes() -> None:
    assert set(Config.model_fields) == set(json_schema()["properties"])
