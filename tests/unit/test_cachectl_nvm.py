"""What cachectl shows of the NVM tier; against a real daemon it is in tests/e2e."""

import json
from pathlib import Path

import pytest
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from cache_daemon._proto.feature_cache.v1 import admin_pb2
from cache_daemon.cachectl import app
from cache_daemon.cachectl_nvm import nvm_tables, nvm_view
from cache_daemon.cachectl_samples import Samples
from cache_daemon.cachectl_view import stats_table, stats_view, status_dict, status_table

MIB = 1 << 20
DEVICE = "feature_cache_nvm_device"
SHARE = "feature_cache_namespace_nvm"


def sample(name: str, value: float, **labels: str) -> admin_pb2.Sample:
    kind = "counter" if name.endswith("_total") else "gauge"
    return admin_pb2.Sample(name=name, labels=labels, value=value, kind=kind)


def reply(
    seconds: float, *, times: int = 1, in_service: bool = True, speculative: bool = True
) -> admin_pb2.GetStatsResponse:
    """Two namespaces, of which `pin` has NVM on two devices; counters are multiples of `times`."""

    def device(path: str, **info: str) -> list[admin_pb2.Sample]:
        counters = {
            "reads": 100,
            "read_bytes": 100 * 4096,
            "writes": 2,
            "written_bytes": 2 * MIB,
            "read_errors": 3,
            "write_errors": 0,
            "outages": 1,
            "probes": 5,
        }
        return [
            sample(f"{DEVICE}_info", 1, device=path, **info),
            sample(f"{DEVICE}_in_service", in_service or path != "/nvm/b", device=path),
            sample(f"{DEVICE}_bytes", 64 * MIB, device=path),
            *(
                sample(f"{DEVICE}_regions", count, device=path, state=state)
                for state, count in (("free", 40), ("open", 1), ("sealed", 22))
            ),
            *(
                sample(f"{DEVICE}_{name}_total", value * times, device=path)
                for name, value in counters.items()
            ),
        ]

    samples = [
        *device("/nvm/a", io="io_uring", direct="true", fallback=""),
        *device("/nvm/b", io="threads", direct="false", fallback="io_uring: not permitted"),
        sample("feature_cache_nvm_region_bytes", MIB),
        sample("feature_cache_nvm_memory_bytes", 20 * MIB),
        sample("feature_cache_nvm_index_slots", 1000),
        sample("feature_cache_nvm_reads_in_flight", 7),
        sample("feature_cache_nvm_cells_queued", 9),
        sample("feature_cache_nvm_reads_shared_total", 11 * times),
        sample("feature_cache_nvm_reads_coalesced_total", 12 * times),
        sample("feature_cache_nvm_reads_refused_total", 13 * times),
        sample("feature_cache_nvm_reads_abandoned_total", 14 * times),
        sample("feature_cache_nvm_checksum_errors_total", 15 * times),
        sample(f"{SHARE}_budget_bytes", 60 * MIB, namespace="pin"),
        sample(f"{SHARE}_used_bytes", 30 * MIB, namespace="pin"),
        sample(f"{SHARE}_items", 5000, namespace="pin"),
        sample(f"{SHARE}_hits_total", 20 * times, namespace="pin"),
        sample(f"{SHARE}_promoted_total", 4 * times, namespace="pin"),
        sample(f"{SHARE}_demoted_total", 30 * times, namespace="pin"),
        sample(f"{SHARE}_reinserted_total", 6 * times, namespace="pin"),
        sample(f"{SHARE}_evicted_total", 8 * times, namespace="pin"),
        sample(f"{SHARE}_not_admitted_total", 2 * times, namespace="pin", reason="write_rate"),
        sample(f"{SHARE}_not_admitted_total", 0, namespace="pin", reason="expiring"),
        sample(f"{SHARE}_lost_reads_total", 3 * times, namespace="pin", reason="device"),
        sample(f"{SHARE}_budget_bytes", 0, namespace="user"),
    ]
    if speculative:
        for name, value in (("launched", 9), ("won_by_store", 5), ("won_by_nvm", 4), ("denied", 2)):
            samples.append(
                sample(f"feature_cache_speculative_{name}_total", value * times, namespace="pin")
            )
    domain = admin_pb2.DomainStats(name="main", hits=60 * times, budget_bytes=MIB)
    return admin_pb2.GetStatsResponse(
        monotonic_seconds=seconds,
        namespaces=[
            admin_pb2.NamespaceStats(
                name="pin",
                hits=80 * times,
                misses=20 * times,
                nvm_hits=20 * times,
                domains=[domain],
            ),
            admin_pb2.NamespaceStats(name="user", domains=[domain]),
        ],
        samples=samples,
    )


def shown(view: RenderableType) -> str:
    console = Console(width=240)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


def row(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.strip().startswith(start)]
    return [cell for cell in line.split("  ") if cell.strip()]


def test_devices_namespaces_and_lookups_since_the_start() -> None:
    view = nvm_view(reply(100.0, in_service=False))
    assert view.seconds is None
    first, second = view.devices
    assert (first.path, first.io, first.in_service) == ("/nvm/a", "io_uring", True)
    assert (second.path, second.in_service) == ("/nvm/b", False)
    assert second.fallback == "io_uring: not permitted"
    assert first.size_bytes == 64 * MIB
    assert first.regions == {"free": 40, "open": 1, "writing": 0, "sealed": 22, "emptying": 0}
    assert (first.reads, first.written_bytes, first.read_errors) == (100, 2 * MIB, 3)
    assert first.reads_per_second is None
    assert (view.reads_in_flight, view.cells_queued, view.checksum_errors) == (7, 9, 15)
    (pin,) = view.namespaces
    assert (pin.name, pin.budget_bytes, pin.items, pin.hits) == ("pin", 60 * MIB, 5000, 20)
    assert (pin.promoted, pin.demoted, pin.reinserted, pin.evicted) == (4, 30, 6, 8)
    assert pin.not_admitted == {"expiring": 0, "write_rate": 2}
    assert pin.lost_reads == {"device": 3}
    assert (pin.speculative.launched, pin.speculative.won_by_store) == (9, 5)
    assert (pin.speculative.won_by_nvm, pin.speculative.denied) == (4, 2)


def test_rates_between_two_replies() -> None:
    view = nvm_view(reply(104.0, times=3), reply(100.0))
    assert view.seconds == 4.0
    device = view.devices[0]
    assert (device.reads, device.reads_per_second) == (200, 50.0)
    assert device.written_bytes_per_second == MIB
    assert device.regions["free"] == 40  # a gauge: not a difference
    assert view.reads_coalesced == 24
    (pin,) = view.namespaces
    assert (pin.hits, pin.items, pin.not_admitted["write_rate"]) == (40, 5000, 4)
    assert pin.speculative.launched == 18


def test_a_restart_between_two_replies_gives_no_negative_figures() -> None:
    assert nvm_view(reply(104.0), reply(100.0, times=3)).devices[0].reads == 100
    assert nvm_view(reply(4.0), reply(100.0, times=3)).seconds is None


def test_the_tables_show_it() -> None:
    text = shown(nvm_tables(nvm_view(reply(100.0, in_service=False))))
    first = row(text, "/nvm/a")
    for expected in ("io_uring, direct", "in service", "64.0 MiB", "free 40, open 1, sealed 22"):
        assert any(expected in cell for cell in first), (expected, first)
    second = " ".join(row(text, "/nvm/b"))
    for expected in ("threads, buffered (io_uring: not permitted)", "out of service", "read 3"):
        assert expected in second
    pin = [cell.strip() for cell in row(text.partition("speculative lookups")[0], "pin ")]
    assert "write_rate 2" in pin
    assert "device 3" in pin
    for expected in ("regions of 1.0 MiB", "7 reads in flight", "15 checksum errors"):
        assert expected in text
    assert "won by store" in text
    assert "since start" in text
    watched = shown(nvm_tables(nvm_view(reply(104.0, times=3), reply(100.0))))
    assert "last 4.0 s" in watched
    assert "written/s" in watched


def test_a_daemon_without_lookups_or_nvm_shows_none() -> None:
    text = shown(nvm_tables(nvm_view(reply(100.0, speculative=False))))
    assert "speculative" not in text
    nothing = nvm_view(admin_pb2.GetStatsResponse(monotonic_seconds=1.0))
    assert (nothing.devices, nothing.namespaces, nothing.region_bytes) == ([], [], 0)


def test_json_has_every_figure() -> None:
    read = json.loads(json.dumps(nvm_view(reply(100.0)).to_dict()))
    assert read["devices"][0]["regions"]["sealed"] == 22
    assert read["namespaces"][0]["speculative"]["denied"] == 2
    assert read["seconds"] is None


def test_stats_show_what_came_from_nvm() -> None:
    view = stats_view(reply(100.0))
    pin, user = view.namespaces
    assert pin.hit_ratio == pytest.approx(0.8), "hits include those from NVM"
    assert pin.nvm is not None
    assert (pin.nvm.hits, pin.nvm.hit_ratio, pin.nvm.items) == (20, 0.2, 5000)
    assert pin.domains[0].hit_ratio == pytest.approx(0.6)
    assert user.nvm is None
    text = shown(stats_table(view))
    share = [cell.strip() for cell in row(text, "(NVM)")]
    assert share == ["(NVM)", "20.0 %", "20", "5,000", "30.0 MiB", "60.0 MiB", "50.0 %", "8"]
    later = stats_view(reply(102.0, times=3), reply(100.0)).namespaces[0].nvm
    assert later is not None
    assert (later.hits, later.hits_per_second, later.used_bytes) == (40, 20.0, 30 * MIB)


def test_status_has_a_line_a_device() -> None:
    status = admin_pb2.GetStatusResponse(
        state="SERVING",
        nvm_devices=[
            admin_pb2.NvmDeviceStatus(
                path="/nvm/a", bytes=64 * MIB, in_service=True, io="io_uring", direct=True
            ),
            admin_pb2.NvmDeviceStatus(path="/nvm/b", bytes=64 * MIB, io="threads"),
        ],
    )
    text = shown(status_table(status))
    assert "64.0 MiB, in service, io_uring, direct" in text
    assert "64.0 MiB, out of service, threads, buffered" in text
    read = json.loads(json.dumps(status_dict(status)))
    assert [device["in_service"] for device in read["nvm_devices"]] == [True, False]
    assert set(read) == {field.name for field in status.DESCRIPTOR.fields}
    assert set(read["nvm_devices"][0]) == {
        field.name for field in admin_pb2.NvmDeviceStatus.DESCRIPTOR.fields
    }


def test_samples_are_found_by_their_exact_labels() -> None:
    samples = Samples(reply(1.0))
    assert samples.value(f"{DEVICE}_bytes", device="/nvm/a") == 64 * MIB
    assert samples.value(f"{DEVICE}_bytes") == 0
    assert samples.value("no_such_metric") == 0
    assert samples.by("state", f"{DEVICE}_regions", device="/nvm/a")["sealed"] == 22
    assert samples.by("state", f"{DEVICE}_regions") == {}
    assert Samples(None).labels(f"{DEVICE}_info") == []


def test_an_absent_daemon_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["nvm", "--admin", f"unix:{tmp_path}/admin.sock"])
    assert result.exit_code == 3
    assert "is it running?" in result.stderr
