"""How the devices of the NVM tier are cut into regions and shared out among the namespaces."""

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cache_daemon.config_model import Config
from cache_daemon.config_problem import ConfigError, Problem
from cache_daemon.config_problem import Path as KeyPath
from cache_daemon.config_units import Budget, format_size

__all__ = [
    "DeviceBytes",
    "NvmPlan",
    "block_device_bytes",
    "nvm_plan",
    "size_missing",
    "usable_bytes",
]

DeviceBytes = Callable[[str], int | None]
"""Bytes of the block device at a path; None where there is none."""

# The engine's own numbers (native/src/core/layout.hpp), here so that an error names the key.
_DATA_OFFSET = 64 << 10  # of each device: what is kept before its first region
_REGION_BYTES_MIN = 64 << 10
_REGION_BYTES_MAX = 16 << 20
_REGIONS_WANTED = 64  # of the smallest namespace, where the size of a region is chosen for it
_NAMESPACE_REGIONS_MIN = 4
_BYTES_MAX = 1 << 40  # of one instance
_BLOCK_BYTES = 4096  # files are cut for instances in whole blocks

_BLOCK_DEVICES = Path("/sys/dev/block")
_SECTOR_BYTES = 512  # what the kernel counts in there, whatever the device's own sectors are
# A share such as 29% is not exact in binary: 29% of 100 regions are meant to be 29 of them. This is
# far below what all namespaces together would need to gain a region that is not there.
_SHARE_SLACK = 1e-6


@dataclass(frozen=True)
class NvmPlan:
    """The NVM tier in whole regions, over all instances of the node.

    A file stands for one of its share's size an instance; block devices are not cut, so each
    belongs to one instance (`whole`).
    """

    region_bytes: int
    devices: tuple[tuple[str, int], ...]  # path and bytes
    budgets: Mapping[str, int]  # bytes by namespace, whole regions in every instance
    instances: int = 1
    whole: bool = False

    @property
    def regions(self) -> int:
        """Regions of all devices that budgets may use: evenly over the instances."""
        return self.instance_regions * self.instances

    @property
    def instance_regions(self) -> int:
        """Regions of the instance with the fewest."""
        if not self.whole:
            return sum(self.regions_of(size) for _, size in self.devices) // self.instances
        sizes = [size for _, size in self.devices]
        return min(
            sum(map(self.regions_of, sizes[i :: self.instances])) for i in range(self.instances)
        )

    def regions_of(self, device_bytes: int) -> int:
        """Regions of one device of so many bytes."""
        if self.whole:
            return usable_bytes(device_bytes) // self.region_bytes
        part = device_bytes // self.instances // _BLOCK_BYTES * _BLOCK_BYTES
        return usable_bytes(part) // self.region_bytes * self.instances


def block_device_bytes(path: str) -> int | None:
    """Bytes of the block device at `path`; None for anything else, and where nothing is."""
    try:
        status = os.stat(path)
        if not stat.S_ISBLK(status.st_mode):
            return None
        name = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        return int((_BLOCK_DEVICES / name / "size").read_text()) * _SECTOR_BYTES
    except (OSError, ValueError):
        return None


def usable_bytes(size: int) -> int:
    """Bytes of a device of `size` bytes that regions may take, before they are cut."""
    return max(0, size - _DATA_OFFSET)


def nvm_plan(config: Config, device_bytes: DeviceBytes = block_device_bytes) -> NvmPlan | None:
    """Sizes of regions and budgets; None where there is no NVM tier.

    Raises ConfigError for budgets that do not fit the devices.
    """
    if config.nvm is None:
        return None
    devices, problems = _sized_devices(config, device_bytes)
    asked = {
        name: namespace.nvm.budget
        for name, namespace in config.namespaces.items()
        if namespace.nvm is not None
    }
    if problems:
        raise ConfigError(problems)
    if not asked:  # as in a config that was not read from a file, so nobody has checked it
        raise ConfigError([Problem(("nvm",), "no namespace has an nvm budget")])
    instances = config.memory.instance_count
    whole = instances > 1 and any(device_bytes(path) is not None for path, _ in devices)
    if whole and len(devices) % instances:
        raise ConfigError([_not_divisible(len(devices), instances)])
    region_bytes = config.nvm.region_size or _automatic_region_bytes(asked, devices, instances)
    plan = NvmPlan(region_bytes, devices, {}, instances, whole)
    budgets = {name: _budget_regions(budget, plan) * region_bytes for name, budget in asked.items()}
    plan = replace(plan, budgets=budgets)
    problems = [*_device_problems(plan), *_budget_problems(asked, plan)]
    if problems:
        raise ConfigError(problems)
    return plan


def _sized_devices(
    config: Config, device_bytes: DeviceBytes
) -> tuple[tuple[tuple[str, int], ...], list[Problem]]:
    devices: list[tuple[str, int]] = []
    problems: list[Problem] = []
    for index, device in enumerate(config.nvm.devices if config.nvm else ()):
        size = device.size if device.size is not None else device_bytes(device.path)
        if size is None:
            where: KeyPath = ("nvm", "devices", index, "size")
            problems.append(Problem(where, size_missing(device.path)))
        devices.append((device.path, size or 0))
    return tuple(devices), problems


def size_missing(path: str) -> str:
    """What to say of a device whose size nobody tells."""
    return f"missing; {path} is no block device here, and a file is made as large as its size says"


def _not_divisible(devices: int, instances: int) -> Problem:
    return Problem(
        ("nvm", "devices"),
        f"{devices} of them cannot be divided among {instances} instances, and block devices are "
        f"not cut; give a multiple of {instances}, or set memory.instances by their number",
    )


def _automatic_region_bytes(
    asked: Mapping[str, Budget], devices: tuple[tuple[str, int], ...], instances: int
) -> int:
    usable = sum(usable_bytes(size) for _, size in devices)
    smallest = min(budget.bytes_of(usable) for budget in asked.values()) // instances
    wanted = max(1, smallest // _REGIONS_WANTED)
    power_of_two = 1 << (wanted.bit_length() - 1)
    return min(max(power_of_two, _REGION_BYTES_MIN), _REGION_BYTES_MAX)


def _budget_regions(budget: Budget, plan: NvmPlan) -> int:
    """Whole regions of a budget, the same number in every instance.

    Shares that add up to 100% never ask for more than there are.
    """
    if budget.share:
        return int(budget.share * plan.instance_regions + _SHARE_SLACK) * plan.instances
    return budget.size // plan.instances // plan.region_bytes * plan.instances


def _device_problems(plan: NvmPlan) -> list[Problem]:
    region = format_size(plan.region_bytes)
    problems = [
        Problem(
            ("nvm", "devices", index, "size"),
            f"{format_size(size)} holds no region of {region} (64KiB are kept for other things); "
            "give it more, or set nvm.region_size lower",
        )
        for index, (_, size) in enumerate(plan.devices)
        if plan.regions_of(size) == 0
    ]
    if plan.instance_regions * plan.region_bytes > _BYTES_MAX:
        problems.append(
            Problem(
                ("nvm", "devices"),
                f"{plan.regions * plan.region_bytes / (1 << 40):.2f}TiB in all; at most "
                f"{format_size(_BYTES_MAX * plan.instances)} can be addressed: give them a smaller "
                "size, or set memory.instances higher",
            )
        )
    return problems


def _budget_problems(asked: Mapping[str, Budget], plan: NvmPlan) -> list[Problem]:
    region = format_size(plan.region_bytes)
    regions = _NAMESPACE_REGIONS_MIN * plan.instances
    least = regions * plan.region_bytes
    problems = [
        Problem(
            ("namespaces", name, "nvm", "budget"),
            f"{asked[name]} is {size // plan.region_bytes} regions of {region} here; the least is "
            f"{regions} regions, {format_size(least)}: give it more, or set "
            "nvm.region_size lower",
        )
        for name, size in plan.budgets.items()
        if size < least
    ]
    total = sum(plan.budgets.values())
    if not problems and total > plan.regions * plan.region_bytes:
        named = ", ".join(f"{name} {budget}" for name, budget in asked.items())
        problems.append(
            Problem(
                ("nvm", "devices"),
                f"the namespaces' nvm budgets add up to {_mebibytes(total)}, but in whole regions "
                f"of {region} the devices hold {_mebibytes(plan.regions * plan.region_bytes)}; "
                f"use shares such as 40%, or give the devices more ({named})",
            )
        )
    return problems


def _mebibytes(size: int) -> str:
    return f"{size / (1 << 20):.1f}MiB"
