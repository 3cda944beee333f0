"""Reads the config file, and the few things that the machine and the environment decide.

The only module that opens a config file or looks at the environment; the models are in
`config_model`, the checks in `config_check`.
"""

import os
import re
from collections.abc import Hashable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cache_daemon.config_check import check
from cache_daemon.config_model import Config
from cache_daemon.config_problem import ConfigError, Problem
from cache_daemon.config_problem import Path as KeyPath
from cache_daemon.config_warmup import ROOT_LACKS
from cache_daemon.stores import options_model

__all__ = [
    "Config",
    "ConfigError",
    "ServiceManager",
    "effective_settings",
    "free_memory_bytes",
    "load_config",
    "machine_memory_bytes",
    "parse_config",
    "service_manager",
]

_FILE_BYTES_MAX = 1 << 20
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
_VARIABLE = re.compile(r"\$(?:\$|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)\})")


def load_config(path: Path) -> Config:
    """Reads and validates the YAML file at `path` as a whole.

    Raises ConfigError with every problem found, or with one when the file cannot be read.
    """
    try:
        if path.stat().st_size > _FILE_BYTES_MAX:
            raise ConfigError([Problem((), f"larger than {_FILE_BYTES_MAX} bytes")], str(path))
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError([Problem((), f"cannot read: {error.strerror}")], str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError([Problem((), f"not UTF-8 text: {error}")], str(path)) from error
    return parse_config(text, source=str(path))


def parse_config(
    text: str, source: str = "config", environment: Mapping[str, str] | None = None
) -> Config:
    """Validates YAML text as a whole; `source` names it in errors.

    `${NAME}` in a text value stands for an environment variable (of this process when
    `environment` is None), so that passwords need not be in the file; `$$` is a dollar sign.
    Raises ConfigError with every problem found.
    """
    try:
        document = _Document(text, os.environ if environment is None else environment)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        problem = Problem((), f"not YAML: {error.problem or error.context}", line)
        raise ConfigError([problem], source) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError([Problem((), f"not YAML: {error}")], source) from error
    config, problems = check(document.values, machine_memory_bytes())
    problems += document.problems
    if config is None or problems:
        located = [replace(problem, line=document.line_of(problem.path)) for problem in problems]
        raise ConfigError(sorted(located, key=lambda problem: problem.line), source)
    return config


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: `off`, `no` and `1:30` are text, as people expect."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's way; filled just below


for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?[0-9]*\.[0-9]+(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first
    )


class _Document:
    """A YAML document: its values, the line of every path, and what YAML itself lets pass."""

    def __init__(self, text: str, environment: Mapping[str, str]) -> None:
        self.problems: list[Problem] = []
        self._environment = environment
        self._lines: dict[KeyPath, int] = {}
        self._seen: set[int] = set()
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if root is not None:
                self._walk(root, ())
            values = loader.construct_document(root) if root is not None else {}
        finally:
            loader.dispose()
        if not isinstance(values, dict):
            self.problems.append(Problem((), "a config is a mapping of sections"))
            values = {}
        self.values: dict[Hashable, Any] = values

    def line_of(self, path: KeyPath) -> int:
        """The line of `path`, or of the section that would hold it."""
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 0)

    def _walk(self, node: yaml.Node, path: KeyPath) -> None:
        # A node that an alias repeats is walked once, which also ends any cycle.
        if id(node) in self._seen:
            return
        self._seen.add(id(node))
        self._lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            names: set[str] = set()
            for key, value in node.value:
                name = str(key.value)
                self._lines[(*path, name)] = key.start_mark.line + 1
                if name in names:
                    self.problems.append(Problem((*path, name), "this key is given twice"))
                names.add(name)
                self._walk(value, path if name == "<<" else (*path, name))
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._walk(item, (*path, index))
        elif isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str":
            node.value = _VARIABLE.sub(lambda match: self._expand(match, path), node.value)

    def _expand(self, match: re.Match[str], path: KeyPath) -> str:
        name = match["name"]
        if name is None:
            return "$"
        if name not in self._environment:
            self.problems.append(Problem(path, f"environment variable {name} is not set"))
        return self._environment.get(name, "")


def machine_memory_bytes() -> int | None:
    """Bytes of memory that this process may use at most: the machine's, or its cgroup's limit.

    None where the system does not tell.
    """
    limits = []
    if (total := _memory_total()) is not None:
        limits.append(total)
    limits += _cgroup_limits()
    return min(limits, default=None)


def free_memory_bytes() -> int | None:
    """Bytes of memory that are left now, on the machine and in this process's cgroup.

    None where the system does not tell.
    """
    free = []
    if (available := _meminfo("MemAvailable")) is not None:
        free.append(available)
    for limit_path, used_name in _cgroup_files():
        with suppress(OSError, ValueError):  # no such file, or "max"
            limit = int(limit_path.read_text())
            used = int(limit_path.with_name(used_name).read_text())
            stat = limit_path.with_name("memory.stat").read_text().split()
            # What the kernel caches of files counts as used, and gives way.
            cached = int(stat[stat.index("inactive_file") + 1])
            free.append(max(0, limit - max(0, used - cached)))
    return min(free, default=None)


def _memory_total() -> int | None:
    return _meminfo("MemTotal")


def _meminfo(name: str) -> int | None:
    try:
        for line in (_PROC / "meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return None


def _cgroup_limits() -> list[int]:
    """The memory limits of this process's cgroup and of all above it (v2 and v1)."""
    limits: list[int] = []
    for limit_path, _ in _cgroup_files():
        with suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(limit_path.read_text()))
    return limits


def _cgroup_files() -> Iterator[tuple[Path, str]]:
    """Where the limits are said, and the name of the file beside it that says what is used."""
    try:
        rows = [row.split(":", 2) for row in (_PROC / "self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for row in rows:
        if len(row) != 3:
            continue
        _, controllers, own = row
        if not controllers:
            root, name, used = _CGROUP_ROOT, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = _CGROUP_ROOT / "memory"
            name, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be the host's and not exist here; the root then has it.
        folder = root / own.strip("/")
        for place in (folder, *folder.parents):
            yield place / name, used
            if place == root:
                break


def effective_settings(config: Config) -> dict[str, Any]:
    """All settings with their defaults, as JSON-able values in the notation of the file.

    Secrets in the options of stores are masked where the store's type declares them as such.
    """
    settings = config.model_dump(mode="json")
    if config.is_root:  # it may not say what it does not have
        del settings["memory"]
        for key in ROOT_LACKS if config.warmup else ():
            del settings["warmup"][key]
        for namespace in settings["namespaces"].values():
            if not namespace["domains"]:
                del namespace["domains"]
    for name, store in config.stores.items():
        model = options_model(store.type)
        if model is not None:
            options = model.model_validate(store.options).model_dump(mode="json")
            settings["stores"][name]["options"] = options
    return settings


@dataclass(frozen=True)
class ServiceManager:
    """What systemd tells a service about itself."""

    notify_socket: str = ""  # where to report to; "": nobody listens
    watchdog_seconds: float = 0.0  # it expects a sign of life this often; 0: it does not


def service_manager(environment: Mapping[str, str] | None = None) -> ServiceManager:
    """Reads NOTIFY_SOCKET and WATCHDOG_USEC of the environment (sd_notify(3))."""
    environment = os.environ if environment is None else environment
    # The watchdog may be meant for another process of the same service.
    for_us = environment.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
    microseconds = environment.get("WATCHDOG_USEC", "")
    return ServiceManager(
        notify_socket=environment.get("NOTIFY_SOCKET", ""),
        watchdog_seconds=int(microseconds) / 1e6 if for_us and microseconds.isdigit() else 0.0,
    )
