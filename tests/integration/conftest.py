"""Fixtures that start real servers; see tests/servers.py."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.proxy import TcpProxy
from tests.s3_server import S3Server, credentials
from tests.servers import RedisServer
from tests.zookeeper import ZooKeeperEnsemble, ZooKeeperServer, new_chroot


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


@pytest.fixture(scope="session")
def _s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"))
    with server:
        yield server


@pytest.fixture
def s3_server(_s3: S3Server) -> Iterator[S3Server]:
    """A running S3, shared; take a prefix of your own. Its credentials are this process's."""
    with credentials():
        yield _s3


@pytest.fixture(scope="session")
def _zookeeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZooKeeperServer]:
    server = ZooKeeperServer(tmp_path_factory.mktemp("zookeeper"))
    with server:
        yield server


@pytest.fixture
def zookeeper_hosts(_zookeeper: ZooKeeperServer) -> str:
    """A connection string with a new, empty chroot on a shared server; do not stop or pause it."""
    return new_chroot(_zookeeper.address)


@pytest.fixture
def start_zookeeper(tmp_path: Path) -> Iterator[Callable[..., ZooKeeperServer]]:
    """Starts servers of a test's own, for passwords and faults; they end with the test."""
    with ExitStack() as stack:

        def start(**options: Any) -> ZooKeeperServer:
            server = ZooKeeperServer(
                Path(tempfile.mkdtemp(prefix="zookeeper-", dir=tmp_path)), **options
            )
            stack.enter_context(server)
            return server

        yield start


@pytest.fixture(scope="session")
def _zookeeper_ensemble(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZooKeeperEnsemble]:
    with ZooKeeperEnsemble(tmp_path_factory.mktemp("ensemble")) as ensemble:
        yield ensemble


@pytest.fixture
def zookeeper_ensemble(_zookeeper_ensemble: ZooKeeperEnsemble) -> Iterator[ZooKeeperEnsemble]:
    """Three members that serve. A test may kill, pause and restart them: they are repaired later.

    Take a chroot of your own: `new_chroot(ensemble.hosts)`.
    """
    yield _zookeeper_ensemble
    _zookeeper_ensemble.repair()


@pytest.fixture
def start_proxy() -> Iterator[Callable[[int], TcpProxy]]:
    """Starts proxies in front of a port of loopback; they end with the test."""
    with ExitStack() as stack:

        def start(target_port: int) -> TcpProxy:
            return stack.enter_context(TcpProxy(target_port))

        yield start
