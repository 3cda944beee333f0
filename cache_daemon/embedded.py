"""The cache in the ranker's own process: the engine and stores of a daemon, without the daemon.

    from cache_daemon.embedded import EmbeddedCache

    with EmbeddedCache("feature-cache.yaml") as cache:
        reply = cache.client.batch_get({"pin_text": keys}, timeout=0.05)

The same config file and the same client API as with a daemon, and no network between. Nothing
listens: where metrics are wanted, `samples` and `histograms` give what a daemon shows at /metrics.
"""

import weakref
from pathlib import Path
from types import TracebackType

from cache_daemon.client import AsyncClient, Client
from cache_daemon.config import Config, ConfigError, load_config
from cache_daemon.config_problem import Problem
from cache_daemon.metrics import HistogramLike, SampleLike
from cache_daemon.pipeline import Pipeline, StartError

__all__ = ["ConfigError", "EmbeddedCache", "StartError"]

_ALONE = "'sharded' takes a daemon of its own; in process only colocated and separate work"


class EmbeddedCache:
    """An engine with its stores, running from construction until `close`. Thread-safe.

    It must not be used in a child after a fork: open one in each process.
    """

    def __init__(self, config: Config | Path | str) -> None:
        """`config` is a path, or settings that were read before.

        Raises ConfigError for bad settings, StartError where memory, a store or an NVM device
        is not to be had.
        """
        settings = config if isinstance(config, Config) else load_config(Path(config))
        if settings.sharding is not None:
            raise ConfigError([Problem(("topology",), _ALONE)])
        self._pipeline = pipeline = Pipeline(settings)
        try:
            pipeline.start()
        except BaseException:
            pipeline.close()
            raise
        self._client = Client(self._pipeline.node)
        # An interpreter that ends under threads that wait in native code aborts the process, so a
        # cache that nobody closed is closed before.
        self._finalizer = weakref.finalize(self, _end, pipeline)

    @property
    def client(self) -> Client:
        """The blocking client. It works until the cache is closed."""
        return self._client

    def async_client(self) -> AsyncClient:
        """A client for asyncio; make one for each event loop."""
        return AsyncClient(self._pipeline.node)

    def samples(self) -> list[SampleLike]:
        """Counters and gauges of the engine and of the stores' guards."""
        return [sample for source in self._pipeline.sources for sample in source.samples()]

    def histograms(self) -> list[HistogramLike]:
        """Latency histograms of the engine and of the stores' guards."""
        return [histogram for source in self._pipeline.sources for histogram in source.histograms()]

    def resize_domain(self, namespace: str, domain: str, budget_bytes: int) -> int:
        """Changes a domain's budget; returns the old one.

        Raises KeyError for an unknown name and ValueError where there is no room.
        """
        return self._pipeline.node.resize_domain(namespace, domain, budget_bytes)

    def flush_namespace(self, namespace: str) -> int:
        """Drops every item of the namespace; returns how many. Raises KeyError."""
        return self._pipeline.node.flush_namespace(namespace)

    def close(self) -> None:
        """Answers what waits with TIMED_OUT and closes the stores; takes bounded time. Idempotent.

        A store call that still runs then is left behind in its daemonic thread. With `persist` what
        shall outlive the process is written then, within its `shutdown_limit`.
        """
        self._client.close()
        self._finalizer()

    def __enter__(self) -> "EmbeddedCache":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _end(pipeline: Pipeline) -> None:
    pipeline.close()
    pipeline.shut_down()
