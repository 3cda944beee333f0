"""Reports to the service manager, in systemd's protocol: datagrams of text on a Unix socket."""

import logging
import socket
from types import TracebackType

__all__ = ["Notifier"]

_log = logging.getLogger(__name__)


class Notifier:
    """Sends states to the socket that the service manager named; does nothing without one.

    A report is never worth a failure: what cannot be sent is logged once and dropped. Not
    thread-safe; the daemon's main thread owns it.
    """

    def __init__(self, address: str) -> None:
        """`address` is NOTIFY_SOCKET: a path, `@name` in the abstract space, or "" for none."""
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
        self._failed = False

    def ready(self, status: str) -> None:
        """The daemon serves; `status` is a line for people."""
        self._send("READY=1", f"STATUS={status}")

    def recovering(self, status: str, extend_s: float) -> None:
        """The daemon still starts, and will say so again within `extend_s` seconds."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(extend_s * 1e6)}", f"STATUS={status}")

    def still_stopping(self, extend_s: float) -> None:
        """The daemon writes what shall outlive it; it ends, or says so again, within `extend_s`."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(extend_s * 1e6)}")

    def stopping(self, status: str) -> None:
        """The daemon drains."""
        self._send("STOPPING=1", f"STATUS={status}")

    def alive(self) -> None:
        """Feeds the watchdog."""
        self._send("WATCHDOG=1")

    def close(self) -> None:
        """Idempotent; later reports are dropped."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> "Notifier":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _send(self, *fields: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto("\n".join(fields).encode(), self._address)
        except OSError as error:
            if not self._failed:
                _log.warning("cannot report to the service manager: %s", error)
            self._failed = True
