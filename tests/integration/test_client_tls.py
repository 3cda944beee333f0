"""The client over TLS and over a Unix socket, against a grpcio server with real certificates."""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from cache_daemon._proto.feature_cache.v1 import feature_cache_pb2 as pb
from cache_daemon.client import Client, DeadlineExceeded, RetryPolicy, Tls, Unavailable

_SERVER_NAME = "cache.test"


@dataclass(frozen=True)
class _Identity:
    """A private key and its certificate, in PEM."""

    key: bytes
    certificate: bytes


class _Authority:
    """A certificate authority that lives as long as a test."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self._openssl(
            "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2"
            f" -subj /CN={directory.name}"
        )
        self.certificate = (directory / "ca.pem").read_bytes()

    def issue(self, name: str) -> _Identity:
        (self._directory / "extensions").write_text(f"subjectAltName=DNS:{name}\n")
        self._openssl(
            f"req -newkey rsa:2048 -nodes -keyout leaf.key -out leaf.csr -subj /CN={name}"
        )
        self._openssl(
            "x509 -req -in leaf.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2"
            " -extfile extensions -out leaf.pem"
        )
        read = self._directory.joinpath
        return _Identity(read("leaf.key").read_bytes(), read("leaf.pem").read_bytes())

    def _openssl(self, arguments: str) -> None:
        command = ["openssl", *arguments.split()]
        subprocess.run(command, cwd=self._directory, check=True, capture_output=True, timeout=60)


@contextmanager
def _serve(address: str, credentials: grpc.ServerCredentials | None) -> Iterator[int]:
    """A service that finds nothing; yields its port."""

    def answer(request: bytes, _context: grpc.ServicerContext) -> bytes:
        columns = pb.BatchGetRequest.FromString(request).columns
        return pb.BatchGetResponse(
            columns=[
                pb.ValueColumn(value_lengths=[0] * len(c.ids), statuses=b"\x06" * len(c.ids))
                for c in columns
            ]
        ).SerializeToString()

    server = grpc.server(ThreadPoolExecutor(4))
    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "BatchGet": grpc.unary_unary_rpc_method_handler(answer)
    }
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("feature_cache.v1.FeatureCache", methods),)
    )
    if credentials is None:
        port = server.add_insecure_port(address)
    else:
        port = server.add_secure_port(address, credentials)
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait(10)


def _ask(target: str, tls: Tls | None) -> None:
    # One attempt: a handshake that fails will fail again.
    with Client(target, tls=tls, timeout=3.0, retry=RetryPolicy(attempts=1)) as client:
        assert not client.batch_get({"pin": [1, 2, 3]})["pin"].found.any()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> _Authority:
    return _Authority(tmp_path_factory.mktemp("tls") / "trusted")


@pytest.fixture(scope="module")
def tls_port(authority: _Authority) -> Iterator[int]:
    identity = authority.issue(_SERVER_NAME)
    pair = [(identity.key, identity.certificate)]
    with _serve("127.0.0.1:0", grpc.ssl_server_credentials(pair)) as port:
        yield port


def test_a_server_of_the_given_authority_is_trusted(authority: _Authority, tls_port: int) -> None:
    _ask(f"127.0.0.1:{tls_port}", Tls(authority.certificate, server_name=_SERVER_NAME))


def test_a_server_under_another_name_is_not(authority: _Authority, tls_port: int) -> None:
    with pytest.raises((Unavailable, DeadlineExceeded)):
        _ask(f"127.0.0.1:{tls_port}", Tls(authority.certificate, server_name="other.test"))


def test_a_server_of_another_authority_is_not(tls_port: int, tmp_path: Path) -> None:
    stranger = _Authority(tmp_path / "stranger")
    with pytest.raises((Unavailable, DeadlineExceeded)):
        _ask(f"127.0.0.1:{tls_port}", Tls(stranger.certificate, server_name=_SERVER_NAME))


def test_plain_text_does_not_get_through_to_tls(tls_port: int) -> None:
    with pytest.raises((Unavailable, DeadlineExceeded)):
        _ask(f"127.0.0.1:{tls_port}", None)


def test_mutual_tls_wants_a_certificate_of_the_client(authority: _Authority) -> None:
    identity, ours = authority.issue(_SERVER_NAME), authority.issue("ranker.test")
    credentials = grpc.ssl_server_credentials(
        [(identity.key, identity.certificate)],
        root_certificates=authority.certificate,
        require_client_auth=True,
    )
    with _serve("127.0.0.1:0", credentials) as port:
        target = f"127.0.0.1:{port}"
        shown = Tls(
            authority.certificate,
            private_key=ours.key,
            certificate_chain=ours.certificate,
            server_name=_SERVER_NAME,
        )
        _ask(target, shown)
        with pytest.raises((Unavailable, DeadlineExceeded)):
            _ask(target, Tls(authority.certificate, server_name=_SERVER_NAME))


def test_a_unix_socket_is_a_target(tmp_path: Path) -> None:
    target = f"unix:{tmp_path}/data.sock"
    with _serve(target, None):
        _ask(target, None)
