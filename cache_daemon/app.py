"""The composition root: the one place that turns settings into a running daemon.

`Pipeline` is what serves reads and writes (node, stores, fetch loops) and is all that embedded use
needs; `Daemon` puts listeners, metrics and a life cycle around it.
"""

import functools
import importlib.metadata
import json
import logging
import os
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import ValidationError

from cache_daemon._native import Node, Server, build_info
from cache_daemon.admin import AdminServer, DaemonStatus, DomainInfo, NamespaceInfo, StoreInfo
from cache_daemon.config import Config, ConfigError, ServiceManager
from cache_daemon.config_node import node_config
from cache_daemon.config_problem import Problem
from cache_daemon.config_units import format_duration, format_size
from cache_daemon.fetch import FetchLoop
from cache_daemon.http import HttpServer
from cache_daemon.lifecycle import Drained, DrainRequest, Inbox, Lifecycle, State, StopSignal
from cache_daemon.metrics import Metrics, SampleSource
from cache_daemon.nvm_devices import DeviceWatch, nvm_devices
from cache_daemon.sdnotify import Notifier
from cache_daemon.stores import StoreConfigError, make_store
from cache_daemon.stores.guard import GuardedStore

__all__ = ["Addresses", "Daemon", "Outcome", "Pipeline", "StartError", "version"]

_log = logging.getLogger(__name__)

_JOIN_STORES_S = 2.0  # how long a stop waits for store calls that run
_JOIN_DRAIN_S = 1.0
_DRAIN_GRACE_S = 2.0  # for the last replies, beyond a drain's timeout


class StartError(Exception):
    """The daemon or an embedded cache cannot start; the message says why and what to do."""


class Pipeline:
    """The cache by itself: node, guarded stores and their fetch loops, running from construction.

    Raises StartError, or ConfigError for settings that only the engine can judge. Thread-safe.
    """

    def __init__(self, config: Config) -> None:
        settings = node_config(config)
        self.config = config
        self.stores: dict[str, GuardedStore] = {}
        self._loops: list[FetchLoop] = []
        with ExitStack() as undo:
            for name in config.stores:
                self.stores[name] = self._open_store(name)
                undo.callback(self.stores[name].close)
            try:
                self.node = Node(settings)
            except MemoryError as error:
                size = format_size(config.memory.size)
                raise StartError(
                    f"cannot reserve {size} of memory: {error or 'the system refuses'}; "
                    "give memory.size less, or the machine (or its /dev/shm) more"
                ) from error
            except OSError as error:  # of an NVM device; the message says what to do
                raise StartError(error.strerror or str(error)) from error
            except ValueError as error:
                raise ConfigError([Problem((), f"the engine refuses it: {error}")]) from error
            undo.callback(self.halt)
            self.devices = DeviceWatch(self.node)
            undo.callback(self.devices.stop)
            for name, store in self.stores.items():
                concurrency = config.stores[name].guard.concurrency
                loop = FetchLoop(self.node, name, store, concurrency)
                self._loops.append(loop)
                loop.start()
            undo.pop_all()

    @property
    def sources(self) -> list[SampleSource]:
        """Everything in the pipeline that keeps counters."""
        return [self.node, *self.stores.values()]

    def halt(self) -> None:
        """Takes no more misses to the stores, and answers what still waits. Idempotent."""
        for loop in self._loops:
            loop.request_stop()
        self.node.stop()

    def close(self) -> bool:
        """Halts, and closes the stores once their calls have returned; takes bounded time.

        False when a store call is still running: it is left in its daemonic thread and its store
        open, because closing a store under a call may crash the store's library. Idempotent.
        """
        self.halt()
        self.devices.stop()
        deadline = time.monotonic() + _JOIN_STORES_S
        finished = True
        for loop in self._loops:
            if loop.join(deadline - time.monotonic()):
                _close_store(loop.name, self.stores[loop.name])
            else:
                _log.warning("store %s: a call still runs; it is left behind", loop.name)
                finished = False
        return finished

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


@dataclass
class Outcome:
    """How a daemon ended."""

    drained: bool = False  # every accepted request got its reply, be it of TIMED_OUT cells
    threads_left: bool = False  # a native or store call still runs in a daemonic thread


@dataclass
class Addresses:
    """Where a daemon listens, ports as bound; "" and nothing where it does not."""

    pid: int
    grpc: list[str] = field(default_factory=list)
    admin: str = ""
    http: str = ""


class Daemon:
    """One daemon process: pipeline, listeners and life cycle. Run it once, in the main thread."""

    def __init__(
        self, config: Config, manager: ServiceManager, *, ready_file: Path | None = None
    ) -> None:
        """`ready_file` holds the daemon's `Addresses` as JSON while it serves."""
        self._config = config
        self._manager = manager
        self._ready_file = ready_file
        self._inbox = Inbox()
        self._addresses = Addresses(os.getpid())
        self._drain_thread: threading.Thread | None = None
        self._signals = 0
        self.lifecycle = Lifecycle()

    def run(self) -> Outcome:
        """Serves until a signal or an operator ends it. Raises StartError or ConfigError."""
        outcome = Outcome()
        with ExitStack() as stack:
            stack.callback(self.lifecycle.advance, State.STOPPED)
            stack.enter_context(self._inbox.signals())
            notifier = stack.enter_context(Notifier(self._manager.notify_socket))
            pipeline = Pipeline(self._config)

            def close_pipeline() -> None:
                outcome.threads_left = not pipeline.close()

            stack.callback(close_pipeline)
            try:
                server = self._listen(stack, pipeline)
            except (OSError, ValueError, RuntimeError) as error:
                raise StartError(getattr(error, "strerror", None) or str(error)) from error
            self._announce(stack, notifier)
            outcome.drained = self._serve(notifier, server, pipeline)
            if not outcome.drained:
                # What waits for a store is answered now, so that no listener waits for it to end.
                pipeline.halt()
        if self._drain_thread is not None:
            self._drain_thread.join(_JOIN_DRAIN_S)
            outcome.threads_left |= self._drain_thread.is_alive()
        return outcome

    def _listen(self, stack: ExitStack, pipeline: Pipeline) -> Server:
        """Opens all listeners; `stack` closes them in reverse order."""
        listen = self._config.listen
        if listen.http is not None:
            labels = {"version": version(), **build_info()}
            metrics = Metrics(pipeline.sources, state=self._state, build_info=labels)
            http = HttpServer(
                listen.http,
                metrics=metrics,
                state=self._state,
                out_of_service=lambda: pipeline.devices.out_of_service,
            )
            stack.callback(http.stop)
            self._addresses.http = http.address
        server = Server(
            pipeline.node,
            list(listen.grpc),
            max_message_bytes=self._config.limits.max_message_size,
        )
        stack.callback(server.stop)

        def tell_health(state: State) -> None:
            if state is not State.STOPPED:  # the server is gone by then
                server.set_serving(state is State.SERVING)

        self.lifecycle.add_listener(tell_health)
        self._addresses.grpc = list(server.addresses)
        if listen.admin is not None:
            admin = AdminServer(
                pipeline.node,
                listen.admin,
                lambda: self._status(pipeline),
                lambda timeout_s: self._inbox.put(DrainRequest(timeout_s)),
                sources=pipeline.sources,
                allow_remote=self._config.insecure,
            )
            stack.callback(admin.stop)
            self._addresses.admin = admin.address
        return server

    def _announce(self, stack: ExitStack, notifier: Notifier) -> None:
        """Moves to SERVING, and says so to everybody who waits for it."""
        self.lifecycle.advance(State.SERVING)
        if self._ready_file is not None:
            try:
                _write_whole(self._ready_file, json.dumps(asdict(self._addresses)))
            except OSError as error:
                raise StartError(f"cannot write {self._ready_file}: {error.strerror}") from error
            stack.callback(self._ready_file.unlink, missing_ok=True)
        for kind, address in (("admin", self._addresses.admin), ("http", self._addresses.http)):
            if address:
                _log.info("%s on %s", kind, address)
        line = f"serving on {', '.join(self._addresses.grpc)}"
        _log.info("%s", line)
        notifier.ready(line)

    def _serve(self, notifier: Notifier, server: Server, pipeline: Pipeline) -> bool:
        """The main thread's loop; True when the drain answered every accepted request."""
        drain = functools.partial(self._drain, notifier, server, pipeline)
        # Half the interval, as sd_watchdog_enabled(3) advises.
        beat_s = self._manager.watchdog_seconds / 2 or None
        while True:
            event = self._inbox.get(beat_s)
            if beat_s is not None:
                notifier.alive()
            match event:
                case StopSignal(name) if self._signals == 0:
                    self._signals = 1
                    if self.lifecycle.state is State.SERVING:
                        drain(self._config.drain_timeout, f"{name} received")
                    else:
                        _log.info("%s received: draining already; one more stops at once", name)
                case StopSignal(name):
                    _log.warning("%s received again: stopping at once", name)
                    # From here on the kernel's default holds: should a stop hang, one more ends it.
                    self._inbox.release_signals()
                    return False
                case DrainRequest(timeout_s) if self.lifecycle.state is State.SERVING:
                    seconds = self._config.drain_timeout if timeout_s is None else timeout_s
                    drain(seconds, "an operator asks for it")
                case Drained(complete):
                    if not complete:
                        _log.warning("accepted requests had to be cancelled")
                    return complete

    def _drain(
        self,
        notifier: Notifier,
        server: Server,
        pipeline: Pipeline,
        timeout_s: float,
        reason: str,
    ) -> None:
        self.lifecycle.advance(State.DRAINING)
        line = f"draining for at most {format_duration(timeout_s)}: {reason}"
        _log.info("%s", line)
        notifier.stopping(line)

        # In a thread of its own, so that the main thread still hears a second signal.
        def drain() -> None:
            complete = False
            try:
                # When the time is over, what still waits for a store is answered TIMED_OUT; the
                # server gets a little longer to bring these replies home.
                complete = server.drain(timeout_s + _DRAIN_GRACE_S)
            except Exception:
                _log.exception("the drain failed")
            time_over.cancel()
            self._inbox.put(Drained(complete))

        def give_up() -> None:
            _log.warning("the drain's time is over: what still waits is answered TIMED_OUT")
            pipeline.halt()

        time_over = threading.Timer(timeout_s, give_up)
        time_over.daemon = True
        time_over.start()
        self._drain_thread = threading.Thread(target=drain, name="drain", daemon=True)
        self._drain_thread.start()

    def _state(self) -> str:
        return self.lifecycle.state.value

    def _status(self, pipeline: Pipeline) -> DaemonStatus:
        config = self._config
        return DaemonStatus(
            state=self._state(),
            version=version(),
            topology=config.topology,
            uptime_seconds=self.lifecycle.uptime_s,
            data_addresses=self._addresses.grpc,
            http_address=self._addresses.http,
            memory_bytes=config.memory.size,
            namespaces=[
                NamespaceInfo(
                    name=name,
                    domains=[
                        DomainInfo(name=domain_name, policy=domain.policy, ttl_seconds=domain.ttl)
                        for domain_name, domain in namespace.domains.items()
                    ],
                    default_domain=namespace.entry_domain,
                    store=namespace.store or "",
                )
                for name, namespace in config.namespaces.items()
            ],
            stores=[
                StoreInfo(name=name, type=config.stores[name].type, breaker=store.state)
                for name, store in pipeline.stores.items()
            ],
            nvm_devices=nvm_devices(pipeline.node.samples()) if config.nvm else (),
        )


def version() -> str:
    """The installed package's version; "unknown" where it runs without being installed."""
    try:
        return importlib.metadata.version("feature-cache")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _close_store(name: str, store: GuardedStore) -> None:
    try:
        store.close()
    except Exception:
        _log.exception("store %s: close failed", name)


def _write_whole(path: Path, text: str) -> None:
    """Writes a file so that nobody ever sees half of it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text + "\n")
    Path(file.name).replace(path)
