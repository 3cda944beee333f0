"""What stands beside an uploaded log: whose it is, and how to know that all of it is there."""

from __future__ import annotations

import json
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from warmup.errors import Damaged, NewerVersion
from warmup.layout import parse_shards

__all__ = ["LogInfo", "Manifest", "NamespaceTotals", "parse_manifest"]

_VERSION = 1


class LogInfo(Protocol):
    """What is known of a log by reading it; `cache_daemon._native.RequestLogInfo` is one."""

    @property
    def version(self) -> int: ...
    @property
    def host(self) -> str: ...
    @property
    def window_start_ms(self) -> int: ...
    @property
    def window_ms(self) -> int: ...
    @property
    def sample(self) -> float: ...
    @property
    def by(self) -> str: ...
    @property
    def complete(self) -> bool: ...
    @property
    def requests(self) -> int: ...
    @property
    def keys(self) -> int: ...
    @property
    def distinct_keys(self) -> int: ...
    @property
    def dropped_keys(self) -> int: ...
    @property
    def namespaces(self) -> list[tuple[str, str, int, int]]: ...


class NamespaceTotals(BaseModel):
    """One namespace of a log."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(max_length=1024)
    privacy: str = Field(max_length=32)
    keys: int = Field(ge=0)
    distinct_keys: int = Field(ge=0)


class Manifest(BaseModel):
    """Of one log of one host. What later releases of this version add is ignored."""

    model_config = ConfigDict(frozen=True)

    version: int = Field(default=_VERSION, ge=1)
    cluster: str = Field(max_length=1024)
    topology: str = Field(max_length=64)
    host: str = Field(max_length=1024)
    window_start_ms: int = Field(ge=0)  # since 1970, by the host's clock
    window_ms: int = Field(gt=0)
    uploaded_ms: int = Field(ge=0)
    log: str = Field(min_length=1, max_length=1024)  # the object's key
    log_version: int = Field(ge=1)
    size: int = Field(ge=0)  # bytes
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    complete: bool  # the log was ended in order
    sample: float = Field(gt=0, le=1)
    by: str = Field(max_length=32)
    requests: int = Field(ge=0)
    keys: int = Field(ge=0)
    distinct_keys: int = Field(ge=0)
    dropped_keys: int = Field(ge=0)
    namespaces: tuple[NamespaceTotals, ...] = Field(max_length=4096)
    shard_count: int = Field(default=0, ge=0)  # 0: of all keys
    shards: str = Field(default="", max_length=1 << 20)  # as ranges

    @field_validator("shards")
    @classmethod
    def _shards_are_ranges(cls, text: str) -> str:
        parse_shards(text)
        return text

    @property
    def window_start_s(self) -> float:
        return self.window_start_ms / 1000

    def covers(self, shard_count: int, shards: set[int]) -> bool:
        """Whether it may tell of these shards; of another number of shards nobody knows."""
        if not self.shard_count or self.shard_count != shard_count:
            return True
        return not shards.isdisjoint(parse_shards(self.shards))


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Raises NewerVersion, or Damaged for what is no manifest; `where` names it."""
    try:
        raw = json.loads(data)
        version = raw["version"] if isinstance(raw, dict) else None
    except (ValueError, KeyError, RecursionError) as error:
        raise Damaged(f"{where} is no manifest") from error
    if isinstance(version, int) and version > _VERSION:
        raise NewerVersion(
            f"{where} is of version {version}, this release knows {_VERSION}: update this node, or "
            "let it record windows of its own"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise Damaged(f"{where} is no manifest: {field}: {first['msg']}") from error
