"""Fixtures that start daemons as processes; see tests/daemon_process.py."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cache_daemon.stores.lmdb import LmdbWriter
from tests.daemon_process import ITEMS, STORE_MODULE, Daemon, Start


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A small colocated node on an LMDB with `ITEMS` in namespaces `pin` and `user`."""
    with LmdbWriter(tmp_path / "features", sync=False, map_size=64 << 20) as writer:
        writer.write_many("pin", ITEMS)
        writer.write_many("user", {b"u": b"user value"})
    return {
        "listen": {
            "grpc": ["127.0.0.1:0", f"unix:{tmp_path}/data.sock"],
            "admin": f"unix:{tmp_path}/admin.sock",
            "http": "127.0.0.1:0",
        },
        "memory": {"size": "32MiB"},
        "namespaces": {
            "pin": {
                "store": "features",
                "default_domain": "main",
                "domains": {"main": {"budget": "60%"}, "other": {"budget": "20%"}},
            },
            "user": {"store": "features", "domains": {"main": {"budget": "20%"}}},
        },
        "stores": {"features": {"type": "lmdb", "options": {"path": str(tmp_path / "features")}}},
        "drain_timeout": "15s",
    }


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Start]:
    """Starts daemons without waiting for them; they do not outlive the test."""
    with ExitStack() as stack:

        def start(config: dict[str, Any], **environment: str) -> Daemon:
            (tmp_path / "slow_store.py").write_text(STORE_MODULE)
            daemon = Daemon(tmp_path, config, **environment)
            stack.callback(daemon.process.wait)
            stack.callback(daemon.process.kill)
            return daemon

        yield start


@pytest.fixture
def start(launch: Start) -> Start:
    def start_and_wait(config: dict[str, Any], **environment: str) -> Daemon:
        return launch(config, **environment).wait_until_ready()

    return start_and_wait
