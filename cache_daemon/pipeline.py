"""What serves reads and writes: the node, its stores and the loops that fetch for it.

All that embedded use needs; a daemon puts listeners, metrics and a life cycle around it.
"""

import logging
import time
from contextlib import ExitStack

from pydantic import ValidationError

from cache_daemon._native import Node, RecoveryProgress
from cache_daemon.config import Config, ConfigError
from cache_daemon.config_node import node_config
from cache_daemon.config_problem import Problem
from cache_daemon.config_units import format_duration, format_size
from cache_daemon.fetch import FetchLoop
from cache_daemon.metrics import SampleSource
from cache_daemon.node_holder import NodeHolder
from cache_daemon.nvm_devices import DeviceWatch
from cache_daemon.recovery import Start
from cache_daemon.stores import StoreConfigError, make_store
from cache_daemon.stores.guard import GuardedStore

__all__ = ["Pipeline", "StartError"]

_log = logging.getLogger(__name__)

_JOIN_STORES_S = 2.0  # how long a stop waits for store calls that run


class StartError(Exception):
    """The daemon or an embedded cache cannot start; the message says why and what to do."""


class Pipeline:
    """The cache by itself: node, guarded stores and their fetch loops. Thread-safe.

    The stores are open from construction, the rest is there after `start`. Both raise StartError,
    or ConfigError for settings that only the engine can judge.
    """

    def __init__(self, config: Config) -> None:
        self._settings = node_config(config)
        self._progress = RecoveryProgress()
        self._node: Node | None = None
        self._devices: DeviceWatch | None = None
        self._loops: list[FetchLoop] = []
        self.config = config
        self.stores: dict[str, GuardedStore] = {}
        self.held = NodeHolder()  # the node, also before it is there
        self.started = Start(self._progress)  # how the start goes, or went
        with ExitStack() as undo:
            for name in config.stores:
                self.stores[name] = self._open_store(name)
                undo.callback(self.stores[name].close)
            undo.pop_all()

    def start(self) -> None:
        """Makes the node, which recovers what an earlier process left: that may take its time.

        Once. Where it raises, `close` is still to be called.
        """
        self._node = node = self._make_node()
        self.started.end(node.start_report())
        self._devices = DeviceWatch(node)
        for name, store in self.stores.items():
            loop = FetchLoop(node, name, store, self.config.stores[name].guard.concurrency)
            self._loops.append(loop)
            loop.start()
        self.held.put(node)

    @property
    def node(self) -> Node:
        """The node; RuntimeError before `start` has made it."""
        if self._node is None:
            raise RuntimeError("the pipeline was not started")
        return self._node

    @property
    def out_of_service(self) -> list[str]:
        """Paths of the NVM devices that are out of service."""
        return self._devices.out_of_service if self._devices else []

    @property
    def sources(self) -> list[SampleSource]:
        """Everything in the pipeline that keeps counters."""
        return [self.held, self.started, *self.stores.values()]

    def halt(self) -> None:
        """Takes no more misses to the stores, and answers what still waits. Idempotent."""
        for loop in self._loops:
            loop.request_stop()
        if self._node is not None:
            self._node.stop()

    def close(self) -> bool:
        """Halts, and closes the stores once their calls have returned; takes bounded time.

        False when a store call is still running: it is left in its daemonic thread and its store
        open, because closing a store under a call may crash the store's library. Idempotent.
        """
        self.halt()
        if self._devices is not None:
            self._devices.stop()
        if not self._loops:  # it was not started, or not all the way
            for name, store in self.stores.items():
                _close_store(name, store)
        deadline = time.monotonic() + _JOIN_STORES_S
        finished = True
        for loop in self._loops:
            if loop.join(deadline - time.monotonic()):
                _close_store(loop.name, self.stores[loop.name])
            else:
                _log.warning("store %s: a call still runs; it is left behind", loop.name)
                finished = False
        return finished

    def shut_down(self) -> None:
        """The orderly end, after `close`: what shall outlive the process is written.

        Takes `persist.shutdown_limit` at most. No server may be over the node any more. Idempotent.
        """
        self.held.take_away()
        if self._node is None or self.config.persistence is None:
            return
        began = time.monotonic()
        try:
            whole = self._node.shutdown()
        except Exception:
            _log.exception("the orderly end of the node failed; the next start checks what it left")
            return
        seconds = time.monotonic() - began
        if whole:
            _log.info("the cache is left in order for the next start, in %.2f s", seconds)
        else:
            _log.warning(
                "not all was written for the next start, in %.2f s (persist.shutdown_limit is %s)",
                seconds,
                format_duration(self.config.persistence.shutdown_limit),
            )

    def _make_node(self) -> Node:
        try:
            return Node(self._settings, self._progress)
        except MemoryError as error:
            size = format_size(self.config.memory.size)
            raise StartError(
                f"cannot reserve {size} of memory: {str(error) or 'the system refuses'}; "
                "give memory.size less, or the machine (or its /dev/shm) more"
            ) from error
        except OSError as error:  # of an NVM device or persist.dir; the message says what to do
            raise StartError(error.strerror or str(error)) from error
        except ValueError as error:
            raise ConfigError([Problem((), f"the engine refuses it: {error}")]) from error

    def _open_store(self, name: str) -> GuardedStore:
        settings = self.config.stores[name]
        try:
            store = make_store(name, settings.type, settings.options)
        except (StoreConfigError, ValidationError, OSError) as error:
            raise StartError(f"store {name}: {error}") from error
        except Exception as error:  # a class of the user's own may raise anything
            raise StartError(
                f"store {name}: {settings.type} cannot be made: {type(error).__name__}: {error}"
            ) from error
        return GuardedStore(name, store, settings.guard)


def _close_store(name: str, store: GuardedStore) -> None:
    try:
        store.close()
    except Exception:
        _log.exception("store %s: close failed", name)
