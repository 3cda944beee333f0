"""The errors of the client, one class for each thing that a caller can do about them."""

from cache_daemon import _native

__all__ = [
    "ClientClosed",
    "DeadlineExceeded",
    "FeatureCacheError",
    "InvalidRequest",
    "Overloaded",
    "PermissionDenied",
    "ServerFault",
    "Unavailable",
    "UnknownName",
    "error_of",
]

# Numbers of grpc.StatusCode; the client does not import grpc, which alone takes 0.2 s.
CANCELLED = 1
INVALID_ARGUMENT = 3
DEADLINE_EXCEEDED = 4
NOT_FOUND = 5
PERMISSION_DENIED = 7
RESOURCE_EXHAUSTED = 8
FAILED_PRECONDITION = 9
OUT_OF_RANGE = 11
UNAVAILABLE = 14
UNAUTHENTICATED = 16

# gRPC uses one code for a server without room and for a message that will never fit.
_TOO_LARGE = "larger than max"


class FeatureCacheError(Exception):
    """Base of all errors of the client.

    FeatureCacheError
    ├── InvalidRequest (also ValueError): the request can never succeed; change it
    │   └── UnknownName: the daemon has no such namespace or domain; see `cachectl namespaces`
    ├── DeadlineExceeded (also TimeoutError): no reply in time; raise `timeout` or shrink the batch
    ├── Unavailable (also ConnectionError): no daemon answers there; is it running and serving?
    ├── Overloaded: the daemon refused for want of room; slow down
    ├── PermissionDenied: the daemon does not accept these credentials
    ├── ClientClosed: the client was closed before or during the call
    └── ServerFault: the daemon failed or its reply is garbled; see its log

    `code` is the number of the gRPC status, 0 when no call was made; `details` is what the daemon
    said.
    """

    def __init__(self, message: str, *, code: int = 0, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.details = details or message


class InvalidRequest(FeatureCacheError, ValueError):
    """The request can never succeed as it is."""


class UnknownName(InvalidRequest):
    """The daemon has no such namespace or domain."""


class DeadlineExceeded(FeatureCacheError, TimeoutError):
    """No reply came within the timeout of the call."""


class Unavailable(FeatureCacheError, ConnectionError):
    """No daemon answered, also after retries."""


class Overloaded(FeatureCacheError):
    """The daemon refused the call for want of room, also after retries."""


class PermissionDenied(FeatureCacheError):
    """The daemon does not accept the credentials of this client."""


class ClientClosed(FeatureCacheError):
    """The client was closed before or during the call."""


class ServerFault(FeatureCacheError):
    """The daemon failed, or its reply cannot be read."""


_CLASSES: dict[int, type[FeatureCacheError]] = {
    CANCELLED: ClientClosed,
    INVALID_ARGUMENT: InvalidRequest,
    OUT_OF_RANGE: InvalidRequest,
    NOT_FOUND: UnknownName,
    DEADLINE_EXCEEDED: DeadlineExceeded,
    PERMISSION_DENIED: PermissionDenied,
    UNAUTHENTICATED: PermissionDenied,
    RESOURCE_EXHAUSTED: Overloaded,
    UNAVAILABLE: Unavailable,
}


def is_retryable(error: _native.RpcError) -> bool:
    """Whether the same request may succeed a little later."""
    if error.code == RESOURCE_EXHAUSTED:
        return _TOO_LARGE not in error.details.lower()
    return error.code == UNAVAILABLE


def error_of(error: _native.RpcError, *, method: str, target: str) -> FeatureCacheError:
    """The error that a caller sees for a call that failed."""
    kind = _CLASSES.get(error.code, ServerFault)
    if error.code == RESOURCE_EXHAUSTED and not is_retryable(error):
        kind = InvalidRequest
    message = f"{method} of {target}: {error.details or kind.__doc__}"
    return kind(message, code=error.code, details=error.details)
