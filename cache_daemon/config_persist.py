"""What of `persist` can be wrong beyond its section, and whether this machine has room for it."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cache_daemon.config_model import Config
from cache_daemon.config_problem import Problem, at_path
from cache_daemon.config_units import format_duration, format_size

__all__ = ["ARENA_SUFFIX", "STOP_GRACE_S", "persist_problems", "persist_warnings", "stop_seconds"]

ARENA_SUFFIX = ".arena"  # of the file that holds the memory, as the engine names it
STOP_GRACE_S = 5.0  # of a stop, beyond its two limits: last replies, store calls that still run
_UNIT_STOP_S = 75.0  # TimeoutStopSec of deploy/systemd/feature-cache.service
_MOUNTS = Path("/proc/self/mounts")
_MEMORY_FILE_SYSTEMS = ("tmpfs", "hugetlbfs")


def persist_problems(raw: Mapping[Any, Any]) -> Iterator[Problem]:
    """What spans sections, of raw settings."""
    persist = raw.get("persist")
    if not isinstance(persist, Mapping):
        return
    devices = at_path(raw, "nvm", "devices")
    paths = [
        path
        for device in (devices if isinstance(devices, list) else ())
        if isinstance(path := at_path(device, "path"), str)
    ]
    durability, journal = persist.get("durability", "drop_nvm"), persist.get("journal")
    logs = durability == "sync" or isinstance(durability, Mapping)
    if raw.get("nvm") is None:
        if persist.get("on_shutdown") == "spill":
            yield Problem(
                ("persist", "on_shutdown"),
                "spill moves DRAM's items to NVM, and the config has no nvm section; add one with "
                "a device, or write keep",
            )
        if logs:
            yield Problem(
                ("persist", "durability"),
                "it says what NVM holds after power loss, and the config has no nvm section; "
                "add one with a device, or remove this",
            )
    if journal is not None and not logs:
        yield Problem(
            ("persist", "journal"),
            "there is no invalidation log with durability: drop_nvm; write durability: sync or "
            "{bounded: 100ms}, or remove this",
        )
    elif journal is None and logs and paths and os.path.normpath(paths[0]).startswith("/dev/"):
        yield Problem(
            ("persist", "journal"),
            f"missing; the first nvm device ({paths[0]}) is no file that the log could lie "
            "beside: name a file on a disk that keeps it through power loss",
        )
    elif isinstance(journal, str) and os.path.normpath(journal) in map(os.path.normpath, paths):
        yield Problem(("persist", "journal"), f"{journal} is one of nvm.devices")


def stop_seconds(config: Config) -> float:
    """How long an orderly stop may take at most."""
    shutdown_s = config.persistence.shutdown_limit if config.persistence else 0.0
    sharding = config.sharding
    leave_s = sharding.drop_grace if sharding is not None and not config.is_root else 0.0
    return leave_s + config.drain_timeout + shutdown_s + STOP_GRACE_S


def persist_warnings(
    config: Config,
    free_memory_bytes: int | None = None,
    file_system: Callable[[str], str] | None = None,
) -> list[str]:
    """What would keep a start on this machine, as it is now, from having its memory persist.

    `free_memory_bytes` is what machine and cgroup have left; None: not looked at.
    """
    persist = config.persistence
    if persist is None:
        return []
    warnings = []
    if stop_seconds(config) > _UNIT_STOP_S:
        warnings.append(
            f"an orderly stop may take {format_duration(stop_seconds(config))} (drain_timeout, "
            "persist.shutdown_limit and a little more): TimeoutStopSec of the systemd unit "
            f"({format_duration(_UNIT_STOP_S)} as shipped) or the container's stop timeout must "
            "be above that"
        )
    where = f"persist.dir: {persist.dir}"
    try:
        mount = os.statvfs(persist.dir)
    except OSError as error:
        return [*warnings, f"{where}: {error.strerror}; the daemon will not start"]
    kind = (file_system or _file_system)(persist.dir)
    if kind and kind not in _MEMORY_FILE_SYSTEMS:
        warnings.append(
            f"{where} is on {kind}, not on tmpfs or hugetlbfs; the daemon will not start"
        )
    if not os.access(persist.dir, os.W_OK | os.X_OK):
        warnings.append(f"{where}: this user may not write there")
    needed = config.memory.size - _kept_bytes(os.path.join(persist.dir, persist.name))
    needs = f"{where} must hold up to {format_size(config.memory.size)} (memory.size)"
    free = mount.f_bavail * mount.f_frsize
    if mount.f_blocks and needed > free:
        warnings.append(f"{needs}, and the mount has {_mebibytes(free)} free now")
    if kind != "hugetlbfs" and free_memory_bytes is not None and needed > free_memory_bytes:
        warnings.append(
            f"{needs}, and the machine or its cgroup has {_mebibytes(free_memory_bytes)} of "
            "memory free now"
        )
    return warnings


def _kept_bytes(path: str) -> int:
    """What an earlier daemon's memory takes already; it is adopted, or removed."""
    try:
        return os.stat(path + ARENA_SUFFIX).st_blocks * 512
    except OSError:
        return 0


def _file_system(directory: str) -> str:
    """The type of the file system that holds `directory`; "" where the system does not tell."""
    found, length = "", 0
    path = os.path.realpath(directory)
    try:
        lines = _MOUNTS.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        _, mounted, kind, *_ = line.split()
        mounted = mounted.replace("\\040", " ")
        inside = path == mounted or path.startswith(mounted.rstrip("/") + "/")
        if inside and len(mounted) >= length:  # a later mount hides an earlier one
            found, length = kind, len(mounted)
    return found


def _mebibytes(size: int) -> str:
    return f"{size / (1 << 20):.0f}MiB"
