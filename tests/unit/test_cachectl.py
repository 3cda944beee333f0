"""What cachectl works out and how it fails; against a real daemon it is in tests/integration."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner, Result

from cache_daemon._proto.feature_cache.v1 import admin_pb2
from cache_daemon.cachectl import app
from cache_daemon.cachectl_data import preview
from cache_daemon.cachectl_view import (
    human_bytes,
    human_count,
    namespaces_table,
    stats_table,
    stats_view,
    status_dict,
    status_table,
)


def stats(
    seconds: float, *, hits: tuple[int, int], misses: int, negative: int = 0, evictions: int = 0
) -> admin_pb2.GetStatsResponse:
    """One namespace of two domains, whose hits are given domain by domain."""
    domains = [
        admin_pb2.DomainStats(
            name=name,
            policy="s3fifo",
            hits=count,
            items=10,
            used_bytes=512,
            budget_bytes=1024,
            evictions=evictions,
            ttl_seconds=ttl,
        )
        for name, count, ttl in (("long_lasting", hits[0], 0.0), ("ephemeral", hits[1], 90.0))
    ]
    namespace = admin_pb2.NamespaceStats(
        name="pin_text",
        hits=sum(hits),
        misses=misses,
        negative_hits=negative,
        domains=domains,
        store="features",
        default_domain="long_lasting",
    )
    return admin_pb2.GetStatsResponse(monotonic_seconds=seconds, namespaces=[namespace])


def shown(table: Table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def run(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), env=env)


def test_totals_since_the_start() -> None:
    (namespace,) = stats_view(stats(100.0, hits=(60, 20), misses=15, negative=5)).namespaces
    assert namespace.hit_ratio == pytest.approx(0.85)
    assert namespace.lookups_per_second is None
    # Shares of the namespace's lookups: they add up to its hit ratio without negative hits.
    assert [domain.hit_ratio for domain in namespace.domains] == [0.6, 0.2]


def test_rates_and_ratios_between_two_replies() -> None:
    before = stats(100.0, hits=(60, 20), misses=15, negative=5, evictions=10)
    now = stats(104.0, hits=(60, 50), misses=25, negative=5, evictions=30)
    view = stats_view(now, before)
    (namespace,) = view.namespaces
    assert view.seconds == 4.0
    assert (namespace.hits, namespace.misses, namespace.negative_hits) == (30, 10, 0)
    assert namespace.hit_ratio == pytest.approx(0.75)
    assert namespace.lookups_per_second == pytest.approx(10.0)
    long_lasting, ephemeral = namespace.domains
    assert (long_lasting.hits, long_lasting.hit_ratio) == (0, 0.0)
    assert (ephemeral.hits_per_second, ephemeral.hit_ratio) == (7.5, 0.75)
    assert ephemeral.evictions_per_second == pytest.approx(5.0)
    assert ephemeral.items == 10  # a gauge: not a difference


def test_no_lookups_is_no_ratio() -> None:
    same = stats(1.0, hits=(5, 5), misses=5)
    (namespace,) = stats_view(stats(3.0, hits=(5, 5), misses=5), same).namespaces
    assert namespace.hit_ratio is None
    assert namespace.domains[0].hit_ratio is None
    assert namespace.lookups_per_second == 0


def test_a_restart_between_two_replies_gives_no_negative_figures() -> None:
    before = stats(500.0, hits=(1000, 0), misses=1000)
    later_boot = stats_view(stats(502.0, hits=(3, 0), misses=1), before)
    assert later_boot.namespaces[0].hits == 3
    assert later_boot.namespaces[0].hit_ratio == 0.75
    other_clock = stats_view(stats(2.0, hits=(3, 0), misses=1), before)
    assert other_clock.seconds is None
    assert other_clock.namespaces[0].hits == 3


def test_tables_show_what_the_view_holds() -> None:
    view = stats_view(stats(100.0, hits=(60, 20), misses=15, negative=5))
    text = shown(stats_table(view))
    for expected in ("pin_text", "85.0 %", "60.0 %", "since start", "50.0 %"):
        assert expected in text
    text = shown(namespaces_table(view))
    for expected in ("features", "long_lasting (default)", "1m30s", "none", "1.0 KiB"):
        assert expected in text


def test_status_as_table_and_json() -> None:
    status = admin_pb2.GetStatusResponse(
        state="SERVING",
        version="1.2.3",
        topology="colocated",
        uptime_seconds=61.2,
        pid=7,
        data_addresses=["unix:/a", "127.0.0.1:1"],
        memory_bytes=3 << 30,
        stores=[admin_pb2.StoreStatus(name="features", type="redis", breaker="open")],
    )
    text = shown(status_table(status))
    for expected in ("SERVING", "1m1s", "unix:/a", "3.0 GiB", "redis, breaker open", "off"):
        assert expected in text
    read = json.loads(json.dumps(status_dict(status)))
    assert read["stores"] == [{"name": "features", "type": "redis", "breaker": "open"}]
    assert set(read) == {field.name for field in status.DESCRIPTOR.fields}


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 40, "5.0 TiB")]
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_human_count() -> None:
    assert [human_count(n) for n in (1234, 1_250_000, 2_000_000_000)] == ["1,234", "1.2M", "2.0G"]


def test_preview_is_text_or_hexadecimal_and_short() -> None:
    assert preview("Amélie".encode()) == "Amélie"
    assert preview(b"\x00\xff\x10") == "00ff10"
    assert preview(b"a" * 100) == "a" * 60 + "…"
    assert preview(("a" + "é" * 40).encode()) == "a" + "é" * 29 + "…"
    assert preview("é".encode()[:1]) == "c3"
    assert "\n" not in preview(b"two\nlines")


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["stats", "--json"],
        ["stats", "--watch"],
        ["namespaces"],
        ["resize", "a", "b", "1GiB"],
        ["flush", "a", "--yes"],
        ["drain"],
    ],
)
def test_an_absent_daemon_is_named(command: list[str], tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/admin.sock"
    result = run(*command, "--admin", address)
    assert result.exit_code == 3
    assert f"cannot reach the daemon at {address}: is it running?" in result.stderr
    assert result.stdout == ""


def test_the_address_comes_from_the_environment(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/elsewhere.sock"
    assert address in run("status", env={"FEATURE_CACHE_ADMIN": address}).stderr


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["resize", "a", "b", "many"], "is not a size"),
        (["flush", "a"], "--yes"),
        (["stats", "--timeout", "5"], "is not a duration"),
        (["get", "a", "x", "--id"], "'x' is not a 64-bit integer"),
        (["get", "a", str(1 << 64), "--id"], "is not a 64-bit integer"),
        (["get", "a", "abc", "--hex"], "is not hexadecimal"),
        (["get", "a", "1", "--hex", "--id"], "exclude each other"),
        (["get", "a", ""], "1 to 1024"),
        (["get", "a", "k" * 1025], "1 to 1024"),
        (["get", "a", "k", "l", "--raw"], "one key"),
        (["put", "a", "k"], "--file"),
    ],
)
def test_wrong_usage(command: list[str], says: str) -> None:
    result = run(*command)
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.replace("│", " ").split())
