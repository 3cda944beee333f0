"""`cache-daemon warmup wait` over the real admin service: what it waits for, and how it exits."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cache_daemon import cli_warmup
from cache_daemon.admin import AdminServer, DaemonStatus
from cache_daemon.hooks import HookExit, WaitLimits, drain_until_gone, stop_signals, wait_until_warm
from cache_daemon.node_holder import NodeHolder
from cache_daemon.warmup_status import WarmupStatus

_RUNNING = WarmupStatus(
    "running",
    phase="replaying",
    keys_done=1500,
    keys_total=6000,
    predicted_hit_ratio=0.25,
    target_hit_ratio=0.95,
    seconds=3.0,
    max_seconds=600.0,
)
_WARMED = replace(
    _RUNNING, state="warmed", phase="", keys_done=6000, predicted_hit_ratio=0.96, seconds_left=None
)
_COLD = WarmupStatus("failed", reason="no snapshot in time", serving_cold=True)
_Step = tuple[str, WarmupStatus | None]


class Daemon:
    """An admin service that goes through `steps`, one an asking; the last one stays."""

    def __init__(self, folder: Path) -> None:
        self.address = f"unix:{folder}/admin.sock"
        self.steps: list[_Step] = [("SERVING", None)]
        self.drains: list[float | None] = []
        self._admin: AdminServer | None = None

    def begin(self) -> None:
        self._admin = AdminServer(NodeHolder(), self.address, self._status, self.drains.append)

    def end(self) -> None:
        if self._admin is not None:
            self._admin.stop(0.1)
            self._admin = None

    def _status(self) -> DaemonStatus:
        state, warmup = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        return DaemonStatus(
            state=state,
            version="1",
            topology="colocated",
            uptime_seconds=1.0,
            data_addresses=[],
            http_address="",
            memory_bytes=1,
            namespaces=[],
            warmup=warmup,
        )

    def hook(self, *arguments: str) -> Result:
        return CliRunner().invoke(cli_warmup.app, [*arguments, "--admin", self.address])


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path)
    yield made
    made.end()


@pytest.fixture
def there(daemon: Daemon) -> Daemon:
    daemon.begin()
    return daemon


# ---- how it ends ---------------------------------------------------------------------------------


def test_it_waits_until_the_daemon_is_warm(there: Daemon) -> None:
    there.steps = [
        ("STARTING", _RUNNING),
        ("RECOVERING", _RUNNING),
        ("WARMING", _RUNNING),
        ("SERVING", _WARMED),
    ]
    done = there.hook("wait")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("warm after ")
    assert "SERVING: warmed, 6,000 of 6,000 keys, 96.0% of the recorded" in done.stdout
    lines = done.stderr.splitlines()
    assert [line.split()[0].strip(":") for line in lines] == ["STARTING", "RECOVERING", "WARMING"]
    assert "running, replaying, 1,500 of 6,000 keys" in lines[2]


@pytest.mark.parametrize(
    "warmup",
    [
        None,  # no section: nothing to warm up
        WarmupStatus("off"),
        replace(_WARMED, state="partial", predicted_hit_ratio=0.5),
        replace(_WARMED, state="stopped", reason="by an operator"),
        _RUNNING,  # which an operator began while it serves
    ],
)
def test_a_daemon_that_serves_and_is_not_cold_is_warm(
    there: Daemon, warmup: WarmupStatus | None
) -> None:
    there.steps = [("SERVING", warmup)]
    assert there.hook("wait").exit_code == 0


def test_a_daemon_that_serves_cold_has_a_code_of_its_own(there: Daemon) -> None:
    there.steps = [("WARMING", _RUNNING), ("SERVING", _COLD)]
    done = there.hook("wait")
    assert (done.exit_code, done.stdout) == (4, "")
    assert "serves cold: SERVING: failed, no snapshot in time" in done.stderr


@pytest.mark.parametrize(
    ("warmup", "code", "said"),
    [
        (_WARMED, 0, ""),
        (replace(_WARMED, predicted_hit_ratio=0.79), 4, "less than 80.0% would hit"),
        (replace(_WARMED, predicted_hit_ratio=None), 4, "hit ratio is not known"),
        (WarmupStatus("off"), 4, "hit ratio is not known"),
        (None, 4, "hit ratio is not known"),
    ],
)
def test_a_least_hit_ratio_may_be_asked_for(
    there: Daemon, warmup: WarmupStatus | None, code: int, said: str
) -> None:
    there.steps = [("SERVING", warmup)]
    done = there.hook("wait", "--min-hit-ratio", "80%")
    assert done.exit_code == code
    assert said in done.stderr


def test_a_wait_has_its_time(there: Daemon) -> None:
    there.steps = [("WARMING", _RUNNING)]
    began = time.monotonic()
    done = there.hook("wait", "--timeout", "1s")
    assert done.exit_code == 3
    assert 1.0 <= time.monotonic() - began < 10.0
    assert "not warm within 1 s: WARMING: running, replaying" in done.stderr


def test_a_daemon_that_is_not_there_has_its_time_to_come(daemon: Daemon) -> None:
    done = daemon.hook("wait", "--reach", "600ms")
    assert done.exit_code == 5
    assert "is it running?" in done.stderr
    late = threading.Timer(1.5, daemon.begin)
    late.start()
    done = daemon.hook("wait", "--reach", "20s")
    late.join()
    assert done.exit_code == 0, done.output


def test_the_time_of_all_holds_for_one_that_never_comes(daemon: Daemon) -> None:
    assert daemon.hook("wait", "--timeout", "600ms", "--reach", "1h").exit_code == 5


def test_a_daemon_that_ends_in_its_warm_up_is_told_with_what_it_was(there: Daemon) -> None:
    there.steps = [("WARMING", _RUNNING)]
    end = threading.Timer(1.0, there.end)
    end.start()
    done = there.hook("wait", "--reach", "1s")
    end.join()
    assert done.exit_code == 5
    assert "is it running?; before, it was WARMING: running, replaying, 1,500" in done.stderr


def test_a_daemon_that_restarts_is_waited_for(there: Daemon) -> None:
    there.steps = [("WARMING", _RUNNING)]
    results: list[HookExit] = []

    def wait() -> None:  # not as a command: signals are for the main thread alone
        limits = WaitLimits(timeout_s=20.0, reach_s=10.0)
        stop = threading.Event()
        outcome = wait_until_warm(there.address, limits, stop, lambda _line, _status: None)
        results.append(outcome.code)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.8)
    there.end()
    time.sleep(0.8)
    there.steps = [("WARMING", _RUNNING), ("SERVING", _WARMED)]
    there.begin()
    waiting.join(20)
    assert results == [HookExit.DONE]


@pytest.mark.parametrize("state", ["DRAINING", "STOPPED"])
def test_a_daemon_that_is_about_to_end_is_not_waited_for(there: Daemon, state: str) -> None:
    there.steps = [(state, _WARMED)]
    done = there.hook("wait")
    assert done.exit_code == 5
    assert f"the daemon is {state}: somebody stops it" in done.stderr


# ---- for people ----------------------------------------------------------------------------------


def test_on_a_terminal_there_is_a_bar(there: Daemon) -> None:
    there.steps = [*[("WARMING", _RUNNING)] * 3, ("SERVING", _WARMED)]
    leader, follower = os.openpty()
    command = [str(Path(sys.executable).with_name("cache-daemon")), "warmup", "wait"]
    with subprocess.Popen(
        [*command, "--admin", there.address],
        env=os.environ | {"COLUMNS": "200", "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=follower,
    ) as process:
        try:
            os.close(follower)
            shown = b""
            with suppress(OSError):  # the other end is gone
                while part := os.read(leader, 65536):
                    shown += part
            assert process.wait(30) == 0
            assert process.stdout is not None
            assert process.stdout.read().startswith(b"warm after ")
        finally:
            process.kill()
            os.close(leader)
    assert "━" in shown.decode()
    assert "WARMING: running, replaying, 1,500 of 6,000 keys" in shown.decode()
    assert b"\x1b[2K" in shown  # and it goes when it is over


# ---- for scripts ---------------------------------------------------------------------------------


def test_a_result_is_json_for_scripts(there: Daemon) -> None:
    there.steps = [("WARMING", _RUNNING), ("SERVING", _COLD)]
    done = there.hook("wait", "--json")
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert (result["result"], result["exit_code"], done.exit_code) == ("cold", 4, 4)
    assert (result["state"], result["warmup"]["serving_cold"]) == ("SERVING", True)
    assert result["warmup"]["reason"] == "no snapshot in time"
    assert 0.4 < result["seconds"] < 10
    there.end()
    result = json.loads(there.hook("wait", "--json", "--reach", "100ms").stdout)
    assert (result["result"], result["state"], result["warmup"]) == ("unreachable", None, None)


def test_the_address_is_the_configs(there: Daemon, tmp_path: Path) -> None:
    def config(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(
            "memory: {size: 16MiB}\nnamespaces: {pin: {domains: {main: {budget: 50%}}}}\n"
            f"listen: {{grpc: ['127.0.0.1:0']{text}}}\n"
        )
        return path

    def hook(*arguments: str) -> Result:
        return CliRunner().invoke(cli_warmup.app, ["wait", *arguments])

    path = config(f", admin: '{there.address}'")
    assert hook("--config", str(path)).exit_code == 0
    assert hook("--config", str(path), "--admin", there.address).exit_code == 2
    # What the environment says gives way: it is for all commands.
    done = CliRunner().invoke(
        cli_warmup.app,
        ["wait", "--config", str(path)],
        env={"FEATURE_CACHE_ADMIN": f"unix:{tmp_path}/other.sock"},
    )
    assert done.exit_code == 0, done.output
    done = hook("--config", str(config("")))
    assert done.exit_code == 2
    assert "no listen.admin" in " ".join(done.output.split())
    assert hook("--config", str(config(", admin: '127.0.0.1:0'"))).exit_code == 2
    assert hook("--config", str(config(", wrong: true"))).exit_code == 2
    assert hook("--config", str(tmp_path / "none")).exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["wait", "--timeout", "5"],
        ["wait", "--min-hit-ratio", "1.5"],
        ["wait", "--min-hit-ratio", "much"],
        ["drain", "--delay", "soon"],
        ["aws-lifecycle", "--hook", "h"],
        ["aws-lifecycle", "--hook", "h", "--group", "g", "--watch"],
        ["aws-lifecycle", "--hook", "h", "--group", "g", "--on-failure", "hope"],
        ["aws-lifecycle", "--hook", "h", "--group", "g", "--heartbeat", "1ms"],
        [
            *("aws-lifecycle", "--hook", "h", "--group", "g", "--watch", "--terminating"),
            *("--instance-id", "i-1"),
        ],
    ],
)
def test_wrong_usage_is_told_at_once(there: Daemon, arguments: list[str]) -> None:
    done = there.hook(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert there.drains == []


# ---- a drain -------------------------------------------------------------------------------------


def test_a_drain_ends_with_the_daemon(there: Daemon) -> None:
    end = threading.Timer(1.0, there.end)
    end.start()
    done = there.hook("drain", "--within", "3s")
    end.join()
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("drained after ")
    assert there.drains == [3.0]


def test_a_drain_is_asked_for_once_and_as_configured(there: Daemon) -> None:
    done = there.hook("drain", "--timeout", "1s")
    assert done.exit_code == 3
    assert "still there after 1 s" in done.stderr
    assert there.drains == [None]


def test_a_drain_may_be_put_off(there: Daemon) -> None:
    seen: list[int] = []
    look = threading.Timer(0.5, lambda: seen.append(len(there.drains)))
    look.start()
    there.hook("drain", "--delay", "2s", "--timeout", "100ms")
    look.join()
    assert (seen, len(there.drains)) == ([0], 1)


def test_another_daemon_in_its_place_is_not_waited_for(there: Daemon) -> None:
    # The same process, and so the same pid, as in a container: what is younger is another one.
    uptimes = iter([100.0, 100.5, 0.1])
    status = there._status
    there._status = lambda: replace(status(), uptime_seconds=next(uptimes))  # type: ignore[method-assign]
    there.end()
    there.begin()
    done = there.hook("drain")
    assert done.exit_code == 0
    assert "another one began" in done.stdout


def test_a_drain_of_nothing_says_so(daemon: Daemon) -> None:
    done = daemon.hook("drain")
    assert done.exit_code == 5
    assert "is it running?" in done.stderr


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_wait(there: Daemon, number: signal.Signals) -> None:
    there.steps = [("WARMING", _RUNNING)]
    before = signal.getsignal(number)
    began = time.monotonic()
    kill = threading.Timer(0.7, lambda: signal.raise_signal(number))
    kill.start()
    done = there.hook("wait")
    kill.join()
    assert done.exit_code == 143
    assert time.monotonic() - began < 5
    assert signal.getsignal(number) is before


def test_a_signal_leaves_a_drain_under_way(there: Daemon) -> None:
    with stop_signals() as stop:
        stop.set()
        outcome = drain_until_gone(there.address, 0.0, 60.0, stop, lambda _line, _status: None)
    assert outcome.code is HookExit.SIGNALLED
    assert "drains on" in outcome.message
    assert there.drains == [None]
