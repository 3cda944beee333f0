"""What a start says of itself: in the log, as metrics, in `cachectl status`; and before the node is
there."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from rich.console import Console

from cache_daemon._native import RecoveryProgress
from cache_daemon._proto.feature_cache.v1 import admin_pb2
from cache_daemon.cachectl_view import status_dict, status_table
from cache_daemon.metrics import HistogramLike, Metrics, SampleLike
from cache_daemon.node_holder import NodeHolder, NotServing
from cache_daemon.recovery import Progress, Start


@dataclass
class Progressing:
    phase: str = ""
    done: int = 0
    total: int = 0


@dataclass
class Report:
    """As of an orderly stop with an NVM tier."""

    memory: str = "clean"
    memory_reason: str = ""
    pages: str = "4 KiB (shmem_enabled: never)"
    memory_ms: float = 12.4
    memory_items: int = 17_900_000
    memory_dropped: int = 0
    nvm: str = "kept"
    nvm_reason: str = ""
    nvm_ms: float = 3.0
    nvm_items: int = 5
    nvm_dropped: int = 0
    set_aside: int = 0


def values(start: Start) -> dict[str, float]:
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value for sample in start.samples()
    }


def lines_of(report: Report, caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    with caplog.at_level(logging.INFO):
        Start(Progressing()).end(report)
    return [(record.levelname, record.getMessage()) for record in caplog.records]


# ---- the log -------------------------------------------------------------------------------------


def test_a_warm_start_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert lines_of(Report(), caplog) == [
        (
            "INFO",
            "memory: clean, adopted 17,900,000 items in 12 ms on 4 KiB (shmem_enabled: never)",
        ),
        ("INFO", "nvm: kept, 5 items in 3 ms"),
    ]


def test_a_checked_start_says_why_and_what_it_dropped(caplog: pytest.LogCaptureFixture) -> None:
    report = Report(
        "checked", "the owner before ended", "", memory_items=7, memory_dropped=1200, nvm="off"
    )
    assert lines_of(report, caplog) == [
        (
            "INFO",
            "memory: checked, adopted 7 items in 12 ms, 1,200 dropped: the owner before ended",
        )
    ]


def test_a_cold_start_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    report = Report("cold", "memory was 1 bytes", "2 MiB (hugetlbfs)", nvm="empty", nvm_reason="x")
    assert lines_of(report, caplog) == [
        ("WARNING", "memory: cold, starts empty on 2 MiB (hugetlbfs): memory was 1 bytes"),
        ("WARNING", "nvm: empty, starts empty: x"),
    ]


def test_nothing_is_said_where_nothing_outlives_the_process(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert lines_of(Report("off", nvm="new"), caplog) == []


def test_progress_is_told_with_its_rate(caplog: pytest.LogCaptureFixture) -> None:
    now = Progressing()
    start = Start(now)
    with caplog.at_level(logging.INFO):
        assert start.tell_progress() == "recovering"
        now.phase, now.total = "memory", 1000
        assert start.tell_progress() == "recovering memory: 0% of 1,000"
        now.done = 400
        line = start.tell_progress()
        assert line.startswith("recovering memory: 40% of 1,000, ")
        assert line.endswith("/s")
        now.phase, now.done, now.total = "nvm", 5, 0
        assert start.tell_progress() == "recovering nvm: 5"
        start.end(Report())
        assert start.tell_progress() == ""
    assert "recovering memory: 40% of 1,000, " in caplog.text


def test_a_share_never_passes_the_whole() -> None:
    assert Progress("nvm", 12, 10, 0).share == 1.0
    assert Progress("", 0, 0, 0).share == 0.0


# ---- metrics -------------------------------------------------------------------------------------


def test_while_it_recovers_there_is_progress_and_then_what_it_found() -> None:
    now = Progressing("nvm", 3, 4)
    start = Start(now)
    assert values(start) == {"feature_cache_recovery_progress nvm": 0.75}
    assert start.report is None
    start.end(Report(memory_dropped=2, set_aside=1))
    assert start.progress is None
    assert values(start) == {
        "feature_cache_start_info clean kept 4 KiB (shmem_enabled: never)": 1,
        "feature_cache_start_memory_seconds": 0.0124,
        "feature_cache_start_nvm_seconds": 0.003,
        "feature_cache_start_items dram": 17_900_000,
        "feature_cache_start_items nvm": 5,
        "feature_cache_start_dropped_items dram": 2,
        "feature_cache_start_dropped_items nvm": 0,
        "feature_cache_start_set_aside_total": 1,
    }
    metrics = Metrics([start], state=lambda: "SERVING", build_info={})
    assert b'feature_cache_start_items{tier="dram"} 1.79e+07\n' in metrics.render()[1]
    assert b"feature_cache_scrape_conflicts 0.0\n" in metrics.render()[1]


def test_the_engines_progress_begins_at_nothing() -> None:
    progress = RecoveryProgress()
    assert (progress.phase, progress.done, progress.total) == ("", 0, 0)


# ---- status --------------------------------------------------------------------------------------


def shown(status: admin_pb2.GetStatusResponse) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(status_table(status))
    return capture.get()


def test_status_shows_how_far_it_is() -> None:
    status = admin_pb2.GetStatusResponse(
        state="RECOVERING",
        recovery=admin_pb2.RecoveryStatus(phase="nvm", done=1, total=4000, seconds=2.5),
    )
    assert "nvm: 0% of 4,000, 2.5 s" in shown(status)
    assert status_dict(status)["recovery"] == {
        "phase": "nvm",
        "done": 1,
        "total": 4000,
        "seconds": 2.5,
    }
    assert status_dict(status)["start"] is None


def test_status_shows_how_it_started() -> None:
    start = admin_pb2.StartStatus(
        memory="cold",
        memory_reason="memory was 1 bytes",
        pages="4 KiB",
        nvm="rebuilt",
        nvm_items=1234,
        nvm_seconds=1.5,
        nvm_dropped=6,
        set_aside=1,
    )
    text = shown(admin_pb2.GetStatusResponse(state="SERVING", start=start))
    assert "cold, 0 items in 0 ms, 4 KiB; memory was 1 bytes" in text
    assert "rebuilt, 1,234 items in 1,500 ms, 6 dropped" in text
    assert "1 files of an unknown format" in text


def test_status_is_silent_where_nothing_outlives_the_process() -> None:
    off = admin_pb2.GetStatusResponse(start=admin_pb2.StartStatus(memory="off", nvm="new"))
    assert "start" not in shown(off)
    assert status_dict(off)["start"]["memory"] == "off"


# ---- a node that is not there --------------------------------------------------------------------


class Node:
    def samples(self) -> Sequence[SampleLike]:
        return Start(Progressing("nvm")).samples()

    def histograms(self) -> Sequence[HistogramLike]:
        return []

    def resize_domain(self, namespace: str, domain: str, budget_bytes: int) -> int:
        return len(namespace + domain) + budget_bytes

    def flush_namespace(self, namespace: str) -> int:
        return len(namespace)


def test_without_a_node_there_are_no_samples_and_a_reason() -> None:
    holder = NodeHolder()
    assert list(holder.samples()) == []
    assert list(holder.histograms()) == []
    with pytest.raises(NotServing, match="recovering; try again"):
        holder.flush_namespace("pin")
    holder.put(Node())
    assert len(holder.samples()) == 1
    assert holder.flush_namespace("pin") == 3
    assert holder.resize_domain("a", "b", 5) == 7
    holder.take_away()
    assert list(holder.samples()) == []
    with pytest.raises(NotServing, match="stopping"):
        holder.resize_domain("a", "b", 5)
