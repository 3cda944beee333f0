"""The composition root: the one place that turns settings into a running daemon.

`Pipeline` is what serves reads and writes; `Daemon` puts listeners, metrics and a life cycle around
it.
"""

import functools
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cache_daemon._native import Server, build_info
from cache_daemon.admin import AdminServer
from cache_daemon.cluster_status import Membership
from cache_daemon.config import Config, ServiceManager
from cache_daemon.config_sharded import SecretError
from cache_daemon.config_units import format_duration
from cache_daemon.daemon_status import daemon_status, version
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
    Warmed,
)
from cache_daemon.metrics import Metrics, SampleSource
from cache_daemon.pipeline import Pipeline, StartError
from cache_daemon.sdnotify import Notifier
from cache_daemon.warmup_status import Warming

__all__ = ["Addresses", "Daemon", "Outcome", "Pipeline", "StartError", "version"]

_log = logging.getLogger(__name__)

_JOIN_DRAIN_S = 1.0
_DRAIN_GRACE_S = 2.0  # for the last replies, beyond a drain's timeout
_TELL_PROGRESS_S = 2.0  # how often a recovery says how far it is
_EXTEND_S = 30.0  # what the service manager is asked for at a time, on the way up and down


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
        self._warming: Warming | None = None  # with a warmup section
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
            self._warming = self._make_warming()

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
            end = self._warm(stack, notifier, pipeline)
            if end is not None:
                self._drain(notifier, server, pipeline, 0.0, f"{end}, before it served")
            else:
                self._announce(stack, notifier)
                if not (self._membership is None or self._config.is_root or self._config.warms):
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
        warmup = self._config.warmup
        copies = warmup.peer_copy if warmup is not None and not self._config.is_root else None
        # It has its addresses before the node is made, so that what is wrong with them is found
        # before anything else is touched; the node comes to it later.
        server = Server(
            None,
            list(listen.grpc),
            max_message_bytes=self._config.limits.max_message_size,
            misses_until_attached=early,
            max_batch_keys=self._config.limits.max_batch_keys,
            copy_bytes_per_second=copies.serve_rate if copies else 0,
            copies_at_once=copies.at_once if copies else 1,
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
                lambda: daemon_status(
                    self.lifecycle,
                    pipeline,
                    self._membership,
                    self._addresses.grpc,
                    self._addresses.http,
                    self._warming,
                ),
                lambda timeout_s: self._inbox.put(DrainRequest(timeout_s)),
                sources=self._sources(pipeline),
                warmup=self._warming,
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

    def _warm(self, stack: ExitStack, notifier: Notifier, pipeline: Pipeline) -> str | None:
        """Fills the cache before anybody is told to send requests; why it ends here, if so.

        Raises StartError where a warm-up failed and the config says that the node then must not
        serve.
        """
        warming = self._warming
        if warming is None:
            return None
        stack.callback(warming.close)
        warming.attach(pipeline.node, None if self._config.is_root else self._membership)
        if not self._config.warms:
            return None
        self.lifecycle.advance(State.WARMING)
        if self._membership is not None:
            # Shards are what a leaf is filled with, so it needs them first.
            self._membership.start(pipeline.node, self._addresses.grpc, fill=warming.fill)
        warming.begin(lambda error: self._inbox.put(Warmed(error)))
        while True:
            match self._inbox.get(_TELL_PROGRESS_S):
                case StopSignal(name):
                    self._signals = 1
                    return f"{name} received"
                case DrainRequest():
                    return "an operator asks for it"
                case Warmed(error):
                    if error is not None:
                        raise error
                    return None
                case None:
                    notifier.recovering(warming.tell_progress(), _EXTEND_S)

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
                if self._warming is not None:
                    self._warming.close()
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

    def _make_warming(self) -> Warming | None:
        if self._config.warmup is None:
            return None
        # Loads the clients of S3, which other nodes do without.
        from cache_daemon.warming import make_warming

        return make_warming(self._config, self.lifecycle)

    def _sources(self, pipeline: Pipeline) -> list[SampleSource]:
        return [
            *pipeline.sources,
            *([self._membership] if self._membership else []),
            *([self._warming] if self._warming else []),
        ]

    def _recovers(self) -> bool:
        return self.lifecycle.state is State.RECOVERING

    def _state(self) -> str:
        return self.lifecycle.state.value


def _is_alive(thread: threading.Thread | None) -> bool:
    return thread is not None and thread.is_alive()


def _write_whole(path: Path, text: str) -> None:
    """Writes a file so that nobody ever sees half of it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text + "\n")
    Path(file.name).replace(path)
