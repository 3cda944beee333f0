"""The admin service and cachectl over a real node, on a real Unix socket."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner, Result

from cache_daemon import _native
from cache_daemon._proto.feature_cache.v1 import admin_pb2, admin_pb2_grpc
from cache_daemon.admin import (
    AdminError,
    AdminServer,
    DaemonStatus,
    DomainInfo,
    NamespaceInfo,
    StoreInfo,
)
from cache_daemon.cachectl import app
from cache_daemon.nvm_devices import NvmDevice

MEMORY_BYTES = 64 << 20
BUDGET_BYTES = 8 << 20


class Daemon:
    """A node with its data and admin services, and the callbacks that app.py would give them."""

    def __init__(self, folder: Path, instances: int = 1) -> None:
        domains = [
            _native.DomainConfig(name="long_lasting", budget_bytes=BUDGET_BYTES),
            _native.DomainConfig(
                name="ephemeral", budget_bytes=BUDGET_BYTES, policy="lru", ttl_ms=60_000
            ),
        ]
        namespace = _native.NamespaceConfig(
            name="pin_text", domains=domains, default_domain="long_lasting"
        )
        self.node = _native.Node(
            _native.NodeConfig(
                memory_bytes=MEMORY_BYTES, namespaces=[namespace], instances=instances
            )
        )
        self.server = _native.Server(self.node, [f"unix:{folder}/data.sock"])
        self.server.set_serving(True)
        self.drains: list[float | None] = []
        self.status = DaemonStatus(
            state="SERVING",
            version="1.2.3",
            topology="colocated",
            uptime_seconds=5.0,
            data_addresses=self.server.addresses,
            http_address="127.0.0.1:7072",
            memory_bytes=MEMORY_BYTES,
            namespaces=[
                NamespaceInfo(
                    name="pin_text",
                    domains=[
                        DomainInfo("long_lasting", "s3fifo", 0.0),
                        DomainInfo("ephemeral", "lru", 60.0),
                    ],
                    default_domain="long_lasting",
                )
            ],
            stores=[StoreInfo("features", "lmdb", "closed")],
        )
        self.admin = AdminServer(
            self.node, f"unix:{folder}/admin.sock", lambda: self.status, self.drains.append
        )

    def put(self, count: int, domain: str = "long_lasting", first: int = 0) -> None:
        keys = [b"key-%08d" % number for number in range(first, first + count)]
        values = [b"v" * 200] * count
        request = _native.encode_put([("pin_text", keys, domain, values, None)])
        assert set(self.node.batch_put(request, 5.0).statuses(0)) == {1}

    def get(self, first: int, count: int) -> int:
        """How many of the keys were hits."""
        keys = [b"key-%08d" % number for number in range(first, first + count)]
        request = _native.encode_get([("pin_text", keys, "")])
        return int((self.node.batch_get(request, 5.0).statuses(0) == 1).sum())

    def ctl(self, *arguments: str, stdin: str | None = None) -> Result:
        data = arguments[0] in {"get", "put", "delete"}
        where = ["--address", self.server.addresses[0]] if data else ["--admin", self.admin.address]
        return CliRunner().invoke(app, [*arguments, *where], input=stdin)

    def ctl_json(self, *arguments: str) -> list[object]:
        result = self.ctl(*arguments, "--json")
        assert result.exit_code == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]

    def close(self) -> None:
        self.admin.stop(0.1)
        self.server.stop()
        self.node.stop()


@pytest.fixture(params=[1, 3], ids=["one_instance", "three_instances"])
def daemon(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    made = Daemon(tmp_path, request.param)
    yield made
    made.close()


@pytest.fixture
def stub(daemon: Daemon) -> Iterator[admin_pb2_grpc.AdminStub]:
    with grpc.insecure_channel(daemon.admin.address) as channel:
        yield admin_pb2_grpc.AdminStub(channel)


def refused(call: Callable[..., object], request: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=5)
    assert isinstance(caught.value, grpc.Call)
    return caught.value.code(), caught.value.details() or ""


# ---- the service ---------------------------------------------------------------------------------


def test_the_socket_is_the_owners_only(daemon: Daemon) -> None:
    mode = os.stat(daemon.admin.address.removeprefix("unix:")).st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


def test_stats_are_the_nodes_counters(daemon: Daemon, stub: admin_pb2_grpc.AdminStub) -> None:
    daemon.put(300)
    daemon.put(100, "ephemeral", first=300)
    assert daemon.get(0, 500) == 400
    reply = stub.GetStats(admin_pb2.GetStatsRequest(), timeout=5)
    (namespace,) = reply.namespaces
    assert (namespace.name, namespace.hits, namespace.misses) == ("pin_text", 400, 100)
    long_lasting, ephemeral = namespace.domains
    assert (long_lasting.items, long_lasting.hits, long_lasting.policy) == (300, 300, "s3fifo")
    assert (ephemeral.items, ephemeral.hits, ephemeral.ttl_seconds) == (100, 100, 60.0)
    assert long_lasting.budget_bytes == BUDGET_BYTES
    assert 300 * 212 <= long_lasting.live_bytes <= long_lasting.used_bytes <= BUDGET_BYTES
    assert {sample.name for sample in reply.samples} == {s.name for s in daemon.node.samples()}
    assert {sample.kind for sample in reply.samples} == {"counter", "gauge"}


def test_resize_changes_the_budget_while_serving(
    daemon: Daemon, stub: admin_pb2_grpc.AdminStub
) -> None:
    daemon.put(15_000)
    before = daemon.get(0, 15_000)
    request = admin_pb2.ResizeDomainRequest(
        namespace="pin_text", domain="long_lasting", budget_bytes=BUDGET_BYTES // 4
    )
    reply = stub.ResizeDomain(request, timeout=30)
    assert (reply.old_budget_bytes, reply.new_budget_bytes) == (BUDGET_BYTES, BUDGET_BYTES // 4)
    domain = stub.GetStats(admin_pb2.GetStatsRequest(), timeout=5).namespaces[0].domains[0]
    assert domain.budget_bytes == BUDGET_BYTES // 4
    assert domain.used_bytes <= BUDGET_BYTES // 4
    assert 0 < daemon.get(0, 15_000) < before


@pytest.mark.parametrize(
    ("namespace", "domain", "budget", "code", "says"),
    [
        ("pin_txt", "x", 1 << 20, grpc.StatusCode.NOT_FOUND, "did you mean 'pin_text'"),
        ("zzz", "x", 1 << 20, grpc.StatusCode.NOT_FOUND, "pin_text"),
        (
            "pin_text",
            "long_lastin",
            1 << 20,
            grpc.StatusCode.NOT_FOUND,
            "did you mean 'long_lasting'",
        ),
        ("pin_text", "long_lasting", 0, grpc.StatusCode.INVALID_ARGUMENT, "above 0"),
        ("pin_text", "long_lasting", 1 << 50, grpc.StatusCode.RESOURCE_EXHAUSTED, "memory"),
        ("pin_text", "long_lasting", 60 << 20, grpc.StatusCode.RESOURCE_EXHAUSTED, ""),
    ],
)
def test_a_resize_that_cannot_be_is_refused_and_changes_nothing(
    daemon: Daemon,
    stub: admin_pb2_grpc.AdminStub,
    namespace: str,
    domain: str,
    budget: int,
    code: grpc.StatusCode,
    says: str,
) -> None:
    daemon.put(1000)
    request = admin_pb2.ResizeDomainRequest(namespace=namespace, domain=domain, budget_bytes=budget)
    got, details = refused(stub.ResizeDomain, request)
    assert got == code
    assert says in details
    domains = stub.GetStats(admin_pb2.GetStatsRequest(), timeout=5).namespaces[0].domains
    assert [domain.budget_bytes for domain in domains] == [BUDGET_BYTES] * 2
    assert daemon.get(0, 1000) == 1000


def test_flush_drops_the_namespace(daemon: Daemon, stub: admin_pb2_grpc.AdminStub) -> None:
    daemon.put(500)
    code, details = refused(
        stub.FlushNamespace,
        admin_pb2.FlushNamespaceRequest(namespace="pin-text"),
    )
    assert (code, "'pin_text'" in details) == (grpc.StatusCode.NOT_FOUND, True)
    assert daemon.get(0, 500) == 500
    request = admin_pb2.FlushNamespaceRequest(namespace="pin_text")
    assert stub.FlushNamespace(request, timeout=5).items == 500
    assert daemon.get(0, 500) == 0
    daemon.put(10)
    assert daemon.get(0, 10) == 10


def test_drain_calls_back_with_its_bound(daemon: Daemon, stub: admin_pb2_grpc.AdminStub) -> None:
    stub.Drain(admin_pb2.DrainRequest(), timeout=5)
    stub.Drain(admin_pb2.DrainRequest(timeout_seconds=2.5), timeout=5)
    assert daemon.drains == [None, 2.5]
    for wrong in (-1.0, float("nan"), float("inf"), 1e9):
        code, _ = refused(stub.Drain, admin_pb2.DrainRequest(timeout_seconds=wrong))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert len(daemon.drains) == 2


def test_admin_answers_many_at_once_and_during_traffic(daemon: Daemon) -> None:
    daemon.put(5000)
    stop = threading.Event()
    traffic = threading.Thread(
        target=lambda: [daemon.get(0, 1000) for _ in iter(stop.is_set, True)]
    )
    traffic.start()
    try:
        with grpc.insecure_channel(daemon.admin.address) as channel:
            stub = admin_pb2_grpc.AdminStub(channel)
            futures = [
                stub.GetStats.future(admin_pb2.GetStatsRequest(), timeout=10) for _ in range(24)
            ]
            hits = [future.result().namespaces[0].hits for future in futures]
        assert max(hits) > 0
    finally:
        stop.set()
        traffic.join(10)


# ---- listening -----------------------------------------------------------------------------------


def serve_again(daemon: Daemon, address: str) -> AdminServer:
    return AdminServer(daemon.node, address, lambda: daemon.status, daemon.drains.append)


def test_a_living_daemons_socket_is_not_taken_over(daemon: Daemon) -> None:
    with pytest.raises(AdminError, match="another daemon serves there"):
        serve_again(daemon, daemon.admin.address)
    assert daemon.ctl("status").exit_code == 0


def test_a_dead_daemons_socket_is_replaced(daemon: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "left.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.listen()
    left.close()  # as after SIGKILL: the file stays
    second = serve_again(daemon, f"unix:{path}")
    try:
        result = CliRunner().invoke(app, ["status", "--admin", f"unix:{path}"])
        assert result.exit_code == 0
    finally:
        second.stop()
    assert not path.exists()


def test_no_file_is_replaced_by_a_socket(daemon: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "precious.txt"
    path.write_text("data")
    with pytest.raises(AdminError, match="a file is in the way"):
        serve_again(daemon, f"unix:{path}")
    assert path.read_text() == "data"


def test_a_missing_directory_is_named(daemon: Daemon, tmp_path: Path) -> None:
    with pytest.raises(AdminError, match=r"absent/admin\.sock.*directory"):
        serve_again(daemon, f"unix:{tmp_path}/absent/admin.sock")


def test_tcp_is_loopback_only_and_a_taken_port_is_clear(daemon: Daemon) -> None:
    with pytest.raises(ValueError, match="not loopback"):
        serve_again(daemon, "0.0.0.0:0")
    with pytest.raises(ValueError, match="absolute"):
        serve_again(daemon, "unix:relative.sock")
    over_tcp = serve_again(daemon, "127.0.0.1:0")
    try:
        assert not over_tcp.address.endswith(":0")
        result = CliRunner().invoke(app, ["namespaces", "--admin", over_tcp.address])
        assert "pin_text" in result.stdout
        with pytest.raises(AdminError, match=re.escape(over_tcp.address)):
            serve_again(daemon, over_tcp.address)
    finally:
        over_tcp.stop()


# ---- cachectl ------------------------------------------------------------------------------------


def test_status_and_namespaces(daemon: Daemon) -> None:
    (status,) = daemon.ctl_json("status")
    assert isinstance(status, dict)
    assert (status["state"], status["pid"]) == ("SERVING", os.getpid())
    assert "SERVING" in daemon.ctl("status").stdout
    (namespaces,) = daemon.ctl_json("namespaces")
    assert isinstance(namespaces, list)
    assert [domain["name"] for domain in namespaces[0]["domains"]] == ["long_lasting", "ephemeral"]


def test_nvm_devices_are_told_and_a_daemon_without_them_says_so(daemon: Daemon) -> None:
    assert "no NVM tier" in daemon.ctl("nvm").stdout
    (nothing,) = daemon.ctl_json("nvm")
    assert isinstance(nothing, dict)
    assert (nothing["devices"], nothing["namespaces"]) == ([], [])
    device = NvmDevice("/nvm/a", 8 << 20, False, "threads", True, "io_uring: no")
    daemon.status = replace(daemon.status, nvm_devices=[device])
    (status,) = daemon.ctl_json("status")
    assert isinstance(status, dict)
    assert status["nvm_devices"] == [
        {
            "path": "/nvm/a",
            "bytes": 8 << 20,
            "in_service": False,
            "io": "threads",
            "direct": True,
            "fallback": "io_uring: no",
        }
    ]
    assert "out of service" in daemon.ctl("status").stdout


def test_stats_once_all_and_watched(daemon: Daemon) -> None:
    daemon.put(100)
    daemon.get(0, 200)
    (stats,) = daemon.ctl_json("stats", "--all")
    assert isinstance(stats, dict)
    assert stats["namespaces"][0]["hit_ratio"] == 0.5
    assert any(sample["name"].endswith("_total") for sample in stats["samples"])
    # The table is as wide as the terminal; a narrow one may cut what is looked for here.
    environment = {"COLUMNS": "200"}
    shown = CliRunner().invoke(app, ["stats", "--admin", daemon.admin.address], env=environment)
    assert "50.0 %" in shown.stdout

    stop = threading.Event()
    traffic = threading.Thread(target=lambda: [daemon.get(0, 100) for _ in iter(stop.is_set, True)])
    traffic.start()
    try:
        views = daemon.ctl_json("stats", "--watch", "--interval", "200ms", "--count", "2")
    finally:
        stop.set()
        traffic.join(10)
    assert len(views) == 2
    for view in views:
        assert isinstance(view, dict)
        assert view["namespaces"][0]["hit_ratio"] == 1.0
        assert view["namespaces"][0]["lookups_per_second"] > 100


def test_resize_and_flush(daemon: Daemon) -> None:
    daemon.put(100)
    (resized,) = daemon.ctl_json("resize", "pin_text", "ephemeral", "4MiB")
    assert resized == {"old_budget_bytes": BUDGET_BYTES, "new_budget_bytes": 4 << 20}
    wrong = daemon.ctl("resize", "pin_text", "ephemerl", "4MiB")
    assert (wrong.exit_code, "did you mean 'ephemeral'" in wrong.stderr) == (1, True)
    assert daemon.ctl("flush", "pin_text").exit_code == 2  # asks, and nobody is there to answer
    assert daemon.get(0, 100) == 100
    (flushed,) = daemon.ctl_json("flush", "pin_text", "--yes")
    assert flushed == {"namespace": "pin_text", "items": 100}


def test_get_put_delete(daemon: Daemon, tmp_path: Path) -> None:
    assert daemon.ctl("put", "pin_text", "k", "hello").exit_code == 0
    (cell,) = daemon.ctl_json("get", "pin_text", "k")
    assert cell == {"key": "k", "status": "HIT_DRAM", "bytes": 5, "value_base64": "aGVsbG8="}
    assert "hello" in daemon.ctl("get", "pin_text", "k").stdout
    assert daemon.ctl("get", "pin_text", "6b", "--hex", "--raw").stdout_bytes == b"hello"

    content = bytes(range(256)) * 10
    file = tmp_path / "value"
    file.write_bytes(content)
    put = daemon.ctl("put", "pin_text", "--id", "--file", str(file), "--ttl", "1h", "--", "-2")
    assert put.exit_code == 2  # options of the harness end up behind `--`: usage, not a crash
    options = ["--id", "--file", str(file), "--ttl", "1h", "--domain", "ephemeral"]
    assert daemon.ctl("put", "pin_text", "77", *options).exit_code == 0
    assert daemon.ctl("get", "pin_text", "77", "--id", "--raw").stdout_bytes == content
    same = (77).to_bytes(8, "little").hex()
    assert daemon.ctl("get", "pin_text", same, "--hex", "--raw").stdout_bytes == content

    assert daemon.ctl("delete", "pin_text", "k", "absent").exit_code == 0
    gone = daemon.ctl("get", "pin_text", "k", "--json")
    assert gone.exit_code == 1
    assert json.loads(gone.stdout)["status"] == "MISS"


def test_get_says_what_the_data_service_says(daemon: Daemon, tmp_path: Path) -> None:
    wrong = daemon.ctl("get", "pin_txt", "k")
    assert wrong.exit_code == 1
    assert "pin_txt" in wrong.stderr
    nobody = CliRunner().invoke(
        app, ["get", "pin_text", "k", "--address", f"unix:{tmp_path}/none", "--timeout", "1s"]
    )
    assert nobody.exit_code == 3
    assert "is it running?" in nobody.stderr


def test_the_data_service_is_not_taken_for_the_admin_service(daemon: Daemon) -> None:
    result = CliRunner().invoke(app, ["status", "--admin", daemon.server.addresses[0]])
    assert result.exit_code == 3
    assert "not the admin service" in result.stderr


def test_drain_waits_until_the_daemon_is_gone(daemon: Daemon) -> None:
    assert daemon.ctl_json("drain", "--no-wait")[0]["stopped"] is False  # type: ignore[index]

    def die() -> None:
        time.sleep(0.5)
        daemon.status = replace(daemon.status, state="DRAINING")
        time.sleep(0.5)
        daemon.admin.stop(0)

    dying = threading.Thread(target=die)
    dying.start()
    (drained,) = daemon.ctl_json("drain", "--within", "3s")
    dying.join(10)
    assert isinstance(drained, dict)
    assert drained["stopped"] is True
    assert drained["seconds"] >= 0.9
    assert daemon.drains == [None, 3.0]


def test_a_watch_in_a_real_process_ends_by_an_interrupt(daemon: Daemon) -> None:
    command = [sys.executable, "-m", "cache_daemon.cachectl", "stats", "--watch", "--json"]
    with subprocess.Popen(
        [*command, "--interval", "100ms", "--admin", daemon.admin.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["namespaces"]
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert "Traceback" not in process.stderr.read()
