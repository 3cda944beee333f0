"""`cachectl warmup` over the real admin service: what it shows, begins and ends, how it exits."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cache_daemon.admin import AdminServer, DaemonStatus
from cache_daemon.cachectl import app
from cache_daemon.node_holder import NodeHolder
from cache_daemon.warmup_status import UploadStatus, WarmupRefused, WarmupStatus

_RUNNING = WarmupStatus(
    "running",
    phase="replaying",
    keys_done=1500,
    keys_total=6000,
    keys_fetched=1400,
    keys_failed=3,
    keys_per_second=500.0,
    rate_limit=1000.0,
    predicted_hit_ratio=0.25,
    target_hit_ratio=0.95,
    seconds=3.0,
    seconds_left=9.0,
    max_seconds=600.0,
    snapshots=2,
    fleet_members=3,
    uploads=UploadStatus(uploaded=7, pending=1, problem="no such bucket"),
)
_WARMED = replace(
    _RUNNING, state="warmed", phase="", keys_done=6000, predicted_hit_ratio=0.96, seconds_left=None
)


class Daemon:
    """An admin service whose warm-up goes through `states`, one an asking; the last one stays."""

    def __init__(self, folder: Path) -> None:
        self.states: list[WarmupStatus | None] = [_RUNNING]
        self.started: list[float | None] = []
        self.refusal = ""
        self.admin = AdminServer(
            NodeHolder(), f"unix:{folder}/admin.sock", self._status, lambda _: None, warmup=self
        )

    def start(self, max_duration_s: float | None) -> None:
        if self.refusal:
            raise WarmupRefused(self.refusal)
        self.started.append(max_duration_s)

    def stop(self) -> bool:
        state = self.states[0]
        return state is not None and state.state == "running"

    def _status(self) -> DaemonStatus:
        warmup = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return DaemonStatus(
            state="SERVING",
            version="1",
            topology="colocated",
            uptime_seconds=1.0,
            data_addresses=[],
            http_address="",
            memory_bytes=1,
            namespaces=[],
            warmup=warmup,
        )

    def ctl(self, *arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--admin", self.admin.address])


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path)
    yield made
    made.admin.stop(0.1)


def test_a_status_says_how_far_it_is(daemon: Daemon) -> None:
    shown = " ".join(daemon.ctl("warmup", "status").stdout.split())
    for text in ("running, replaying", "1,500 of 6,000 keys", "3 failed", "from 2 snapshots"):
        assert text in shown, shown
    assert "25.0%, target 95%" in shown
    assert "500 keys/s, at most 1,000/s, shared by 3 nodes" in shown
    assert "7 windows, 1 wait" in shown
    assert "no such bucket" in shown


def test_a_status_is_json_for_scripts(daemon: Daemon) -> None:
    seen = json.loads(daemon.ctl("warmup", "status", "--json").stdout)
    assert (seen["state"], seen["phase"]) == ("running", "replaying")
    assert (seen["keys_done"], seen["keys_total"], seen["seconds_left"]) == (1500, 6000, 9.0)
    assert seen["uploads"]["uploaded"] == 7
    daemon.states = [replace(_WARMED, uploads=None, predicted_hit_ratio=None)]
    seen = json.loads(daemon.ctl("warmup", "status", "--json").stdout)
    assert (seen["uploads"], seen["predicted_hit_ratio"], seen["seconds_left"]) == (
        None,
        -1.0,
        -1.0,
    )


def test_the_daemons_own_status_has_it_in_a_line(daemon: Daemon) -> None:
    daemon.states = [WarmupStatus("failed", reason="no snapshot in time", serving_cold=True)]
    shown = " ".join(daemon.ctl("status").stdout.split())
    assert "warm-up failed, serves cold: no snapshot in time" in shown
    assert json.loads(daemon.ctl("status", "--json").stdout)["warmup"]["serving_cold"] is True


def test_a_watch_ends_when_the_warm_up_does(daemon: Daemon) -> None:
    daemon.states = [_RUNNING, _RUNNING, _WARMED]
    done = daemon.ctl("warmup", "status", "--watch")
    assert done.exit_code == 0
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("running, replaying, 1,500 of 6,000 keys, 500/s, 25.0% of the recorded")
    assert "9s left" in first
    assert last.startswith("warmed, 6,000 of 6,000 keys, 96.0%")


def test_a_watch_in_json_has_a_document_a_line(daemon: Daemon) -> None:
    daemon.states = [_RUNNING, _RUNNING, _WARMED]
    lines = daemon.ctl("warmup", "status", "--watch", "--json").stdout.splitlines()
    assert [json.loads(line)["state"] for line in lines][-1] == "warmed"


def test_one_is_begun_for_as_long_as_wanted(daemon: Daemon) -> None:
    done = daemon.ctl("warmup", "start", "--max-duration", "5m")
    assert (done.exit_code, daemon.started) == (0, [300.0])
    assert "warmup status --watch" in done.stdout
    assert json.loads(daemon.ctl("warmup", "start", "--json").stdout) == {"started": True}
    assert daemon.started == [300.0, None]


def test_a_start_that_is_watched_fails_when_nothing_came(daemon: Daemon) -> None:
    daemon.states = [_RUNNING, WarmupStatus("failed", reason="no snapshot")]
    done = daemon.ctl("warmup", "start", "--watch")
    assert done.exit_code == 1
    assert "the warm-up brought nothing: no snapshot" in done.stderr


def test_a_refusal_says_why(daemon: Daemon) -> None:
    daemon.refusal = "one runs already"
    done = daemon.ctl("warmup", "start")
    assert (done.exit_code, done.stderr) == (1, "cachectl: one runs already\n")
    assert daemon.ctl("warmup", "start", "--max-duration", "5").exit_code == 2
    assert daemon.ctl("warmup", "start", "--max-duration", "2d").exit_code == 1


def test_one_is_ended(daemon: Daemon) -> None:
    assert daemon.ctl("warmup", "stop").stdout == "ended\n"
    daemon.states = [_WARMED]
    assert daemon.ctl("warmup", "stop").stdout == "none was running\n"
    assert json.loads(daemon.ctl("warmup", "stop", "--json").stdout) == {"was_running": False}


def test_a_daemon_without_the_section_says_so(daemon: Daemon, tmp_path: Path) -> None:
    daemon.states = [None]
    for command in (["status"], ["status", "--watch"]):
        done = daemon.ctl("warmup", *command)
        assert done.exit_code == 1
        assert "no warmup section" in done.stderr
    bare = AdminServer(NodeHolder(), f"unix:{tmp_path}/bare.sock", daemon._status, lambda _: None)
    for command in (["start"], ["stop"]):
        done = CliRunner().invoke(app, ["warmup", *command, "--admin", bare.address])
        assert done.exit_code == 1
        assert "no warmup section" in done.stderr
    bare.stop(0.1)
