"""Where things lie below the prefix of a snapshot store.

    <cluster>/<topology>/<shards>/<window>/<host>-<log>.fcrl    a window as a host recorded it
    <cluster>/<topology>/<shards>/<window>/<host>-<log>.json    its manifest, written last
    <cluster>/fleet-rate                                        shared by nodes that warm up

`<shards>` is `all`, or for the log of a leaf the number of its shards and a digest of which;
`<window>` is when the window began, as 20261201T061000Z. The manifest says both exactly.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from datetime import datetime, timezone

__all__ = [
    "FLEET_RATE",
    "LOG_SUFFIX",
    "MANIFEST_SUFFIX",
    "folder_of",
    "log_name",
    "parse_shards",
    "safe_name",
    "shards_text",
    "topology_prefix",
    "window_name",
]

LOG_SUFFIX = ".fcrl"
MANIFEST_SUFFIX = ".json"
FLEET_RATE = "fleet-rate"

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_NAME_CHARACTERS_MAX = 100
_SHARDS_MAX = 1 << 20


def safe_name(name: str) -> str:
    """A host's or cluster's name as a part of a key."""
    return _UNSAFE.sub("_", name).strip(".")[:_NAME_CHARACTERS_MAX] or "_"


def topology_prefix(cluster: str, topology: str) -> str:
    """Below which all windows of a cluster lie."""
    return f"{safe_name(cluster)}/{topology}/"


def window_name(start_s: float) -> str:
    """The folder of a window that began then, in seconds since 1970."""
    return datetime.fromtimestamp(start_s, timezone.utc).strftime("%Y%m%dT%H%M%SZ")


def folder_of(cluster: str, topology: str, shards: Sequence[int], start_s: float) -> str:
    """The folder of a log; `shards` rising, none: of all keys."""
    which = "all"
    if shards:
        digest = hashlib.sha256(shards_text(shards).encode()).hexdigest()[:12]
        which = f"{len(shards)}-{digest}"
    return f"{topology_prefix(cluster, topology)}{which}/{window_name(start_s)}/"


def log_name(host: str, stem: str) -> str:
    """The name of a log, without its suffix; `stem` of its local file, which is unique."""
    return f"{safe_name(host)}-{safe_name(stem)}"


def shards_text(shards: Sequence[int]) -> str:
    """Rising shards as ranges: 0-15,20."""
    ranges: list[list[int]] = []
    for shard in shards:
        if ranges and shard == ranges[-1][1] + 1:
            ranges[-1][1] = shard
        else:
            ranges.append([shard, shard])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def parse_shards(text: str) -> list[int]:
    """The reverse of `shards_text`. Raises ValueError for what is none."""
    shards: list[int] = []
    for part in text.split(",") if text else ():
        first, _, last = part.partition("-")
        start, end = int(first), int(last or first)
        if not (shards[-1] if shards else -1) < start <= end < _SHARDS_MAX:
            raise ValueError(f"{text[:100]!r} are no rising shards")
        shards.extend(range(start, end + 1))
    return shards
