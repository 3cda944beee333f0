"""What `cachectl nvm` shows: devices, namespaces and speculative lookups, as tables or JSON.

Pure functions of the admin service's replies; no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from cache_daemon._proto.feature_cache.v1 import admin_pb2
from cache_daemon.cachectl_samples import Samples, since
from cache_daemon.cachectl_view import empty_table, human_bytes, human_count

__all__ = [
    "NvmDeviceView",
    "NvmNamespaceView",
    "NvmView",
    "SpeculativeView",
    "nvm_tables",
    "nvm_view",
]

_DEVICE = "feature_cache_nvm_device_"
_NAMESPACE = "feature_cache_namespace_nvm_"
_SPECULATIVE = "feature_cache_speculative_"
_NVM = "feature_cache_nvm_"

# Also the order in which a region goes through them.
_REGION_STATES = ("free", "open", "writing", "sealed", "emptying")


@dataclass(frozen=True)
class NvmDeviceView:
    """One device; counts and bytes are over the time that the view covers."""

    path: str
    io: str
    direct: bool
    fallback: str
    in_service: bool
    size_bytes: int
    regions: Mapping[str, int]  # by state
    reads: int
    read_bytes: int
    writes: int
    written_bytes: int
    read_errors: int
    write_errors: int
    outages: int
    probes: int
    reads_per_second: float | None
    read_bytes_per_second: float | None
    written_bytes_per_second: float | None


@dataclass(frozen=True)
class SpeculativeView:
    """Lookups that asked the store since a read was late."""

    launched: int
    won_by_store: int
    won_by_nvm: int
    denied: int


@dataclass(frozen=True)
class NvmNamespaceView:
    """A namespace's part of the tier; counts are over the time that the view covers."""

    name: str
    budget_bytes: int
    used_bytes: int
    items: int
    hits: int
    promoted: int
    demoted: int
    demoted_bytes: int
    reinserted: int
    reinserted_bytes: int
    evicted: int
    dropped_by_tag: int
    not_admitted: Mapping[str, int]  # by reason
    lost_reads: Mapping[str, int]  # by reason
    speculative: SpeculativeView


@dataclass(frozen=True)
class NvmView:
    """The NVM tier: since the start (`seconds` is None) or between two replies."""

    seconds: float | None
    region_bytes: int
    memory_bytes: int
    index_slots: int
    reads_in_flight: int
    cells_queued: int
    reads_shared: int
    reads_coalesced: int
    reads_refused: int
    reads_abandoned: int
    checksum_errors: int
    devices: Sequence[NvmDeviceView]  # none: the daemon has no NVM tier
    namespaces: Sequence[NvmNamespaceView]

    def to_dict(self) -> dict[str, Any]:
        """The view as plain objects that json can write."""
        return asdict(self)


def nvm_view(
    now: admin_pb2.GetStatsResponse, before: admin_pb2.GetStatsResponse | None = None
) -> NvmView:
    """Counts since the daemon's start, or since `before`, then with rates."""
    seconds = None if before is None else now.monotonic_seconds - before.monotonic_seconds
    if seconds is not None and seconds <= 0:
        before, seconds = None, None  # another daemon answered: its clock may stand anywhere
    counters = _Counters(Samples(now), Samples(before), seconds)
    return NvmView(
        seconds=seconds,
        region_bytes=counters.gauge(f"{_NVM}region_bytes"),
        memory_bytes=counters.gauge(f"{_NVM}memory_bytes"),
        index_slots=counters.gauge(f"{_NVM}index_slots"),
        reads_in_flight=counters.gauge(f"{_NVM}reads_in_flight"),
        cells_queued=counters.gauge(f"{_NVM}cells_queued"),
        reads_shared=counters.grown(f"{_NVM}reads_shared_total"),
        reads_coalesced=counters.grown(f"{_NVM}reads_coalesced_total"),
        reads_refused=counters.grown(f"{_NVM}reads_refused_total"),
        reads_abandoned=counters.grown(f"{_NVM}reads_abandoned_total"),
        checksum_errors=counters.grown(f"{_NVM}checksum_errors_total"),
        devices=[
            _device_view(labels, counters) for labels in counters.now.labels(f"{_DEVICE}info")
        ],
        namespaces=[
            _namespace_view(stats.name, counters)
            for stats in now.namespaces
            if counters.gauge(f"{_NAMESPACE}budget_bytes", namespace=stats.name)
        ],
    )


@dataclass(frozen=True)
class _Counters:
    """Two readings, and the time between them."""

    now: Samples
    before: Samples
    seconds: float | None

    def gauge(self, name: str, **labels: str) -> int:
        return self.now.value(name, **labels)

    def grown(self, name: str, **labels: str) -> int:
        return since(self.now.value(name, **labels), self.before.value(name, **labels))

    def grown_by(self, label: str, name: str, **labels: str) -> dict[str, int]:
        before = self.before.by(label, name, **labels)
        return {
            key: since(value, before.get(key, 0))
            for key, value in sorted(self.now.by(label, name, **labels).items())
        }

    def rate(self, count: int) -> float | None:
        return None if self.seconds is None else count / self.seconds


def _device_view(info: Mapping[str, str], counters: _Counters) -> NvmDeviceView:
    path = info["device"]

    def grown(metric: str) -> int:
        return counters.grown(f"{_DEVICE}{metric}_total", device=path)

    regions = counters.now.by("state", f"{_DEVICE}regions", device=path)
    reads, read_bytes, written_bytes = grown("reads"), grown("read_bytes"), grown("written_bytes")
    return NvmDeviceView(
        path=path,
        io=info.get("io", ""),
        direct=info.get("direct") == "true",
        fallback=info.get("fallback", ""),
        in_service=bool(counters.gauge(f"{_DEVICE}in_service", device=path)),
        size_bytes=counters.gauge(f"{_DEVICE}bytes", device=path),
        regions={state: regions.get(state, 0) for state in _REGION_STATES},
        reads=reads,
        read_bytes=read_bytes,
        writes=grown("writes"),
        written_bytes=written_bytes,
        read_errors=grown("read_errors"),
        write_errors=grown("write_errors"),
        outages=grown("outages"),
        probes=grown("probes"),
        reads_per_second=counters.rate(reads),
        read_bytes_per_second=counters.rate(read_bytes),
        written_bytes_per_second=counters.rate(written_bytes),
    )


def _namespace_view(name: str, counters: _Counters) -> NvmNamespaceView:
    def grown(metric: str) -> int:
        return counters.grown(f"{_NAMESPACE}{metric}_total", namespace=name)

    def speculative(metric: str) -> int:
        return counters.grown(f"{_SPECULATIVE}{metric}_total", namespace=name)

    return NvmNamespaceView(
        name=name,
        budget_bytes=counters.gauge(f"{_NAMESPACE}budget_bytes", namespace=name),
        used_bytes=counters.gauge(f"{_NAMESPACE}used_bytes", namespace=name),
        items=counters.gauge(f"{_NAMESPACE}items", namespace=name),
        hits=grown("hits"),
        promoted=grown("promoted"),
        demoted=grown("demoted"),
        demoted_bytes=grown("demoted_bytes"),
        reinserted=grown("reinserted"),
        reinserted_bytes=grown("reinserted_bytes"),
        evicted=grown("evicted"),
        dropped_by_tag=grown("dropped_by_tag"),
        not_admitted=counters.grown_by("reason", f"{_NAMESPACE}not_admitted_total", namespace=name),
        lost_reads=counters.grown_by("reason", f"{_NAMESPACE}lost_reads_total", namespace=name),
        speculative=SpeculativeView(
            launched=speculative("launched"),
            won_by_store=speculative("won_by_store"),
            won_by_nvm=speculative("won_by_nvm"),
            denied=speculative("denied"),
        ),
    )


# ---- tables --------------------------------------------------------------------------------------


def nvm_tables(view: NvmView) -> Group:
    """The tier for people: devices, namespaces, speculative lookups where there are any."""
    span = "since start" if view.seconds is None else f"last {view.seconds:.1f} s"
    parts: list[Table | Text] = [_devices_table(view, span), _reads_line(view)]
    parts.append(_namespaces_table(view, span))
    if any(_is_speculative(namespace) for namespace in view.namespaces):
        parts.append(_speculative_table(view, span))
    return Group(*parts)


def _devices_table(view: NvmView, span: str) -> Table:
    table = empty_table(f"NVM devices, {span}")
    rate = "" if view.seconds is None else "/s"
    for name in ("device", "io", "state"):
        table.add_column(name, overflow="fold")
    for name in ("size", f"reads{rate}", f"read{rate}", f"written{rate}"):
        table.add_column(name, justify="right")
    table.add_column("regions", overflow="fold")
    table.add_column("errors", overflow="fold")
    for device in view.devices:
        direct = "direct" if device.direct else "buffered"
        state = Text("in service", "green") if device.in_service else Text("out of service", "red")
        table.add_row(
            device.path,
            f"{device.io}, {direct}" + (f" ({device.fallback})" if device.fallback else ""),
            state,
            human_bytes(device.size_bytes),
            human_count(_or(device.reads_per_second, device.reads)),
            human_bytes(int(_or(device.read_bytes_per_second, device.read_bytes))),
            human_bytes(int(_or(device.written_bytes_per_second, device.written_bytes))),
            _counts(device.regions),
            _counts(
                {
                    "read": device.read_errors,
                    "write": device.write_errors,
                    "outages": device.outages,
                }
            )
            or "none",
        )
    return table


def _reads_line(view: NvmView) -> Text:
    return Text(
        f"regions of {human_bytes(view.region_bytes)}, "
        f"{human_bytes(view.memory_bytes)} of memory; "
        f"{human_count(view.reads_in_flight)} reads in flight, "
        f"{human_count(view.cells_queued)} cells queued; "
        f"{human_count(view.reads_coalesced)} coalesced, {human_count(view.reads_shared)} shared, "
        f"{human_count(view.reads_refused)} refused, "
        f"{human_count(view.reads_abandoned)} abandoned, "
        f"{human_count(view.checksum_errors)} checksum errors\n"
    )


def _namespaces_table(view: NvmView, span: str) -> Table:
    table = empty_table(f"NVM by namespace, {span}")
    table.add_column("namespace")
    for name in ("budget", "used", "items", "hits", "promoted"):
        table.add_column(name, justify="right")
    for name in ("demoted", "reinserted", "evicted"):
        table.add_column(name, justify="right")
    table.add_column("not admitted", overflow="fold")
    table.add_column("lost reads", overflow="fold")
    for namespace in view.namespaces:
        table.add_row(
            namespace.name,
            *(human_bytes(namespace.budget_bytes), human_bytes(namespace.used_bytes)),
            *(human_count(namespace.items), human_count(namespace.hits)),
            *(human_count(namespace.promoted), human_count(namespace.demoted)),
            *(human_count(namespace.reinserted), human_count(namespace.evicted)),
            _counts(namespace.not_admitted) or "none",
            _counts(namespace.lost_reads) or "none",
        )
    return table


def _speculative_table(view: NvmView, span: str) -> Table:
    table = empty_table(f"speculative lookups, {span}")
    table.add_column("namespace")
    for name in ("launched", "won by store", "won by NVM", "denied by budget"):
        table.add_column(name, justify="right")
    for namespace in filter(_is_speculative, view.namespaces):
        lookups = namespace.speculative
        table.add_row(
            namespace.name,
            *(human_count(lookups.launched), human_count(lookups.won_by_store)),
            *(human_count(lookups.won_by_nvm), human_count(lookups.denied)),
        )
    return table


def _is_speculative(namespace: NvmNamespaceView) -> bool:
    return bool(namespace.speculative.launched or namespace.speculative.denied)


def _counts(counts: Mapping[str, int]) -> str:
    """`free 3, open 1`: what there is of each, zeros left out."""
    return ", ".join(f"{name} {human_count(count)}" for name, count in counts.items() if count)


def _or(rate: float | None, count: int) -> float:
    return count if rate is None else rate
