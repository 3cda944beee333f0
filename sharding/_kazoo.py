"""kazoo's client as the connection wants it: quiet, bounded, and with errors of our own."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kazoo.client import KazooClient
from kazoo.exceptions import (
    AuthFailedError,
    BadVersionError,
    NoAuthError,
    NodeExistsError,
    NoNodeError,
    NotEmptyError,
    SessionClosedRequireSaslError,
)
from kazoo.handlers.threading import KazooTimeoutError, SequentialThreadingHandler
from kazoo.retry import KazooRetry
from kazoo.security import CREATOR_ALL_ACL

from sharding.errors import AuthenticationFailed, ClusterError, Conflict, Disconnected
from sharding.znodes import Credentials, Watch, ZooKeeperConfig

_log = logging.getLogger(__name__)

_RETRY_DELAY_MAX_S = 2.0
_REFUSALS = (AuthFailedError, SessionClosedRequireSaslError)
_CONFLICTS = {
    NoNodeError: "is not there",
    NodeExistsError: "is there already",
    BadVersionError: "was changed by another",
    NotEmptyError: "has children",
}


def make_client(config: ZooKeeperConfig, on_timeout: Callable[[float], None]) -> KazooClient:
    """A client that is not started; `on_timeout` gets the seconds that each session is granted."""
    credentials = config.credentials
    options: dict[str, Any] = {}
    if credentials is not None and credentials.scheme == "sasl":
        options["sasl_options"] = {
            "mechanism": "DIGEST-MD5",
            "username": credentials.user,
            "password": credentials.password,
        }
    elif credentials is not None:
        options["auth_data"] = [("digest", f"{credentials.user}:{credentials.password}")]
    servers = config.hosts.partition("/")[0].count(",") + 1
    client = KazooClient(
        hosts=config.hosts.replace(" ", ""),
        timeout=config.session_timeout_seconds,
        # One server that swallows packets must not cost the whole session.
        handler=_Handler(config.session_timeout_seconds / (servers + 1)),
        default_acl=list(CREATOR_ALL_ACL) if config.acl == "creator" else None,
        connection_retry=KazooRetry(
            max_tries=-1, delay=0.1, backoff=1.5, max_jitter=0.5, max_delay=_RETRY_DELAY_MAX_S
        ),
        logger=_KazooLog(),
        **options,
    )
    # kazoo keeps what a server grants to itself: two thirds of it are the time within which a read
    # must end, which its connection returns when it is made.
    connection = client._connection
    connect = connection._connect

    def noting(*arguments: Any) -> Any:
        timeouts = connect(*arguments)
        on_timeout(timeouts[0] * 1.5 / 1000)
        return timeouts

    connection._connect = noting
    return client


def make_chroot(config: ZooKeeperConfig) -> None:
    """Makes the chroot of `config` and its parents, by a session of its own.

    kazoo makes a chroot of one level by itself, and no deeper one. Raises kazoo's errors.
    """
    servers, _, chroot = config.hosts.partition("/")
    client = make_client(replace(config, hosts=servers), lambda _: None)
    try:
        client.start(timeout=config.session_timeout_seconds)
        client.ensure_path(f"/{chroot}")
    finally:
        end_client(client, config.session_timeout_seconds)


def end_client(client: KazooClient, timeout_s: float) -> None:
    """Stops it, and waits for that at most so long: kazoo's own stop may take as long as a connect
    does."""

    def stop() -> None:
        try:
            client.stop()
            client.close()
        except Exception:
            _log.debug("an ended client of ZooKeeper complains", exc_info=True)

    thread = threading.Thread(target=stop, name="zookeeper-stop", daemon=True)
    thread.start()
    thread.join(timeout_s)


def is_missing(error: BaseException | None) -> bool:
    return isinstance(error, NoNodeError)


def is_refusal(error: BaseException | None) -> bool:
    """Whether ZooKeeper does not want us, as opposed to: does not let us have this znode."""
    return isinstance(error, _REFUSALS)


def is_answer(error: BaseException | None) -> bool:
    """Whether a request that ended so was answered."""
    return error is None or isinstance(error, (NoAuthError, *_CONFLICTS))


def refused(credentials: Credentials | None) -> str:
    """Why that may be, for people."""
    if credentials is None:
        return "ZooKeeper wants a user and password, and none is configured"
    if credentials.scheme == "sasl":
        return f"ZooKeeper refused user {credentials.user!r} (SASL); check the password"
    return f"ZooKeeper wants SASL, and user {credentials.user!r} is configured as digest"


def translated(path: str, error: Exception, credentials: Credentials | None) -> ClusterError:
    """An error of ours for one of kazoo's."""
    for kind, why in _CONFLICTS.items():
        if isinstance(error, kind):
            return Conflict(path, why)
    if isinstance(error, NoAuthError):
        whom = f"user {credentials.user!r}" if credentials else "a client without a user"
        return AuthenticationFailed(
            f"{path}: ZooKeeper denies {whom} access; check user and password, "
            "and who created the cluster"
        )
    if is_refusal(error):
        return AuthenticationFailed(f"{path}: {refused(credentials)}")
    if isinstance(error, KazooTimeoutError):
        return Disconnected(f"{path}: no answer in time")
    name = type(error).__name__.removesuffix("Error")
    return Disconnected(f"{path}: {re.sub(r'(?<=[a-z])(?=[A-Z])', ' ', name).lower()}")


def first_refused(results: list[Any]) -> tuple[int, Exception] | None:
    """Of a transaction's results the one that says why it was refused; None when it was not.

    The others say only that they were rolled back.
    """
    failed = [(at, result) for at, result in enumerate(results) if isinstance(result, Exception)]
    if not failed:
        return None
    return next((pair for pair in failed if is_answer(pair[1])), failed[0])


@dataclass(frozen=True)
class Watcher:
    """Equal for equal callbacks, so that reading a znode again leaves no second watch behind."""

    watch: Watch

    def __call__(self, _event: object) -> None:
        self.watch()


class _Handler(SequentialThreadingHandler):  # type: ignore[misc]
    """kazoo's threads, with an end that is noticed and a limit on connecting."""

    def __init__(self, connect_timeout_s: float) -> None:
        super().__init__()
        self._connect_timeout_s = connect_timeout_s
        self.failure: Exception | None = None  # what ended the connection's thread

    def create_connection(self, *arguments: Any, **options: Any) -> Any:
        options["timeout"] = min(options.get("timeout", 10.0), self._connect_timeout_s)
        return super().create_connection(*arguments, **options)

    def spawn(self, func: Callable[..., object], *arguments: Any, **options: Any) -> Any:
        def run() -> None:
            try:
                func(*arguments, **options)
            except Exception as error:  # kazoo raises where ZooKeeper wants SASL
                self.failure = error
                _log.debug("a thread of kazoo ended: %s", type(error).__name__)

        return super().spawn(run)


class _KazooLog:
    """Takes what kazoo says about its work. Its requests hold passwords, and what matters to
    people is said by the connection itself, once."""

    def debug(self, *_: Any, **__: Any) -> None:
        pass

    log = exception = info = debug

    def warning(self, message: str, *arguments: Any, **_: Any) -> None:
        _log.debug("kazoo: " + message, *arguments)

    warn = error = warning
