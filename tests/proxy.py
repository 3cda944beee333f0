"""A TCP proxy between two parties of a test, to part them: silence, resets, delay.

    with TcpProxy(server.port) as proxy:
        client = connect("127.0.0.1", proxy.port)
        proxy.black_hole()   # connections stay, nothing arrives; new ones are taken and stay silent
        proxy.forward()      # what was held back arrives now, as TCP sends again after a partition
        proxy.reset()        # RST on every connection; new ones are forwarded
        proxy.refuse()       # RST on every connection, also on new ones, until forward()
        proxy.delay_s = 0.2  # each way, for what is sent from now on

All methods may be called from any thread. The target may be away: then new connections are reset.
"""

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any

__all__ = ["TcpProxy"]

_READ_BYTES = 64 << 10
_QUEUED_CHUNKS_MAX = 64  # one way of one connection, while it is held back or delayed
_CALL_TIMEOUT_S = 10.0


class TcpProxy:
    """Forwards `127.0.0.1:port` to a port of loopback; a context manager."""

    def __init__(self, target_port: int, target_host: str = "127.0.0.1") -> None:
        self.delay_s = 0.0
        self.accepted = 0  # connections so far
        self.port = 0
        self._target = (target_host, target_port)
        self._refusing = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="tcp-proxy", daemon=True)
        self._up_open = asyncio.Event()  # towards the target
        self._down_open = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def open_connections(self) -> int:
        """Accepted ones that neither side has closed."""
        return len(self._tasks)

    def forward(self) -> None:
        """The state it starts in; what a black hole held back arrives."""
        self._call(self._set, refusing=False, up=True, down=True)

    def black_hole(self, *, up: bool = True, down: bool = True) -> None:
        """Nothing arrives any more: `up` towards the target, `down` from it."""
        self._call(self._set, refusing=False, up=not up, down=not down)

    def reset(self) -> None:
        """RST to both sides of every connection that is open now."""
        self._call(self._reset)

    def refuse(self) -> None:
        """As `reset`, and new connections are reset, too, until `forward`."""
        self._call(self._set, refusing=True, up=True, down=True)
        self._call(self._reset)

    def start(self) -> None:
        self._thread.start()
        self._await(self._listen())
        self.forward()

    def stop(self) -> None:
        """Resets what is open and ends. Idempotent."""
        if self._loop.is_closed():
            return
        self._await(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_TIMEOUT_S)
        self._loop.close()

    def __enter__(self) -> "TcpProxy":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # ---- in the thread of the loop -------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _end(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _set(self, *, refusing: bool, up: bool, down: bool) -> None:
        self._refusing = refusing
        for event, is_open in ((self._up_open, up), (self._down_open, down)):
            if is_open:
                event.set()
            else:
                event.clear()

    def _reset(self) -> None:
        for writer in list(self._writers):
            _abort(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        target: asyncio.StreamWriter | None = None
        try:
            if self._refusing:
                return
            # In a black hole the target never learns of it.
            await self._up_open.wait()
            target_reader, target = await asyncio.open_connection(*self._target)
            self._writers.add(target)
            # One side that ends ends both: none of the protocols here closes half a connection.
            ways = [
                asyncio.ensure_future(self._carry(reader, target, self._up_open)),
                asyncio.ensure_future(self._carry(target_reader, writer, self._down_open)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for side in (writer, *((target,) if target else ())):
                self._writers.discard(side)
                _abort(side)
            self._tasks.discard(task)

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_open: asyncio.Event
    ) -> None:
        """One way of a connection, until its sender ends or either side breaks."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_QUEUED_CHUNKS_MAX)

        async def read() -> None:
            data = b"more"
            while data:
                try:
                    data = await reader.read(_READ_BYTES)
                except OSError:
                    data = b""
                await queue.put((time.monotonic() + self.delay_s, data))

        reading = asyncio.ensure_future(read())
        try:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                await is_open.wait()
                if not data:
                    return
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    # ---- from other threads --------------------------------------------------------------------

    def _await(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_TIMEOUT_S)

    def _call(self, function: Callable[..., None], **arguments: bool) -> None:
        async def call() -> None:
            function(**arguments)

        self._await(call())


def _abort(writer: asyncio.StreamWriter) -> None:
    """Closes with RST, not FIN; what was not sent is lost."""
    raw = writer.get_extra_info("socket")
    if raw is not None and raw.fileno() >= 0:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
