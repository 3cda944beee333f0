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
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import ValidationError

from cache_daemon._native import Node, RecoveryProgress, Server, build_info
from cache_daemon.admin import AdminServer, DaemonStatus, DomainInfo, NamespaceInfo, StoreInfo
from cache_daemon.cluster_status import Membership
from cache_daemon.config import Config, ConfigError, ServiceManager
from cache_daemon.config_node import node_config
from cache_daemon.config_problem import Problem
from cache_daemon.config_sharded import SecretError
from cache_daemon.config_units import format_duration, format_size
from cache_daemon.fetch import FetchLoop
from cache_daemon.http import HttpServer
from cache_daemon.lifecycle import (
    Drained,
    DrainRequest,
    Event,
    Finished,
    Inbox,
    Lifecycle,
    NodeMade,
    Routed,
    State,
    StopSignal,
)
from cache_daemon.metrics import Metrics, SampleSource
from cache_daemon.node_holder import NodeHolder
from cache_daemon.nvm_devices import DeviceWatch, nvm_devices
from cache_daemon.recovery import Start
from cache_daemon.sdnotify import Notifier
from cache_daemon.stores import StoreConfigError, make_store
from cache_daemon.stores.guard import GuardedStore

__all__ = ["Addresses", "Daemon", "Outcome", "Pipeline", "StartError", "version"]

_log = logging.getLogger(__name__)

_JOIN_STORES_S = 2.0  # how long a stop waits for store calls that run
_JOIN_DRAIN_S = 1.0
_DRAIN_GRACE_S = 2.0  # for the last replies, beyond a drain's timeout
_TELL_PROGRESS_S = 2.0  # how often a recovery says how far it is
_EXTEND_S = 30.0  # what the service manager is asked for at a time, on the way up and down


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
        # What works while the main thread listens; daemonic, so that none can keep the process.
        self._start_thread: threading.Thread | None = None
        self._drain_thread: threading.Thread | None = None
        self._finish_thread: threading.Thread | None = None
        self._signals = 0
        self._drained = False  # the drain has answered every accepted request
        self._closed: bool | None = None  # what the pipeline's close said, once it was called
        self._membership: Membership | None = None  # of a root or a leaf
        self.lifecycle = Lifecycle()

    def run(self) -> Outcome:
        """Serves until a signal or an operator ends it. Raises StartError or ConfigError."""
        outcome = Outcome()
        with ExitStack() as stack:
            stack.callback(self.lifecycle.advance, State.STOPPED)
            stack.enter_context(self._inbox.signals())
            notifier = stack.enter_context(Notifier(self._manager.notify_socket))
            pipeline = Pipeline(self._config)
            self._membership = self._make_membership()

            def close_pipeline() -> None:
                # A node that is being made, or is being shut down, cannot be interrupted: the
                # process ends under it, and the next start recovers.
                if _is_alive(self._start_thread) or _is_alive(self._finish_thread):
                    outcome.threads_left = True
                    return
                closed = pipeline.close() if self._closed is None else self._closed
                outcome.threads_left = not closed

            stack.callback(close_pipeline)
            if self._membership is not None:
                stack.callback(self._membership.stop)
            try:
                server = self._listen(stack, pipeline)
            except (OSError, ValueError, RuntimeError) as error:
                raise StartError(getattr(error, "strerror", None) or str(error)) from error
            if not (self._start(notifier, pipeline) and self._find_way(notifier, pipeline)):
                outcome.drained = server.drain(_DRAIN_GRACE_S)
                return outcome
            server.attach(pipeline.node)
            self._announce(stack, notifier)
            if self._membership is not None and not self._config.is_root:
                # From now on others send requests here, so it comes last.
                self._membership.start(pipeline.node, self._addresses.grpc)
            outcome.drained = self._serve(notifier, server, pipeline)
            if not outcome.drained and self._finish_thread is None:
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
            metrics = Metrics(self._sources(pipeline), state=self._state, build_info=labels)
            http = HttpServer(
                listen.http,
                metrics=metrics,
                state=self._state,
                out_of_service=lambda: pipeline.out_of_service,
            )
            stack.callback(http.stop)
            self._addresses.http = http.address
        persist = self._config.persistence
        early = persist is not None and persist.serve_while_recovering
        # It has its addresses before the node is made, so that what is wrong with them is found
        # before anything else is touched; the node comes to it later.
        server = Server(
            None,
            list(listen.grpc),
            max_message_bytes=self._config.limits.max_message_size,
            misses_until_attached=early,
            max_batch_keys=self._config.limits.max_batch_keys,
        )
        stack.callback(server.stop)

        def tell_health(state: State) -> None:
            if state is not State.STOPPED:  # the server is gone by then
                recovering = state is State.RECOVERING
                server.set_serving(state is State.SERVING or (early and recovering))

        self.lifecycle.add_listener(tell_health)
        self._addresses.grpc = list(server.addresses)
        if listen.admin is not None:
            admin = AdminServer(
                pipeline.held,
                listen.admin,
                lambda: self._status(pipeline),
                lambda timeout_s: self._inbox.put(DrainRequest(timeout_s)),
                sources=self._sources(pipeline),
                allow_remote=self._config.insecure,
            )
            stack.callback(admin.stop)
            self._addresses.admin = admin.address
        return server

    def _start(self, notifier: Notifier, pipeline: Pipeline) -> bool:
        """Waits until the pipeline runs; False when a stop came first."""
        if self._config.persistence is not None:
            self.lifecycle.advance(State.RECOVERING)

        def start() -> None:
            try:
                pipeline.start()
            except Exception as error:
                self._inbox.put(NodeMade(error))
            else:
                self._inbox.put(NodeMade())

        self._start_thread = threading.Thread(target=start, name="start", daemon=True)
        self._start_thread.start()
        match self._wait_before_serving(
            lambda: notifier.recovering(
                pipeline.started.tell_progress() if self._recovers() else "starting", _EXTEND_S
            )
        ):
            case NodeMade(error):
                self._start_thread.join()
                if error is not None:
                    raise error
                return True
        return False

    def _find_way(self, notifier: Notifier, pipeline: Pipeline) -> bool:
        """Of a root: waits until it knows its leaves; False when a stop came first."""
        membership = self._membership
        if membership is None or not self._config.is_root:
            return True
        membership.start(
            pipeline.node, self._addresses.grpc, on_routed=lambda: self._inbox.put(Routed())
        )

        def tell() -> None:
            status = membership.status()
            line = f"waiting for the shard map of cluster {status.cluster}"
            line += "".join(f": {problem}" for problem in status.problems)
            _log.info("%s", line)
            notifier.recovering(line, _EXTEND_S)

        return self._wait_before_serving(tell) is not None

    def _wait_before_serving(self, tell: Callable[[], None]) -> Event | None:
        """The next event that is no stop; None when a stop came. Calls `tell` meanwhile."""
        while True:
            match self._inbox.get(_TELL_PROGRESS_S):
                case StopSignal(name):
                    _log.info("%s received: stopping at once, before anything was served", name)
                    return None
                case DrainRequest():
                    _log.info("an operator asks to stop: at once, before anything was served")
                    return None
                case None:
                    tell()
                case event:
                    return event

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
        while True:
            match self._next_event(notifier):
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
                    return self._drained
                case DrainRequest(timeout_s) if self.lifecycle.state is State.SERVING:
                    seconds = self._config.drain_timeout if timeout_s is None else timeout_s
                    drain(seconds, "an operator asks for it")
                case Drained(complete):
                    if not complete:
                        _log.warning("accepted requests had to be cancelled")
                    self._drained = complete
                    self._finish(server, pipeline)
                case Finished() if self._finish_thread is not None:
                    self._finish_thread.join()
                    return self._drained

    def _next_event(self, notifier: Notifier) -> Event | None:
        """The next one; the service manager hears meanwhile that the daemon lives."""
        # Half the interval, as sd_watchdog_enabled(3) advises.
        beat_s = self._manager.watchdog_seconds / 2 or None
        wait_s = beat_s
        if self._finish_thread is not None:
            notifier.still_stopping(_EXTEND_S)
            wait_s = min(_EXTEND_S / 2, beat_s or _EXTEND_S)
        event = self._inbox.get(wait_s)
        if beat_s is not None:
            notifier.alive()
        return event

    def _finish(self, server: Server, pipeline: Pipeline) -> None:
        """Ends what serves, then the node in order; in a thread, as a drain."""

        def finish() -> None:
            try:
                server.stop()
                if self._membership is not None:
                    self._membership.stop()
                self._closed = pipeline.close()
                pipeline.shut_down()
            except Exception:
                _log.exception("the orderly end failed")
            self._inbox.put(Finished())

        self._finish_thread = threading.Thread(target=finish, name="finish", daemon=True)
        self._finish_thread.start()

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
                if self._membership is not None:  # nobody shall send requests here any more
                    self._membership.leave()
                time_over.start()
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
        self._drain_thread = threading.Thread(target=drain, name="drain", daemon=True)
        self._drain_thread.start()

    def _make_membership(self) -> Membership | None:
        if self._config.sharding is None:
            return None
        persist = self._config.persistence
        # Loads the client of ZooKeeper, which other nodes do without.
        from cache_daemon.cluster import make_membership

        try:
            return make_membership(
                self._config.sharding,
                tuple(self._config.namespaces),
                version(),
                Path(persist.dir, f"{persist.name}.doubt") if persist is not None else None,
            )
        except (SecretError, ValueError) as error:
            raise StartError(str(error)) from error

    def _sources(self, pipeline: Pipeline) -> list[SampleSource]:
        return [*pipeline.sources, *([self._membership] if self._membership else [])]

    def _recovers(self) -> bool:
        return self.lifecycle.state is State.RECOVERING

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
            nvm_devices=nvm_devices(pipeline.held.samples()) if config.nvm else (),
            recovery=pipeline.started.progress if self._recovers() else None,
            start=pipeline.started.report,
            cluster=self._membership.status() if self._membership else None,
        )


def version() -> str:
    """The installed package's version; "unknown" where it runs without being installed."""
    try:
        return importlib.metadata.version("feature-cache")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _is_alive(thread: threading.Thread | None) -> bool:
    return thread is not None and thread.is_alive()


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
