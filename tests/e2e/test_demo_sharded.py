"""The demo of a cluster that loses a leaf, as `make demo-sharded` runs it, only shorter."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks._cluster_load import Batch, by_second
from benchmarks.demo_sharded.__main__ import _report

_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ended() -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.demo_sharded", "--quick", "--json"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_killed_leaf_is_not_felt_and_recovery_is_shown(
    ended: subprocess.CompletedProcess[str],
) -> None:
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report: dict[str, Any] = json.loads(ended.stdout)
    assert report["batches"] > 200
    assert report["failed_batches"] == 0
    assert report["wrong_values"] == 0
    assert report["hit_ratio_by_second"][-1] > 0.9
    assert "kill -9 leaf-2" in ended.stderr
    assert "leaf-2 -/-" in ended.stderr
    assert "every shard has both replicas again" in ended.stderr


class _Load:
    """What `_report` asks of a load."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches

    def failures(self) -> list[str]:
        return [batch.failure for batch in self._batches if batch.failure]


def _problems(*batches: Batch) -> list[str]:
    load: Any = _Load(list(batches))
    report = _report(by_second(batches, 0.0), load, kill_at=1.5)
    found: list[str] = report["problems"]
    return found


def test_what_must_not_happen_is_a_failure() -> None:
    good = [Batch(at + 0.5, 0.01, 100, 100, 100) for at in range(6)]
    assert _problems(*good) == []
    # The cells of a batch that failed have no value either.
    failed, missing = _problems(*good, Batch(3.2, 0.1, 100, failure="Unavailable: gone"))
    assert failed == "1 batches failed: Unavailable: gone"
    assert missing == "100 of 500 cells without a value"
    assert "1 values were wrong" in _problems(*good, Batch(3.2, 0.1, 100, 100, 100, wrong=1))
    assert "cells without a value" in _problems(*good, Batch(4.1, 0.1, 100, 90, 90))[0]
    assert _problems(*good, Batch(1.6, 0.1, 100, 0, 0)) == [], "the second of the kill is left out"
    assert "did not recover" in _problems(*good, Batch(6.1, 0.1, 100, 100, 10))[0]
