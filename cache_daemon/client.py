"""The client library of the feature cache.

    from cache_daemon.client import Client

    with Client("localhost:7070") as cache:
        reply = cache.batch_get({"pin_text": [b"pin:1", b"pin:2"], "pin_visual": ids}, timeout=0.05)
        matrix, valid = reply["pin_visual"].to_numpy("float32", dim=64)

`AsyncClient` is the same for asyncio. Both take, in place of a target, a transport such as the
embedded node. Nothing here runs Python per key: replies are read as arrays.

A client may be shared by threads (each call waits in its own); a client made before a fork must not
be used after it in the child.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from cache_daemon import _native
from cache_daemon._client_core import (
    AnyReply,
    Attempt,
    Call,
    Keys,
    Pause,
    RetryPolicy,
    Tls,
    Transport,
    Ttl,
    Values,
    attempts,
    checked_timeout,
    delete_call,
    get_call,
    put_call,
)
from cache_daemon._client_errors import (
    ClientClosed,
    DeadlineExceeded,
    FeatureCacheError,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    ServerFault,
    Unavailable,
    UnknownName,
)
from cache_daemon._client_reply import Column, Reply, Status, WriteReply, WriteStatus

if TYPE_CHECKING:
    from cache_daemon.client_sharded import ZooKeeperLogin

__all__ = [
    "AsyncClient",
    "Client",
    "ClientClosed",
    "Column",
    "DeadlineExceeded",
    "FeatureCacheError",
    "InvalidRequest",
    "Keys",
    "Overloaded",
    "PermissionDenied",
    "Reply",
    "RetryPolicy",
    "ServerFault",
    "Status",
    "Tls",
    "Transport",
    "Ttl",
    "Unavailable",
    "UnknownName",
    "Values",
    "WriteReply",
    "WriteStatus",
]


_Self = TypeVar("_Self", bound="_Connection")


class _Connection:
    """A transport, and the settings of the calls on it."""

    def __init__(
        self,
        target: str | Transport,
        *,
        timeout: float = 1.0,
        retry: RetryPolicy | None = None,
        tls: Tls | None = None,
        max_message_bytes: int = 64 << 20,
    ) -> None:
        """Connects at the first call, not here.

        `target` is `host:port`, `unix:/path`, or a transport, which stays its owner's to close.
        `timeout` is for calls that give none, in seconds. `tls` given: TLS; otherwise plain text.
        """
        self._timeout = checked_timeout(timeout)
        self._retry = retry or RetryPolicy()
        self._random = random.Random()
        self._closed = False
        self._channel: _native.Channel | None = None
        self._close_router: Callable[[], None] | None = None
        if not isinstance(target, str):
            self._transport: Transport = target
            self._target = "the embedded node"
            return
        self._target = target
        options: dict[str, Any] = {} if tls is None else vars(tls)
        self._channel = _native.Channel(target, max_message_bytes=max_message_bytes, **options)
        self._transport = self._channel

    @classmethod
    def sharded(
        cls: type[_Self],
        *,
        zookeeper: str,
        cluster: str,
        namespaces: Sequence[str],
        login: "ZooKeeperLogin | None" = None,
        session_timeout: float = 10.0,
        wait: float = 10.0,
        timeout: float = 1.0,
        retry: RetryPolicy | None = None,
    ) -> _Self:
        """A client that asks the leaves of a cluster itself, which saves the way over a root.

        zookeeper: servers and the cluster's path, `zk1:2181,zk2:2181/feature-cache/prod`.
        cluster: the cluster's name; another one at that path is refused.
        namespaces: those that the client will ask for.
        login: a `cache_daemon.client_sharded.ZooKeeperLogin`; None: without.
        session_timeout: of the session with ZooKeeper, in seconds.
        wait: for the first shard map, in seconds. Later ones come as the cluster changes; while
            ZooKeeper is away the last one serves on.

        It keeps nothing: every key is asked of a leaf that has its shard, and writes go to all of
        them. A key whose leaves are all gone is TIMED_OUT. Raises Unavailable where no map comes
        within `wait`, and ValueError for settings that cannot be.
        """
        # Here, since no other client needs ZooKeeper's library.
        from cache_daemon.client_sharded import LeafRouter

        router = LeafRouter(
            zookeeper=zookeeper,
            cluster=cluster,
            namespaces=namespaces,
            login=login,
            session_timeout=session_timeout,
            wait=wait,
        )
        client = cls(router.node, timeout=timeout, retry=retry)
        client._target = f"the leaves of cluster {cluster}"
        client._close_router = router.close
        return client

    def _steps(self, method: str, timeout: float | None) -> Any:
        if self._closed:
            raise ClientClosed("this client is closed")
        return attempts(
            self._retry,
            self._timeout if timeout is None else checked_timeout(timeout),
            method=method,
            target=self._target,
            clock=time.monotonic,
            random=self._random.random,
        )

    def _close(self) -> None:
        self._closed = True
        if self._channel is not None:
            self._channel.close()
        if self._close_router is not None:
            self._close_router()


class Client(_Connection):
    """A blocking client; a context manager. Any number of threads may use it at once."""

    def batch_get(
        self,
        columns: Mapping[str, Keys],
        *,
        timeout: float | None = None,
        domains: Mapping[str, str] | None = None,
        cache_only: bool = False,
    ) -> Reply:
        """Looks up keys of several namespaces in one call.

        columns: by namespace an integer array (ids), a sequence of bytes or str (1 to 1,024 bytes
            each), or a blob with the lengths of its keys. An id is the key of its eight
            little-endian bytes.
        timeout: seconds for the whole call, retries included. Keys that the daemon cannot answer in
            time come back as TIMED_OUT; DeadlineExceeded means that not even that came.
        domains: by namespace the eviction domain that fetched values should enter.
        cache_only: do not ask the store; absent keys are MISS.

        Raises FeatureCacheError; see there.
        """
        return self._run(get_call(columns, domains, cache_only), timeout)

    def batch_put(
        self,
        columns: Mapping[str, tuple[Keys, Values]],
        *,
        ttl: Ttl | Mapping[str, Ttl] = None,
        timeout: float | None = None,
        domains: Mapping[str, str] | None = None,
    ) -> WriteReply:
        """Writes values into the cache, not into the feature store.

        columns: by namespace the keys, as for `batch_get`, and as many values: a sequence of bytes,
            a C-contiguous array with one row a key, or a blob with the lengths of its values.
        ttl: seconds; one for all, or an array with one a key, or either by namespace. None: the
            domain's.
        domains: by namespace the eviction domain; otherwise the namespace's rules decide.

        A put may be retried, as it may be repeated without harm. Raises FeatureCacheError.
        """
        return self._run(put_call(columns, domains, ttl), timeout)

    def batch_delete(
        self, columns: Mapping[str, Keys], *, timeout: float | None = None
    ) -> WriteReply:
        """Removes keys from the cache, not from the feature store. Raises FeatureCacheError."""
        return self._run(delete_call(columns), timeout)

    def close(self) -> None:
        """Ends calls under way with ClientClosed. Idempotent."""
        self._close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, call: Call[AnyReply], timeout: float | None) -> AnyReply:
        send: Callable[[bytes, float], Any] = getattr(self._transport, call.method)
        steps = self._steps(call.method, timeout)
        step = next(steps)
        while True:  # ends: the steps are bounded by the policy's attempts
            if isinstance(step, Pause):
                time.sleep(step.seconds)
                step = next(steps)
                continue
            try:
                answer = send(call.request, step.timeout_s)
            except _native.RpcError as error:
                failure = error
            else:
                return call.read(answer)
            step = steps.send(failure)


class AsyncClient(_Connection):
    """The client for asyncio; an asynchronous context manager. Belongs to one event loop.

    A call that is cancelled stops waiting; the daemon still answers it, at most until its timeout.
    """

    async def batch_get(
        self,
        columns: Mapping[str, Keys],
        *,
        timeout: float | None = None,
        domains: Mapping[str, str] | None = None,
        cache_only: bool = False,
    ) -> Reply:
        """See `Client.batch_get`."""
        return await self._run(get_call(columns, domains, cache_only), timeout)

    async def batch_put(
        self,
        columns: Mapping[str, tuple[Keys, Values]],
        *,
        ttl: Ttl | Mapping[str, Ttl] = None,
        timeout: float | None = None,
        domains: Mapping[str, str] | None = None,
    ) -> WriteReply:
        """See `Client.batch_put`."""
        return await self._run(put_call(columns, domains, ttl), timeout)

    async def batch_delete(
        self, columns: Mapping[str, Keys], *, timeout: float | None = None
    ) -> WriteReply:
        """See `Client.batch_delete`."""
        return await self._run(delete_call(columns), timeout)

    async def close(self) -> None:
        """Ends calls under way with ClientClosed. Idempotent."""
        await asyncio.to_thread(self._close)  # waits for calls, whose callbacks want this loop

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _run(self, call: Call[AnyReply], timeout: float | None) -> AnyReply:
        steps = self._steps(call.method, timeout)
        step = next(steps)
        while True:  # ends: the steps are bounded by the policy's attempts
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
                step = next(steps)
                continue
            answer = await self._send(call, step)
            if not isinstance(answer, _native.RpcError):
                return call.read(answer)
            step = steps.send(answer)

    async def _send(self, call: Call[AnyReply], attempt: Attempt) -> Any:
        """The native reply, or the RpcError of the attempt."""
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Any] = loop.create_future()

        def settle(answer: Any) -> None:
            if not answered.done():  # done: cancelled
                answered.set_result(answer)

        def done(answer: Any) -> None:  # in a thread of the transport
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits
                loop.call_soon_threadsafe(settle, answer)

        getattr(self._transport, f"{call.method}_async")(call.request, attempt.timeout_s, done)
        return await answered
