"""Redis: strings by MGET, or one hash an entity by HMGET.

`layout: strings` keeps each value under a key of its own, `{namespace}:{key}` by default; one MGET
answers the keys of a namespace.

`layout: hashes` is DoorDash's: one hash an entity, whose fields are the feature groups. The hash's
key is `{key}` by default; the field is the xxh32 of the namespace's name, short whatever the name's
length. One HMGET answers several namespaces of an entity: keys asked in several namespaces of a
batch are asked once.

See https://careersatdoordash.com/blog/building-a-gigascale-ml-feature-store-with-redis/
"""

import time
from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import hiredis
import redis
import xxhash
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from cache_daemon.config_units import Duration
from cache_daemon.stores._base import Groups, StoreAnswerError, Values
from cache_daemon.stores._redis_wire import (
    Link,
    connection_options,
    pack_each,
    pack_greeting,
    pack_mget,
    raise_reply_error,
)

__all__ = ["FieldFormat", "RedisOptions", "RedisStore", "field_of"]

FieldFormat = Literal["decimal", "hex", "binary"]


def field_of(namespace: str, field_format: FieldFormat = "decimal") -> bytes:
    """The hash field of a namespace: xxh32 (seed 0) of its UTF-8 name.

    As decimal digits, as eight lower-case hex digits, or as four big-endian bytes.
    """
    digest = xxhash.xxh32(namespace.encode())
    if field_format == "decimal":
        return str(digest.intdigest()).encode()
    return digest.hexdigest().encode() if field_format == "hex" else digest.digest()


class RedisOptions(BaseModel):
    """Options of `type: redis`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=6379, ge=1, le=65535)
    unix_socket: Path | None = Field(
        default=None, description="path of a Unix socket; instead of host"
    )
    database: int = Field(default=0, ge=0)
    username: str | None = None
    password: SecretStr | None = None
    tls: bool = False
    tls_ca: Path | None = Field(default=None, description="PEM file of the authorities to trust")
    connect_timeout: Duration = Field(default=0.5, gt=0, description="of opening a connection")
    layout: Literal["strings", "hashes"] = "strings"
    key_template: str | None = Field(
        default=None,
        description="text with {key}, and for strings {namespace}; "
        "default {namespace}:{key} for strings, {key} for hashes",
    )
    field_format: FieldFormat = Field(
        default="decimal", description="how hashes write xxh32(namespace)"
    )

    @field_validator("key_template")
    @classmethod
    def _template(cls, template: str | None) -> str | None:
        if template is not None:
            if template.count("{key}") != 1:
                raise ValueError(f"{template!r} must contain {{key}} once")
            rest = template.replace("{key}", "").replace("{namespace}", "")
            if "{" in rest or "}" in rest:
                raise ValueError(f"{template!r} may contain only {{key}} and {{namespace}}")
        return template

    @model_validator(mode="after")
    def _together(self) -> "RedisOptions":
        if self.layout == "hashes" and "{namespace}" in (self.key_template or ""):
            raise ValueError(
                "key_template: with layout hashes the namespace is the field, not part of the key"
            )
        if self.tls and self.unix_socket:
            raise ValueError("tls is for TCP, not for unix_socket")
        if self.tls_ca and not self.tls:
            raise ValueError("tls_ca needs tls: true")
        return self


class RedisStore:
    """Reads batches from one Redis server. Connects at the first call, and again when it must."""

    Options = RedisOptions

    def __init__(self, options: RedisOptions) -> None:
        self._options = options
        self._peer = str(options.unix_socket or f"{options.host}:{options.port}")
        template = options.key_template or (
            "{namespace}:{key}" if options.layout == "strings" else "{key}"
        )
        self._prefix, _, self._suffix = template.partition("{key}")
        # As many as calls were ever outstanding at once; the guard bounds those.
        self._idle: deque[Link] = deque()
        self._closed = False

    def get_many(self, groups: Groups, timeout_s: float) -> Values:
        """See `Store.get_many`. A Redis key that is absent, or for MGET no string, is None."""
        deadline = time.monotonic() + timeout_s
        if self._options.layout == "strings":
            return self._get_strings(groups, deadline)
        return self._get_hashes(groups, deadline)

    def close(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    def _get_strings(self, groups: Groups, deadline: float) -> Values:
        asked = [(namespace, keys) for namespace, keys in groups if keys]
        payload = b"".join(
            [
                pack_mget(keys, *self._affixes(namespace, self._prefix, self._suffix))
                for namespace, keys in asked
            ]
        )
        replies = iter(self._ask(payload, len(asked), deadline))
        answers: list[list[bytes | None]] = []
        for _, keys in groups:
            reply = next(replies) if keys else []
            if isinstance(reply, hiredis.ReplyError):
                raise_reply_error(self._peer, reply)
            if not isinstance(reply, list):
                raise StoreAnswerError(f"Redis at {self._peer}: an MGET was not answered by a list")
            answers.append(reply)
        return answers

    def _get_hashes(self, groups: Groups, deadline: float) -> Values:
        sections = _sections(groups)
        if not sections:
            return [[] for _ in groups]
        prefix, suffix = self._prefix.encode(), self._suffix.encode()
        fields = [field_of(namespace, self._options.field_format) for namespace, _ in groups]
        commands = [
            pack_each(keys, prefix, suffix, [fields[i] for i in which]) for which, keys in sections
        ]
        replies = self._ask(b"".join(commands), sum(len(keys) for _, keys in sections), deadline)
        if hiredis.ReplyError in set(map(type, replies)):
            raise_reply_error(
                self._peer, next(r for r in replies if isinstance(r, hiredis.ReplyError))
            )
        return _unfold(groups, sections, replies)

    def _ask(self, payload: bytes, replies: int, deadline: float) -> list[Any]:
        if not payload:
            return []
        try:
            link = self._idle.pop()
        except IndexError:
            link = self._new_link()
        answers = link.ask(payload, replies, deadline)
        # Not reached after an error: such a link is closed and forgotten.
        self._idle.append(link)
        if self._closed:
            self.close()
        return answers

    def _new_link(self) -> Link:
        options = self._options
        common = connection_options()
        connect: Any  # redis-py's connections are not typed
        if options.unix_socket:
            connect = redis.UnixDomainSocketConnection
            common["path"] = str(options.unix_socket)
        else:
            connect = redis.SSLConnection if options.tls else redis.Connection
            common |= {"host": options.host, "port": options.port}
        if options.tls_ca:
            common["ssl_ca_certs"] = str(options.tls_ca)
        greeting = pack_greeting(
            options.username,
            options.password.get_secret_value() if options.password else None,
            options.database,
        )
        return Link(connect(**common), self._peer, greeting, options.connect_timeout)

    @staticmethod
    def _affixes(namespace: str, prefix: str, suffix: str) -> tuple[bytes, bytes]:
        return (
            prefix.replace("{namespace}", namespace).encode(),
            suffix.replace("{namespace}", namespace).encode(),
        )


# Keys to be asked for the same groups (by their positions), each by one command.
_Section = tuple[tuple[int, ...], list[bytes]]


def _sections(groups: Groups) -> list[_Section]:
    """Splits a batch so that every entity is in one section, with all groups that ask for it."""
    asked = [i for i, (_, keys) in enumerate(groups) if keys]
    if not asked:
        return []
    first = groups[asked[0]][1]
    # A cold request asks the same entities in all its namespaces: nothing to split.
    if all(groups[i][1] == first for i in asked):
        return [(tuple(asked), first)]
    masks: dict[bytes, int] = {}
    for i in asked:
        bit = 1 << i
        for key in groups[i][1]:
            masks[key] = masks.get(key, 0) | bit
    by_mask: dict[int, list[bytes]] = {}
    for key, mask in masks.items():
        by_mask.setdefault(mask, []).append(key)
    return [(tuple(i for i in asked if mask >> i & 1), keys) for mask, keys in by_mask.items()]


def _unfold(groups: Groups, sections: Sequence[_Section], replies: list[Any]) -> Values:
    """The replies as one sequence a group, in its order of keys."""
    if len(sections) == 1:
        answers: list[Sequence[bytes | None]] = [[] for _ in groups]
        for i, column in zip(sections[0][0], _columns(sections[0], replies), strict=True):
            answers[i] = column
        return answers
    found: list[dict[bytes, bytes | None]] = [{} for _ in groups]
    rest = iter(replies)
    for section in sections:
        part = list(islice(rest, len(section[1])))
        for i, column in zip(section[0], _columns(section, part), strict=True):
            found[i].update(zip(section[1], column, strict=True))
    return [list(map(found[i].get, keys)) for i, (_, keys) in enumerate(groups)]


def _columns(section: _Section, replies: list[Any]) -> list[Any]:
    """One column a group: HGET replies are the column itself, HMGET replies its rows."""
    return [replies] if len(section[0]) == 1 else list(zip(*replies, strict=True))
