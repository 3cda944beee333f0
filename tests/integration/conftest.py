"""Fixtures that start real servers; see tests/servers.py."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.servers import RedisServer


@pytest.fixture(scope="session")
def _redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    with server:
        yield server


@pytest.fixture
def redis_server(_redis: RedisServer) -> RedisServer:
    """A running Redis, shared and emptied for each test; do not stop or pause it."""
    with _redis.client() as client:
        client.flushall()
    return _redis


@pytest.fixture
def start_redis(tmp_path: Path) -> Iterator[Callable[..., RedisServer]]:
    """Starts Redis servers of a test's own, for passwords and faults; they end with the test."""
    with ExitStack() as stack:

        def start(*arguments: str, password: str | None = None) -> RedisServer:
            directory = Path(tempfile.mkdtemp(prefix="redis-", dir=tmp_path))

            server = RedisServer(directory, *arguments, password=password)
            stack.enter_context(server)
            return server

        yield start
