"""The `warmup` section: what of the traffic is recorded, and how a new node is filled.

Also what it asks of the other sections, and whether this machine can keep a request log.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from cache_daemon.config_base import Address, Name, StrictModel, is_address
from cache_daemon.config_problem import Path, Problem, at_path, nearest
from cache_daemon.config_sharded import is_root
from cache_daemon.config_units import (
    Duration,
    Share,
    Size,
    format_duration,
    format_size,
    parse_duration,
)

__all__ = [
    "ROOT_LACKS",
    "PeerCopySettings",
    "RecordSettings",
    "ReplaySettings",
    "SnapshotSettings",
    "WarmupSettings",
    "warmup_problems",
    "warmup_warnings",
]

_DAY_S = 86_400.0
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9]")
_PART_BYTES_MIN = 5 << 20  # of a multipart upload, by S3's rules
_PART_BYTES_MAX = 5 << 30
# Of the section: how nodes are filled that keep values.
ROOT_LACKS = (
    "plan",
    "replay",
    "peers",
    "peer_copy",
    "max_duration",
    "target_hit_ratio",
    "on_failure",
)


class RecordSettings(StrictModel):
    """A log of sampled requests: keys alone, on the local disk."""

    dir: str = Field(
        min_length=1, max_length=4000, description="Directory of the log; each daemon has its own."
    )
    sample: Share = Field(
        default=0.1, gt=0, description="What share of the traffic is recorded: 10%."
    )
    by: Literal["requests", "keys"] = Field(
        default="requests",
        description="requests: whole ones; keys: by hash, so that a key is always or never "
        "recorded.",
    )
    window: Duration = Field(
        default=600.0, ge=1, le=_DAY_S, description="Of so much time one file tells."
    )
    size: Size = Field(
        default=1 << 30,
        ge=1 << 20,
        le=1 << 40,
        description="Bytes of all files together at most; beyond it the oldest go.",
    )
    namespaces: dict[Name, Literal["plain", "hash", "exclude"]] = Field(
        default_factory=dict,
        max_length=256,
        description="How keys are written: plain (the others), hash (cannot be replayed), or not.",
    )
    hash_key: SecretStr | None = Field(
        default=None,
        min_length=16,
        max_length=4096,
        description="Secret of the namespaces with hash; the same on all nodes.",
    )

    @field_validator("dir")
    @classmethod
    def _dir_is_absolute(cls, path: str) -> str:
        if not path.startswith("/"):
            raise ValueError(
                f"{path!r} must be an absolute path, such as /var/lib/feature-cache/request-log"
            )
        return path


class SnapshotSettings(StrictModel):
    """Where windows of request logs lie, for nodes that come."""

    url: str = Field(
        min_length=1, max_length=2048, description="s3://bucket/prefix, or file:///absolute/path."
    )
    endpoint: str | None = Field(
        default=None,
        max_length=2048,
        description="Of a server that speaks S3, such as http://127.0.0.1:8333; none: AWS.",
    )
    region: str | None = Field(
        default=None, min_length=1, max_length=64, description="None: as the AWS settings say."
    )
    retention: Duration = Field(
        default=_DAY_S, ge=60, le=366 * _DAY_S, description="Older windows are deleted."
    )
    upload: bool = Field(default=True, description="false: this node only reads.")
    part_size: Size = Field(
        default=8 << 20,
        ge=_PART_BYTES_MIN,
        le=_PART_BYTES_MAX,
        description="Bytes of one part of a multipart upload.",
    )
    timeout: Duration = Field(
        default=10.0, ge=0.1, le=300, description="Of one call; it is tried up to four times."
    )

    @property
    def is_s3(self) -> bool:
        return self.url.startswith("s3:")

    @field_validator("url")
    @classmethod
    def _url_is_known(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.query or parts.fragment:
            raise ValueError(f"{url!r}: a URL of snapshots ends with its path")
        if parts.scheme == "s3":
            if not _BUCKET.fullmatch(parts.netloc):
                raise ValueError(f"{url!r} names no bucket; write s3://bucket/prefix")
        elif parts.scheme == "file":
            if parts.netloc or len(parts.path) < 2:
                raise ValueError(f"{url!r} names no directory; write file:///absolute/path")
        else:
            raise ValueError(f"{url!r}: write s3://bucket/prefix or file:///absolute/path")
        return url

    @field_validator("endpoint")
    @classmethod
    def _endpoint_is_http(cls, endpoint: str | None) -> str | None:
        if endpoint is not None:
            parts = urlsplit(endpoint)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"{endpoint!r} is no endpoint; write http://host:port")
            if parts.username or parts.password:
                raise ValueError(
                    "an endpoint carries no credentials; give them as AWS tools take them, such as "
                    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                )
        return endpoint

    @model_validator(mode="after")
    def _files_have_no_endpoint(self) -> "SnapshotSettings":
        for name in ("endpoint", "region"):
            if not self.is_s3 and getattr(self, name) is not None:
                raise ValueError(f"{name} is for s3:// alone; remove it, or write url: s3://...")
        return self


class ReplaySettings(StrictModel):
    """How recorded keys are asked for again."""

    rate: float = Field(
        default=20_000.0, gt=0, le=1e9, description="Keys a second that this node asks of stores."
    )
    fleet_rate: float | None = Field(
        default=None,
        gt=0,
        le=1e9,
        description="Keys a second of all nodes that warm up at once; none: they do not share.",
    )
    fleet: Literal["zookeeper", "snapshots"] | None = Field(
        default=None,
        description="Where the shared rate lies; none: a leaf's in ZooKeeper, else by snapshots.",
    )
    windows: int = Field(default=6, ge=1, le=1000, description="The freshest complete ones.")
    max_age: Duration = Field(
        default=7200.0, ge=1, le=366 * _DAY_S, description="Older windows are not used."
    )
    hosts: int = Field(
        default=8, ge=1, le=1000, description="Logs of at most so many hosts for each window."
    )
    max_keys: int = Field(
        default=50_000_000,
        ge=1000,
        le=2_000_000_000,
        description="Distinct keys that are kept in memory meanwhile.",
    )
    realtime_ttl: Duration = Field(
        default=300.0,
        le=366 * _DAY_S,
        description="Domains with a shorter TTL come last, so that they are fresh.",
    )


class PeerCopySettings(StrictModel):
    """How nodes that are warm give their items to those that are not."""

    rate: Size = Field(
        default=256 << 20, ge=64 << 10, description="Bytes a second that this node takes."
    )
    serve_rate: Size = Field(
        default=256 << 20,
        description="Bytes a second that this node gives, to all together; 0: none.",
    )
    at_once: int = Field(default=2, ge=1, le=64, description="Copies that it gives at a time.")


class WarmupSettings(StrictModel):
    """How nodes record what they are asked, and how new ones are filled before they serve."""

    name: Name | None = Field(
        default=None,
        description="Whose snapshots these are; none: sharding.cluster, else default.",
    )
    record: RecordSettings | None = Field(default=None, description="None: nothing is recorded.")
    snapshots: SnapshotSettings | None = Field(
        default=None, description="None: nothing is uploaded, and there is no replay."
    )
    plan: Literal["auto", "replay", "peer_copy", "none"] = Field(
        default="auto", description="auto: by domain what is faster and lives long enough."
    )
    replay: ReplaySettings = ReplaySettings()
    peers: tuple[Address, ...] = Field(
        default=(), max_length=64, description="Warm nodes; a leaf asks its shards' replicas."
    )
    peer_copy: PeerCopySettings = PeerCopySettings()
    max_duration: Duration = Field(
        default=600.0, gt=0, le=_DAY_S, description="How long a warm-up takes at most."
    )
    target_hit_ratio: Share = Field(
        default=0.95, gt=0, description="It ends when so much of the recorded traffic would hit."
    )
    on_failure: Literal["serve_cold", "fail"] = Field(
        default="serve_cold", description="When nothing can be had: serve, or do not start."
    )


# The checks below span sections, so they look at the raw settings: one slip in a section must not
# hide what else is wrong with it. What has not even the right type is left to the models.


def warmup_problems(raw: Mapping[Any, Any]) -> Iterator[Problem]:
    """What spans sections, of raw settings."""
    if not isinstance(raw.get("warmup"), Mapping):
        return
    yield from _record_problems(raw)
    if is_root(raw):
        yield from _root_problems(raw)
        return
    yield from _plan_problems(raw)
    yield from _fleet_problems(raw)
    yield from _peer_problems(raw)
    yield from _snapshot_problems(raw)


def _record_problems(raw: Mapping[Any, Any]) -> Iterator[Problem]:
    record = at_path(raw, "warmup", "record")
    if not isinstance(record, Mapping):
        return
    here: Path = ("warmup", "record")
    known = raw.get("namespaces")
    privacy = record.get("namespaces")
    privacy = privacy if isinstance(privacy, Mapping) else {}
    for name in privacy:
        if isinstance(known, Mapping) and isinstance(name, str) and name not in known:
            hint = nearest(name, [str(key) for key in known])
            yield Problem((*here, "namespaces", name), f"no namespace {name!r}; {hint}")
    hashes = "hash" in privacy.values()
    has_key = record.get("hash_key") not in (None, "")
    if hashes and not has_key:
        yield Problem(
            (*here, "hash_key"),
            "missing; without a secret of your own hashed keys can be guessed: give it by "
            "the environment, such as hash_key: ${FEATURE_CACHE_HASH_KEY}",
        )
    if has_key and not hashes:
        yield Problem(
            (*here, "hash_key"),
            "no namespace is hashed; write namespaces: {user: hash}, or remove this",
        )


def _root_problems(raw: Mapping[Any, Any]) -> Iterator[Problem]:
    """A root keeps no values: it may record what it is asked, for the leaves."""
    for name in ROOT_LACKS:
        value = at_path(raw, "warmup", name)
        if value is not None and (name, value) != ("plan", "none"):
            yield Problem(
                ("warmup", name),
                "a root keeps no values, so there is nothing to warm up: this belongs to the "
                "leaves; a root's warmup has record and snapshots",
            )


def _plan_problems(raw: Mapping[Any, Any]) -> Iterator[Problem]:
    where: Path = ("warmup", "plan")
    plan = at_path(raw, *where)
    snapshots = at_path(raw, "warmup", "snapshots")
    if plan == "replay":
        if snapshots is None:
            yield Problem(
                where,
                "replay reads snapshots, and warmup.snapshots is missing; give its url, or "
                "write peer_copy with peers",
            )
        if not any(at_path(raw, "namespaces", name, "store") for name in _names(raw)):
            yield Problem(where, "replay asks stores, and no namespace has one; write peer_copy")
    if plan == "peer_copy" and not _is_leaf(raw) and not at_path(raw, "warmup", "peers"):
        yield Problem(
            where, "peer_copy needs a warm node to copy from; write peers: [cache-1.example:7070]"
        )


def _fleet_problems(raw: Mapping[Any, Any]) -> Iterator[Problem]:
    fleet = at_path(raw, "warmup", "replay", "fleet")
    rate = at_path(raw, "warmup", "replay", "fleet_rate")
    snapshots = at_path(raw, "warmup", "snapshots")
    if fleet == "zookeeper" and not _is_leaf(raw):
        yield Problem(
            ("warmup", "replay", "fleet"),
            "only a leaf knows a ZooKeeper; write snapshots, where any node can share the rate",
        )
    if fleet == "snapshots" and snapshots is None:
        yield Problem(
            ("warmup", "replay", "fleet"),
            "there is no warmup.snapshots to keep the shared rate; give its url, or remove this",
        )
    if fleet is not None and rate is None:
        yield Problem(
            ("warmup", "replay", "fleet_rate"),
            "missing; say how many keys a second all nodes together may ask, or remove fleet",
        )
    if rate is not None and snapshots is None:
        yield Problem(
            ("warmup", "replay", "fleet_rate"),
            "there is no replay without warmup.snapshots; give its url, or remove this",
        )


def _peer_problems(raw: Mapping[Any, Any]) -> Iterator[Problem]:
    where: Path = ("warmup", "peers")
    peers = at_path(raw, *where)
    if not isinstance(peers, list):
        return
    if _is_leaf(raw) and peers:
        yield Problem(where, "a leaf asks the replicas of its shards; remove this")
    own = at_path(raw, "listen", "grpc")
    for index, peer in enumerate(peers):
        if isinstance(peer, str) and is_address(peer):
            if isinstance(own, list) and peer in own:
                yield Problem((*where, index), f"{peer} is this node itself (listen.grpc)")
            if peer.endswith(":0"):
                yield Problem((*where, index), f"{peer} is no address to call; write its port")


def _snapshot_problems(raw: Mapping[Any, Any]) -> Iterator[Problem]:
    retention = _duration(at_path(raw, "warmup", "snapshots", "retention"), _DAY_S)
    window = _duration(at_path(raw, "warmup", "record", "window"), 600.0)
    if window is not None and retention is not None and retention < 2 * window:
        yield Problem(
            ("warmup", "snapshots", "retention"),
            f"{format_duration(retention)} is too short for windows of {format_duration(window)}: "
            "each would be deleted before a new node can read it; keep at least twice as much",
        )
    max_age = _duration(at_path(raw, "warmup", "replay", "max_age"), 7200.0)
    if window is not None and max_age is not None and max_age < window:
        yield Problem(
            ("warmup", "replay", "max_age"),
            f"no complete window of {format_duration(window)} is younger than "
            f"{format_duration(max_age)}; use at least twice as much",
        )


def warmup_warnings(warmup: WarmupSettings | None) -> list[str]:
    """What would keep this machine, as it is now, from keeping a request log."""
    record = warmup.record if warmup else None
    if record is None:
        return []
    where = f"warmup.record.dir: {record.dir}"
    folder = record.dir
    while not os.path.isdir(folder) and folder != "/":  # the daemon makes what is missing
        folder = os.path.dirname(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        return [f"{where}: this user may not write to {folder}; nothing will be recorded"]
    mount = os.statvfs(folder)
    free = mount.f_bavail * mount.f_frsize
    if free < record.size:
        return [
            f"{where} may grow to {format_size(record.size)} (warmup.record.size), and the disk "
            f"has {free / (1 << 20):.0f}MiB free now; when it is full, log is dropped"
        ]
    return []


def _is_leaf(raw: Mapping[Any, Any]) -> bool:
    return raw.get("topology") == "sharded" and at_path(raw, "sharding", "role") == "leaf"


def _names(raw: Mapping[Any, Any]) -> list[str]:
    namespaces = raw.get("namespaces")
    return [str(name) for name in namespaces] if isinstance(namespaces, Mapping) else []


def _duration(value: object, default: float) -> float | None:
    """None for what is none; the model says so."""
    if value is None:
        return default
    with suppress(ValueError):
        return parse_duration(value)
    return None
