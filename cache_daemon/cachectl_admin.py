"""The admin service as cachectl calls it: one connection, a timeout a call, errors made plain."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import grpc

from cache_daemon._proto.feature_cache.v1 import admin_pb2, admin_pb2_grpc

__all__ = ["AdminClient", "DaemonSilent", "DaemonUnreachable", "RequestRefused"]

_Request = TypeVar("_Request")
_Reply = TypeVar("_Reply")


class DaemonUnreachable(ConnectionError):
    """Nobody answers at the address; says what to check."""


class DaemonSilent(DaemonUnreachable):
    """It did not answer in time, and may well be there."""


class RequestRefused(Exception):
    """The daemon answered, and said no; the text is the daemon's."""


class AdminClient:
    """Calls `feature_cache.v1.Admin` at `address` (`unix:/path` or `host:port`).

    Every method raises DaemonUnreachable or RequestRefused.
    """

    def __init__(self, address: str, timeout_s: float) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(
            address,
            # Counters of a thousand namespaces are larger than gRPC's default of 4 MiB.
            [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", 256 << 20)],
        )
        self._stub = admin_pb2_grpc.AdminStub(self._channel)

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()

    def status(self) -> admin_pb2.GetStatusResponse:
        return self._call(self._stub.GetStatus, admin_pb2.GetStatusRequest())

    def stats(self) -> admin_pb2.GetStatsResponse:
        return self._call(self._stub.GetStats, admin_pb2.GetStatsRequest())

    def resize(self, namespace: str, domain: str, budget_bytes: int) -> int:
        """Returns the old budget in bytes."""
        request = admin_pb2.ResizeDomainRequest(
            namespace=namespace, domain=domain, budget_bytes=budget_bytes
        )
        return self._call(self._stub.ResizeDomain, request).old_budget_bytes

    def flush(self, namespace: str) -> int:
        """Returns how many items were dropped."""
        request = admin_pb2.FlushNamespaceRequest(namespace=namespace)
        return self._call(self._stub.FlushNamespace, request).items

    def drain(self, timeout_s: float) -> None:
        """Begins to drain; 0: as long as the daemon's config says."""
        self._call(self._stub.Drain, admin_pb2.DrainRequest(timeout_seconds=timeout_s))

    def start_warmup(self, max_duration_s: float) -> None:
        """Begins to warm up; 0: for as long as the daemon's config says."""
        request = admin_pb2.StartWarmupRequest(max_duration_seconds=max_duration_s)
        self._call(self._stub.StartWarmup, request)

    def stop_warmup(self) -> bool:
        """Ends a warm-up; False when none ran."""
        return self._call(self._stub.StopWarmup, admin_pb2.StopWarmupRequest()).was_running

    def _call(
        self, method: grpc.UnaryUnaryMultiCallable[_Request, _Reply], request: _Request
    ) -> _Reply:
        try:
            return method(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise self._translate(error) from error

    def _translate(self, error: grpc.RpcError) -> Exception:
        code: Callable[[], grpc.StatusCode] = getattr(
            error, "code", lambda: grpc.StatusCode.UNKNOWN
        )
        details = getattr(error, "details", lambda: str(error))() or "no details"
        if code() == grpc.StatusCode.UNAVAILABLE:
            why = "is it running?"
            if "Permission denied" in details:
                why = "permission denied; run this as the daemon's user"
            return DaemonUnreachable(f"cannot reach the daemon at {self.address}: {why}")
        if code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            return DaemonSilent(
                f"the daemon at {self.address} did not answer within {self._timeout_s:g} s"
            )
        if code() == grpc.StatusCode.UNIMPLEMENTED:
            return DaemonUnreachable(
                f"what listens at {self.address} is not the admin service; "
                "is this the address of the data service?"
            )
        return RequestRefused(details)
