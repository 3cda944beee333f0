"""What warm-ups are made of, by the config: snapshots, uploads, plans, peers, a shared rate."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from cache_daemon._native import Node, PeerCopy, WarmPlan, describe_peer, inspect_request_log
from cache_daemon.cluster_status import Membership
from cache_daemon.config import Config
from cache_daemon.config_node import host_name
from cache_daemon.config_sharded import node_name
from cache_daemon.config_warmup import SnapshotSettings, WarmupSettings
from cache_daemon.warm_peers import Copier, NativePeer, ReplicaPeers, online_replicas
from cache_daemon.warmup_status import UploadStatus
from sharding.model import ShardMap, Shards
from warmup.backend import Backend, BackendOptions, open_backend
from warmup.documents import BackendDocument
from warmup.fleet_rate import Document
from warmup.layout import FLEET_RATE, safe_name
from warmup.protocols import Peer
from warmup.snapshots import SnapshotStore
from warmup.uploader import Uploader
from warmup.warmer import Sources, Warmer, WarmSettings

__all__ = ["Parts", "Uploads"]

_FLEET_ZNODE = "/warmup/fleet-rate"
_DOMAIN_EVICTIONS = "feature_cache_domain_evictions_total"
_DOMAIN_ITEMS = "feature_cache_domain_items"
_NVM_EVICTIONS = (
    "feature_cache_namespace_nvm_evicted_total",
    "feature_cache_namespace_nvm_not_admitted_total",
)
_NVM_ITEMS = "feature_cache_namespace_nvm_items"


class Parts:
    """Of one daemon whose config has a warmup section."""

    def __init__(self, config: Config, warmup: WarmupSettings) -> None:
        self._config = config
        self._warmup = warmup
        self._cluster = warmup.name or (config.sharding.cluster if config.sharding else "default")
        # Among nodes that share a rate: a process of the same host must not be taken for this one.
        self._name = f"{host_name(config)}-{secrets.token_hex(4)}"
        self._backend: Backend | None = None
        self._store: SnapshotStore | None = None
        if warmup.snapshots is not None:
            self._backend = open_backend(warmup.snapshots.url, _options(warmup.snapshots))
            self._store = SnapshotStore(self._backend, self._cluster, config.topology)

    def start_uploads(self, owned: Callable[[], tuple[int, Shards] | None]) -> Uploads | None:
        """Brings finished windows of the request log to the snapshots; None: none are to be.

        `owned` tells which shards the keys of this node are of; None: it is asked for all.
        """
        record, snapshots = self._warmup.record, self._warmup.snapshots
        if record is None or snapshots is None or self._store is None or not snapshots.upload:
            return None

        def shards() -> tuple[int, list[int]] | None:
            found = owned()
            return None if found is None else (found[0], found[1].tolist())

        return Uploads(
            Uploader(
                Path(record.dir),
                self._store,
                inspect_request_log,
                retention_s=snapshots.retention,
                owned=shards,
            )
        )

    def kept_items(self, node: Node) -> int:
        """Those of an earlier process, that the node began with."""
        report = node.start_report()
        return report.memory_items + report.nvm_items

    def make_warmer(
        self,
        node: Node,
        seconds: float,
        shards: Shards | None = None,
        view: ShardMap | None = None,
        membership: Membership | None = None,
    ) -> Warmer:
        """Fills `node` once, in at most `seconds`; on a leaf `shards`, by others of `view`."""
        warmup, replay = self._warmup, self._warmup.replay
        shard_count = self._config.sharding.shard_count if self._config.sharding else 0
        settings = WarmSettings(
            plan=warmup.plan,
            rate=replay.rate,
            fleet_rate=replay.fleet_rate,
            windows=replay.windows,
            max_age_s=replay.max_age,
            hosts=replay.hosts,
            realtime_ttl_s=replay.realtime_ttl,
            copy_bytes_per_second=float(warmup.peer_copy.rate),
            max_seconds=seconds,
            target_hit_ratio=warmup.target_hit_ratio,
            # A restart that kept its items is not held up by an S3 that is down.
            patient=shards is not None or not self.kept_items(node),
            shard_count=0 if shards is None else shard_count,
            shards=shards,
        )
        sources = Sources(
            make_plan=lambda: WarmPlan(node, max_keys=replay.max_keys),
            snapshots=self._store if warmup.plan != "peer_copy" else None,
            peers=self._peers(node, shards, view),
            fleet_document=self._fleet_document(membership),
            node_name=self._name,
            nvm_namespaces=frozenset(
                name for name, namespace in self._config.namespaces.items() if namespace.nvm
            ),
            fill=lambda: _fill(node),
        )
        return Warmer(settings, sources)

    def _peers(self, node: Node, shards: Shards | None, view: ShardMap | None) -> Sequence[Peer]:
        if self._warmup.plan == "replay":
            return ()
        sharding = self._config.sharding

        def make(address: str, domains: Sequence[tuple[str, str]], some: Shards | None) -> Copier:
            return PeerCopy(
                node,
                address,
                domains,
                shard_count=sharding.shard_count if sharding and some is not None else 0,
                shards=some,
                map_version=view.version if view is not None else 0,
                bytes_per_second=self._warmup.peer_copy.rate,
            )

        def make_peer(address: str, some: Shards | None) -> NativePeer:
            return NativePeer(address, make, describe_peer, some)

        if shards is None or view is None or sharding is None:
            return [make_peer(address, None) for address in self._warmup.peers]
        replicas = online_replicas(shards, view, node_name(sharding))
        return [ReplicaPeers(replicas, make_peer)]

    def _fleet_document(self, membership: Membership | None) -> Document | None:
        if self._warmup.replay.fleet_rate is None:
            return None
        if membership is not None and self._warmup.replay.fleet != "snapshots":
            from sharding.shared_document import ZnodeDocument

            return ZnodeDocument(membership.connection, _FLEET_ZNODE)
        if self._backend is None:
            return None
        return BackendDocument(self._backend, f"{safe_name(self._cluster)}/{FLEET_RATE}")


class Uploads:
    """A running `Uploader`."""

    def __init__(self, uploader: Uploader) -> None:
        self._uploader = uploader
        uploader.start()

    def status(self) -> UploadStatus:
        state = self._uploader.state
        return UploadStatus(
            uploaded=state.uploaded,
            failed=state.failed,
            dropped=state.dropped,
            pending=state.pending,
            oldest_pending_seconds=state.oldest_pending_seconds,
            problem=state.problem,
        )

    def stop(self) -> None:
        """Waits a little for an upload that runs; the next process brings what it does not."""
        self._uploader.stop()


def _options(settings: SnapshotSettings) -> BackendOptions:
    return BackendOptions(
        endpoint=settings.endpoint,
        region=settings.region,
        timeout_s=settings.timeout,
        part_bytes=settings.part_size,
    )


def _fill(node: Node) -> dict[tuple[str, str], tuple[float, float]]:
    """What the node has evicted for good, and its items, by domain; "" is a namespace's NVM.

    What DRAM evicts is not lost where the namespace has NVM, but what NVM evicts or refuses is.
    """
    evicted: dict[tuple[str, str], float] = {}
    items: dict[tuple[str, str], float] = {}
    nvm: set[str] = set()
    for sample in node.samples():
        key = (sample.labels.get("namespace", ""), sample.labels.get("domain", ""))
        if sample.name == _DOMAIN_EVICTIONS or sample.name in _NVM_EVICTIONS:
            evicted[key] = evicted.get(key, 0.0) + sample.value
        elif sample.name in (_DOMAIN_ITEMS, _NVM_ITEMS):
            items[key] = items.get(key, 0.0) + sample.value
        if sample.name == _NVM_ITEMS:
            nvm.add(key[0])
    return {
        key: (evicted.get(key, 0.0) if key[0] not in nvm or not key[1] else 0.0, count)
        for key, count in items.items()
    }
