"""What a daemon says of itself when an operator asks."""

import importlib.metadata

from cache_daemon.admin import DaemonStatus, DomainInfo, NamespaceInfo, StoreInfo
from cache_daemon.cluster_status import Membership
from cache_daemon.lifecycle import Lifecycle, State
from cache_daemon.nvm_devices import nvm_devices
from cache_daemon.pipeline import Pipeline
from cache_daemon.warmup_status import Warming

__all__ = ["daemon_status", "version"]


def daemon_status(
    lifecycle: Lifecycle,
    pipeline: Pipeline,
    membership: Membership | None,
    data_addresses: list[str],
    http_address: str,
    warming: Warming | None = None,
) -> DaemonStatus:
    """At the moment of asking. `membership` is of a root or a leaf."""
    config = pipeline.config
    state = lifecycle.state
    return DaemonStatus(
        state=state.value,
        version=version(),
        topology=config.topology,
        uptime_seconds=lifecycle.uptime_s,
        data_addresses=data_addresses,
        http_address=http_address,
        memory_bytes=config.memory.size,
        namespaces=[
            NamespaceInfo(
                name=name,
                domains=[
                    DomainInfo(name=domain_name, policy=domain.policy, ttl_seconds=domain.ttl)
                    for domain_name, domain in namespace.domains.items()
                ],
                default_domain=namespace.entry_domain,
                store=namespace.store or "",
            )
            for name, namespace in config.namespaces.items()
        ],
        stores=[
            StoreInfo(name=name, type=config.stores[name].type, breaker=store.state)
            for name, store in pipeline.stores.items()
        ],
        nvm_devices=nvm_devices(pipeline.held.samples()) if config.nvm else (),
        recovery=pipeline.started.progress if state is State.RECOVERING else None,
        start=pipeline.started.report,
        cluster=membership.status() if membership else None,
        warmup=warming.status() if warming else None,
    )


def version() -> str:
    """The installed package's version; "unknown" where it runs without being installed."""
    try:
        return importlib.metadata.version("feature-cache")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
