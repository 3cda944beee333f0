"""What of the NVM tier outlives a daemon's process and a reboot, by how the daemon ended.

A reboot is played by removing the shared memory: what the engine then has is what a new boot would
leave it, the devices alone.
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache_daemon.cachectl_admin import AdminClient
from cache_daemon.client import Status
from tests.daemon_process import Daemon, Start
from tests.servers import wait_until

ITEMS = {b"item %d" % number: b"%08d" % number * 100 for number in range(12_000)}  # 10 MiB
KEYS = list(ITEMS)
HIT = (Status.HIT_DRAM, Status.HIT_NVM)


@pytest.fixture
def settings(shared: Path, tmp_path: Path) -> dict[str, Any]:
    """DRAM for a part of the items, NVM for all of them, no store."""
    return {
        "listen": {"grpc": ["127.0.0.1:0"], "admin": f"unix:{tmp_path}/admin.sock"},
        "memory": {"size": "20MiB", "expected_item_size": 800, "segment_size": "16KiB"},
        "nvm": {
            "devices": [{"path": str(tmp_path / "nvm"), "size": "32MiB"}],
            "region_size": "64KiB",
            "read_memory": "4MiB",
        },
        # Nothing is promoted: what is counted as on NVM stays there.
        "namespaces": {
            "pin": {
                "nvm": {"budget": "100%", "promotion": "never"},
                "domains": {"main": {"budget": "5MiB"}},
            }
        },
        "persist": {"dir": str(shared), "name": "e2e"},
        "drain_timeout": "10s",
    }


def found(daemon: Daemon) -> dict[bytes, int]:
    """Status of each item; a value that is found must be the right one."""
    all_statuses: dict[bytes, int] = {}
    with daemon.client() as client:
        for first in range(0, len(KEYS), 1000):
            keys = KEYS[first : first + 1000]
            column = client.batch_get({"pin": keys})["pin"]
            for key, value, status in zip(
                keys, column.to_bytes(), column.statuses.tolist(), strict=True
            ):
                assert value is None or value == ITEMS[key], key
                all_statuses[key] = status
    return all_statuses


def hits(daemon: Daemon) -> int:
    return sum(status in HIT for status in found(daemon).values())


def fill(daemon: Daemon) -> None:
    """Nearly all items, most of them on NVM. What the device has no room for at once is dropped, so
    that it is put again."""

    def nearly_all() -> bool:
        missing = [key for key, status in found(daemon).items() if status not in HIT]
        with daemon.client() as client:
            for first in range(0, len(missing), 100):
                keys = missing[first : first + 100]
                client.batch_put({"pin": (keys, [ITEMS[key] for key in keys])})
                time.sleep(0.002)
        return len(missing) < 0.1 * len(KEYS)

    wait_until(nearly_all, 30, "nearly all items are found")


def delete_some(daemon: Daemon) -> list[bytes]:
    gone = KEYS[::10]
    with daemon.client() as client:
        client.batch_delete({"pin": gone})
    return gone


def stop(daemon: Daemon) -> None:
    daemon.signal()
    assert daemon.wait(40) == 0, daemon.log
    assert "Traceback" not in daemon.log


def kill(daemon: Daemon) -> None:
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    daemon.ready_path.unlink()


def reboot(shared: Path) -> None:
    for path in shared.iterdir():
        path.unlink()


def started(daemon: Daemon) -> tuple[str, str]:
    with AdminClient(daemon.addresses["admin"], 10) as admin:
        start = admin.status().start
        return start.memory, start.nvm


def assert_gone(daemon: Daemon, keys: list[bytes]) -> None:
    statuses = found(daemon)
    assert {statuses[key] for key in keys} == {Status.MISS}


@pytest.mark.parametrize(("end", "memory"), [(stop, "clean"), (kill, "checked")])
def test_both_tiers_outlive_the_process(
    settings: dict[str, Any], start: Start, end: Callable[[Daemon], None], memory: str
) -> None:
    first = start(settings)
    fill(first)
    gone = delete_some(first)
    before = found(first)
    end(first)
    second = start(settings)
    assert started(second) == (memory, "kept")
    after = found(second)
    assert_gone(second, gone)
    kept = sum(status in HIT for status in after.values())
    # What was in a region that was not written yet is lost with the process.
    assert kept >= 0.95 * sum(status in HIT for status in before.values())
    assert Status.HIT_NVM in after.values()


def test_a_reboot_in_order_keeps_nvm(settings: dict[str, Any], start: Start, shared: Path) -> None:
    first = start(settings)
    fill(first)
    gone = delete_some(first)
    on_nvm = sum(status == Status.HIT_NVM for status in found(first).values())
    stop(first)
    reboot(shared)
    second = start(settings)
    assert started(second) == ("new", "rebuilt")
    assert hits(second) >= 0.9 * on_nvm
    assert_gone(second, gone)
    assert "nvm: rebuilt, " in second.log


def test_spill_brings_dram_through_a_reboot(
    settings: dict[str, Any], start: Start, shared: Path
) -> None:
    settings["persist"]["on_shutdown"] = "spill"
    first = start(settings)
    fill(first)
    gone = delete_some(first)
    before = hits(first)
    stop(first)
    reboot(shared)
    second = start(settings)
    assert started(second)[1] == "rebuilt"
    assert hits(second) >= 0.98 * before
    assert_gone(second, gone)


def test_power_loss_empties_nvm_by_default(
    settings: dict[str, Any], start: Start, shared: Path
) -> None:
    first = start(settings)
    fill(first)
    kill(first)
    reboot(shared)
    second = start(settings)
    assert started(second) == ("new", "empty")
    assert hits(second) == 0
    assert "nvm: empty, starts empty" in second.log


def test_power_loss_undoes_nothing_with_sync(
    settings: dict[str, Any], start: Start, shared: Path, tmp_path: Path
) -> None:
    settings["persist"] |= {"durability": "sync", "journal": str(tmp_path / "log")}
    first = start(settings)
    fill(first)
    gone = delete_some(first)
    kill(first)
    reboot(shared)
    second = start(settings)
    assert started(second) == ("new", "rebuilt")
    assert_gone(second, gone)
    assert hits(second) > 0.3 * len(KEYS)
    assert (tmp_path / "log").exists()


def test_a_flush_stays_a_flush_through_power_loss(
    settings: dict[str, Any], start: Start, shared: Path
) -> None:
    settings["persist"]["durability"] = "sync"
    first = start(settings)
    fill(first)
    with AdminClient(first.addresses["admin"], 10) as admin:
        admin.flush("pin")
    kill(first)
    reboot(shared)
    second = start(settings)
    assert hits(second) == 0
    assert (Path(settings["nvm"]["devices"][0]["path"] + ".journal")).exists()
