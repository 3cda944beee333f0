"""Real servers for benchmarks, as child processes on loopback: peers, and the daemon itself."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
import yaml

from benchmarks.demo.server import DaemonProcess

__all__ = ["RunningServer", "cpu_seconds", "feature_cache", "redis_server"]

_START_TIMEOUT_S = 10.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class RunningServer:
    """A server that answers: its process and where it listens on TCP."""

    pid: int
    host: str
    port: int

    @property
    def target(self) -> str:
        return f"{self.host}:{self.port}"


@contextmanager
def redis_server(directory: Path) -> Iterator[RunningServer]:
    """A Redis without persistence, as a cache runs it. Raises RuntimeError when it cannot start."""
    if shutil.which("redis-server") is None:
        raise RuntimeError("redis-server is not installed; `make setup` does it")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    process = subprocess.Popen(
        [*command, "--appendonly", "no", "--dir", str(directory)], stdout=subprocess.DEVNULL
    )
    try:
        _wait_for_redis(process, port)
        yield RunningServer(process.pid, "127.0.0.1", port)
    finally:
        process.terminate()
        process.wait(_START_TIMEOUT_S)


@contextmanager
def feature_cache(
    directory: Path,
    *,
    memory: str,
    namespaces: dict[str, Any],
    stores: dict[str, Any] | None = None,
) -> Iterator[RunningServer]:
    """A `cache-daemon` process; arguments are sections of its config."""
    config: dict[str, Any] = yaml.safe_load(
        """
        topology: colocated
        listen: {grpc: ["127.0.0.1:0"], admin: "127.0.0.1:0", http: "127.0.0.1:0"}
        """
    )
    config["memory"] = {"size": memory}
    config["namespaces"] = namespaces
    if stores:
        config["stores"] = stores
    with DaemonProcess(config, directory) as daemon:
        host, port = daemon.addresses.grpc.rsplit(":", 1)
        yield RunningServer(daemon.pid, host, int(port))
        daemon.stop()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all its threads, in seconds (steps of 10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _wait_for_redis(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    with redis.Redis(port=port) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"redis-server ended with exit code {process.returncode}")
            try:
                client.ping()
            except redis.ConnectionError:
                time.sleep(0.01)
            else:
                return
    raise RuntimeError(f"redis-server does not answer after {_START_TIMEOUT_S:g} s")
