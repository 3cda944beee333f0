"""From the settings to the native node's configuration.

The only config module that needs the native extension: how much of the memory is left for the
domains, after index and tables, is the engine's to say.
"""

import socket
from collections import defaultdict

from cache_daemon._native import (
    DomainConfig,
    LeafConfig,
    NamespaceConfig,
    NodeConfig,
    NvmConfig,
    PersistConfig,
    RecordConfig,
    RootConfig,
    RouteRule,
    StoreConfig,
)
from cache_daemon.config_model import (
    Config,
    DomainSettings,
    MemorySettings,
    NamespaceSettings,
    NvmSettings,
    PersistSettings,
)
from cache_daemon.config_nvm import NvmPlan, nvm_plan
from cache_daemon.config_problem import ConfigError, Path, Problem
from cache_daemon.config_sharded import LeafSettings, RootSettings, node_name
from cache_daemon.config_units import Budget, format_size
from cache_daemon.config_warmup import RecordSettings

__all__ = ["budgets", "host_name", "node_config"]

_ROUNDS_MAX = 8
_DOMAIN = "values"  # of a root's namespace that names none
_HOT_SECONDS_MAX = 1.0
# The engine's own limits (native/src/core/layout.hpp), here so that an error names the key.
_DOMAIN_SEGMENTS_MIN = 4
_AUTO_SEGMENT_BYTES_MIN = 16 << 10


def budgets(config: Config) -> dict[tuple[str, str], int]:
    """Bytes of each (namespace, domain).

    Raises ConfigError when they do not fit into the arena.
    """
    config = _kept_by(config)
    if not config.memory.size:
        return {}  # a root that keeps no values of its own
    return _budgets(config, nvm_plan(config))


def node_config(config: Config) -> NodeConfig:
    """The native configuration. Raises ConfigError for what the engine cannot do."""
    config = _kept_by(config)
    nvm = nvm_plan(config)
    if not config.memory.size:
        # A root that keeps no values of its own; it knows domains by their names alone.
        return _build(config, defaultdict(int), nvm)
    return _build(config, _budgets(config, nvm), nvm)


def _kept_by(config: Config) -> Config:
    """What a root keeps itself: of a leaf's sections nothing, or values of at most a second."""
    if not config.is_root or config.sharding is None:
        return config
    hot = config.sharding.as_root.hot_tier
    names = {name: list(one.domains) or [_DOMAIN] for name, one in config.namespaces.items()}
    share = Budget(share=1 / sum(map(len, names.values())))
    domain = DomainSettings(budget=share, ttl_jitter=0.0).model_copy(
        update={"ttl": hot.max_age if hot else _HOT_SECONDS_MAX}
    )
    namespaces = {
        name: one.model_copy(
            update={
                "domains": dict.fromkeys(names[name], domain),
                "default_domain": one.default_domain or names[name][0],
                "negative_ttl": min(one.negative_ttl, hot.max_age) if hot else 0.0,
                "rules": (),
                "nvm": None,
                "speculative": None,
            }
        )
        for name, one in config.namespaces.items()
    }
    memory = MemorySettings(size=hot.memory) if hot else config.memory
    return config.model_copy(update={"memory": memory, "namespaces": namespaces, "nvm": None})


def _budgets(config: Config, nvm: NvmPlan | None) -> dict[tuple[str, str], int]:
    asked = {
        (namespace_name, domain_name): domain.budget
        for namespace_name, namespace in config.namespaces.items()
        for domain_name, domain in namespace.domains.items()
    }
    # What index and tables take depends a little on the domains' sizes, and shares depend on what
    # they leave: start from shares of the whole memory and go down until both agree.
    arena_bytes = config.memory.size
    resolved: dict[tuple[str, str], int] = {}
    for _ in range(_ROUNDS_MAX):
        resolved = {key: budget.bytes_of(arena_bytes) for key, budget in asked.items()}
        before, arena_bytes = arena_bytes, min(arena_bytes, _arena_bytes(config, resolved, nvm))
        if arena_bytes == before:
            break
    total = sum(resolved.values())
    if total > arena_bytes:
        raise ConfigError([_over(asked, total, arena_bytes, config.memory.size)])
    instances = config.memory.instance_count
    over = f" over {instances} instances" if instances > 1 else ""
    least = _DOMAIN_SEGMENTS_MIN * (config.memory.segment_size or _AUTO_SEGMENT_BYTES_MIN)
    least *= instances
    small = [
        Problem(
            ("namespaces", namespace, "domains", domain, "budget"),
            f"{asked[namespace, domain]} is {size} bytes here; the least is "
            f"{format_size(least)}{over}",
        )
        for (namespace, domain), size in resolved.items()
        if size < least
    ]
    if small:
        raise ConfigError(small)
    return resolved


def _arena_bytes(
    config: Config, provisional: dict[tuple[str, str], int], nvm: NvmPlan | None
) -> int:
    where: Path = ("memory",)
    try:
        arena_bytes = _build(config, provisional, nvm).arena_bytes()
    except ValueError as error:
        message = str(error)
        if nvm is not None:
            message += (
                "; the NVM tier takes a part of memory.size: index slots for its items, "
                "nvm.read_memory, and nvm.region_size for each namespace that has nvm and each of "
                "nvm.write_buffers"
            )
        raise ConfigError([Problem(where, message)]) from error
    if arena_bytes <= 0:
        size = format_size(config.memory.size)
        raise ConfigError([Problem(where, f"{size} leaves nothing for values; give more")])
    return arena_bytes


def _over(
    asked: dict[tuple[str, str], Budget], total: int, arena_bytes: int, memory_bytes: int
) -> Problem:
    named = ", ".join(f"{'.'.join(key)} {budget}" for key, budget in asked.items())
    return Problem(
        ("namespaces",),
        f"the domains' budgets add up to {_mebibytes(total)}, but of memory.size "
        f"({format_size(memory_bytes)}) the index and tables leave {_mebibytes(arena_bytes)}; "
        f"use shares such as 40%, or give more memory ({named})",
    )


def _mebibytes(size: int) -> str:
    return f"{size / (1 << 20):.1f}MiB"


def _build(config: Config, bytes_of: dict[tuple[str, str], int], nvm: NvmPlan | None) -> NodeConfig:
    limits, memory = config.limits, config.memory
    return NodeConfig(
        memory_bytes=memory.size,
        namespaces=[
            _namespace(name, namespace, bytes_of, nvm.budgets.get(name, 0) if nvm else 0)
            for name, namespace in config.namespaces.items()
        ],
        stores=[
            StoreConfig(
                name=name,
                max_batch_keys=store.max_batch_keys,
                concurrency=store.guard.concurrency,
                timeout_ms=_milliseconds(store.guard.timeout),
                queue_keys=store.queue_keys,
            )
            for name, store in config.stores.items()
        ],
        segment_bytes=memory.segment_size,
        instances=memory.instances,
        max_instance_bytes=memory.max_instance_bytes,
        expected_item_bytes=memory.expected_item_size,
        huge_pages=memory.huge_pages == "try",
        max_value_bytes=limits.max_value_size,
        max_batch_keys=limits.max_batch_keys,
        max_reply_bytes=limits.max_reply_size,
        max_pending_batches=limits.max_pending_batches,
        refresh_keys_per_second=config.refresh.keys_per_second,
        nvm=_nvm(config.nvm, nvm) if config.nvm and nvm else None,
        persist=_persist(config.persistence) if config.persistence else None,
        root=_root(config.sharding.as_root) if config.is_root and config.sharding else None,
        leaf=_leaf(config.sharding.as_leaf) if config.sharding and not config.is_root else None,
        shard_count=config.sharding.shard_count if config.sharding and not config.is_root else 0,
        record=_record(config.warmup.record, host_name(config)) if config.warmup else None,
    )


def host_name(config: Config) -> str:
    """By what name the node's request log is told from that of others."""
    return node_name(config.sharding) if config.sharding else socket.gethostname()


def _record(settings: RecordSettings | None, host: str) -> RecordConfig | None:
    if settings is None:
        return None
    key = settings.hash_key
    return RecordConfig(
        dir=settings.dir,
        sample=settings.sample,
        by=settings.by,
        window_ms=_milliseconds(settings.window),
        max_bytes=settings.size,
        host=host,
        privacy=settings.namespaces,
        hash_key=key.get_secret_value() if key is not None else "",
    )


def _root(settings: RootSettings) -> RootConfig:
    hedge = settings.hedge
    return RootConfig(
        threads=settings.threads,
        connections_per_leaf=settings.connections_per_leaf,
        leaf_timeout_ms=_milliseconds(settings.leaf_timeout),
        attempts=settings.attempts,
        retry_budget=settings.retry_budget,
        hedge=hedge.budget > 0,
        hedge_after_us=hedge.after.microseconds,
        hedge_quantile=hedge.after.quantile or 0.99,
        hedge_budget=hedge.budget,
        store_budget=settings.store_fallback_budget,
    )


def _leaf(settings: LeafSettings) -> LeafConfig:
    return LeafConfig(write_log_bytes=settings.write_log)


def _persist(settings: PersistSettings) -> PersistConfig:
    return PersistConfig(
        dir=settings.dir,
        name=settings.name,
        durability=settings.durability.kind,
        durability_window_ms=_milliseconds(settings.durability.window_s),
        journal=settings.journal or "",
        keep_on_clock_doubt=settings.on_clock_doubt == "keep",
        spill_on_shutdown=settings.on_shutdown == "spill",
        shutdown_limit_ms=_milliseconds(settings.shutdown_limit),
    )


def _nvm(settings: NvmSettings, plan: NvmPlan) -> NvmConfig:
    return NvmConfig(
        devices=plan.devices,
        region_bytes=plan.region_bytes,
        io=settings.io,
        direct=settings.direct == "try",
        queue_depth=settings.queue_depth,
        io_threads=settings.io_threads,
        coalesce_gap_bytes=settings.coalesce_gap,
        queued_reads=settings.queued_reads,
        read_memory_bytes=settings.read_memory,
        write_buffers=settings.write_buffers,
        write_bytes_per_second=settings.write_rate,
        errors_max=settings.errors_max,
        probe_interval_ms=_milliseconds(settings.probe_interval),
    )


def _namespace(
    name: str,
    namespace: NamespaceSettings,
    bytes_of: dict[tuple[str, str], int],
    nvm_budget_bytes: int,
) -> NamespaceConfig:
    share = namespace.nvm
    speculative = namespace.speculative
    return NamespaceConfig(
        name=name,
        domains=[
            DomainConfig(
                name=domain_name,
                budget_bytes=bytes_of[name, domain_name],
                policy=domain.policy,
                ttl_ms=_milliseconds(domain.ttl),
                ttl_jitter=domain.ttl_jitter,
                refresh_ahead=domain.refresh_ahead,
            )
            for domain_name, domain in namespace.domains.items()
        ],
        default_domain=namespace.entry_domain,
        rules=[
            RouteRule(
                domain=rule.domain,
                prefix=rule.prefix.encode(),
                asked_at_least=rule.asked_at_least,
            )
            for rule in namespace.rules
        ],
        store=namespace.store or "",
        negative_ttl_ms=_milliseconds(namespace.negative_ttl),
        fetch_timeout_ms=_milliseconds(namespace.fetch_timeout),
        nvm_budget_bytes=nvm_budget_bytes,
        nvm_admission=share.admission if share else "all",
        nvm_admission_frequency=share.admission_frequency if share else 2,
        nvm_promotion=share.promotion if share else "second_hit",
        speculative_budget=speculative.budget if speculative else 0.0,
        speculative_after_us=speculative.after.microseconds if speculative else 0,
        speculative_after_quantile=(speculative.after.quantile or 0.99) if speculative else 0.99,
    )


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
