"""What the sync and the asyncio client share: requests and retries. No I/O, no waiting."""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from cache_daemon import _native
from cache_daemon._client_errors import InvalidRequest, error_of, is_retryable
from cache_daemon._client_reply import Reply, WriteReply

__all__ = [
    "Attempt",
    "Call",
    "Keys",
    "Pause",
    "RetryPolicy",
    "Tls",
    "Transport",
    "Ttl",
    "Values",
    "attempts",
]

# An integer array or a sequence of int (ids), a sequence of bytes or str, or (blob, lengths).
Keys: TypeAlias = (
    npt.NDArray[Any]
    | Sequence[bytes]
    | Sequence[str]
    | Sequence[int]
    | tuple[Any, npt.NDArray[Any]]
)
# A sequence of bytes, an array with one row a key, or (blob, lengths).
Values: TypeAlias = Sequence[bytes] | npt.NDArray[Any] | tuple[Any, npt.NDArray[Any]]
# Seconds for all keys, or an array of seconds, one a key. None: the domain's TTL.
Ttl: TypeAlias = float | npt.NDArray[Any] | None

AnyReply = TypeVar("AnyReply", Reply, WriteReply)


class Transport(Protocol):
    """What moves the bytes: a `_native.Channel` to a daemon, a `_native.Node` in this process."""

    def batch_get(self, request: bytes, timeout_s: float, /) -> _native.Reply: ...
    def batch_put(self, request: bytes, timeout_s: float, /) -> _native.WriteReply: ...
    def batch_delete(self, request: bytes, timeout_s: float, /) -> _native.WriteReply: ...
    def batch_get_async(
        self,
        request: bytes,
        timeout_s: float,
        done: Callable[[_native.Reply | _native.RpcError], None],
        /,
    ) -> None: ...
    def batch_put_async(
        self,
        request: bytes,
        timeout_s: float,
        done: Callable[[_native.WriteReply | _native.RpcError], None],
        /,
    ) -> None: ...
    def batch_delete_async(
        self,
        request: bytes,
        timeout_s: float,
        done: Callable[[_native.WriteReply | _native.RpcError], None],
        /,
    ) -> None: ...


@dataclass(frozen=True)
class Tls:
    """Certificates in PEM. With key and chain the client shows who it is (mutual TLS)."""

    root_certificates: bytes
    private_key: bytes | None = None
    certificate_chain: bytes | None = None
    server_name: str = ""  # what the daemon's certificate says, when that is not the target's host


@dataclass(frozen=True)
class RetryPolicy:
    """Retries of a daemon that is away or has no room, within the timeout of the call.

    The pause before retry n is uniform between 0 and min(pause_max_s, pause_s * 2**(n - 1)), so
    that clients that failed together do not come back together ("full jitter").
    """

    attempts: int = 4  # with the first; 1: no retries
    pause_s: float = 0.01
    pause_max_s: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.attempts <= 100:
            raise InvalidRequest(f"attempts must be 1 to 100, not {self.attempts}")
        if not 0 <= self.pause_s <= self.pause_max_s:
            raise InvalidRequest("pauses must not be negative, nor pause_s above pause_max_s")


@dataclass(frozen=True)
class Attempt:
    """A step of a call: send the request, with this much time for the reply."""

    timeout_s: float


@dataclass(frozen=True)
class Pause:
    """A step of a call: wait."""

    seconds: float


# A retry with less time than this would only add load.
_ATTEMPT_SECONDS_MIN = 0.001


def attempts(
    policy: RetryPolicy,
    timeout_s: float,
    *,
    method: str,
    target: str,
    clock: Callable[[], float],
    random: Callable[[], float],
) -> Generator[Attempt | Pause, _native.RpcError | None, None]:
    """The steps of one call: yields what to do next, is sent the error of a failed attempt.

    Whoever drives it drops it on success. Raises FeatureCacheError when the call has failed.
    """
    deadline = clock() + timeout_s
    left = timeout_s
    for attempt in range(1, policy.attempts + 1):
        error = yield Attempt(left)
        if error is None:
            raise RuntimeError("an attempt that succeeded ends the call")
        pause = random() * min(policy.pause_max_s, policy.pause_s * 2 ** (attempt - 1))
        left = deadline - clock() - pause
        if attempt == policy.attempts or not is_retryable(error) or left < _ATTEMPT_SECONDS_MIN:
            raise error_of(error, method=method, target=target)
        yield Pause(pause)
        left = deadline - clock()


@dataclass(frozen=True)
class Call(Generic[AnyReply]):
    """One encoded request: the transport's method for it, and how to read the answer."""

    method: str  # of Transport; its asynchronous twin ends in _async
    request: bytes
    read: Callable[[Any], AnyReply]


def get_call(
    columns: Mapping[str, Keys], domains: Mapping[str, str] | None, cache_only: bool
) -> Call[Reply]:
    """Encodes a `batch_get`."""
    keys = {name: _normalised(column) for name, column in columns.items()}
    request = _encoded(
        lambda: _native.encode_get(_with_domains(keys, domains), cache_only=cache_only)
    )
    counts = {name: _count(column) for name, column in keys.items()}
    return Call("batch_get", request, lambda reply: Reply(reply, counts))


def put_call(
    columns: Mapping[str, tuple[Keys, Values]],
    domains: Mapping[str, str] | None,
    ttl: Ttl | Mapping[str, Ttl],
) -> Call[WriteReply]:
    """Encodes a `batch_put`."""
    keys = {name: _normalised(column[0]) for name, column in columns.items()}
    ttls = ttl if isinstance(ttl, Mapping) else dict.fromkeys(columns, ttl)
    _check_names(ttls, keys, "ttl")
    encoded = [
        (name, column, domain, columns[name][1], _ttl_ms(ttls.get(name)))
        for name, column, domain in _with_domains(keys, domains)
    ]
    request = _encoded(lambda: _native.encode_put(encoded))
    counts = {name: _count(column) for name, column in keys.items()}
    return Call("batch_put", request, lambda reply: WriteReply(reply, counts))


def delete_call(columns: Mapping[str, Keys]) -> Call[WriteReply]:
    """Encodes a `batch_delete`."""
    keys = {name: _normalised(column) for name, column in columns.items()}
    request = _encoded(lambda: _native.encode_delete(_with_domains(keys, None)))
    counts = {name: _count(column) for name, column in keys.items()}
    return Call("batch_delete", request, lambda reply: WriteReply(reply, counts))


def checked_timeout(timeout_s: float) -> float:
    """Seconds above zero; infinity means no deadline."""
    if math.isnan(timeout_s) or timeout_s <= 0:
        raise InvalidRequest(f"a timeout must be above 0 seconds, not {timeout_s}")
    return timeout_s


def _encoded(encode: Callable[[], bytes]) -> bytes:
    try:
        return encode()
    except (ValueError, TypeError) as error:
        raise InvalidRequest(str(error)) from error


def _normalised(keys: Keys) -> Any:
    """Ids as an array; everything else as the encoder takes it."""
    if isinstance(keys, np.ndarray):
        return keys
    if isinstance(keys, bytes | str):
        raise InvalidRequest("keys must be a sequence, not one string")
    column: Sequence[Any] = keys if isinstance(keys, Sequence) else list(keys)
    if isinstance(column, range) or (len(column) > 0 and isinstance(column[0], int)):
        return np.asarray(column)
    return column


def _count(keys: Any) -> int:
    """How many keys a normalised column that was encoded has."""
    if isinstance(keys, tuple) and len(keys) == 2 and not isinstance(keys[1], bytes | str):
        return len(keys[1])
    return len(keys)


def _with_domains(
    columns: Mapping[str, Any], domains: Mapping[str, str] | None
) -> list[tuple[str, Any, str]]:
    if domains is None:
        return [(name, keys, "") for name, keys in columns.items()]
    _check_names(domains, columns, "domains")
    return [(name, keys, domains.get(name, "")) for name, keys in columns.items()]


def _check_names(given: Mapping[str, Any], columns: Mapping[str, Any], what: str) -> None:
    unknown = given.keys() - columns.keys()
    if unknown:
        raise InvalidRequest(f"{what} names {sorted(unknown)}, which are not in the request")


def _ttl_ms(ttl: Ttl) -> int | npt.NDArray[np.int64] | None:
    """Milliseconds, rounded up, so that a short TTL never turns into 0, the domain's own."""
    if ttl is None:
        return None
    milliseconds = np.ceil(np.asarray(ttl, np.float64) * 1000)
    if not (milliseconds > 0).all() or not (milliseconds < 2**32).all():
        raise InvalidRequest("a ttl must be above 0 and below 49 days (None: the domain's)")
    if milliseconds.ndim == 0:
        return int(milliseconds)
    return milliseconds.astype(np.int64)
