"""What nodes and operators write, kept up to date by watches: config, overrides, nodes, states."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from sharding import layout
from sharding.connection import Connection, Watch
from sharding.errors import CorruptState
from sharding.model import ClusterConfig, CurrentState, LiveNode, NodeOverride
from sharding.placement import Problem
from sharding.rebalance import Seen

__all__ = ["Observer"]

_log = logging.getLogger(__name__)

_ROOTS = (layout.LIVE, layout.NODES, layout.CURRENT)
_READERS = 16  # requests on their way at once, when many znodes have changed
_DECODERS: dict[str, Callable[[str, bytes], Any]] = {
    layout.LIVE: layout.decode_live,
    layout.NODES: layout.decode_override,
    layout.CURRENT: layout.decode_current,
}


class Observer:
    """Reads again only what a watch has told of. A znode that cannot be read keeps the value that
    it had. For one thread; watches come from others and only take notes."""

    def __init__(self, connection: Connection, changed: Watch) -> None:
        """`changed` is called, in a thread of the connection, when there is something to read."""
        self._connection = connection
        self._changed = changed
        self._watches: dict[str, Watch] = {}
        self._names: dict[str, set[str]] = {root: set() for root in _ROOTS}
        self._values: dict[str, Any] = {}
        self._corrupt: dict[str, str] = {}
        self.corrupt_reads = 0  # ever
        self._lock = threading.Lock()
        self._dirty = {layout.CONFIG, *_ROOTS}  # guarded by the lock

    def reset(self) -> None:
        """All is read anew, as after a silence in which watches were lost."""
        paths = {f"{root}/{name}" for root in _ROOTS for name in self._names[root]}
        with self._lock:
            self._dirty |= {layout.CONFIG, *_ROOTS, *paths}

    def look_again(self) -> None:
        """What there is is listed anew, and what is new in the lists is read: for all that no watch
        has told, should there be any."""
        with self._lock:
            self._dirty |= {layout.CONFIG, *_ROOTS}

    def config(self) -> ClusterConfig | None:
        """The cluster's config, None before there is one.

        Raises `CorruptState` for one that cannot be read when no good one was read before.
        """
        if self._take(layout.CONFIG):
            self._read(layout.CONFIG, lambda _, data: layout.decode_config(data))
        config: ClusterConfig | None = self._values.get(layout.CONFIG)
        if config is None and layout.CONFIG in self._corrupt:
            raise CorruptState(layout.CONFIG, self._corrupt[layout.CONFIG])
        return config

    def see(self, config: ClusterConfig) -> tuple[Seen, list[Problem]]:
        """All that there is now, and what is wrong with it. Raises `Disconnected`."""
        for root in _ROOTS:
            if self._take(root):
                self._list(root)
        self._read_changed()
        live: dict[str, LiveNode] = self._all(layout.LIVE)
        strangers = sorted(name for name, node in live.items() if node.cluster != config.cluster)
        problems = [
            Problem(
                "stranger", f"{name} says that it is of cluster {live[name].cluster!r}: ignored"
            )
            for name in strangers
        ]
        problems += [Problem("corrupt", text) for _, text in sorted(self._corrupt.items())]
        overrides: dict[str, NodeOverride] = self._all(layout.NODES)
        current: dict[str, CurrentState] = self._all(layout.CURRENT)
        seen = Seen(
            config=config,
            overrides=overrides,
            live={name: node for name, node in live.items() if name not in strangers},
            current=current,
            unreadable=frozenset(
                name
                for name in self._names[layout.LIVE] - set(strangers)
                for path in (f"{root}/{name}" for root in _ROOTS)
                if path in self._corrupt and path not in self._values
            ),
        )
        return seen, problems

    # ---- reading ---------------------------------------------------------------------------------

    def _list(self, root: str) -> None:
        names = self._retrying(root, lambda: self._connection.children(root, self._watch(root)))
        if names is None:
            self._retrying(root, lambda: self._connection.ensure(root))
            names = self._retrying(root, lambda: self._connection.children(root, self._watch(root)))
        now = set(names or ())
        for name in self._names[root] - now:
            path = f"{root}/{name}"
            self._values.pop(path, None)
            self._corrupt.pop(path, None)
            self._watches.pop(path, None)
        with self._lock:
            self._dirty |= {f"{root}/{name}" for name in now - self._names[root]}
        self._names[root] = now

    def _read_changed(self) -> None:
        with self._lock:
            paths = sorted(self._dirty - {layout.CONFIG, *_ROOTS})
            self._dirty.difference_update(paths)
        work = [
            (path, root)
            for path in paths
            for root, _, name in [path.rpartition("/")]
            if name in self._names[root]
        ]
        if len(work) <= _READERS:
            for path, root in work:
                self._read(path, _DECODERS[root])
            return
        with ThreadPoolExecutor(_READERS, thread_name_prefix="controller-read") as pool:
            list(pool.map(lambda one: self._read(one[0], _DECODERS[one[1]]), work))

    def _read(self, path: str, decode: Callable[[str, bytes], Any]) -> None:
        znode = self._retrying(path, lambda: self._connection.get(path, self._watch(path)))
        if znode is None:
            self._values.pop(path, None)
            self._corrupt.pop(path, None)
            return
        try:
            self._values[path] = decode(path, znode.data)
        except CorruptState as error:
            with self._lock:
                self.corrupt_reads += 1
            if self._corrupt.get(path) != error.why:
                good = "going on with what it said before" if path in self._values else "left alone"
                _log.warning("%s; %s", error, good)
            self._corrupt[path] = str(error)
        else:
            self._corrupt.pop(path, None)

    def _retrying(self, path: str, read: Callable[[], Any]) -> Any:
        """Reads; what could not be read stays to be read."""
        try:
            return read()
        except Exception:
            with self._lock:
                self._dirty.add(path)
            raise

    def _all(self, root: str) -> dict[str, Any]:
        """Values by name, of those that there are."""
        found = ((name, self._values.get(f"{root}/{name}")) for name in sorted(self._names[root]))
        return {name: value for name, value in found if value is not None}

    # ---- watches ---------------------------------------------------------------------------------

    def _watch(self, path: str) -> Watch:
        """The same one for the same path: reading again leaves no second watch."""
        return self._watches.setdefault(path, partial(self._note, path))

    def _note(self, path: str) -> None:
        with self._lock:
            self._dirty.add(path)
        self._changed()

    def _take(self, path: str) -> bool:
        with self._lock:
            there = path in self._dirty
            self._dirty.discard(path)
        return there
