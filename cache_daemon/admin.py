"""The admin service: what operators and cachectl ask of a running daemon.

It has a listener and threads of its own, so that it answers while the data service is saturated or
draining. Who can reach the listener can flush and stop the node: a Unix socket of mode 0600, or TCP
on loopback, is the boundary until TLS and tokens come.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NoReturn, Protocol

import grpc
from grpc_reflection.v1alpha import reflection

from cache_daemon._proto._pool import POOL
from cache_daemon._proto.feature_cache.v1 import admin_pb2, admin_pb2_grpc
from cache_daemon.cluster_status import ClusterStatus
from cache_daemon.config_check import is_loopback, nearest
from cache_daemon.metrics import SampleLike, SampleSource
from cache_daemon.node_holder import NotServing
from cache_daemon.nvm_devices import NvmDevice
from cache_daemon.recovery import Progress, Report
from cache_daemon.warmup_status import WarmupControl, WarmupRefused, WarmupStatus

__all__ = [
    "AdminError",
    "AdminNode",
    "AdminServer",
    "DaemonStatus",
    "DomainInfo",
    "NamespaceInfo",
    "StoreInfo",
]

_log = logging.getLogger(__name__)

_THREADS = 4
_CALLS_AT_ONCE = 32  # beyond: RESOURCE_EXHAUSTED at once
_DRAIN_SECONDS_MAX = 24 * 3600.0
_WARMUP_SECONDS_MAX = 24 * 3600.0
_NAMESPACE_METRICS = "feature_cache_namespace_"
_DOMAIN_METRICS = "feature_cache_domain_"


class AdminError(OSError):
    """The admin service cannot listen; says where and why."""


class AdminNode(SampleSource, Protocol):
    """What the service needs of a node; `cache_daemon._native.Node` is one."""

    def resize_domain(self, namespace: str, domain: str, budget_bytes: int) -> int: ...
    def flush_namespace(self, namespace: str) -> int: ...


@dataclass(frozen=True)
class DomainInfo:
    """What the config says of an eviction domain."""

    name: str
    policy: str
    ttl_seconds: float  # 0: no expiry


@dataclass(frozen=True)
class NamespaceInfo:
    """What the config says of a namespace."""

    name: str
    domains: Sequence[DomainInfo]
    default_domain: str
    store: str = ""


@dataclass(frozen=True)
class StoreInfo:
    """A feature store and the state of its circuit breaker: closed, open or half_open."""

    name: str
    type: str
    breaker: str


@dataclass(frozen=True)
class DaemonStatus:
    """What the daemon is and how it does, at the moment of asking."""

    state: str  # STARTING, RECOVERING, WARMING, SERVING, DRAINING or STOPPED
    version: str
    topology: str
    uptime_seconds: float
    data_addresses: Sequence[str]
    http_address: str
    memory_bytes: int
    namespaces: Sequence[NamespaceInfo]
    stores: Sequence[StoreInfo] = ()
    nvm_devices: Sequence[NvmDevice] = ()
    recovery: Progress | None = None  # while it recovers
    start: Report | None = None  # how it started, once it has
    cluster: ClusterStatus | None = None  # of a root or a leaf
    warmup: WarmupStatus | None = None  # with a warmup section


class AdminServer:
    """Serves `feature_cache.v1.Admin` and reflection from construction until `stop`.

    Parameters
    ----------
    node
        Answers for counters, resizes and flushes.
    address
        `unix:/path` (made with mode 0600; a socket left behind by a dead daemon is replaced, that
        of a living one is not) or `host:port` of loopback; port 0: any (see `address`).
    status
        Called for each request; must not block.
    drain
        Begins to drain and returns at once. Its argument bounds the seconds that accepted requests
        may take; None: as configured. May be called more than once.
    sources
        Whose counters GetStats shows: the node and the stores' guards; only the node if not given.
    warmup
        Begins and ends warm-ups; None: the config has no such section.
    allow_remote
        Permits a TCP address beyond loopback (the config's `insecure: true`).

    Raises
    ------
    ValueError
        The address is of no such form, or is not loopback.
    AdminError
        The address cannot be bound.
    """

    def __init__(
        self,
        node: AdminNode,
        address: str,
        status: Callable[[], DaemonStatus],
        drain: Callable[[float | None], None],
        *,
        sources: Sequence[SampleSource] | None = None,
        warmup: WarmupControl | None = None,
        allow_remote: bool = False,
    ) -> None:
        self._unix_path = _unix_path(address)
        if not (allow_remote or is_loopback(address)):
            raise ValueError(
                f"admin address {address!r} is not loopback: use unix:/path or 127.0.0.1:port"
            )
        self._server = grpc.server(
            ThreadPoolExecutor(_THREADS, thread_name_prefix="admin"),
            maximum_concurrent_rpcs=_CALLS_AT_ONCE,
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 1 << 20)],
        )
        servicer = _Servicer(
            node, status, drain, (node,) if sources is None else tuple(sources), warmup
        )
        admin_pb2_grpc.add_AdminServicer_to_server(servicer, self._server)
        service = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
        reflection.enable_server_reflection(
            [service, reflection.SERVICE_NAME], self._server, pool=POOL
        )
        self._address = self._bind(address)
        self._server.start()

    @property
    def address(self) -> str:
        """The address as bound, in the form that clients take."""
        return self._address

    def stop(self, grace_s: float = 1.0) -> None:
        """Stops listening and gives running calls `grace_s` seconds. Idempotent."""
        self._server.stop(grace_s).wait(grace_s + 1.0)
        if self._unix_path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._unix_path)
            self._unix_path = None

    def _bind(self, address: str) -> str:
        if self._unix_path is None:
            try:
                port = self._server.add_insecure_port(address)
            except RuntimeError as error:
                raise AdminError(
                    errno.EADDRINUSE,
                    f"cannot serve admin on {address}: the port is in use or not ours",
                ) from error
            return f"{address.rpartition(':')[0]}:{port}"
        _make_way(self._unix_path)
        # The umask makes the socket private from its first moment; chmod then sets the exact mode.
        # The umask is the process's: what other threads create meanwhile is private, too.
        before = os.umask(0o077)
        try:
            self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise AdminError(
                errno.EADDRNOTAVAIL,
                f"cannot serve admin on {address}: is its directory there and writable?",
            ) from error
        finally:
            os.umask(before)
        os.chmod(self._unix_path, 0o600)
        return address


class _Servicer(admin_pb2_grpc.AdminServicer):
    def __init__(
        self,
        node: AdminNode,
        status: Callable[[], DaemonStatus],
        drain: Callable[[float | None], None],
        sources: Sequence[SampleSource],
        warmup: WarmupControl | None,
    ) -> None:
        self._node = node
        self._status = status
        self._drain = drain
        self._sources = sources
        self._warmup = warmup

    def GetStatus(
        self,
        request: admin_pb2.GetStatusRequest,  # noqa: ARG002
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> admin_pb2.GetStatusResponse:
        status = self._status()
        return admin_pb2.GetStatusResponse(
            state=status.state,
            version=status.version,
            topology=status.topology,
            uptime_seconds=status.uptime_seconds,
            pid=os.getpid(),
            data_addresses=status.data_addresses,
            http_address=status.http_address,
            memory_bytes=status.memory_bytes,
            stores=[
                admin_pb2.StoreStatus(name=store.name, type=store.type, breaker=store.breaker)
                for store in status.stores
            ],
            nvm_devices=[
                admin_pb2.NvmDeviceStatus(
                    path=device.path,
                    bytes=device.size_bytes,
                    in_service=device.in_service,
                    io=device.io,
                    direct=device.direct,
                    fallback=device.fallback,
                )
                for device in status.nvm_devices
            ],
            recovery=_recovery_status(status.recovery),
            start=_start_status(status.start),
            cluster=_cluster_status(status.cluster),
            warmup=_warmup_status(status.warmup),
        )

    def GetStats(
        self,
        request: admin_pb2.GetStatsRequest,  # noqa: ARG002
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> admin_pb2.GetStatsResponse:
        now = time.monotonic()
        samples = [sample for source in self._sources for sample in source.samples()]
        return admin_pb2.GetStatsResponse(
            monotonic_seconds=now,
            namespaces=_namespace_stats(self._status().namespaces, samples),
            samples=[
                admin_pb2.Sample(
                    name=sample.name,
                    labels=dict(sample.labels),
                    value=sample.value,
                    kind=sample.kind,
                )
                for sample in samples
            ],
        )

    def ResizeDomain(
        self, request: admin_pb2.ResizeDomainRequest, context: grpc.ServicerContext
    ) -> admin_pb2.ResizeDomainResponse:
        status = self._status()
        namespace = _known_namespace(status, request.namespace, context)
        names = [domain.name for domain in namespace.domains]
        where = f"namespace {namespace.name!r}"
        if request.domain not in names:
            _not_found(context, "eviction domain", request.domain, names, where)
        if request.budget_bytes == 0:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "budget_bytes must be above 0")
        if request.budget_bytes > status.memory_bytes:
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{request.budget_bytes} bytes are more than the node's memory of "
                f"{status.memory_bytes} bytes",
            )
        try:
            old = self._node.resize_domain(request.namespace, request.domain, request.budget_bytes)
        except KeyError:
            _not_found(context, "eviction domain", request.domain, names, where)
        except ValueError as error:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except NotServing as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        _log.info(
            "admin: resized %s/%s from %d to %d bytes",
            *(request.namespace, request.domain, old, request.budget_bytes),
        )
        return admin_pb2.ResizeDomainResponse(
            old_budget_bytes=old, new_budget_bytes=request.budget_bytes
        )

    def FlushNamespace(
        self, request: admin_pb2.FlushNamespaceRequest, context: grpc.ServicerContext
    ) -> admin_pb2.FlushNamespaceResponse:
        namespace = _known_namespace(self._status(), request.namespace, context)
        try:
            items = self._node.flush_namespace(namespace.name)
        except NotServing as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        _log.info("admin: flushed namespace %s, %d items", namespace.name, items)
        return admin_pb2.FlushNamespaceResponse(items=items)

    def Drain(
        self, request: admin_pb2.DrainRequest, context: grpc.ServicerContext
    ) -> admin_pb2.DrainResponse:
        timeout = request.timeout_seconds
        if not (math.isfinite(timeout) and 0 <= timeout <= _DRAIN_SECONDS_MAX):
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"timeout_seconds must be between 0 and {_DRAIN_SECONDS_MAX:.0f}",
            )
        _log.info("admin: asked to drain")
        self._drain(timeout or None)
        return admin_pb2.DrainResponse()

    def StartWarmup(
        self, request: admin_pb2.StartWarmupRequest, context: grpc.ServicerContext
    ) -> admin_pb2.StartWarmupResponse:
        seconds = request.max_duration_seconds
        if not (math.isfinite(seconds) and 0 <= seconds <= _WARMUP_SECONDS_MAX):
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"max_duration_seconds must be between 0 and {_WARMUP_SECONDS_MAX:.0f}",
            )
        try:
            self._known_warmup(context).start(seconds or None)
        except WarmupRefused as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        _log.info("admin: asked to warm up")
        return admin_pb2.StartWarmupResponse()

    def StopWarmup(
        self,
        request: admin_pb2.StopWarmupRequest,  # noqa: ARG002
        context: grpc.ServicerContext,
    ) -> admin_pb2.StopWarmupResponse:
        was_running = self._known_warmup(context).stop()
        _log.info("admin: asked to end the warm-up%s", "" if was_running else ", and none runs")
        return admin_pb2.StopWarmupResponse(was_running=was_running)

    def _known_warmup(self, context: grpc.ServicerContext) -> WarmupControl:
        if self._warmup is None:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                "this daemon's config has no warmup section; add one and restart",
            )
        return self._warmup


def _recovery_status(progress: Progress | None) -> admin_pb2.RecoveryStatus | None:
    if progress is None:
        return None
    return admin_pb2.RecoveryStatus(
        phase=progress.phase, done=progress.done, total=progress.total, seconds=progress.seconds
    )


def _start_status(report: Report | None) -> admin_pb2.StartStatus | None:
    if report is None:
        return None
    return admin_pb2.StartStatus(
        memory=report.memory,
        memory_reason=report.memory_reason,
        pages=report.pages,
        memory_seconds=report.memory_ms / 1000,
        memory_items=report.memory_items,
        memory_dropped=report.memory_dropped,
        nvm=report.nvm,
        nvm_reason=report.nvm_reason,
        nvm_seconds=report.nvm_ms / 1000,
        nvm_items=report.nvm_items,
        nvm_dropped=report.nvm_dropped,
        set_aside=report.set_aside,
    )


def _cluster_status(cluster: ClusterStatus | None) -> admin_pb2.ClusterStatus | None:
    if cluster is None:
        return None
    age_s = cluster.session_age_seconds
    return admin_pb2.ClusterStatus(
        role=cluster.role,
        cluster=cluster.cluster,
        node=cluster.node,
        session=cluster.session,
        session_age_seconds=-1.0 if age_s is None else age_s,
        map_version=cluster.map_version,
        map_age_seconds=cluster.map_age_seconds,
        shard_count=cluster.shard_count,
        leaves=cluster.leaves,
        shards_online=cluster.shards_online,
        shards_warming=cluster.shards_warming,
        registration=cluster.registration,
        leader=cluster.leader,
        moves=cluster.moves,
        frozen=cluster.frozen,
        problems=cluster.problems,
    )


def _warmup_status(warmup: WarmupStatus | None) -> admin_pb2.WarmupStatus | None:
    if warmup is None:
        return None
    uploads = warmup.uploads
    return admin_pb2.WarmupStatus(
        state=warmup.state,
        reason=warmup.reason,
        serving_cold=warmup.serving_cold,
        phase=warmup.phase,
        keys_done=warmup.keys_done,
        keys_total=warmup.keys_total,
        keys_fetched=warmup.keys_fetched,
        keys_failed=warmup.keys_failed,
        keys_per_second=warmup.keys_per_second,
        rate_limit=warmup.rate_limit,
        items_copied=warmup.items_copied,
        bytes_copied=warmup.bytes_copied,
        predicted_hit_ratio=_or_negative(warmup.predicted_hit_ratio),
        target_hit_ratio=warmup.target_hit_ratio,
        seconds=warmup.seconds,
        seconds_left=_or_negative(warmup.seconds_left),
        max_seconds=warmup.max_seconds,
        snapshots=warmup.snapshots,
        fleet_members=warmup.fleet_members,
        uploads=None
        if uploads is None
        else admin_pb2.UploadStatus(
            uploaded=uploads.uploaded,
            failed=uploads.failed,
            dropped=uploads.dropped,
            pending=uploads.pending,
            oldest_pending_seconds=uploads.oldest_pending_seconds,
            problem=uploads.problem,
        ),
    )


def _or_negative(value: float | None) -> float:
    return -1.0 if value is None else value


def _namespace_stats(
    infos: Sequence[NamespaceInfo], samples: Iterable[SampleLike]
) -> Iterator[admin_pb2.NamespaceStats]:
    """Configured namespaces, with every native counter that the messages have a field for.

    `feature_cache_domain_evictions_total{namespace,domain}` fills `DomainStats.evictions`, and so
    on, so that a new field needs no code here.
    """
    namespaces: dict[str, admin_pb2.NamespaceStats] = {}
    domains: dict[tuple[str, str], admin_pb2.DomainStats] = {}
    for info in infos:
        stats = admin_pb2.NamespaceStats(
            name=info.name, store=info.store, default_domain=info.default_domain
        )
        for domain in info.domains:
            domains[info.name, domain.name] = stats.domains.add(
                name=domain.name, policy=domain.policy, ttl_seconds=domain.ttl_seconds
            )
        namespaces[info.name] = stats
    for sample in samples:
        owner = sample.labels.get("namespace", "")
        if sample.name.startswith(_NAMESPACE_METRICS) and owner in namespaces:
            _fill(namespaces[owner], sample.name.removeprefix(_NAMESPACE_METRICS), sample.value)
        elif sample.name.startswith(_DOMAIN_METRICS):
            found = domains.get((owner, sample.labels.get("domain", "")))
            if found is not None:
                _fill(found, sample.name.removeprefix(_DOMAIN_METRICS), sample.value)
    yield from namespaces.values()


def _fill(
    message: admin_pb2.NamespaceStats | admin_pb2.DomainStats, metric: str, value: float
) -> None:
    field = message.DESCRIPTOR.fields_by_name.get(metric.removesuffix("_total"))
    if field is not None and field.cpp_type == field.CPPTYPE_UINT64:
        setattr(message, field.name, int(value))


def _known_namespace(
    status: DaemonStatus, name: str, context: grpc.ServicerContext
) -> NamespaceInfo:
    known = {namespace.name: namespace for namespace in status.namespaces}
    if name not in known:
        _not_found(context, "namespace", name, known, "this node")
    return known[name]


def _not_found(
    context: grpc.ServicerContext, what: str, name: str, known: Iterable[str], where: str
) -> NoReturn:
    message = f"{where} has no {what} {name!r}; {nearest(name, known)}"
    context.abort(grpc.StatusCode.NOT_FOUND, message)


def _unix_path(address: str) -> str | None:
    if not address.startswith("unix:"):
        return None
    path = address.removeprefix("unix:")
    if not path.startswith("/"):
        raise ValueError(f"admin address {address!r}: the path of a Unix socket must be absolute")
    return os.path.normpath(path)


def _make_way(path: str) -> None:
    """Removes the socket of a dead daemon; gRPC would silently take over that of a living one."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise AdminError(errno.EEXIST, f"cannot serve admin on unix:{path}: a file is in the way")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            reason = error.strerror or str(error)
            raise AdminError(
                error.errno or errno.EADDRINUSE, f"cannot serve admin on unix:{path}: {reason}"
            ) from error
    raise AdminError(
        errno.EADDRINUSE, f"cannot serve admin on unix:{path}: another daemon serves there"
    )
