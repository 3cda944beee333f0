"""The proxy that parts the parties of other tests does what it says."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.proxy import TcpProxy
from tests.servers import wait_until


@contextmanager
def echo() -> Iterator[int]:
    """A server that sends back what it gets; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer(peer: socket.socket) -> None:
            with peer:
                try:
                    while data := peer.recv(65536):
                        peer.sendall(data)
                except OSError:
                    pass

        def accept() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(peer,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy() -> Iterator[TcpProxy]:
    with echo() as port, TcpProxy(port) as made:
        yield made


def connect(proxy: TcpProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def ask(peer: socket.socket, text: bytes) -> bytes:
    peer.sendall(text)
    return peer.recv(100)


def test_it_forwards_and_counts(proxy: TcpProxy) -> None:
    with connect(proxy) as one, connect(proxy) as two:
        assert ask(one, b"one") == b"one"
        assert ask(two, b"two") == b"two"
        assert proxy.accepted == 2
        assert proxy.open_connections == 2
    wait_until(lambda: proxy.open_connections == 0)


def test_a_black_hole_holds_back_and_gives_it_later(proxy: TcpProxy) -> None:
    with connect(proxy) as peer:
        assert ask(peer, b"before") == b"before"
        proxy.black_hole()
        peer.settimeout(0.2)
        with pytest.raises(TimeoutError):
            ask(peer, b"during")
        with connect(proxy) as late:
            late.settimeout(0.2)
            with pytest.raises(TimeoutError):
                ask(late, b"late")
            proxy.forward()
            peer.settimeout(5)
            late.settimeout(5)
            assert peer.recv(100) == b"during"
            assert late.recv(100) == b"late"


def test_one_way_may_stay_open(proxy: TcpProxy) -> None:
    with connect(proxy) as peer:
        assert ask(peer, b"a") == b"a"
        proxy.black_hole(up=False)
        peer.settimeout(0.2)
        with pytest.raises(TimeoutError):
            ask(peer, b"b")
        proxy.black_hole(down=False)
        assert peer.recv(100) == b"b", "it had gone up, and only its way down was closed"


def test_a_reset_is_one(proxy: TcpProxy) -> None:
    with connect(proxy) as peer:
        assert ask(peer, b"a") == b"a"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            peer.recv(100)
    with connect(proxy) as peer:
        assert ask(peer, b"b") == b"b"


def test_refused_until_forwarded(proxy: TcpProxy) -> None:
    proxy.refuse()
    with pytest.raises(ConnectionResetError), connect(proxy) as peer:
        peer.recv(100)
    proxy.forward()
    with connect(proxy) as peer:
        assert ask(peer, b"b") == b"b"


def test_delay_is_each_way_and_does_not_add_up(proxy: TcpProxy) -> None:
    with connect(proxy) as peer:
        proxy.delay_s = 0.1
        started = time.monotonic()
        for _ in range(5):
            peer.sendall(b"x")
            time.sleep(0.01)
        got = b""
        while len(got) < 5:
            got += peer.recv(100)
        assert 0.2 <= time.monotonic() - started < 0.6


def test_a_target_that_is_away_resets() -> None:
    with echo() as port:
        pass
    with TcpProxy(port) as proxy, pytest.raises(ConnectionResetError), connect(proxy) as peer:
        peer.recv(100)
