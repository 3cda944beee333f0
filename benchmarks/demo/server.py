"""The demo's daemon: a real `cache-daemon` process with a config derived from configs/demo.yaml."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from cache_daemon.config import ConfigError, parse_config
from cache_daemon.config_node import node_config

__all__ = ["Addresses", "DaemonError", "DaemonProcess", "derive_config", "routing_rules"]

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 20.0
_POLL_S = 0.02
_LOG_LINES_SHOWN = 20
_ROOMY_BYTES = 256 << 20


class DaemonError(RuntimeError):
    """The daemon did not start, or did not stop as it should; carries the end of its log."""


def derive_config(base: Path, work_dir: Path, *, dram_bytes: int, nvm_bytes: int) -> dict[str, Any]:
    """The config at `base`, with free ports, the demo's own store and NVM file, and other sizes.

    Sizes are what the demo must choose by itself: the data is to be several times larger than DRAM,
    which has `dram_bytes` with its index and tables; what the NVM tier takes of the memory comes on
    top. Raises OSError or ValueError when `base` cannot be used.
    """
    config = yaml.safe_load(base.read_text())
    try:
        config["listen"] = {"grpc": ["127.0.0.1:0"], "admin": "127.0.0.1:0", "http": "127.0.0.1:0"}
        config["memory"]["size"] = dram_bytes
        config["stores"]["features"]["options"]["path"] = str(work_dir / "features")
        config["nvm"]["devices"] = [{"path": str(work_dir / "nvm"), "size": nvm_bytes}]
        config["memory"]["size"] += _nvm_memory_bytes(config)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{base} is not the demo's config: {error!r} is missing") from error
    except ConfigError as error:
        raise ValueError(f"{base} cannot be used: {error}") from error
    return dict(config)


def _nvm_memory_bytes(config: dict[str, Any]) -> int:
    """What the NVM tier of a config takes of the memory, whatever the memory is."""
    roomy = {**config, "memory": {**config["memory"], "size": _ROOMY_BYTES}}
    return node_config(parse_config(yaml.safe_dump(roomy))).nvm_memory_bytes()


def routing_rules(config: dict[str, Any]) -> list[str]:
    """One line a namespace: which domain its values enter, and each domain's nature."""
    lines = []
    for name, namespace in config["namespaces"].items():
        domains = ", ".join(
            f"{domain} ({settings['budget']}, ttl {settings.get('ttl', 'none')}, "
            f"{settings.get('policy', 's3fifo')})"
            for domain, settings in namespace["domains"].items()
        )
        rules = [
            f"{' and '.join(f'{key} {value}' for key, value in rule.items() if key != 'domain')}"
            f" → {rule['domain']}"
            for rule in namespace.get("rules", [])
        ]
        default = namespace.get("default_domain") or next(iter(namespace["domains"]))
        lines.append(f"{name}: {domains}; {', '.join([*rules, f'else → {default}'])}")
    return lines


@dataclass(frozen=True)
class Addresses:
    """Where the daemon listens."""

    grpc: str
    admin: str
    http: str


class DaemonProcess:
    """Runs the daemon from construction until `stop`; its log is `daemon.log` in `work_dir`."""

    def __init__(self, config: dict[str, Any], work_dir: Path) -> None:
        """Raises DaemonError when it does not serve within 30 s."""
        config_path, ready_path = work_dir / "config.yaml", work_dir / "ready.json"
        config_path.write_text(yaml.safe_dump(config, sort_keys=False))
        ready_path.unlink(missing_ok=True)
        self._log_path = work_dir / "daemon.log"
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-c", "from cache_daemon.cli import main; main()", "run"),
                    *("--config", str(config_path), "--ready-file", str(ready_path)),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self.addresses = self._wait_until_ready(ready_path)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        return self._process.pid

    def __enter__(self) -> "DaemonProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def check_alive(self) -> None:
        """Raises DaemonError when the process has ended."""
        code = self._process.poll()
        if code is not None:
            raise DaemonError(f"the daemon ended with exit code {code}\n{self._log_end()}")

    def stop(self) -> None:
        """Drains and ends the daemon. Raises DaemonError unless it ends well within 20 s."""
        self.check_alive()
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise DaemonError(f"the daemon does not stop\n{self._log_end()}") from error
        if code != 0:
            raise DaemonError(f"the daemon stopped with exit code {code}\n{self._log_end()}")

    def _wait_until_ready(self, ready_path: Path) -> Addresses:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            self.check_alive()
            if ready_path.exists():
                ready = json.loads(ready_path.read_text())
                return Addresses(ready["grpc"][0], ready["admin"], ready["http"])
            time.sleep(_POLL_S)
        raise DaemonError(
            f"the daemon does not serve after {_START_TIMEOUT_S:.0f} s\n{self._log_end()}"
        )

    def _log_end(self) -> str:
        lines = self._log_path.read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES_SHOWN:])
