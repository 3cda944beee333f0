"""`cache-daemon run` as a child process for end-to-end tests, and a store that shows its calls."""

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cache_daemon.client import Client, FeatureCacheError, RetryPolicy
from tests.servers import wait_until

__all__ = [
    "ITEMS",
    "KEYS",
    "ONCE",
    "START_S",
    "STORE_MODULE",
    "Daemon",
    "Start",
    "begin_reads",
    "keys_asked",
    "slow",
    "statuses",
]

START_S = 30.0
_STOP_S = 20.0
ITEMS = {b"item %d" % number: b"value of %d" % number for number in range(3000)}
KEYS = list(ITEMS)
ONCE = RetryPolicy(attempts=1)

# A slow store that leaves a file at each call, named by how many keys it asks: so a test knows
# which reads the daemon has accepted.
STORE_MODULE = """\
import pathlib
import time


class SlowStore:
    def __init__(self, folder, seconds):
        self._folder = pathlib.Path(folder)
        self._seconds = seconds

    def get_many(self, groups, timeout_s):
        asked = sum(len(keys) for _, keys in groups)
        (self._folder / f"{time.monotonic_ns()} {asked}").touch()
        time.sleep(self._seconds)
        return [list(keys) for _, keys in groups]

    def close(self):
        (self._folder / "closed").touch()
"""


class Daemon:
    """One `cache-daemon run` process."""

    def __init__(self, folder: Path, config: dict[str, Any], **environment: str) -> None:
        self.folder = folder
        self.config_path = folder / "config.yaml"
        self.config_path.write_text(yaml.safe_dump(config, sort_keys=False))
        self.ready_path = folder / "ready.json"
        self.log_path = folder / "daemon.log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("cache-daemon")),
                    *("run", "--config", str(self.config_path)),
                    *("--ready-file", str(self.ready_path)),
                ],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(folder)} | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_until_ready(self) -> "Daemon":
        def ready() -> bool:
            assert self.process.poll() is None, f"ended at once:\n{self.log}"
            return self.ready_path.exists()

        wait_until(ready, START_S, "the ready file")
        return self

    @property
    def addresses(self) -> dict[str, Any]:
        addresses: dict[str, Any] = json.loads(self.ready_path.read_text())
        return addresses

    @property
    def tcp(self) -> str:
        return str(next(a for a in self.addresses["grpc"] if not a.startswith("unix:")))

    def client(self, **options: Any) -> Client:
        return Client(self.tcp, **({"timeout": 10.0} | options))

    def http(self, path: str) -> tuple[int, str]:
        url = f"http://{self.addresses['http']}{path}"
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                return int(reply.status), str(reply.read().decode())
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def health(self) -> str:
        with grpc.insecure_channel(self.tcp) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = _STOP_S) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.log}") from None


Start = Callable[..., Daemon]


def slow(config: dict[str, Any], folder: Path, seconds: float) -> dict[str, Any]:
    """The same with a `SlowStore` whose calls take `seconds`; its files are in `folder`/calls."""
    (folder / "calls").mkdir()
    config["stores"]["features"] = {
        "type": "slow_store:SlowStore",
        "options": {"folder": str(folder / "calls"), "seconds": seconds},
        "guard": {"timeout": "60s", "concurrency": 4},
    }
    for namespace in config["namespaces"].values():
        namespace["fetch_timeout"] = "60s"
    return config


def statuses(client: Client, namespace: str, keys: list[bytes]) -> list[int]:
    found: list[int] = client.batch_get({namespace: keys})[namespace].statuses.tolist()
    return found


def keys_asked(folder: Path) -> int:
    """How many keys the slow store has been asked for."""
    return sum(int(path.name.split()[1]) for path in (folder / "calls").glob("* *"))


def begin_reads(daemon: Daemon, count: int, results: list[Any]) -> list[threading.Thread]:
    """Reads of one cold key each, under way when this returns; what they get goes to `results`."""

    def read(number: int) -> None:
        with daemon.client(timeout=30, retry=ONCE) as client:
            try:
                results.append(client.batch_get({"pin": [b"cold %d" % number]})["pin"].to_bytes())
            except FeatureCacheError as error:
                results.append(error)

    threads = [threading.Thread(target=read, args=[number]) for number in range(count)]
    for thread in threads:
        thread.start()
    wait_until(lambda: keys_asked(daemon.folder) >= count, what="all reads accepted")
    return threads
