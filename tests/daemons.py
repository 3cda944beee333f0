"""A daemon and a Prometheus as child processes, for tests that watch the one through the other."""

import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.servers import Server, free_port

__all__ = ["CacheDaemon", "Prometheus"]


class CacheDaemon(Server):
    """`cache-daemon run` with a config, on sockets of its own."""

    program = sys.executable
    package = "the package itself (make setup)"

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        """`config` lacks `listen`, which is set here: a Unix socket each, and HTTP on any port."""
        super().__init__(directory)
        self.log_path = directory / "cache-daemon.log"
        self._config_path = directory / "config.yaml"
        self._ready_path = directory / "ready.json"
        listen = {
            "grpc": [f"unix:{directory}/data.sock"],
            "admin": f"unix:{directory}/admin.sock",
            "http": f"127.0.0.1:{free_port()}",
        }
        self._config_path.write_text(yaml.safe_dump({**config, "listen": listen}))

    def command(self) -> list[str]:
        config, ready = str(self._config_path), str(self._ready_path)
        return [
            *(self.program, "-m", "cache_daemon.cli", "run"),
            *("--config", config, "--ready-file", ready),
        ]

    def is_ready(self) -> bool:
        return self._ready_path.is_file()

    def _addresses(self) -> dict[str, Any]:
        read: dict[str, Any] = json.loads(self._ready_path.read_text())
        return read

    @property
    def data_address(self) -> str:
        return str(self._addresses()["grpc"][0])

    @property
    def admin_address(self) -> str:
        return str(self._addresses()["admin"])

    @property
    def http_address(self) -> str:
        return str(self._addresses()["http"])


class Prometheus(Server):
    """A Prometheus that runs a given config."""

    program = "prometheus"
    package = "prometheus"

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        super().__init__(directory)
        self._config_path = directory / "prometheus.yml"
        self._config_path.write_text(yaml.safe_dump(dict(config)))
        self._address = f"127.0.0.1:{free_port()}"

    def command(self) -> list[str]:
        return [
            self.program,
            f"--config.file={self._config_path}",
            f"--storage.tsdb.path={self.directory / 'data'}",
            f"--web.listen-address={self._address}",
            "--storage.tsdb.retention.time=1h",
            "--log.level=warn",
        ]

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self._address}/-/ready", timeout=1) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def get(self, path: str, **parameters: str) -> Any:
        """The `data` of an API call; AssertionError with Prometheus' words when it refuses."""
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series of an instant vector."""
        data = self.get("query", query=expression)
        assert data["resultType"] == "vector", expression
        return [(series["metric"], float(series["value"][1])) for series in data["result"]]
