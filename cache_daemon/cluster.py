"""A node's place in its cluster: the glue between `sharding`, which knows ZooKeeper, and the node.

`LeafMembership` registers a leaf and tells the node which shards it answers for; `RootMembership`
hands the node each new shard map. Neither is on the way of a request: without ZooKeeper a node
goes on with what it was told last.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cache_daemon import _native
from cache_daemon.catch_up import CatchUp
from cache_daemon.cluster_settings import cluster_config, zookeeper_config
from cache_daemon.cluster_status import ClusterStatus, Fill, Membership, cluster_samples
from cache_daemon.config_sharded import (
    ShardingSettings,
    advertised,
    node_name,
)
from cache_daemon.metrics import HistogramLike, SampleLike
from cache_daemon.owned_view import OwnedView
from sharding import layout
from sharding.connection import Connection, boot_clock
from sharding.controller import Controller
from sharding.errors import ClusterError, Disconnected
from sharding.model import LiveNode, ReplicaState, ShardMap, Shards
from sharding.participant import Participant
from sharding.spectator import Spectator

__all__ = [
    "LeafMembership",
    "RootMembership",
    "make_membership",
]

_log = logging.getLogger(__name__)

_ASK_NODE_S = 0.1  # how often a root's node is asked for the newest map version that it heard of
_LEAVE_POLL_S = 0.05
_RETRY_S = 1.0
_JOIN_RETRY_S = 0.05
_LEFT_MARGIN_S = 0.3  # for roots to take the map, and for what is on its way to arrive

_NO_SHARDS: Shards = np.empty(0, np.uint32)


def make_membership(
    settings: ShardingSettings,
    namespaces: Sequence[str],
    version: str,
    doubt_file: Path | None = None,
) -> Membership:
    """What the node does in its cluster. Raises SecretError for a password that is not to be had.

    `namespaces` are those that the node has, `version` is of the software. `doubt_file` lies beside
    memory that outlives the process: it is there while a leaf may miss writes that its memory does
    not know of, so that a process that comes after it takes nothing over.
    """
    if settings.role == "root":
        return RootMembership(settings)
    return LeafMembership(settings, namespaces, version, doubt_file)


class _Member:
    """What roots and leaves have in common: connection, external view, perhaps a controller."""

    def __init__(self, settings: ShardingSettings, node: str) -> None:
        self._settings = settings
        self._node = node
        self._connection = Connection(zookeeper_config(settings.zookeeper))
        self._spectator = Spectator(self._connection, self._see_map)
        self._controller = (
            Controller(self._connection, cluster_config(settings), node)
            if settings.stands_for_election
            else None
        )
        self._leaves = 0  # that the map names for some shard
        self._stop_lock = threading.Lock()
        self._started = False
        self._stopped = False

    def _start(self) -> None:
        self._started = True
        self._connection.start()
        self._spectator.start()
        if self._controller is not None:
            self._controller.start()

    def stop(self) -> None:
        with self._stop_lock:
            if self._stopped or not self._started:
                return
            self._stopped = True
            self._stop()

    def _stop(self) -> None:
        if self._controller is not None:
            self._controller.stop()
        self._spectator.stop()
        self._connection.close()

    def _see_map(self, map: ShardMap) -> None:
        # Those that are gone stay in the table of leaves for a while.
        self._leaves = len(np.unique(map.leaf))
        self._take_map(map)

    def _take_map(self, map: ShardMap) -> None:
        raise NotImplementedError

    @property
    def connection(self) -> Connection:
        return self._connection

    def owned(self) -> tuple[Shards, ShardMap | None]:
        return _NO_SHARDS, self._spectator.map

    def samples(self) -> Sequence[SampleLike]:
        return cluster_samples(self.status())

    def histograms(self) -> Sequence[HistogramLike]:
        return []

    def status(self) -> ClusterStatus:
        """What roots and leaves have in common."""
        map, age = self._spectator.map, self._spectator.age_seconds
        problems = [self._connection.problem, self._spectator.problem]
        status = ClusterStatus(
            role=self._settings.role,
            cluster=self._settings.cluster,
            node=self._node,
            session=self._connection.state.value,
            session_age_seconds=self._connection.session_age(),
            map_version=0 if map is None else map.version,
            map_age_seconds=age or 0.0,
            shard_count=0 if map is None else map.shard_count,
            leaves=self._leaves,
            problems=tuple(dict.fromkeys(problem for problem in problems if problem)),
        )
        return status if self._controller is None else _with_controller(status, self._controller)


class LeafMembership(_Member):
    """See `Membership`. The node answers for its shards whether ZooKeeper is there or not."""

    def __init__(
        self,
        settings: ShardingSettings,
        namespaces: Sequence[str],
        version: str,
        doubt_file: Path | None = None,
    ) -> None:
        super().__init__(settings, node_name(settings))
        self._namespaces = tuple(namespaces)
        self._version = version
        self._doubt_file = doubt_file
        self._made_at = boot_clock()  # before the node is
        self._native: _native.Node | None = None
        self._fill: Fill | None = None
        self._participant: Participant | None = None
        self._joining = threading.Thread(target=self._join, name="join", daemon=True)
        self._ended = threading.Event()
        self._refusal = ""  # why it does not take part, for people
        self._lock = threading.Lock()  # guards what follows, and the order of set_owned
        self._view = OwnedView()
        self._owned: Shards = _NO_SHARDS
        self._made_up: set[int] = set()  # of those: what was missed is made up for
        self._kept: set[int] = set()  # by an earlier process, and not looked at yet
        self._kept_since = 0.0  # by the boot clock: what was written later is missing in them
        self._doubtful: set[int] = set()  # owned ones that may have missed writes since a loss

    def start(
        self,
        node: _native.Node,
        addresses: Sequence[str],
        on_routed: Callable[[], None] | None = None,
        fill: Fill | None = None,
    ) -> None:
        del on_routed  # a leaf sends nothing anywhere
        self._native, self._fill = node, fill
        leaf = self._settings.as_leaf
        live = LiveNode(
            name=self._node,
            address=advertised(self._settings, list(addresses)),
            zone=leaf.zone,
            weight=leaf.weight,
            capacity=leaf.capacity,
            version=self._version,
            cluster=self._settings.cluster,
            instance_id="",
        )
        self._take_over(node)
        self._participant = Participant(
            self._connection, cluster_config(self._settings), live, self
        )
        self._start()
        self._joining.start()

    def _take_over(self, node: _native.Node) -> None:
        """What an earlier process held, as the engine found it."""
        if self._doubt_file is not None and self._doubt_file.exists():
            _log.warning(
                "the process before was parted from ZooKeeper when it ended: what it left cannot "
                "be made up for, and goes"
            )
            node.hold_shards(self._settings.shard_count, _NO_SHARDS)
            self._doubt_file.unlink(missing_ok=True)
            return
        kept = node.kept_shards()
        self._kept = set(kept.shards)
        # The engine measured it after this object was made: rather too long than too short.
        self._kept_since = self._made_at - kept.away_ms / 1000

    def _join(self) -> None:
        """Takes part, unless the cluster has another number of shards than the engine."""
        while not self._ended.is_set():
            try:
                znode = self._connection.get(layout.CONFIG)
                found = None if znode is None else layout.decode_config(znode.data)
            except Disconnected:
                self._ended.wait(_JOIN_RETRY_S)
                continue
            except ClusterError as error:
                _log.warning("%s", error)
                found = None  # the participant has an opinion of its own on that
            if found is None or found.shard_count == self._settings.shard_count:
                break
            self._refusal = (
                f"the cluster has {found.shard_count} shards, and this node's config says "
                f"{self._settings.shard_count}: write sharding.shard_count: {found.shard_count} "
                "and restart"
            )
            _log.error("cluster %s: %s", self._settings.cluster, self._refusal)
            return
        if not self._ended.is_set() and self._participant is not None:
            self._participant.start()

    def leave(self) -> None:
        if self._participant is None:
            return
        self._ended.set()
        own = self._participant.status()
        with self._lock:
            if own.registered and not own.warming:  # the session lived on after all
                self._doubtful.clear()
                self._settle_doubts_locked()
        self._participant.stop(leave=True)
        if not self._connection.connected:
            return  # nobody hears of it: roots find out by themselves
        deadline = time.monotonic() + self._settings.drop_grace
        while time.monotonic() < deadline and self._is_asked():
            time.sleep(_LEAVE_POLL_S)
        time.sleep(min(_LEFT_MARGIN_S, self._settings.drop_grace))

    def _is_asked(self) -> bool:
        """Whether roots send requests here, by the newest map."""
        map = self._spectator.map
        return map is not None and len(map.held_by(self._node)[0]) > 0

    def _stop(self) -> None:
        self._ended.set()
        self._joining.join()
        if self._participant is not None:
            self._participant.stop(leave=True)
        super()._stop()

    # ---- hooks of the participant, called in its threads

    def own(self, version: int, shard_count: int, shards: Shards) -> None:
        del version  # the spectator's may be newer, and is the one that roots are told
        if shard_count != self._settings.shard_count:
            raise ValueError(f"shards of {shard_count}, not of {self._settings.shard_count}")
        with self._lock:
            self._owned = shards
            self._made_up &= set(shards.tolist())
            self._doubtful &= set(shards.tolist())
            self._tell_node_locked()
            self._hold_locked()
            self._settle_doubts_locked()

    def warm(self, shards: Shards, view: ShardMap, away_seconds: float | None) -> None:
        """Makes up for what was missed; what cannot be made up for is forgotten.

        A shard that is new here begins empty. It is filled before it goes online, or its keys come
        from the store as they are asked for.
        """
        node = self._native
        if node is None:
            return
        numbers = set(shards.tolist())
        kept, away_s = numbers, away_seconds
        if away_seconds is None:
            kept, away_s = numbers & self._kept, boot_clock() - self._kept_since
        lost = numbers - kept
        if kept:
            catch_up = CatchUp(node, self._node, self._namespaces)
            lost.update(catch_up.run(_sorted(kept), view, away_s or 0.0))
        if lost:
            self._forget(_sorted(lost))
        if kept:
            _log.info(
                "away for %.1f s: %d shards are made up for, %d begin empty",
                away_s,
                len(numbers - lost),
                len(lost),
            )
        with self._lock:
            self._kept -= numbers
            self._doubtful -= numbers
            self._made_up |= numbers & set(self._owned.tolist())
            self._tell_node_locked()  # before it says that it is online
            self._hold_locked()
            self._settle_doubts_locked()
        if lost and self._fill is not None and not self._ended.is_set():
            self._fill(_sorted(lost), view)

    def drop(self, shards: Shards) -> None:
        with self._lock:
            self._kept -= set(shards.tolist())
            self._made_up -= set(shards.tolist())
            self._doubtful -= set(shards.tolist())
            self._hold_locked()
        if self._native is not None:
            self._native.drop_shards(self._settings.shard_count, shards)

    def _forget(self, shards: Shards) -> None:
        """Of owned ones. For a moment they are not: what peers ask about the time before, this leaf
        does not know."""
        with self._lock:
            owned = self._owned
            self._owned = np.setdiff1d(owned, shards)
            self._tell_node_locked()
            if self._native is not None:
                self._native.drop_shards(self._settings.shard_count, shards)
            self._owned = owned
            self._tell_node_locked()

    def session_lost(self, away_seconds: float) -> None:
        _log.warning(
            "cluster %s: ZooKeeper was last heard of %.1f s ago and takes this leaf for gone; it "
            "serves on",
            self._settings.cluster,
            away_seconds,
        )
        with self._lock:
            self._doubtful = set(self._owned.tolist())
            if self._doubt_file is not None and self._doubtful:
                self._doubt_file.touch(mode=0o600)

    def owned(self) -> tuple[Shards, ShardMap | None]:
        with self._lock:
            return self._owned, self._spectator.map

    def _settle_doubts_locked(self) -> None:
        if self._doubt_file is not None and not self._doubtful:
            self._doubt_file.unlink(missing_ok=True)

    def _take_map(self, map: ShardMap) -> None:
        with self._lock:
            self._view.take(map)
            if map.shard_count == self._settings.shard_count:
                self._tell_node_locked()

    def _tell_node_locked(self) -> None:
        if self._native is not None:
            version, since = self._view.version, self._view.written_since(self._owned)
            # A root that has not heard yet that this leaf was away still asks it: not for what an
            # earlier process left, before it is known what of it is old.
            readable = (~np.isin(self._owned, _sorted(self._kept))).astype(np.uint8)
            count = self._settings.shard_count
            self._native.set_owned(version, count, self._owned, since, readable)

    def _hold_locked(self) -> None:
        """Tells what the next process may take over, once it is known of all that was kept."""
        unknown = self._kept & set(self._owned.tolist()) if self._made_up else self._kept
        if self._native is not None and not unknown:
            self._native.hold_shards(self._settings.shard_count, _sorted(self._made_up))

    def status(self) -> ClusterStatus:
        status = super().status()
        if self._participant is None:
            return replace(status, registration="the daemon does not serve yet")
        if self._refusal:
            problems = (*status.problems, self._refusal)
            return replace(status, registration=self._refusal, problems=problems)
        own = self._participant.status()
        return replace(
            status,
            shards_online=own.online,
            shards_warming=own.warming,
            registration="" if own.registered else "; ".join(own.problems) or "not registered yet",
            problems=tuple(dict.fromkeys((*status.problems, *own.problems))),
        )


def _sorted(shards: set[int]) -> Shards:
    return np.array(sorted(shards), np.uint32)


class RootMembership(_Member):
    """See `Membership`. The node routes by the last map, however old it is."""

    def __init__(self, settings: ShardingSettings) -> None:
        super().__init__(settings, node_name(settings))
        self._native: _native.Node | None = None
        self._on_routed: Callable[[], None] | None = None
        self._shards = (0, 0)  # online and warming ones of the map
        self._is_ours = False  # what is at that path of ZooKeeper is our cluster
        self._stranger = ""  # whose it is otherwise, for people
        self._ended = threading.Event()
        self._asking = threading.Thread(target=self._ask_node, name="map-versions", daemon=True)

    def start(
        self,
        node: _native.Node,
        addresses: Sequence[str],
        on_routed: Callable[[], None] | None = None,
        fill: Fill | None = None,
    ) -> None:
        del addresses, fill  # nobody of the cluster calls a root, and it keeps nothing
        self._native, self._on_routed = node, on_routed
        self._start()
        self._asking.start()

    def leave(self) -> None:
        """A root is not named anywhere."""

    def _stop(self) -> None:
        self._ended.set()
        self._asking.join()
        super()._stop()

    def _take_map(self, map: ShardMap) -> None:
        node = self._native
        if node is None or not (self._is_ours or self._wait_for_ours()):
            return
        self._shards = _shards_by_state(map)
        leaves = [(leaf.name, leaf.address, leaf.zone) for leaf in map.leaves]
        node.set_shard_map(_native.ShardMap(map.version, leaves, map.first, map.leaf, map.state))
        on_routed, self._on_routed = self._on_routed, None
        if on_routed is not None:
            _log.info(
                "cluster %s: routes by map %d, %d leaves, %d shards",
                self._settings.cluster,
                map.version,
                len(map.leaves),
                map.shard_count,
            )
            on_routed()

    def _wait_for_ours(self) -> bool:
        """Whether the cluster is ours; waits while it is not. False when the node stops."""
        while not self._ended.is_set():
            try:
                znode = self._connection.get(layout.CONFIG)
                found = None if znode is None else layout.decode_config(znode.data)
            except Disconnected:
                found = None  # the connection says so itself
            except ClusterError as error:
                found, self._stranger = None, str(error)
            if found is not None:
                if found.cluster == self._settings.cluster:
                    self._is_ours, self._stranger = True, ""
                    return True
                self._stranger = (
                    f"{self._settings.zookeeper.hosts} belongs to cluster {found.cluster!r}, and "
                    f"this node's config says {self._settings.cluster!r}; give one of them another "
                    "path"
                )
            self._ended.wait(_RETRY_S)
        return False

    def _ask_node(self) -> None:
        """A leaf that has a newer map says so in its replies: then it is time to fetch it."""
        asked = 0
        while not self._ended.wait(_ASK_NODE_S):
            node = self._native
            newest = node.newest_map_version() if node is not None else 0
            map = self._spectator.map
            if newest > max(asked, map.version if map is not None else 0):
                self._spectator.refresh(newest)
                asked = newest

    def status(self) -> ClusterStatus:
        status = super().status()
        online, warming = self._shards
        problems = (*status.problems, *([self._stranger] if self._stranger else []))
        return replace(
            status, node="", shards_online=online, shards_warming=warming, problems=problems
        )


def _with_controller(status: ClusterStatus, controller: Controller) -> ClusterStatus:
    found = controller.status()
    if not found.leader:
        return status
    return replace(
        status,
        leader=True,
        moves=len(found.moves),
        frozen=found.frozen or "",
        problems=tuple(dict.fromkeys((*status.problems, *found.problems))),
    )


def _shards_by_state(map: ShardMap) -> tuple[int, int]:
    """Shards that some leaf answers for, and those that some leaf warms."""
    shards = map.shard_of_replica()
    online = map.state == ReplicaState.ONLINE
    return len(np.unique(shards[online])), len(np.unique(shards[~online]))
