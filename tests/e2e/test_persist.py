"""What outlives a daemon's process: an orderly stop, a kill, another config; and what a start says
when the memory of an earlier one cannot be had. Real processes, real shared memory."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from cache_daemon.cachectl_admin import AdminClient, RequestRefused
from cache_daemon.client import Client, Status, Unavailable, WriteStatus
from cache_daemon.embedded import EmbeddedCache
from tests.daemon_process import ONCE, START_S, Daemon, Start, statuses
from tests.servers import wait_until

MINE = [b"mine %d" % number for number in range(2000)]  # the store has none of these
VALUES = [b"value of mine %d" % number for number in range(2000)]
HITS = [Status.HIT_DRAM] * len(MINE)
ABSENT = [Status.NOT_FOUND] * len(MINE)  # the store was asked, and has none


@pytest.fixture
def persist(config: dict[str, Any], shared: Path) -> dict[str, Any]:
    """The usual config, whose memory outlives the process; small, as is a container's /dev/shm."""
    config["memory"]["size"] = "16MiB"
    config["persist"] = {"dir": str(shared), "name": "e2e"}
    return config


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[Start]:
    """Starts a second daemon of the same memory, in a folder and on sockets of its own."""
    with ExitStack() as stack:

        def start(config: dict[str, Any], **persist: Any) -> Daemon:
            folder = tmp_path / "second"
            folder.mkdir()
            listen = {
                "grpc": [f"unix:{folder}/data.sock"],
                "admin": f"unix:{folder}/admin.sock",
                "http": "127.0.0.1:0",
            }
            changed = config | {"listen": listen, "persist": config["persist"] | persist}
            daemon = Daemon(folder, changed)
            stack.callback(daemon.process.wait)
            stack.callback(daemon.process.kill)
            return daemon

        yield start


def fill(daemon: Daemon, namespace: str = "pin", domain: str | None = None) -> None:
    with daemon.client() as client:
        domains = {namespace: domain} if domain else {}
        put = client.batch_put({namespace: (MINE, VALUES)}, domains=domains)
        assert set(put[namespace].tolist()) == {WriteStatus.STORED}


def found(daemon: Daemon, namespace: str = "pin") -> list[int]:
    """Statuses of all of `MINE`; a value that is found must be the right one."""
    with daemon.client() as client:
        column = client.batch_get({namespace: MINE})[namespace]
        pairs = zip(column.to_bytes(), VALUES, strict=True)
        assert all(value is None or value == expected for value, expected in pairs)
        statuses: list[int] = column.statuses.tolist()
        return statuses


def stop(daemon: Daemon) -> None:
    daemon.signal()
    assert daemon.wait() == 0, daemon.log
    assert "Traceback" not in daemon.log


def kill(daemon: Daemon) -> None:
    daemon.process.kill()
    daemon.wait()
    daemon.ready_path.unlink()


def status_of(admin: str) -> dict[str, Any]:
    command = [str(Path(sys.executable).with_name("cachectl")), "status", "--json"]
    done = subprocess.run(
        [*command, "--admin", admin], capture_output=True, text=True, timeout=30, check=True
    )
    status: dict[str, Any] = json.loads(done.stdout)
    return status


def started(daemon: Daemon) -> dict[str, Any]:
    """What the daemon says of its start."""
    start: dict[str, Any] = status_of(daemon.addresses["admin"])["start"]
    return start


def assert_refused(daemon: Daemon, *words: str) -> None:
    assert daemon.wait(START_S) == 1, daemon.log
    assert "cannot start: " in daemon.log
    for word in words:
        assert word in daemon.log
    assert "Traceback" not in daemon.log
    assert not daemon.ready_path.exists()


# ---- what comes back -----------------------------------------------------------------------------


def test_an_orderly_stop_and_a_start_keep_everything(persist: dict[str, Any], start: Start) -> None:
    first = start(persist)
    assert started(first)["memory"] == "new"
    fill(first)
    stop(first)
    assert "the cache is left in order" in first.log

    second = start(persist)
    assert found(second) == HITS
    report = started(second)
    assert (report["memory"], report["memory_reason"]) == ("clean", "")
    assert report["memory_items"] == len(MINE)
    assert report["pages"]
    assert "memory: clean, adopted 2,000 items in " in second.log
    assert "state STARTING -> RECOVERING" in second.log
    assert "state RECOVERING -> SERVING" in second.log
    metrics = second.http("/metrics")[1]
    assert 'feature_cache_start_items{tier="dram"} 2000.0' in metrics
    assert 'feature_cache_start_info{memory="clean",nvm="off",pages=' in metrics
    assert "feature_cache_start_set_aside_total 0.0" in metrics
    assert "feature_cache_recovery_progress" not in metrics


def test_a_kill_and_a_start_keep_everything(persist: dict[str, Any], start: Start) -> None:
    first = start(persist)
    fill(first)
    with first.client() as client:
        client.batch_delete({"pin": MINE[:100]})
        client.batch_put({"pin": (MINE[100:200], VALUES[200:300])})
        client.batch_put({"pin": (MINE[100:200], VALUES[100:200])})
    kill(first)

    second = start(persist)
    assert found(second) == ABSENT[:100] + HITS[100:]
    report = started(second)
    assert report["memory"] == "checked"
    assert str(first.process.pid) in report["memory_reason"]
    assert "memory: checked, adopted 1,900 items" in second.log


def test_it_lives_on_through_many_ends(persist: dict[str, Any], start: Start) -> None:
    daemon = start(persist)
    fill(daemon)
    for number, end in enumerate((kill, stop, kill, kill, stop, stop)):
        end(daemon)
        daemon = start(persist)
        assert found(daemon) == HITS, number
        assert started(daemon)["memory"] == ("checked" if end is kill else "clean")


def test_what_expired_meanwhile_is_gone(persist: dict[str, Any], start: Start) -> None:
    persist["namespaces"]["pin"]["domains"]["other"]["ttl"] = "2s"
    first = start(persist)
    fill(first, "pin", "other")
    fill(first, "user")
    began = time.monotonic()
    stop(first)
    time.sleep(max(0.0, began + 2.5 - time.monotonic()))
    second = start(persist)
    assert found(second) == ABSENT
    assert found(second, "user") == HITS


def test_embedded_use_keeps_it_too(persist: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(persist))
    with EmbeddedCache(path) as cache:
        cache.client.batch_put({"pin": (MINE, VALUES)}, timeout=10)
    assert cache.samples() != []  # of the stores; the engine is not asked any more
    with EmbeddedCache(path) as cache:
        assert statuses(cache.client, "pin", MINE) == HITS
        info = [s.labels for s in cache.samples() if s.name == "feature_cache_start_info"]
        assert [labels["memory"] for labels in info] == ["clean"]


# ---- another config ------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [stop, kill])
def test_another_config_keeps_what_still_fits(
    persist: dict[str, Any], start: Start, end: Callable[[Daemon], None]
) -> None:
    first = start(persist)
    fill(first, "pin", "main")
    fill(first, "user")
    end(first)

    # A namespace is gone, a domain and a namespace are new, a domain is smaller.
    del persist["namespaces"]["user"]
    domains = persist["namespaces"]["pin"]["domains"]
    domains["main"]["budget"] = "30%"
    domains["fresh"] = {"budget": "20%"}
    persist["namespaces"]["added"] = {"domains": {"main": {"budget": "20%"}}}
    second = start(persist)
    assert found(second) == HITS
    assert found(second, "added") == [Status.MISS] * len(MINE)
    assert started(second)["memory_dropped"] >= len(MINE)
    fill(second, "added")
    end(second)

    # What was removed comes back empty, not as it was.
    del persist["namespaces"]["added"]
    persist["namespaces"]["user"] = {"store": "features", "domains": {"main": {"budget": "20%"}}}
    third = start(persist)
    assert found(third) == HITS
    assert found(third, "user") == ABSENT


def test_a_domain_that_shrank_far_keeps_what_it_can(persist: dict[str, Any], start: Start) -> None:
    persist["memory"]["segment_size"] = "16KiB"
    values = [b"%06d" % number * 300 for number in range(4000)]  # 7 MiB
    keys = [b"large %d" % number for number in range(4000)]
    first = start(persist)
    with first.client() as client:
        client.batch_put({"pin": (keys, values)})
    stop(first)
    persist["namespaces"]["pin"]["domains"]["main"]["budget"] = "3MiB"
    second = start(persist)
    with second.client() as client:

        def kept() -> int:
            column = client.batch_get({"pin": keys}, cache_only=True)["pin"]
            pairs = zip(column.to_bytes(), values, strict=True)
            assert all(value is None or value == expected for value, expected in pairs)
            return sum(status == Status.HIT_DRAM for status in column.statuses.tolist())

        wait_until(lambda: kept() * 1800 <= 3 << 20, what="the domain is within its budget")
        assert kept() * 1800 > 1 << 20


def test_another_memory_size_starts_cold_and_says_why(
    persist: dict[str, Any], start: Start
) -> None:
    first = start(persist)
    fill(first)
    stop(first)
    persist["memory"]["size"] = "17MiB"
    second = start(persist)
    assert found(second) == ABSENT
    report = started(second)
    assert report["memory"] == "cold"
    assert report["memory_reason"]
    assert "WARNING" in second.log
    assert "memory: cold, starts empty" in second.log


def test_turned_off_nothing_outlives_the_process(
    persist: dict[str, Any], start: Start, shared: Path
) -> None:
    persist["persist"]["enabled"] = False
    first = start(persist)
    fill(first)
    stop(first)
    assert list(shared.iterdir()) == []
    second = start(persist)
    assert found(second) == ABSENT
    assert started(second)["memory"] == "off"
    assert "RECOVERING" not in second.log
    assert "memory: " not in second.log


# ---- while it recovers ---------------------------------------------------------------------------

# A start waits a few seconds for an owner that is on its way out: that is when it is RECOVERING.


def test_while_recovering_it_says_so_and_takes_over_when_it_can(
    persist: dict[str, Any], start: Start, beside: Start
) -> None:
    first = start(persist)
    fill(first)
    second = beside(persist)
    admin = f"unix:{second.folder}/admin.sock"
    wait_until(Path(admin.removeprefix("unix:")).exists, START_S, "the admin socket")
    with AdminClient(admin, 10) as client:
        wait_until(lambda: client.status().state == "RECOVERING", what="it recovers")
        with pytest.raises(RequestRefused, match="recovering; try again"):
            client.flush("pin")
        assert client.stats().namespaces
    status = status_of(admin)
    assert status["recovery"]["seconds"] > 0
    assert status["start"] is None
    with Client(f"unix:{second.folder}/data.sock", timeout=10, retry=ONCE) as client:
        with pytest.raises(Unavailable, match="recovering"):
            client.batch_get({"pin": MINE})
        with pytest.raises(Unavailable, match="recovering"):
            client.batch_put({"pin": (MINE, VALUES)})
        assert not second.ready_path.exists()
        stop(first)
        second.wait_until_ready()
        assert statuses(client, "pin", MINE) == HITS
    assert started(second)["memory"] == "clean"


def test_reads_may_be_answered_with_misses_meanwhile(
    persist: dict[str, Any], start: Start, beside: Start
) -> None:
    first = start(persist)
    fill(first)
    second = beside(persist, serve_while_recovering=True)
    socket = second.folder / "data.sock"
    wait_until(socket.exists, START_S, "the data socket")
    with Client(f"unix:{socket}", timeout=10, retry=ONCE) as client:
        assert statuses(client, "pin", MINE) == [Status.MISS] * len(MINE)
        reply = client.batch_get({"pin": MINE[:3], "user": [b"u", b"x"]})
        assert reply["user"].statuses.tolist() == [Status.MISS] * 2
        assert reply["user"].to_bytes() == [None] * 2
        with pytest.raises(Unavailable, match="recovering"):
            client.batch_put({"pin": (MINE, VALUES)})
        with pytest.raises(Unavailable, match="recovering"):
            client.batch_delete({"pin": MINE})
        assert not second.ready_path.exists()
        stop(first)
        second.wait_until_ready()
        assert statuses(client, "pin", MINE) == HITS
        assert set(client.batch_put({"pin": ([b"k"], [b"v"])})["pin"].tolist()) == {
            WriteStatus.STORED
        }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_recovering_ends_it_at_once(
    persist: dict[str, Any], start: Start, beside: Start, number: signal.Signals
) -> None:
    first = start(persist)
    fill(first)
    second = beside(persist)
    wait_until(lambda: "-> RECOVERING" in second.log, START_S, "it recovers")
    began = time.monotonic()
    second.signal(number)
    assert second.wait() == 0, second.log
    assert time.monotonic() - began < 3
    assert "before anything was served" in second.log
    assert not (second.folder / "admin.sock").exists()
    assert found(first) == HITS


# ---- what cannot be had --------------------------------------------------------------------------


def test_a_second_daemon_on_the_same_memory_is_refused(
    persist: dict[str, Any], start: Start, beside: Start
) -> None:
    first = start(persist)
    fill(first)
    assert_refused(beside(persist), str(first.process.pid), "persist")
    assert found(first) == HITS
    stop(first)
    assert found(start(persist)) == HITS


def test_two_names_are_two_memories(persist: dict[str, Any], start: Start, beside: Start) -> None:
    first = start(persist)
    fill(first)
    second = beside(persist, name="another").wait_until_ready()
    with Client(f"unix:{second.folder}/data.sock", timeout=10) as client:
        assert statuses(client, "pin", MINE) == ABSENT
    assert found(first) == HITS


def test_memory_that_others_may_read_is_refused(
    persist: dict[str, Any], start: Start, launch: Start, shared: Path
) -> None:
    stop(start(persist))
    (shared / "e2e.arena").chmod(0o644)
    assert_refused(launch(persist), "e2e.arena", "mode")


def test_a_symbolic_link_is_refused(
    persist: dict[str, Any], launch: Start, shared: Path, tmp_path: Path
) -> None:
    (tmp_path / "precious").write_bytes(b"not a cache")
    (shared / "e2e.arena").symlink_to(tmp_path / "precious")
    assert_refused(launch(persist), "e2e.arena", "symbolic link")
    assert (tmp_path / "precious").read_bytes() == b"not a cache"


def test_a_directory_that_is_missing_is_told(persist: dict[str, Any], launch: Start) -> None:
    persist["persist"]["dir"] += "/nowhere"
    assert_refused(launch(persist), "nowhere", "persist.dir")


def test_a_directory_on_a_disk_is_refused(
    persist: dict[str, Any], launch: Start, tmp_path: Path
) -> None:
    persist["persist"]["dir"] = str(tmp_path)
    assert_refused(launch(persist), "tmpfs", "persist.dir")


def test_too_small_a_mount_is_told_before_serving(
    persist: dict[str, Any], launch: Start, tmp_path: Path
) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(mount)]
    subprocess.run(command, check=True)  # as root, as the native tests of such mounts
    try:
        persist["persist"]["dir"] = str(mount)
        assert_refused(launch(persist), str(mount), "are needed", "free")
        assert [path.suffix for path in mount.iterdir()] == [".lock"]
        check = subprocess.run(
            [
                str(Path(sys.executable).with_name("cache-daemon")),
                *("check-config", str(tmp_path / "config.yaml")),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert "warning: persist.dir" in check.stderr
        assert "must hold up to 16MiB" in check.stderr
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def test_an_unknown_format_is_set_aside(
    persist: dict[str, Any], start: Start, shared: Path
) -> None:
    first = start(persist)
    fill(first)
    stop(first)
    with (shared / "e2e.arena").open("r+b") as file:
        file.write(b"\xff" * 64)
    second = start(persist)
    assert found(second) == ABSENT
    report = started(second)
    assert (report["memory"], report["set_aside"]) == ("cold", 1)
    assert (shared / "e2e.arena.set-aside").exists()
    assert "feature_cache_start_set_aside_total 1.0" in second.http("/metrics")[1]
