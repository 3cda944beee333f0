"""A daemon whose node is split over instances: what operators and clients see of it, and what they
do not. A real process, real shared memory and files."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cache_daemon.client import Status, WriteStatus
from tests.daemon_process import Daemon, Start

KEYS = [b"mine %d" % number for number in range(2000)]  # the store has none of these
VALUES = [b"value of mine %d" % number for number in range(2000)]


@pytest.fixture
def three(config: dict[str, Any], tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A separate node of three instances with an NVM tier, all of which outlives the process."""
    shared = Path(tempfile.mkdtemp(prefix="fc-e2e-", dir="/dev/shm"))
    config["topology"] = "separate"
    config["memory"] = {"size": "90MiB", "instances": 3}
    config["persist"] = {"dir": str(shared), "name": "e2e"}
    config["nvm"] = {"devices": [{"path": str(tmp_path / "nvm"), "size": "12MiB"}]}
    config["namespaces"]["pin"]["nvm"] = {"budget": "100%"}
    yield config
    shutil.rmtree(shared)


def fill(daemon: Daemon) -> None:
    with daemon.client() as client:
        put = client.batch_put({"pin": (KEYS, VALUES)})
        assert set(put["pin"].tolist()) == {WriteStatus.STORED}


def assert_found(daemon: Daemon) -> None:
    with daemon.client() as client:
        column = client.batch_get({"pin": KEYS})["pin"]
        assert column.statuses.tolist() == [Status.HIT_DRAM] * len(KEYS)
        assert list(column.to_bytes()) == VALUES


def cachectl(daemon: Daemon, *words: str) -> str:
    command = [str(Path(sys.executable).with_name("cachectl")), *words]
    command += ["--admin", daemon.addresses["admin"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout


def by_instance(daemon: Daemon, what: str) -> list[float]:
    pattern = rf'^feature_cache_instance_{what}{{instance="(\d)"}} (\S+)$'
    found = re.findall(pattern, daemon.http("/metrics")[1], re.MULTILINE)
    assert [number for number, _ in found] == ["0", "1", "2"]
    return [float(value) for _, value in found]


def test_three_instances_are_one_node(three: dict[str, Any], start: Start, tmp_path: Path) -> None:
    daemon = start(three)
    fill(daemon)
    assert_found(daemon)
    items = by_instance(daemon, "items")
    assert sum(items) == len(KEYS)
    assert min(items) > len(KEYS) / 4
    assert by_instance(daemon, "memory_bytes") == [30 << 20] * 3
    assert sum(by_instance(daemon, "hits_total")) == len(KEYS)
    stats = json.loads(cachectl(daemon, "stats", "--json"))
    assert len(KEYS) in _numbers(stats), stats
    assert json.loads(cachectl(daemon, "status", "--json"))["state"] == "SERVING"
    assert {path.name for path in tmp_path.glob("nvm*")} >= {"nvm", "nvm-1", "nvm-2"}


def test_they_stop_and_start_together(three: dict[str, Any], start: Start) -> None:
    first = start(three)
    fill(first)
    first.signal()
    assert first.wait() == 0, first.log
    second = start(three)
    assert_found(second)
    assert "memory: clean, adopted 2,000 items in " in second.log
    second.process.kill()
    second.wait()
    second.ready_path.unlink()
    third = start(three)
    assert_found(third)
    report = json.loads(cachectl(third, "status", "--json"))["start"]
    assert report["memory"] == "checked"
    assert report["memory_reason"].startswith("instance 0: the owner before ended")
    assert report["memory_items"] == len(KEYS)


def _numbers(node: Any) -> list[float]:
    """All numbers in a JSON value, those that are written as text too."""
    if isinstance(node, dict):
        return [number for value in node.values() for number in _numbers(value)]
    if isinstance(node, list):
        return [number for value in node for number in _numbers(value)]
    return [float(node)] if re.fullmatch(r"\d+(\.\d+)?", str(node)) else []
