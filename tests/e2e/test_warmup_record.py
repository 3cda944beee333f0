"""Recording what a daemon serves: files of whole windows, and disks that are full or gone.

A real daemon; the full disk is a real file system of a megabyte.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cache_daemon._native import RequestLogInfo, inspect_request_log
from cache_daemon.client import Client, Status
from tests.daemon_process import KEYS, Daemon, Start
from tests.servers import wait_until

_SUFFIX = ".fcrl"


def recorded(folder: Path) -> list[RequestLogInfo]:
    """What stands in the finished files."""
    return [inspect_request_log(path.read_bytes()) for path in sorted(folder.glob(f"*{_SUFFIX}"))]


def samples(daemon: Daemon, name: str) -> dict[str, float]:
    """The values of a metric by its labels as text."""
    lines = daemon.http("/metrics")[1].splitlines()
    found = [line.rpartition(" ") for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
    return {series.removeprefix(name): float(value) for series, _, value in found}


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def ask_often(client: Client, seconds: float, keys: int = 500) -> int:
    """Distinct keys that the store does not have, so that a log grows; how many requests."""
    asked = 0
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        names = [os.urandom(32) for _ in range(keys)]
        statuses = client.batch_get({"pin": names})["pin"].statuses
        assert set(statuses.tolist()) == {Status.NOT_FOUND}
        asked += 1
    return asked


def test_windows_hold_what_was_asked_and_nothing_else(
    config: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "log" / "of-requests"  # made by the daemon
    config["warmup"] = {
        "record": {
            "dir": str(folder),
            "sample": "100%",
            "window": "1s",
            "namespaces": {"user": "exclude"},
        }
    }
    daemon = start(config)
    with daemon.client() as client:
        for _ in range(3):
            client.batch_get({"pin": KEYS[:100], "user": [b"u"]})
    wait_until(lambda: bool(recorded(folder)), 10, "a finished window")
    daemon.signal()
    assert daemon.wait() == 0
    infos = recorded(folder)
    assert sum(info.requests for info in infos) == 3
    assert sum(info.keys for info in infos) == 300
    for info in infos:
        assert info.window_ms == 1000
        assert info.window_start_ms % 1000 == 0
        assert info.complete
        assert {name: how for name, how, *_ in info.namespaces}["user"] == "exclude"
    assert not list(folder.glob("*.part"))
    # Keys alone: no value got there.
    assert not any(b"value of" in path.read_bytes() for path in folder.iterdir() if path.is_file())


def test_a_full_disk_loses_log_and_no_request(
    config: dict[str, Any], start: Start, full_disk: Path
) -> None:
    filler = full_disk / "filler"
    folder = full_disk / "log"
    config["warmup"] = {"record": {"dir": str(folder), "sample": "100%", "window": "1s"}}
    daemon = start(config)
    filler.write_bytes(b"x" * (shutil.disk_usage(full_disk).free - (64 << 10)))
    with daemon.client() as client:
        assert ask_often(client, 3.0) > 10
        dropped = samples(daemon, "feature_cache_record_dropped_keys_total")
        assert dropped.get('{reason="disk"}', 0) > 0, dropped
        # There is room again: what comes now is recorded.
        filler.unlink()
        before = samples(daemon, "feature_cache_record_keys_total")[""]
        wait_until(
            lambda: (
                bool(ask_often(client, 0.2))
                and samples(daemon, "feature_cache_record_keys_total")[""] > before + 1000
            ),
            20,
            "it records again",
        )
    daemon.signal()
    assert daemon.wait() == 0
    assert any(info.complete for info in recorded(folder))


def test_the_log_stays_within_its_size(
    config: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "log"
    config["warmup"] = {
        "record": {"dir": str(folder), "sample": "100%", "window": "1s", "size": "1MiB"}
    }
    daemon = start(config)
    with daemon.client() as client:
        deadline = time.monotonic() + 6
        while time.monotonic() < deadline:
            ask_often(client, 0.3)
            size = sum(path.stat().st_size for path in folder.iterdir())
            assert size <= (1 << 20) + 4096, size
    assert samples(daemon, "feature_cache_record_files_dropped_total")[""] > 0
    daemon.signal()
    assert daemon.wait() == 0
