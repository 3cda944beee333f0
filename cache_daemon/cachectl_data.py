"""The commands of cachectl that read and write keys, through the data service."""

from __future__ import annotations

import base64
import codecs
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from cache_daemon._proto.feature_cache.v1.feature_cache_pb2 import CellStatus, WriteStatus
from cache_daemon.cachectl_common import (
    DEFAULT_ADDRESS,
    AddressOption,
    ExitCode,
    JsonOption,
    TimeoutOption,
    console,
    duration_argument,
    emit_json,
    fail,
)
from cache_daemon.cachectl_view import human_bytes

if TYPE_CHECKING:
    from cache_daemon.client import Client

__all__ = ["delete", "encode_keys", "get", "preview", "put"]

_PREVIEW_BYTES = 60
_KEY_BYTES_MAX = 1024

_NamespaceArgument = Annotated[str, typer.Argument(help="The namespace.")]
_KeysArgument = Annotated[list[str], typer.Argument(help="Keys: text, unless --id or --hex.")]
_IdOption = Annotated[bool, typer.Option("--id", help="Keys are 64-bit integer ids.")]
_HexOption = Annotated[bool, typer.Option("--hex", help="Keys are bytes in hexadecimal.")]


def get(
    namespace: _NamespaceArgument,
    keys: _KeysArgument,
    as_id: _IdOption = False,
    as_hex: _HexOption = False,
    cache_only: Annotated[
        bool, typer.Option("--cache-only", help="Do not ask the feature store.")
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Write the value's bytes, of one key, to stdout.")
    ] = False,
    address: AddressOption = DEFAULT_ADDRESS,
    as_json: JsonOption = False,
    timeout: TimeoutOption = "5s",  # type: ignore[assignment]
) -> None:
    """Read keys: where each value came from, its size, its first bytes. Exit 1 if one has none."""
    encoded = encode_keys(keys, as_id, as_hex)
    if raw and len(encoded) != 1:
        fail("--raw takes one key", ExitCode.USAGE)
    with _client(address) as client:
        column = client.batch_get({namespace: encoded}, cache_only=cache_only, timeout=timeout)[
            namespace
        ]
        values, statuses = (
            column.to_bytes(),
            [CellStatus.Name(code) for code in column.statuses],
        )
    if raw:
        if values[0] is not None:
            sys.stdout.buffer.write(values[0])
            sys.stdout.buffer.flush()
    elif as_json:
        for key, value, status in zip(keys, values, statuses, strict=True):
            text = None if value is None else base64.b64encode(value).decode()
            size = None if value is None else len(value)
            emit_json({"key": key, "status": status, "bytes": size, "value_base64": text})
    else:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("key", "status", "size", "value"):
            table.add_column(name, overflow="fold")
        for key, value, status in zip(keys, values, statuses, strict=True):
            size_text = "" if value is None else human_bytes(len(value))
            table.add_row(key, status, size_text, "" if value is None else preview(value))
        console().print(table)
    if any(value is None for value in values):
        raise typer.Exit(int(ExitCode.REFUSED))


def put(
    namespace: _NamespaceArgument,
    key: Annotated[str, typer.Argument(help="The key: text, unless --id or --hex.")],
    value: Annotated[str | None, typer.Argument(help="The value as text.")] = None,
    file: Annotated[
        typer.FileBinaryRead | None,
        typer.Option("--file", help="Take the value from a file; - is standard input."),
    ] = None,
    domain: Annotated[str, typer.Option(help="The eviction domain; none: by the rules.")] = "",
    ttl: Annotated[
        float,
        typer.Option(parser=duration_argument, metavar="DURATION", help="0: the domain's."),
    ] = "0",  # type: ignore[assignment]
    as_id: _IdOption = False,
    as_hex: _HexOption = False,
    address: AddressOption = DEFAULT_ADDRESS,
    as_json: JsonOption = False,
    timeout: TimeoutOption = "5s",  # type: ignore[assignment]
) -> None:
    """Write one value into the cache (not into the feature store)."""
    encoded = encode_keys([key], as_id, as_hex)
    if (value is None) == (file is None):
        fail("give either a value or --file", ExitCode.USAGE)
    content = file.read() if file is not None else (value or "").encode()
    with _client(address) as client:
        reply = client.batch_put(
            {namespace: (encoded, [content])},
            ttl=ttl or None,
            timeout=timeout,
            domains={namespace: domain} if domain else None,
        )
        _report_writes([key], reply[namespace], as_json)


def delete(
    namespace: _NamespaceArgument,
    keys: _KeysArgument,
    as_id: _IdOption = False,
    as_hex: _HexOption = False,
    address: AddressOption = DEFAULT_ADDRESS,
    as_json: JsonOption = False,
    timeout: TimeoutOption = "5s",  # type: ignore[assignment]
) -> None:
    """Remove keys from the cache (not from the feature store)."""
    encoded = encode_keys(keys, as_id, as_hex)
    with _client(address) as client:
        reply = client.batch_delete({namespace: encoded}, timeout=timeout)
        _report_writes(keys, reply[namespace], as_json)


def preview(value: bytes) -> str:
    """The first bytes as text where they are printable UTF-8, else in hexadecimal."""
    head = value[:_PREVIEW_BYTES]
    decoder = codecs.getincrementaldecoder("utf-8")()  # bears a character cut in the middle
    more = "…" if len(value) > _PREVIEW_BYTES else ""
    try:
        text = decoder.decode(head, final=len(value) <= _PREVIEW_BYTES)
    except UnicodeDecodeError:
        text = ""
    return (text if text.isprintable() and text else head.hex(" ", 4)) + more


def encode_keys(keys: list[str], as_id: bool, as_hex: bool) -> list[bytes]:
    """Keys as the cache knows them: an id is the key of its eight little-endian bytes."""
    if as_id and as_hex:
        fail("--id and --hex exclude each other", ExitCode.USAGE)
    encoded = []
    for key in keys:
        try:
            if as_id:
                # Signed ids, as of a database, travel as their two's complement.
                made = int(key).to_bytes(8, "little", signed=int(key) < 0)
            else:
                made = bytes.fromhex(key) if as_hex else key.encode()
        except (ValueError, OverflowError):
            kind = "a 64-bit integer" if as_id else "hexadecimal"
            fail(f"key {key!r} is not {kind}", ExitCode.USAGE)
        if not 1 <= len(made) <= _KEY_BYTES_MAX:
            fail(f"key {key!r} has {len(made)} bytes; 1 to {_KEY_BYTES_MAX} may be", ExitCode.USAGE)
        encoded.append(made)
    return encoded


def _report_writes(keys: list[str], statuses: Any, as_json: bool) -> None:
    """A line a key; exit 1 unless all were stored."""
    names = [WriteStatus.Name(code) for code in statuses]
    for key, name in zip(keys, names, strict=True):
        if as_json:
            emit_json({"key": key, "status": name})
        else:
            print(f"{key}: {name}")
    if any(name != "STORED" for name in names):
        raise typer.Exit(int(ExitCode.REFUSED))


@contextlib.contextmanager
def _client(address: str) -> Iterator[Client]:
    """A client of the data service whose errors end the command with a message."""
    # Imported here: the native extension is not needed for what goes through the admin service.
    from cache_daemon import client

    try:
        with client.Client(address) as made:
            yield made
    except client.Unavailable as error:
        fail(
            f"cannot reach the daemon at {address}: is it running? ({error})", ExitCode.UNREACHABLE
        )
    except client.DeadlineExceeded:
        fail(f"the daemon at {address} did not answer in time", ExitCode.UNREACHABLE)
    except client.FeatureCacheError as error:
        fail(str(error), ExitCode.REFUSED)
