"""The demo as `make demo` runs it, only shorter: a real daemon, real data, and an exit code."""

import dataclasses
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.demo import dataset, features
from benchmarks.demo.candidates import ranking_requests
from benchmarks.demo.daemon_stats import StatsReader
from benchmarks.demo.replay import NAMESPACES, Replay
from benchmarks.demo.server import DaemonError, DaemonProcess, derive_config
from cache_daemon.client import Client

_ROOT = Path(__file__).resolve().parents[2]
_CONFIG = _ROOT / "configs" / "demo.yaml"


def _demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.demo", *arguments],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=90,
    )


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    began = time.monotonic()
    ended = _demo("--seconds", "6", "--stride", "40", "--json")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert time.monotonic() - began < 60
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def test_the_hit_ratio_climbs_over_real_requests(report: dict[str, Any]) -> None:
    assert report["ok"]
    assert report["requests"] >= 300
    assert report["keys"] >= 2 * 500 * report["requests"]
    assert report["warm_hit_ratio"] > report["cold_hit_ratio"] + 0.2
    assert report["warm_hit_ratio"] < 0.9999, "the data does not fit, so something must miss"
    assert set(report["namespace_hit_ratio"]) == set(NAMESPACES)


def test_the_data_is_four_times_the_dram_and_eviction_ran(report: dict[str, Any]) -> None:
    assert report["data_bytes"] >= 4 * report["dram_budget_bytes"]
    assert report["data_bytes"] > 1.5 * report["nvm_bytes"]
    assert report["evictions"] > 0


def test_what_dram_evicted_came_back_from_nvm(report: dict[str, Any]) -> None:
    assert report["nvm_hits"] > 0.01 * report["keys"]
    assert report["data_bytes"] >= 20 * report["nvm_region_bytes"]
    assert report["nvm_regions"] >= 20
    assert report["nvm_written_bytes"] > 0


def test_the_store_is_asked_for_what_missed_and_nothing_else(report: dict[str, Any]) -> None:
    hits = round(report["hit_ratio"] * report["keys"])
    assert report["store_keys_saved"] == report["keys"] - report["store_keys"]
    # Single flight may answer two misses by one read; refreshes and retries may add a few.
    assert report["store_keys_saved"] >= 0.98 * hits
    assert report["store_calls"] > 0


def test_values_were_checked_and_several_domains_served(report: dict[str, Any]) -> None:
    assert report["checked_values"] >= 600
    assert report["failures"] == 0
    serving = {name for name, hits in report["domain_hits"].items() if hits}
    assert "item_embedding.long_lasting" in serving
    assert "user_sequence.real_time" in serving


def test_plain_lines_are_printed_where_there_is_no_terminal() -> None:
    ended = _demo("--seconds", "3", "--stride", "200")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "\x1b[" not in ended.stdout
    assert "hit ratio item_embedding=" in ended.stdout
    assert "summary" in ended.stdout


def test_a_config_that_is_wrong_exits_with_2(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("topology: colocated\n")
    ended = _demo("--config", str(tmp_path / "other.yaml"), "--seconds", "1")
    assert ended.returncode == 2
    assert "not the demo's config" in ended.stdout + ended.stderr


def test_a_value_that_differs_from_the_stores_is_a_failure(tmp_path: Path) -> None:
    data = dataset.load()
    tables = features.build(data)
    changed = tables.item_stats.copy()
    changed[:, 0] += 1
    features.write_store(
        dataclasses.replace(tables, item_stats=changed), data, tmp_path / "features"
    )
    config = derive_config(
        _CONFIG,
        tmp_path,
        dram_bytes=tables.total_bytes // 4,
        nvm_bytes=tables.total_bytes // 2,
    )
    requests = itertools.islice(ranking_requests(data, seed=1), 40)
    with DaemonProcess(config, tmp_path) as daemon:
        replay = Replay(
            requests,
            data,
            tables,
            lambda: Client(daemon.addresses.grpc),
            workers=2,
            seconds_max=20,
        )
        replay.start()
        while replay.running:
            time.sleep(0.05)
        with StatsReader(daemon.addresses.admin) as reader:
            assert reader.read().store_calls > 0
        daemon.stop()
    progress = replay.progress()
    assert progress.requests == 40
    assert progress.failure_count == 4, "every tenth request is looked at"
    assert "differ from the store's" in progress.failures[0]


def test_a_daemon_that_cannot_start_is_reported_with_its_log(tmp_path: Path) -> None:
    config = derive_config(_CONFIG, tmp_path, dram_bytes=8 << 20, nvm_bytes=8 << 20)
    # The store has been written by nobody.
    with pytest.raises(DaemonError, match="no LMDB environment"):
        DaemonProcess(config, tmp_path)
