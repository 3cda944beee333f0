"""The HTTP endpoint for people and machines that watch: /metrics and the probes.

It answers GET and HEAD, one request a connection. Everything is bounded, since a monitoring port
must not become the way to bring a node down: connections served at once, seconds a connection may
last, bytes of a request's head (by the standard library).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Protocol
from urllib.parse import urlsplit

__all__ = [
    "CONNECTIONS_MAX",
    "CONNECTION_SECONDS_MAX",
    "HttpError",
    "HttpServer",
    "MetricsRenderer",
]

_log = logging.getLogger(__name__)

CONNECTIONS_MAX = 16
CONNECTION_SECONDS_MAX = 10.0
_STOP_SECONDS_MAX = 2.0

_BUSY = b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_JSON = "application/json"


class HttpError(OSError):
    """The HTTP endpoint cannot listen; says where and why."""


class MetricsRenderer(Protocol):
    """What /metrics shows; `cache_daemon.metrics.Metrics` is one."""

    def render(self, accept: str = "") -> tuple[str, bytes]: ...


@dataclass(frozen=True)
class _Response:
    status: HTTPStatus
    content_type: str
    body: bytes


_Route = Callable[[str], _Response]  # of the Accept header


class HttpServer:
    """Serves the endpoint from threads of its own, from construction until `stop`.

    Parameters
    ----------
    address
        `host:port` or `[ipv6]:port`; port 0 takes any free one (see `address`).
    metrics
        Renders /metrics.
    state
        The daemon's state. /healthz answers 200 unless it is STOPPED: the process need not be
        restarted. /startupz answers 200 from SERVING on: the start, warm-up included, is over.
        /readyz answers 200 only for SERVING: it may be given traffic.
    out_of_service
        Paths of NVM devices that are out of service. /healthz names them and stays 200, and /readyz
        does not care: the daemon serves without them.

    Raises
    ------
    ValueError
        The address is not of that form.
    HttpError
        The address cannot be bound.
    """

    def __init__(
        self,
        address: str,
        *,
        metrics: MetricsRenderer,
        state: Callable[[], str],
        out_of_service: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        host, port = _parse(address)
        self._metrics = metrics
        self._state = state
        self._out_of_service = out_of_service
        routes: dict[str, _Route] = {
            "/metrics": self._serve_metrics,
            "/healthz": self._serve_health,
            "/startupz": self._serve_startup,
            "/readyz": self._serve_readiness,
        }
        try:
            self._server = _BoundedServer(host, port, routes)
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno == errno.EADDRINUSE:
                reason = "another process listens there; set listen.http to a free port"
            raise HttpError(error.errno, f"cannot serve HTTP on {address}: {reason}") from error
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            name="http",
            kwargs={"poll_interval": 0.2},
            daemon=True,
        )
        self._thread.start()

    @property
    def address(self) -> str:
        """`host:port` as bound."""
        host, port = self._server.server_address[:2]
        name = str(host)
        return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"

    def stop(self) -> None:
        """Closes the port and every connection. Idempotent."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(_STOP_SECONDS_MAX)

    def _serve_metrics(self, accept: str) -> _Response:
        content_type, body = self._metrics.render(accept)
        return _Response(HTTPStatus.OK, content_type, body)

    def _serve_health(self, _accept: str) -> _Response:
        out = list(self._out_of_service())
        details = {"nvm_out_of_service": out} if out else {}
        return self._state_response(lambda state: state != "STOPPED", details)

    def _serve_startup(self, _accept: str) -> _Response:
        return self._state_response(lambda state: state in ("SERVING", "DRAINING"), {})

    def _serve_readiness(self, _accept: str) -> _Response:
        return self._state_response(lambda state: state == "SERVING", {})

    def _state_response(
        self, good: Callable[[str], bool], details: Mapping[str, list[str]]
    ) -> _Response:
        state = self._state()
        status = HTTPStatus.OK if good(state) else HTTPStatus.SERVICE_UNAVAILABLE
        return _Response(status, _JSON, json.dumps({"state": state, **details}).encode() + b"\n")


class _BoundedServer(HTTPServer):
    """A thread a connection, a bound on their number, and a deadline for each."""

    request_queue_size = 64
    # On Linux this only skips TIME_WAIT; a port that somebody listens on is still refused.
    allow_reuse_address = True

    def __init__(self, host: str, port: int, routes: Mapping[str, _Route]) -> None:
        self.routes = routes
        self._lock = threading.Lock()
        self._open: dict[socket.socket, float] = {}  # deadline on the monotonic clock
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family = info[0][0]
        super().__init__(info[0][4][:2], _Handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        # HTTPServer looks up the host's name here, which may ask a DNS server; nobody needs it.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            room = len(self._open) < CONNECTIONS_MAX
            if room:
                self._open[request] = time.monotonic() + CONNECTION_SECONDS_MAX
        if not room:
            request.settimeout(0)  # a full socket buffer must not block the accept loop
            with contextlib.suppress(OSError):
                request.send(_BUSY)
            self.shutdown_request(request)
            return
        threading.Thread(
            target=self._serve, args=(request, client_address), name="http-connection", daemon=True
        ).start()

    def _serve(self, request: socket.socket, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except OSError as error:
            _log.debug("http: %s went away: %s", client_address, error)
        except Exception:
            _log.exception("http: serving %s failed", client_address)
        finally:
            with self._lock:
                self._open.pop(request, None)
            self.shutdown_request(request)

    def service_actions(self) -> None:
        """Runs once a poll: cuts connections that outlived their deadline."""
        now = time.monotonic()
        self._cut(lambda deadline: deadline < now)

    def server_close(self) -> None:
        super().server_close()
        self._cut(lambda _deadline: True)

    def _cut(self, due: Callable[[float], bool]) -> None:
        with self._lock:
            for connection, deadline in self._open.items():
                if due(deadline):
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)  # its thread wakes and closes it


class _Handler(BaseHTTPRequestHandler):
    server: _BoundedServer
    server_version = "feature-cache"
    sys_version = ""  # strangers need not know which Python this is
    timeout = CONNECTION_SECONDS_MAX

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _refuse(self) -> None:
        response = _text(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD are answered here")
        self._send(response, body=True, headers={"Allow": "GET, HEAD"})

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_CONNECT = do_TRACE = _refuse

    def _answer(self, *, body: bool) -> None:
        path = urlsplit(self.path).path
        route = self.server.routes.get(path)
        if route is None:
            known = ", ".join(self.server.routes)
            response = _text(HTTPStatus.NOT_FOUND, f"nothing here; there is {known}")
        else:
            try:
                response = route(self.headers.get("Accept", ""))
            except Exception:
                _log.exception("http: %s failed", path)
                response = _text(HTTPStatus.INTERNAL_SERVER_ERROR, f"{path} failed; see the log")
        self._send(response, body=body)

    def _send(
        self, response: _Response, *, body: bool, headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(response.status)
        self.send_header("Content-Type", response.content_type)
        self.send_header("Content-Length", str(len(response.body)))
        self.send_header("Cache-Control", "no-store")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(response.body)

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug("http: " + format, *args)


def _text(status: HTTPStatus, message: str) -> _Response:
    return _Response(status, "text/plain; charset=utf-8", message.encode() + b"\n")


def _parse(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535 or not host:
        raise ValueError(f"HTTP address {address!r} is not of the form host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)
