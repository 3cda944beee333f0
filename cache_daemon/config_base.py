"""What every section of a config is made of: its base, names and addresses."""

import ipaddress
import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, StringConstraints

__all__ = [
    "Address",
    "Name",
    "StrictModel",
    "TcpAddress",
    "is_address",
    "is_loopback",
    "split_address",
]

_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^\[\]:/\s]+):(?P<port>\d{1,5})")
_UNIX_PATH_MAX = 107  # sun_path without its terminating zero


class StrictModel(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def split_address(address: str) -> tuple[str, int]:
    """Host (without brackets) and port of `host:port`; ("", 0) for `unix:/path`."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        return "", 0
    return match["host"].strip("[]"), int(match["port"])


def is_address(value: object) -> bool:
    """Whether `value` is a well-formed `host:port` or `unix:/path`."""
    try:
        _check_address(value)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach a listener at `address`."""
    if address.startswith("unix:"):
        return True
    host, _ = split_address(address)
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may resolve to anything


def _check_address(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError("an address is text: host:port or unix:/path")
    if value.startswith("unix:"):
        path = value.removeprefix("unix:")
        if not path.startswith("/"):
            raise ValueError(f"{value!r}: the path of a Unix socket must be absolute")
        if len(path.encode()) > _UNIX_PATH_MAX:
            raise ValueError(f"{value!r}: a Unix socket path has at most {_UNIX_PATH_MAX} bytes")
        return value
    host, port = split_address(value)
    if not host or port > 65535:
        raise ValueError(f"{value!r} is not an address; write host:port or unix:/path")
    return value


def _check_tcp_address(value: object) -> object:
    if isinstance(value, str) and value.startswith("unix:"):
        raise ValueError("HTTP is served on TCP only; write host:port")
    return _check_address(value)


Address = Annotated[str, BeforeValidator(_check_address)]
"""`host:port` or `unix:/path`."""

TcpAddress = Annotated[str, BeforeValidator(_check_tcp_address)]
"""`host:port`."""

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}$")]
"""Of a namespace, domain, store or node."""
