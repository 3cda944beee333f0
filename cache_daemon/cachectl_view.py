"""What cachectl shows: figures worked out of the admin service's replies, as tables or JSON.

Pure functions of replies; no I/O.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from google.protobuf.message import Message
from rich import box
from rich.table import Table
from rich.text import Text

from cache_daemon._proto.feature_cache.v1 import admin_pb2
from cache_daemon.cachectl_samples import Samples, since
from cache_daemon.config_units import format_duration

__all__ = [
    "DomainView",
    "NamespaceView",
    "NvmShareView",
    "StatsView",
    "empty_table",
    "human_bytes",
    "human_count",
    "human_ratio",
    "message_dict",
    "namespaces_table",
    "stats_table",
    "stats_view",
    "status_dict",
    "status_table",
]


@dataclass(frozen=True)
class DomainView:
    """One eviction domain over the time that a view covers."""

    name: str
    policy: str
    ttl_seconds: float  # 0: no expiry
    budget_bytes: int
    used_bytes: int
    live_bytes: int
    items: int
    hits: int
    evictions: int
    expirations: int
    # One lookup asks all domains of a namespace at once, so that a domain has no misses of its own:
    # this is its share of the namespace's lookups. With that of NVM, the shares add up to the
    # namespace's hit ratio (less negative hits). None without lookups.
    hit_ratio: float | None
    hits_per_second: float | None
    evictions_per_second: float | None


@dataclass(frozen=True)
class NvmShareView:
    """A namespace's part of the NVM tier over the time that a view covers."""

    budget_bytes: int
    used_bytes: int
    items: int
    hits: int
    evictions: int
    hit_ratio: float | None  # of all lookups of the namespace, as a domain's
    hits_per_second: float | None


@dataclass(frozen=True)
class NamespaceView:
    """One namespace over the time that a view covers."""

    name: str
    store: str
    default_domain: str
    hits: int  # those from NVM included
    negative_hits: int
    misses: int
    hit_ratio: float | None  # of all lookups, negative hits included; None without lookups
    lookups_per_second: float | None
    domains: Sequence[DomainView]
    nvm: NvmShareView | None  # None: the namespace has no NVM


@dataclass(frozen=True)
class StatsView:
    """Counters of a span: since the start (`seconds` is None) or between two replies."""

    seconds: float | None
    namespaces: Sequence[NamespaceView]

    def to_dict(self) -> dict[str, Any]:
        """The view as plain objects that json can write."""
        return asdict(self)


def stats_view(
    now: admin_pb2.GetStatsResponse, before: admin_pb2.GetStatsResponse | None = None
) -> StatsView:
    """Counts and ratios since the daemon's start, or since `before`, then with rates.

    A counter that went backwards, as after a restart between both replies, counts from zero.
    """
    seconds = None if before is None else now.monotonic_seconds - before.monotonic_seconds
    if seconds is not None and seconds <= 0:
        before, seconds = None, None  # another daemon answered: its clock may stand anywhere
    earlier = {} if before is None else {stats.name: stats for stats in before.namespaces}
    nvm = Samples(now)
    nvm_earlier = Samples(before)
    return StatsView(
        seconds,
        [
            _namespace_view(
                stats,
                earlier.get(stats.name, admin_pb2.NamespaceStats()),
                seconds,
                (nvm, nvm_earlier),
            )
            for stats in now.namespaces
        ],
    )


def _namespace_view(
    now: admin_pb2.NamespaceStats,
    before: admin_pb2.NamespaceStats,
    seconds: float | None,
    samples: tuple[Samples, Samples],
) -> NamespaceView:
    hits = since(now.hits, before.hits)
    negative_hits = since(now.negative_hits, before.negative_hits)
    misses = since(now.misses, before.misses)
    lookups = hits + negative_hits + misses
    earlier = {domain.name: domain for domain in before.domains}
    return NamespaceView(
        name=now.name,
        store=now.store,
        default_domain=now.default_domain,
        hits=hits,
        negative_hits=negative_hits,
        misses=misses,
        hit_ratio=_ratio(hits + negative_hits, lookups),
        lookups_per_second=_rate(lookups, seconds),
        domains=[
            _domain_view(
                domain, earlier.get(domain.name, admin_pb2.DomainStats()), lookups, seconds
            )
            for domain in now.domains
        ],
        nvm=_nvm_share_view(now.name, *samples, lookups, seconds),
    )


def _nvm_share_view(
    name: str, now: Samples, before: Samples, lookups: int, seconds: float | None
) -> NvmShareView | None:
    def gauge(metric: str) -> int:
        return now.value(f"feature_cache_namespace_nvm_{metric}", namespace=name)

    def counter(metric: str) -> int:
        full = f"feature_cache_namespace_nvm_{metric}_total"
        return since(now.value(full, namespace=name), before.value(full, namespace=name))

    budget_bytes = gauge("budget_bytes")
    if not budget_bytes:
        return None
    hits = counter("hits")
    return NvmShareView(
        budget_bytes=budget_bytes,
        used_bytes=gauge("used_bytes"),
        items=gauge("items"),
        hits=hits,
        evictions=counter("evicted"),
        hit_ratio=_ratio(hits, lookups),
        hits_per_second=_rate(hits, seconds),
    )


def _domain_view(
    now: admin_pb2.DomainStats,
    before: admin_pb2.DomainStats,
    lookups: int,
    seconds: float | None,
) -> DomainView:
    hits = since(now.hits, before.hits)
    evictions = since(now.evictions, before.evictions)
    return DomainView(
        name=now.name,
        policy=now.policy,
        ttl_seconds=now.ttl_seconds,
        budget_bytes=now.budget_bytes,
        used_bytes=now.used_bytes,
        live_bytes=now.live_bytes,
        items=now.items,
        hits=hits,
        evictions=evictions,
        expirations=since(now.expirations, before.expirations),
        hit_ratio=_ratio(hits, lookups),
        hits_per_second=_rate(hits, seconds),
        evictions_per_second=_rate(evictions, seconds),
    )


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _rate(count: int, seconds: float | None) -> float | None:
    return None if seconds is None else count / seconds


# ---- tables --------------------------------------------------------------------------------------


def stats_table(view: StatsView) -> Table:
    """A row a namespace, followed by a row for each of its domains."""
    span = "since start" if view.seconds is None else f"last {view.seconds:.1f} s"
    table = empty_table(f"feature cache, {span}")
    table.add_column("namespace / domain")
    for name in ("lookups/s", "hit ratio", "hits", "negative", "misses"):
        table.add_column(name, justify="right")
    for name in ("items", "used", "budget", "full", "evicted", "expired"):
        table.add_column(name, justify="right")
    if view.seconds is None:
        table.columns[1].header = "lookups"
    for namespace in view.namespaces:
        lookups = namespace.hits + namespace.negative_hits + namespace.misses
        domains = namespace.domains
        table.add_row(
            namespace.name,
            _first(namespace.lookups_per_second, lookups),
            human_ratio(namespace.hit_ratio),
            *(human_count(namespace.hits), human_count(namespace.negative_hits)),
            human_count(namespace.misses),
            human_count(sum(domain.items for domain in domains)),
            human_bytes(sum(domain.used_bytes for domain in domains)),
            human_bytes(sum(domain.budget_bytes for domain in domains)),
            "",
            human_count(sum(domain.evictions for domain in domains)),
            human_count(sum(domain.expirations for domain in domains)),
            style="bold",
        )
        for domain in domains:
            table.add_row(
                f"  {domain.name}",
                "",
                human_ratio(domain.hit_ratio),
                *(human_count(domain.hits), "", ""),
                human_count(domain.items),
                *(human_bytes(domain.used_bytes), human_bytes(domain.budget_bytes)),
                human_ratio(_ratio(domain.used_bytes, domain.budget_bytes)),
                *(human_count(domain.evictions), human_count(domain.expirations)),
            )
        if (nvm := namespace.nvm) is not None:
            table.add_row(
                "  (NVM)",
                "",
                human_ratio(nvm.hit_ratio),
                *(human_count(nvm.hits), "", ""),
                human_count(nvm.items),
                *(human_bytes(nvm.used_bytes), human_bytes(nvm.budget_bytes)),
                human_ratio(_ratio(nvm.used_bytes, nvm.budget_bytes)),
                *(human_count(nvm.evictions), ""),
            )
    return table


def namespaces_table(view: StatsView) -> Table:
    """A row an eviction domain: where it is, how it evicts, how much it may hold."""
    table = empty_table("namespaces and eviction domains")
    for name in ("namespace", "store", "domain", "policy"):
        table.add_column(name)
    for name in ("ttl", "budget", "items"):
        table.add_column(name, justify="right")
    for namespace in view.namespaces:
        for index, domain in enumerate(namespace.domains):
            is_default = domain.name == namespace.default_domain
            table.add_row(
                namespace.name if index == 0 else "",
                (namespace.store or "none") if index == 0 else "",
                f"{domain.name} (default)" if is_default else domain.name,
                domain.policy,
                format_duration(domain.ttl_seconds) if domain.ttl_seconds else "none",
                human_bytes(domain.budget_bytes),
                human_count(domain.items),
            )
    return table


def status_dict(status: admin_pb2.GetStatusResponse) -> dict[str, Any]:
    """The status as plain objects that json can write."""
    return {
        "state": status.state,
        "version": status.version,
        "topology": status.topology,
        "uptime_seconds": status.uptime_seconds,
        "pid": status.pid,
        "data_addresses": list(status.data_addresses),
        "http_address": status.http_address,
        "memory_bytes": status.memory_bytes,
        "stores": [
            {"name": store.name, "type": store.type, "breaker": store.breaker}
            for store in status.stores
        ],
        "nvm_devices": [
            {
                "path": device.path,
                "bytes": device.bytes,
                "in_service": device.in_service,
                "io": device.io,
                "direct": device.direct,
                "fallback": device.fallback,
            }
            for device in status.nvm_devices
        ],
        "recovery": message_dict(status.recovery) if status.HasField("recovery") else None,
        "start": message_dict(status.start) if status.HasField("start") else None,
        "cluster": message_dict(status.cluster) if status.HasField("cluster") else None,
        "warmup": message_dict(status.warmup, ("uploads",)) if status.HasField("warmup") else None,
    }


def message_dict(message: Message, without: Sequence[str] = ()) -> dict[str, Any]:
    """The plain fields of a message as json can write them; `without` names those that are none."""
    names = [field.name for field in message.DESCRIPTOR.fields if field.name not in without]
    values = {name: getattr(message, name) for name in names}
    return {
        name: value if isinstance(value, str | int | float) else list(value)
        for name, value in values.items()
    }


def status_table(status: admin_pb2.GetStatusResponse) -> Table:
    """Names and values, one a row."""
    table = empty_table(None)
    table.add_column(style="dim")
    table.add_column()
    table.show_header = False
    table.add_row("state", Text(status.state, "green" if status.state == "SERVING" else "yellow"))
    table.add_row("version", status.version)
    table.add_row("topology", status.topology)
    table.add_row("up for", format_duration(float(round(status.uptime_seconds))))
    table.add_row("pid", str(status.pid))
    table.add_row("data", "\n".join(status.data_addresses))
    table.add_row("http", status.http_address or "off")
    table.add_row("memory", human_bytes(status.memory_bytes))
    for store in status.stores:
        style = "green" if store.breaker == "closed" else "red"
        breaker = Text(f"breaker {store.breaker}", style)
        table.add_row(f"store {store.name}", Text(f"{store.type}, ") + breaker)
    for device in status.nvm_devices:
        state = Text("in service", "green") if device.in_service else Text("out of service", "red")
        how = f", {device.io}, {'direct' if device.direct else 'buffered'}"
        size = f"{human_bytes(device.bytes)}, "
        table.add_row(f"nvm {device.path}", Text(size) + state + Text(how))
    if status.HasField("recovery"):
        table.add_row("recovery", Text(_recovery_text(status.recovery), "yellow"))
    if status.HasField("start"):
        for tier, text in _start_texts(status.start):
            table.add_row(f"start, {tier}", text)
    if status.HasField("cluster"):
        for name, text in _cluster_texts(status.cluster):
            table.add_row(name, text)
    if status.HasField("warmup") and status.warmup.state != "off":
        warmup = status.warmup
        style = "green" if warmup.state == "warmed" else "yellow"
        reason = f": {warmup.reason}" if warmup.reason else ""
        cold = Text(", serves cold", "red") if warmup.serving_cold else Text("")
        table.add_row("warm-up", Text(warmup.state, style) + cold + Text(reason))
    return table


def _cluster_texts(cluster: admin_pb2.ClusterStatus) -> Iterator[tuple[str, Text]]:
    who = f"{cluster.role} {cluster.node} of {cluster.cluster}".replace("  ", " ")
    yield "cluster", Text(who) + Text(", leads it" if cluster.leader else "")
    session = Text(cluster.session, "green" if cluster.session == "connected" else "red")
    if cluster.session != "connected" and cluster.session_age_seconds >= 0:
        session += Text(f", last heard of {cluster.session_age_seconds:,.0f} s ago")
    yield "zookeeper", session
    if cluster.registration:
        yield "registration", Text(cluster.registration, "red")
    if cluster.map_version:
        line = f"version {cluster.map_version}, {cluster.map_age_seconds:,.1f} s old"
        yield "shard map", Text(f"{line}, {cluster.leaves} leaves")
        warming = f", {cluster.shards_warming:,} warming" if cluster.shards_warming else ""
        yield (
            "shards",
            Text(f"{cluster.shards_online:,} online{warming}, of {cluster.shard_count:,}"),
        )
    else:
        yield "shard map", Text("none yet", "red")
    if cluster.leader:
        frozen = Text(f", frozen: {cluster.frozen}", "red") if cluster.frozen else Text("")
        yield "moves", Text(f"{cluster.moves:,} under way") + frozen
    for problem in cluster.problems:
        yield "problem", Text(problem, "red")


def _recovery_text(recovery: admin_pb2.RecoveryStatus) -> str:
    share = f"{recovery.done / recovery.total:.0%} of {recovery.total:,}" if recovery.total else "…"
    return f"{recovery.phase or 'begins'}: {share}, {recovery.seconds:.1f} s"


def _start_texts(start: admin_pb2.StartStatus) -> Iterator[tuple[str, Text]]:
    """What each tier began with; nothing where nothing outlives the process."""
    if start.memory == "off":
        return
    pages = f", {start.pages}" if start.pages else ""
    figures = (start.memory_items, start.memory_dropped, start.memory_seconds)
    yield "memory", _start_text(start.memory, start.memory_reason, *figures, pages)
    if start.nvm != "off":
        figures = (start.nvm_items, start.nvm_dropped, start.nvm_seconds)
        yield "nvm", _start_text(start.nvm, start.nvm_reason, *figures, "")
    if start.set_aside:
        yield "set aside", Text(f"{start.set_aside} files of an unknown format", "red")


def _start_text(
    how: str, reason: str, items: int, dropped: int, seconds: float, pages: str
) -> Text:
    style = "red" if how in ("cold", "empty") else "green"
    line = f", {items:,} items in {seconds * 1000:,.0f} ms"
    line += f", {dropped:,} dropped" if dropped else ""
    return Text(how, style) + Text(f"{line}{pages}{f'; {reason}' if reason else ''}")


def human_bytes(count: int) -> str:
    """`1.5 GiB`; exact below a KiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def human_count(count: float) -> str:
    """`1,234` up to a million, then `1.2M`."""
    if count < 1e6:
        return f"{count:,.0f}"
    return f"{count / 1e6:,.1f}M" if count < 1e9 else f"{count / 1e9:,.1f}G"


def _first(rate: float | None, count: int) -> str:
    return human_count(count if rate is None else rate)


def human_ratio(ratio: float | None) -> str:
    """`12.5 %`; a dash where there is nothing to relate to."""
    return "–" if ratio is None else f"{ratio * 100:.1f} %"  # noqa: RUF001


def empty_table(title: str | None) -> Table:
    """A table without columns, in the style of all of ours."""
    return Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
