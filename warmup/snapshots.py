"""Snapshots: windows of request logs where other nodes find them.

A log is written first and its manifest last, and only where there is none: who lists manifests
never sees half an upload. Which windows are the freshest is told by the clock of the store, which
gave the manifests their times: clocks of hosts may be wrong.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from warmup.backend import Backend, ObjectInfo
from warmup.errors import Conflict, Damaged, NewerVersion, NotThere
from warmup.layout import (
    LOG_SUFFIX,
    MANIFEST_SUFFIX,
    folder_of,
    log_name,
    shards_text,
    topology_prefix,
)
from warmup.manifest import LogInfo, Manifest, NamespaceTotals, parse_manifest

__all__ = ["Snapshot", "SnapshotStore"]

_log = logging.getLogger(__name__)

_READ_BYTES = 1 << 20
_MANIFEST_BYTES_MAX = 4 << 20
_ORPHAN_S = 86_400.0  # a log without a manifest is an upload under way for no longer


@dataclass(frozen=True)
class Snapshot:
    """One uploaded log."""

    key: str  # of its manifest
    manifest: Manifest
    modified: float  # when it was uploaded, by the clock of the store


class SnapshotStore:
    """The snapshots of one cluster and topology. Thread-safe; raises `SnapshotError`s."""

    def __init__(self, backend: Backend, cluster: str, topology: str) -> None:
        self._backend = backend
        self._cluster = cluster
        self._topology = topology
        self._prefix = topology_prefix(cluster, topology)

    @property
    def url(self) -> str:
        """Where they lie, for people."""
        return f"{self._backend.url}/{self._prefix}".rstrip("/")

    def upload(
        self,
        path: Path,
        info: LogInfo,
        now: float,
        *,
        shard_count: int = 0,
        shards: Sequence[int] = (),
    ) -> Manifest:
        """Uploads a finished log; again, where an earlier attempt was interrupted.

        `shards` of a leaf, rising: those that its keys are of. `now`: seconds since 1970.
        """
        folder = folder_of(self._cluster, self._topology, shards, info.window_start_ms / 1000)
        name = folder + log_name(info.host, path.stem)
        manifest = Manifest(
            cluster=self._cluster,
            topology=self._topology,
            host=info.host,
            window_start_ms=info.window_start_ms,
            window_ms=info.window_ms,
            uploaded_ms=int(now * 1000),
            log=name + LOG_SUFFIX,
            log_version=info.version,
            size=path.stat().st_size,
            sha256=_sha256_of(path),
            complete=info.complete,
            sample=info.sample,
            by=info.by,
            requests=info.requests,
            keys=info.keys,
            distinct_keys=info.distinct_keys,
            dropped_keys=info.dropped_keys,
            namespaces=tuple(
                NamespaceTotals(name=ns, privacy=privacy, keys=keys, distinct_keys=distinct)
                for ns, privacy, keys, distinct in info.namespaces
            ),
            shard_count=shard_count,
            shards=shards_text(shards),
        )
        self._backend.put_file(name + LOG_SUFFIX, path)
        with suppress(Conflict):  # an earlier attempt of ours got that far: the log is the same
            self._backend.put(
                name + MANIFEST_SUFFIX, manifest.model_dump_json(indent=1).encode(), if_absent=True
            )
        return manifest

    def find(self, *, limit: int | None = None) -> list[Snapshot]:
        """All complete ones, the freshest first; of a bad or newer manifest a warning tells."""
        return self._load(self._manifests(), limit)

    def freshest(
        self,
        *,
        windows: int,
        max_age_s: float,
        hosts: int,
        now: float,
        shard_count: int = 0,
        shards: set[int] | None = None,
    ) -> list[Snapshot]:
        """Those to warm up from, the freshest first.

        Of the `windows` windows that were uploaded last, no longer than `max_age_s` before `now`,
        the logs of at most `hosts` hosts each. `shards`: only logs that may tell of these.
        """
        by_window: dict[str, list[ObjectInfo]] = {}
        for each in self._manifests():
            if each.modified < now - max_age_s:
                break
            by_window.setdefault(each.key.rsplit("/", 2)[1], []).append(each)
        found: list[Snapshot] = []
        for candidates in list(by_window.values())[:windows]:
            kept: dict[str, list[Snapshot]] = {}
            for each in candidates:
                if len(kept) == hosts:
                    break
                for snapshot in self._load([each], None):
                    manifest = snapshot.manifest
                    if manifest.keys and (shards is None or manifest.covers(shard_count, shards)):
                        kept.setdefault(manifest.host, []).append(snapshot)
            found += [snapshot for of_host in kept.values() for snapshot in of_host]
        return found

    def read(self, snapshot: Snapshot) -> bytes:
        """The log's bytes as they were uploaded. Raises Damaged for others."""
        manifest = snapshot.manifest
        try:
            data = self._backend.read(manifest.log)
        except NotThere as error:
            raise Damaged(f"{snapshot.key}: its log is gone") from error
        if len(data) != manifest.size:
            raise Damaged(
                f"{manifest.log} has {len(data)} bytes, its manifest says {manifest.size}"
            )
        if hashlib.sha256(data).hexdigest() != manifest.sha256:
            raise Damaged(f"{manifest.log}: its bytes are not those that were uploaded")
        return data

    def delete(self, snapshot: Snapshot) -> None:
        """The manifest goes first: nobody finds a log that is not there any more."""
        self._backend.delete(snapshot.key)
        self._backend.delete(snapshot.manifest.log)

    def expire(self, retention_s: float, now: float) -> int:
        """Deletes what was uploaded longer ago, and what uploads that never ended have left.

        Returns how many objects went.
        """
        count = self._backend.expire_uploads(_ORPHAN_S)
        manifests: list[ObjectInfo] = []
        logs: list[ObjectInfo] = []
        for each in self._backend.find(self._prefix):
            (manifests if each.key.endswith(MANIFEST_SUFFIX) else logs).append(each)
        stays: set[str] = set()
        for each in manifests:
            if each.modified < now - retention_s:
                self._backend.delete(each.key)
                count += 1
            else:
                stays.add(each.key.removesuffix(MANIFEST_SUFFIX))
        for each in logs:
            stem = each.key.removesuffix(LOG_SUFFIX)
            if stem not in stays and each.modified < now - max(retention_s, _ORPHAN_S):
                self._backend.delete(each.key)
                count += 1
        return count

    def _manifests(self) -> list[ObjectInfo]:
        """The freshest first."""
        found = [
            each
            for each in self._backend.find(self._prefix)
            if each.key.endswith(MANIFEST_SUFFIX) and each.size <= _MANIFEST_BYTES_MAX
        ]
        return sorted(found, key=lambda each: (each.modified, each.key), reverse=True)

    def _load(self, objects: Sequence[ObjectInfo], limit: int | None) -> list[Snapshot]:
        found: list[Snapshot] = []
        for each in objects:
            if limit is not None and len(found) == limit:
                break
            try:
                manifest = parse_manifest(self._backend.read(each.key), each.key)
            except NotThere:
                continue  # it expired meanwhile
            except (Damaged, NewerVersion) as error:
                _log.warning("snapshots: %s; it is left out", error)
                continue
            if not manifest.log.startswith(self._prefix):
                _log.warning("snapshots: %s names a log elsewhere; it is left out", each.key)
                continue
            found.append(Snapshot(each.key, manifest, each.modified))
        return found


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
