"""Everything that can be wrong with a config, found in one pass.

`check` validates the whole by its models and then what spans sections.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import ValidationError

from cache_daemon.config_base import is_address, is_loopback, split_address
from cache_daemon.config_model import DOMAINS_MAX, Config
from cache_daemon.config_nvm import DeviceBytes, block_device_bytes, size_missing, usable_bytes
from cache_daemon.config_persist import persist_problems
from cache_daemon.config_problem import (
    ConfigError,
    Path,
    Problem,
    at_path,
    nearest,
    one_slip_one_line,
    translate,
)
from cache_daemon.config_sharded import is_root, topology_problems
from cache_daemon.config_units import format_share, format_size, parse_budget, parse_size
from cache_daemon.config_warmup import warmup_problems
from cache_daemon.stores import StoreConfigError, options_model

__all__ = ["ConfigError", "Path", "Problem", "check", "is_loopback", "nearest"]

_T = TypeVar("_T")


def check(
    raw: Mapping[Any, Any],
    machine_memory_bytes: int | None = None,
    device_bytes: DeviceBytes = block_device_bytes,
) -> tuple[Config | None, list[Problem]]:
    """Validates raw settings as a whole: the config when there is no problem, and all problems.

    `machine_memory_bytes` is what machine and cgroup allow; None: not checked. `device_bytes` tells
    the size of block devices.
    """
    problems: list[Problem] = []
    config: Config | None = None
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        problems += translate(Config, error, raw)
    problems += topology_problems(raw)
    problems += _listen_problems(raw)
    problems += _memory_problems(raw, machine_memory_bytes)
    problems += _device_problems(raw, device_bytes)
    problems += _nvm_budget_problems(raw, device_bytes)
    problems += persist_problems(raw)
    problems += warmup_problems(raw)
    for name, namespace in _entries(raw, "namespaces"):
        problems += _namespace_problems(raw, name, namespace)
        problems += _nvm_share_problems(raw, name, namespace)
    for name, store in _entries(raw, "stores"):
        problems += _option_problems(name, store)
    problems = one_slip_one_line(problems)
    return (None if problems else config), problems


# The checks below span sections, so they look at the raw settings: one slip in a section must not
# hide what else is wrong with it. What has not even the right type is left to the models.


def _listen_problems(raw: Mapping[Any, Any]) -> Iterator[Problem]:
    grpc = at_path(raw, "listen", "grpc")
    listeners: list[tuple[Path, Any]] = [
        (("listen", "grpc", index), address)
        for index, address in enumerate(grpc if isinstance(grpc, list) else ())
    ]
    listeners += [(("listen", name), at_path(raw, "listen", name)) for name in ("admin", "http")]
    taken: dict[str, str] = {}
    for path, address in listeners:
        if not isinstance(address, str) or not is_address(address):
            continue
        if raw.get("insecure") is not True and not is_loopback(address):
            yield Problem(
                path,
                f"{address} is reachable from other machines and nothing is encrypted yet; "
                "listen on 127.0.0.1 or a Unix socket, or set insecure: true",
            )
        same = _same_listener(address)
        if same in taken:
            yield Problem(path, f"{address} is taken by {taken[same]}")
        elif same:
            taken[same] = Problem(path, "").where


def _memory_problems(raw: Mapping[Any, Any], machine_memory_bytes: int | None) -> Iterator[Problem]:
    where: Path = ("memory", "size")
    size = _parsed(parse_size, at_path(raw, *where))
    if size is None:  # a root may keep a few hot values
        where = ("sharding", "root", "hot_tier", "memory")
        size = _parsed(parse_size, at_path(raw, *where))
    if size is None:
        return
    if machine_memory_bytes is not None and size > machine_memory_bytes:
        yield Problem(
            where,
            f"{format_size(size)} is more than the {machine_memory_bytes / (1 << 30):.1f}GiB "
            "that this machine or its cgroup allows",
        )
    if is_root(raw):
        return  # what it says of domains is meant for the leaves
    budgets = [
        _parsed(parse_budget, domain.get("budget"))
        for _, namespace in _entries(raw, "namespaces")
        for _, domain in _entries(namespace, "domains")
    ]
    if len(budgets) > DOMAINS_MAX:
        yield Problem(("namespaces",), f"more than {DOMAINS_MAX} domains in all")
    shares = sum(budget.share for budget in budgets if budget)
    sizes = sum(budget.size for budget in budgets if budget)
    if shares > 1 + 1e-9:
        yield Problem(
            ("namespaces",),
            f"the domains' budgets add up to {format_share(shares)} of the arena; at most 100%",
        )
    # The arena is smaller than the memory by index and tables; what exactly is left for domains is
    # for the engine to say, see `config_node`.
    elif sizes + shares * size > size:
        yield Problem(
            ("namespaces",),
            f"the domains' budgets add up to {(sizes + shares * size) / (1 << 20):.1f}MiB, "
            f"more than memory.size ({format_size(size)})",
        )


def _namespace_problems(
    raw: Mapping[Any, Any], name: str, namespace: Mapping[Any, Any]
) -> Iterator[Problem]:
    here: Path = ("namespaces", name)
    domains = [domain for domain, _ in _entries(namespace, "domains")]
    default = namespace.get("default_domain")
    if default is None and len(domains) > 1:
        yield Problem(
            (*here, "default_domain"),
            f"missing; say which of {', '.join(domains)} values enter by default",
        )
    named: list[tuple[Path, Any]] = [((*here, "default_domain"), default)]
    rules = namespace.get("rules")
    for index, rule in enumerate(rules if isinstance(rules, list) else ()):
        named.append(((*here, "rules", index, "domain"), at_path(rule, "domain")))
    for path, domain in named:
        if domains and isinstance(domain, str) and domain not in domains:
            yield Problem(path, f"no domain {domain!r}; {nearest(domain, domains)}")
    store = namespace.get("store")
    stores = [known for known, _ in _entries(raw, "stores")]
    if isinstance(store, str) and store not in stores:
        hint = nearest(store, stores) if stores else "the config has no stores"
        yield Problem((*here, "store"), f"no store {store!r}; {hint}")


def _devices(raw: Mapping[Any, Any]) -> list[tuple[int, str, Any]]:
    """Place, path and size as written of each device that has a path."""
    devices = at_path(raw, "nvm", "devices")
    return [
        (index, at_path(device, "path"), at_path(device, "size"))
        for index, device in enumerate(devices if isinstance(devices, list) else ())
        if isinstance(at_path(device, "path"), str) and at_path(device, "path")
    ]


def _device_problems(raw: Mapping[Any, Any], device_bytes: DeviceBytes) -> Iterator[Problem]:
    taken: dict[str, int] = {}
    for index, path, size in _devices(raw):
        here: Path = ("nvm", "devices", index)
        if size is None and device_bytes(path) is None:
            yield Problem((*here, "size"), size_missing(path))
        first = taken.setdefault(os.path.normpath(path), index)
        if first != index:
            yield Problem((*here, "path"), f"{path} is nvm.devices[{first}] already")


def _nvm_budget_problems(raw: Mapping[Any, Any], device_bytes: DeviceBytes) -> Iterator[Problem]:
    if is_root(raw):
        return
    shares_of = [
        (name, namespace["nvm"])
        for name, namespace in _entries(raw, "namespaces")
        if isinstance(namespace.get("nvm"), Mapping)
    ]
    if isinstance(raw.get("nvm"), Mapping) and not shares_of:
        yield Problem(
            ("nvm",),
            "no namespace uses it; give one a part of it, such as nvm: {budget: 50%}, "
            "or remove this section",
        )
    budgets = [_parsed(parse_budget, nvm.get("budget")) for _, nvm in shares_of]
    shares = sum(budget.share for budget in budgets if budget)
    sizes = sum(budget.size for budget in budgets if budget)
    if shares > 1 + 1e-9:
        yield Problem(
            ("namespaces",),
            f"the namespaces' nvm budgets add up to {format_share(shares)} of the devices; "
            "at most 100%",
        )
        return
    devices = [
        device_bytes(path) if size is None else _parsed(parse_size, size)
        for _, path, size in _devices(raw)
    ]
    # What is lost by cutting devices and budgets into whole regions is for `config_nvm` to say.
    usable = sum(usable_bytes(size) for size in devices if size is not None)
    if devices and None not in devices and sizes + shares * usable > usable * (1 + 1e-9):
        yield Problem(
            ("namespaces",),
            f"the namespaces' nvm budgets add up to {(sizes + shares * usable) / (1 << 20):.1f}"
            f"MiB, more than the nvm devices hold ({usable / (1 << 20):.1f}MiB)",
        )


def _nvm_share_problems(
    raw: Mapping[Any, Any], name: str, namespace: Mapping[Any, Any]
) -> Iterator[Problem]:
    here: Path = ("namespaces", name)
    if is_root(raw):
        return  # whatever it says of NVM is meant for the leaves
    has_nvm = namespace.get("nvm") is not None
    if has_nvm and raw.get("nvm") is None:
        yield Problem(
            (*here, "nvm"),
            "the config has no nvm section; add one with a device, or remove this",
        )
    if namespace.get("speculative") is None:
        return
    if not has_nvm:
        yield Problem(
            (*here, "speculative"),
            "it is for reads of NVM that are late, and this namespace has no nvm; "
            "give it nvm: {budget: ...}, or remove this",
        )
    if namespace.get("store") is None:
        yield Problem(
            (*here, "speculative"),
            "speculative without an upstream: there is nobody to ask; "
            "give the namespace a store, or remove this",
        )


def _option_problems(name: str, store: Mapping[Any, Any]) -> list[Problem]:
    """What is wrong with a store's options by the model of its type."""
    type_, options = store.get("type"), store.get("options", {})
    if not isinstance(type_, str) or not isinstance(options, Mapping):
        return []
    try:
        model = options_model(type_)
    except StoreConfigError as error:
        return [Problem(("stores", name, "type"), str(error))]
    if model is None:
        return []  # a class of the user's own that declares nothing; it is told when it is made
    try:
        model.model_validate(options)
    except ValidationError as error:
        return [
            Problem(("stores", name, "options", *problem.path), problem.message)
            for problem in translate(model, error, options)
        ]
    return []


def _entries(node: Any, name: str) -> list[tuple[str, Mapping[Any, Any]]]:
    """The named mappings of a section."""
    section = at_path(node, name)
    return [
        (key, value if isinstance(value, Mapping) else {})
        for key, value in (section.items() if isinstance(section, Mapping) else ())
        if isinstance(key, str)
    ]


def _parsed(parse: Callable[[object], _T], value: object) -> _T | None:
    with suppress(ValueError):
        return parse(value)
    return None


def _same_listener(address: str) -> str:
    """Equal for addresses that cannot both be bound; "" where the port is chosen freely."""
    if address.startswith("unix:"):
        return address
    host, port = split_address(address)
    return f"{'127.0.0.1' if host.lower() == 'localhost' else host}:{port}" if port else ""
