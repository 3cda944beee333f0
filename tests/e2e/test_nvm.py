"""The NVM tier of a daemon as a process: what DRAM evicts comes back from a real file, and what
becomes of a file that is not there, not ours, or cut off under a running daemon."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cache_daemon.client import Client, Status
from cache_daemon.embedded import EmbeddedCache
from cache_daemon.stores.lmdb import LmdbWriter
from tests.daemon_process import START_S, Daemon, Start
from tests.servers import wait_until

KIB, MIB = 1 << 10, 1 << 20
NVM_BYTES = 12 * MIB
BATCH = 500
# Some six times what DRAM holds below, and not more than the file does.
BIG = {b"big %d" % number: b"%d:" % number + bytes([number % 251]) * 1000 for number in range(6000)}
BIG_KEYS = list(BIG)


@pytest.fixture
def nvm(tmp_path: Path) -> Path:
    return tmp_path / "nvm" / "cache"


@pytest.fixture
def nvm_config(config: dict[str, Any], nvm: Path, tmp_path: Path) -> dict[str, Any]:
    """A node whose DRAM holds a sixth of `BIG`, and whose NVM file holds all of it."""
    nvm.parent.mkdir()
    with LmdbWriter(tmp_path / "big", sync=False, map_size=64 << 20) as writer:
        writer.write_many("pin", BIG)
    config["memory"] = {"size": "7MiB", "expected_item_size": 1024}
    config["stores"] = {"features": {"type": "lmdb", "options": {"path": str(tmp_path / "big")}}}
    config["nvm"] = {
        "devices": [{"path": str(nvm), "size": NVM_BYTES}],
        "region_size": "64KiB",
        "read_memory": "4MiB",
        "write_buffers": 8,
    }
    config["namespaces"] = {
        "pin": {
            "store": "features",
            "nvm": {"budget": "100%"},
            "domains": {"main": {"budget": "100%"}},
        }
    }
    return config


def read_all(client: Client, after_batch: Callable[[], object] = bool) -> Counter[Status]:
    """Reads `BIG` once; every value must be right. Cells by status."""
    counts: Counter[Status] = Counter()
    for first in range(0, len(BIG_KEYS), BATCH):
        keys = BIG_KEYS[first : first + BATCH]
        cells = client.batch_get({"pin": keys})["pin"]
        for key, value in zip(keys, cells.to_bytes(), strict=True):
            assert value in (None, BIG[key]), f"{key!r} has another's value"
        counts.update(Status(status) for status in cells.statuses.tolist())
        after_batch()
    return counts


def fill(client: Client, source: Daemon | EmbeddedCache) -> Counter[Status]:
    """Reads until nearly all of `BIG` is a hit, be it of DRAM or NVM; the last counts.

    It goes on as fast as regions are written: reads are far faster than a device, and what finds no
    buffer is not waited for.
    """

    def is_written() -> bool:
        return writing(source) == 0

    counts: Counter[Status] = Counter()
    for _ in range(5):
        counts = read_all(client, after_batch=lambda: wait_until(is_written, 10, "it is written"))
        if counts[Status.HIT_DRAM] + counts[Status.HIT_NVM] > 0.9 * len(BIG):
            return counts
    raise AssertionError(f"too few hits: {counts}")


def writing(source: Daemon | EmbeddedCache) -> float:
    """Regions that are on their way to a device."""
    name = "feature_cache_nvm_device_regions"
    if isinstance(source, EmbeddedCache):
        found = source.samples()
        return sum(s.value for s in found if s.name == name and s.labels["state"] == "writing")
    return sum(
        value
        for (metric_name, labels), value in samples(source).items()
        if metric_name == name and "writing" in labels
    )


def samples(daemon: Daemon) -> dict[tuple[str, frozenset[str]], float]:
    """Name and label values to value, of everything at /metrics."""
    status, text = daemon.http("/metrics")
    assert status == 200
    return {
        (sample.name, frozenset(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def metric(daemon: Daemon, name: str, *labels: str) -> float:
    return samples(daemon)[f"feature_cache_{name}", frozenset(labels)]


def cachectl(daemon: Daemon, *arguments: str) -> str:
    program = str(Path(sys.executable).with_name("cachectl"))
    command = [program, *arguments, "--admin", f"unix:{daemon.folder}/admin.sock"]
    environment = os.environ | {"COLUMNS": "250"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def stop(daemon: Daemon) -> None:
    daemon.signal()
    assert daemon.wait() == 0, daemon.log
    assert "Traceback" not in daemon.log


# ---- serving -------------------------------------------------------------------------------------


def test_what_dram_evicted_comes_back_from_nvm(
    nvm_config: dict[str, Any], nvm: Path, start: Start
) -> None:
    daemon = start(nvm_config)
    assert nvm.stat().st_size == NVM_BYTES
    assert nvm.stat().st_mode & 0o077 == 0, "others may not read what was cached"
    with daemon.client() as client:
        first = read_all(client)
        assert first[Status.FETCHED] == len(BIG)
        counts = fill(client, daemon)
    assert counts[Status.HIT_NVM] > len(BIG) / 2, "DRAM is too small for half of them"

    path = str(nvm)
    assert metric(daemon, "nvm_device_in_service", path) == 1
    assert metric(daemon, "nvm_device_bytes", path) == NVM_BYTES
    assert metric(daemon, "nvm_device_reads_total", path) > 0
    assert metric(daemon, "nvm_device_written_bytes_total", path) > NVM_BYTES / 4
    assert metric(daemon, "nvm_region_bytes") == 64 * KIB
    assert metric(daemon, "nvm_checksum_errors_total") == 0
    from_nvm = metric(daemon, "namespace_nvm_hits_total", "pin")
    assert from_nvm >= counts[Status.HIT_NVM]
    assert metric(daemon, "namespace_hits_total", "pin") > from_nvm

    (share,) = json.loads(cachectl(daemon, "stats", "--json"))["namespaces"]
    assert share["nvm"]["hits"] == from_nvm
    assert share["hits"] == metric(daemon, "namespace_hits_total", "pin")
    assert 0 < share["nvm"]["used_bytes"] <= share["nvm"]["budget_bytes"] < NVM_BYTES
    assert "(NVM)" in cachectl(daemon, "stats")

    shown = json.loads(cachectl(daemon, "nvm", "--json"))
    (device,) = shown["devices"]
    assert (device["path"], device["in_service"]) == (path, True)
    assert device["io"] in {"io_uring", "threads"}
    assert sum(device["regions"].values()) == (NVM_BYTES - 64 * KIB) // (64 * KIB)
    assert device["read_errors"] == device["write_errors"] == 0
    assert shown["namespaces"][0]["items"] > len(BIG) / 2
    table = cachectl(daemon, "nvm")
    assert path in table
    assert "in service" in table
    watched = cachectl(daemon, "nvm", "--watch", "--json", "--interval", "200ms", "--count", "2")
    assert [json.loads(line)["devices"][0]["reads_per_second"] for line in watched.splitlines()]

    (state,) = json.loads(cachectl(daemon, "status", "--json"))["nvm_devices"]
    assert (state["path"], state["bytes"], state["in_service"]) == (path, NVM_BYTES, True)
    assert state["io"] == device["io"]
    assert "in service" in cachectl(daemon, "status")
    assert json.loads(daemon.http("/healthz")[1]) == {"state": "SERVING"}
    assert f"nvm: {path}: 12MiB: {device['io']}, " in daemon.log
    stop(daemon)

    # The file is ours, so the next daemon takes it; the tier starts empty.
    again = start(nvm_config)
    with again.client() as client:
        cells = client.batch_get({"pin": BIG_KEYS[:BATCH]}, cache_only=True)["pin"]
        assert set(cells.statuses.tolist()) == {Status.MISS}
        fill(client, again)
    stop(again)


def test_what_lies_on_nvm_never_undoes_a_write(nvm_config: dict[str, Any], start: Start) -> None:
    daemon = start(nvm_config)
    with daemon.client() as client:
        fill(client, daemon)
        keys = BIG_KEYS[::7]
        changed, deleted = keys[::2], keys[1::2]
        values = [b"new " + key for key in changed]
        assert client.batch_put({"pin": (changed, values)}).all_stored
        client.batch_delete({"pin": deleted})
        reply = client.batch_get({"pin": deleted}, cache_only=True)["pin"]
        assert set(reply.statuses.tolist()) == {Status.MISS}
        # Whatever moves between the tiers meanwhile: the new value, or none of the cache's.
        for _ in range(3):
            for key in BIG_KEYS[1::7][:: BATCH // 100]:
                client.batch_get({"pin": [key]})
            got = client.batch_get({"pin": changed}, cache_only=True)["pin"].to_bytes()
            wrong = [
                value for value, new in zip(got, values, strict=True) if value not in (None, new)
            ]
            assert wrong == []
    stop(daemon)


def test_values_that_were_only_put_come_back(nvm_config: dict[str, Any], start: Start) -> None:
    nvm_config["namespaces"]["pin"].pop("store")
    del nvm_config["stores"]
    daemon = start(nvm_config)
    with daemon.client() as client:
        for first in range(0, len(BIG_KEYS), BATCH):
            keys = BIG_KEYS[first : first + BATCH]
            client.batch_put({"pin": (keys, [BIG[key] for key in keys])})
            wait_until(lambda: writing(daemon) == 0, 10, "it is written")
        counts = read_all(client)
    assert counts[Status.HIT_NVM] > len(BIG) / 2, counts
    stop(daemon)


def test_embedded_reads_nvm_too(nvm_config: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(nvm_config))
    with EmbeddedCache(path) as cache:
        fill(cache.client, cache)
        names = {sample.name for sample in cache.samples()}
    assert "feature_cache_nvm_device_reads_total" in names


def test_several_devices_share_the_regions(
    nvm_config: dict[str, Any], nvm: Path, start: Start
) -> None:
    paths = [str(nvm.with_name(name)) for name in ("a", "b", "c")]
    nvm_config["memory"]["size"] = "15MiB"  # each device has buffers of its own for reads
    nvm_config["nvm"]["devices"] = [{"path": path, "size": "4MiB"} for path in paths]
    daemon = start(nvm_config)
    with daemon.client() as client:
        fill(client, daemon)
    for path in paths:
        assert metric(daemon, "nvm_device_reads_total", path) > 0
        assert metric(daemon, "nvm_device_written_bytes_total", path) > 0
    stop(daemon)


def test_late_reads_ask_the_store_and_any_answer_is_right(
    nvm_config: dict[str, Any], start: Start
) -> None:
    # Every read is late after a microsecond, so that the store is asked beside the device.
    nvm_config["namespaces"]["pin"]["speculative"] = {"after": "1us", "budget": "100%"}
    daemon = start(nvm_config)
    with daemon.client() as client:

        def launched() -> bool:
            read_all(client)  # and looks at each value
            return metric(daemon, "speculative_launched_total", "pin") > 0

        wait_until(launched, 30, "speculative lookups")
    text = cachectl(daemon, "nvm")
    assert "speculative lookups" in text
    (namespace,) = json.loads(cachectl(daemon, "nvm", "--json"))["namespaces"]
    lookups = namespace["speculative"]
    assert lookups["won_by_store"] + lookups["won_by_nvm"] <= lookups["launched"]
    stop(daemon)


def test_a_write_rate_holds_and_is_told(
    nvm_config: dict[str, Any], nvm: Path, start: Start
) -> None:
    nvm_config["nvm"]["write_rate"] = "64KiB"  # a region a second
    daemon = start(nvm_config)
    began = time.monotonic()
    with daemon.client() as client:
        for _ in range(20):
            read_all(client)
    (namespace,) = json.loads(cachectl(daemon, "nvm", "--json"))["namespaces"]
    assert namespace["not_admitted"]["write_rate"] > len(BIG)
    written = metric(daemon, "nvm_device_written_bytes_total", str(nvm))
    # What may be saved up, and what was open at the start, come on top.
    assert written < (time.monotonic() - began + 20) * 64 * KIB
    assert "write_rate" in cachectl(daemon, "nvm")
    stop(daemon)


@pytest.mark.parametrize("direct", ["try", "off"])
def test_threads_can_be_forced(
    nvm_config: dict[str, Any], nvm: Path, start: Start, direct: str
) -> None:
    nvm_config["nvm"] |= {"io": "threads", "io_threads": 3, "direct": direct}
    daemon = start(nvm_config)
    with daemon.client() as client:
        fill(client, daemon)
    (device,) = json.loads(cachectl(daemon, "nvm", "--json"))["devices"]
    assert device["io"] == "threads"
    assert "io_uring" not in device["fallback"], "it is what was asked for"
    assert f"nvm: {nvm}: 12MiB: threads, " in daemon.log
    if direct == "off":
        assert (device["direct"], device["fallback"]) == (False, "")
        assert "threads, buffered" in daemon.log
    stop(daemon)


# Makes io_uring_setup (425 on every machine) fail with EPERM, as Docker's default profile does.
_NO_IO_URING = """\
import ctypes
import struct

program = b"".join(
    struct.pack("HBBI", *line)
    for line in (
        (0x20, 0, 0, 0),  # the number of the call
        (0x15, 0, 1, 425),
        (0x06, 0, 0, 0x00050000 | 1),
        (0x06, 0, 0, 0x7FFF0000),
    )
)
buffer = ctypes.create_string_buffer(program, len(program))


class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("lines", ctypes.c_void_p)]


libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
filter = Program(4, ctypes.cast(buffer, ctypes.c_void_p))
assert libc.prctl(22, 2, ctypes.byref(filter), 0, 0) == 0
"""


def test_where_io_uring_is_refused_threads_take_over_and_it_is_told(
    nvm_config: dict[str, Any], nvm: Path, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(_NO_IO_URING)
    daemon = start(nvm_config)
    with daemon.client() as client:
        fill(client, daemon)
    (device,) = json.loads(cachectl(daemon, "nvm", "--json"))["devices"]
    assert device["io"] == "threads"
    assert "io_uring: Operation not permitted" in device["fallback"]
    (line,) = [line for line in daemon.log.splitlines() if f"nvm: {nvm}: 12MiB: threads" in line]
    assert "WARNING" in line.upper()
    assert "not what was asked for: " in line
    assert "io_uring: Operation not permitted" in line
    stop(daemon)


def test_io_uring_that_must_be_and_is_refused_is_a_start_error(
    nvm_config: dict[str, Any], launch: Start, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(_NO_IO_URING)
    nvm_config["nvm"]["io"] = "io_uring"
    assert_cannot_start(launch(nvm_config), "io_uring is refused")


# ---- files that cannot be used -------------------------------------------------------------------


def assert_cannot_start(daemon: Daemon, *words: str) -> None:
    assert daemon.wait(START_S) == 1, daemon.log
    assert "cannot start: " in daemon.log
    for word in words:
        assert word in daemon.log
    assert "Traceback" not in daemon.log
    assert not daemon.ready_path.exists()


def test_a_directory_that_is_missing_is_told(
    nvm_config: dict[str, Any], nvm: Path, launch: Start
) -> None:
    path = nvm.parent / "absent" / "cache"
    nvm_config["nvm"]["devices"][0]["path"] = str(path)
    assert_cannot_start(launch(nvm_config), str(path), "its directory does not exist; make it")
    assert not path.parent.exists()


def test_a_path_through_a_file_is_told(
    nvm_config: dict[str, Any], nvm: Path, launch: Start
) -> None:
    nvm.write_text("a file")
    nvm_config["nvm"]["devices"][0]["path"] = str(nvm / "cache")
    assert_cannot_start(launch(nvm_config), str(nvm / "cache"), "is no directory")
    assert nvm.read_text() == "a file"


def test_a_path_that_is_a_directory_is_told(
    nvm_config: dict[str, Any], nvm: Path, launch: Start
) -> None:
    nvm_config["nvm"]["devices"][0]["path"] = str(nvm.parent)
    assert_cannot_start(launch(nvm_config), str(nvm.parent), "it is a directory")


def test_a_path_that_may_not_be_written_is_told(nvm_config: dict[str, Any], launch: Start) -> None:
    # Where not even root may make a file: the tests may run as root, whom no mode stops.
    path = "/sys/kernel/feature-cache"
    nvm_config["nvm"]["devices"][0]["path"] = path
    daemon = launch(nvm_config)
    assert_cannot_start(daemon, path)
    assert "may not read and write it" in daemon.log or "read-only" in daemon.log


def test_a_disk_without_room_is_told(nvm_config: dict[str, Any], nvm: Path, launch: Start) -> None:
    free = shutil.disk_usage(nvm.parent).free
    size = free // MIB * MIB + 1024 * MIB
    assert size < (1 << 40), "this disk has more room than the tier could ask for"
    nvm_config["memory"] = {"size": "256MiB", "expected_item_size": "1MiB"}
    nvm_config["nvm"] |= {
        "devices": [{"path": str(nvm), "size": size}],
        "region_size": "auto",
        "write_buffers": 1,
    }
    assert_cannot_start(launch(nvm_config), str(nvm), "no room for ", "make it smaller")
    assert not nvm.exists(), "a file that was made in vain is taken away again"
    assert shutil.disk_usage(nvm.parent).free > free - 512 * MIB


@pytest.mark.parametrize("size", [10, 1 * MIB, NVM_BYTES, NVM_BYTES + 3 * MIB])
def test_a_file_that_is_not_ours_is_left_alone(
    nvm_config: dict[str, Any], nvm: Path, launch: Start, size: int
) -> None:
    content = (b"precious data " * (size // 14 + 1))[:size]
    nvm.write_bytes(content)
    assert_cannot_start(launch(nvm_config), str(nvm), "not this cache's", "choose another path")
    assert nvm.read_bytes() == content


def test_an_empty_file_is_taken(nvm_config: dict[str, Any], nvm: Path, start: Start) -> None:
    nvm.touch()
    stop(start(nvm_config))
    assert nvm.stat().st_size == NVM_BYTES


def test_a_file_of_another_size_is_started_anew(
    nvm_config: dict[str, Any], nvm: Path, start: Start
) -> None:
    stop(start(nvm_config))
    for size in (2 * NVM_BYTES, NVM_BYTES // 2):
        nvm_config["nvm"]["devices"][0]["size"] = size
        stop(start(nvm_config))
        assert nvm.stat().st_size == size


def test_two_daemons_cannot_share_a_file(
    nvm_config: dict[str, Any], nvm: Path, start: Start
) -> None:
    first = start(nvm_config)
    with first.client() as client:
        fill(client, first)
    folder = first.folder / "second"
    folder.mkdir()
    nvm_config["listen"] = {"grpc": ["127.0.0.1:0"]}
    second = Daemon(folder, nvm_config)
    try:
        assert_cannot_start(second, str(nvm), "in use by another process")
    finally:
        second.process.kill()
        second.process.wait()
    with first.client() as client:
        assert read_all(client)[Status.HIT_NVM] > 0
    stop(first)


# ---- a device that fails -------------------------------------------------------------------------


def health(daemon: Daemon) -> dict[str, Any]:
    status, body = daemon.http("/healthz")
    assert status == 200
    found: dict[str, Any] = json.loads(body)
    return found


def until(daemon: Daemon, condition: Callable[[], bool], what: str) -> None:
    """Waits under traffic: a device's errors show only where it is read."""
    with daemon.client() as client:

        def read_and_look() -> bool:
            counts = read_all(client)
            assert sum(counts.values()) == len(BIG)
            answered = counts[Status.HIT_DRAM] + counts[Status.HIT_NVM] + counts[Status.FETCHED]
            answered += counts[Status.SPECULATIVE]
            assert answered == len(BIG), f"cells without a value: {counts}"
            return condition()

        wait_until(read_and_look, 60, what)


def test_a_file_that_is_cut_off_goes_out_of_service_and_comes_back(
    nvm_config: dict[str, Any], nvm: Path, start: Start
) -> None:
    nvm_config["nvm"] |= {"errors_max": 4, "probe_interval": "2s"}
    daemon = start(nvm_config)
    path = str(nvm)
    with daemon.client() as client:
        fill(client, daemon)

    os.truncate(nvm, 0)
    seen: dict[str, Any] = {}

    def is_out() -> bool:
        if health(daemon) != {"state": "SERVING", "nvm_out_of_service": [path]}:
            return False
        # All of it at one moment: a probe may bring the device back at the next.
        (device,) = json.loads(cachectl(daemon, "nvm", "--json"))["devices"]
        if device["in_service"]:
            return False
        seen["device"] = device
        return True

    until(daemon, is_out, "the device is out of service")
    assert seen["device"]["outages"] >= 1
    assert daemon.http("/readyz")[0] == 200
    lost = sum(
        value
        for (name, labels), value in samples(daemon).items()
        if name == "feature_cache_namespace_nvm_lost_reads_total" and "pin" in labels
    )
    assert lost > 0
    assert f"nvm: {path} is out of service" in daemon.log

    os.truncate(nvm, NVM_BYTES)
    until(daemon, lambda: health(daemon) == {"state": "SERVING"}, "the device is back")
    wait_until(lambda: metric(daemon, "nvm_device_in_service", path) == 1, 10, "in service")
    assert metric(daemon, "nvm_device_probes_total", path) >= 1
    assert f"nvm: {path} is back in service" in daemon.log
    with daemon.client() as client:
        fill(client, daemon)
    (state,) = json.loads(cachectl(daemon, "status", "--json"))["nvm_devices"]
    assert state["in_service"]
    stop(daemon)
