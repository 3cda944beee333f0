"""Client processes that ask a server as fast as it answers, round by round, and what that took."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from benchmarks._harness import median
from benchmarks._servers import RunningServer, cpu_seconds

__all__ = ["Clients", "Load", "MakeCall"]

MakeCall = Callable[[RunningServer, str], Callable[[Any], Any]]
"""Connects to a server; what it returns asks for one batch. Must be importable by name."""


class Load(Protocol):
    """What the client processes do; must be picklable."""

    @property
    def form(self) -> str:
        """What is made of a reply."""

    @property
    def clients(self) -> int:
        """How many processes."""

    def batches(self, seed: int) -> Sequence[Any]:
        """What one process asks for, again and again."""


@dataclass(frozen=True)
class _Sample:
    """What one client process did in one round."""

    requests: int
    seconds: float
    p50_us: float
    p99_us: float
    cpu_seconds: float


def _work(
    make_call: MakeCall,
    target: RunningServer,
    load: Load,
    seed: int,
    commands: Connection,
) -> None:
    """A client process: for each number received, asks for that many seconds, sends a `_Sample`."""
    call, batches = make_call(target, load.form), load.batches(seed)
    for batch in batches:
        call(batch)
    commands.send("ready")
    while (seconds := commands.recv()) > 0:  # ends with the benchmark
        took: list[float] = []
        cpu_before, started = time.process_time(), time.perf_counter()
        now = started
        while now - started < seconds:
            call(batches[len(took) % len(batches)])
            before, now = now, time.perf_counter()
            took.append(now - before)
        p50, p99 = np.percentile(took, [50, 99]) * 1e6
        cpu = time.process_time() - cpu_before
        commands.send(_Sample(len(took), now - started, float(p50), float(p99), cpu))


class Clients:
    """The client processes of one side, idle between rounds."""

    def __init__(
        self,
        stack: ExitStack,
        make_call: MakeCall,
        server: RunningServer,
        load: Load,
    ) -> None:
        self._server = server
        self._pipes: list[Connection] = []
        self.samples: list[_Sample] = []
        self.server_cpu_seconds = 0.0
        spawn = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
        for seed in range(load.clients):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=_work, args=(make_call, server, load, seed, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            stack.callback(process.join, 10)
            stack.callback(ours.send, 0)
        for pipe in self._pipes:
            if pipe.recv() != "ready":
                raise RuntimeError("a client process did not start")

    def round(self, seconds: float) -> float:
        """Requests/s of all clients together, for that many seconds."""
        cpu_before = cpu_seconds(self._server.pid)
        for pipe in self._pipes:
            pipe.send(seconds)
        samples: list[_Sample] = [pipe.recv() for pipe in self._pipes]
        self.server_cpu_seconds += cpu_seconds(self._server.pid) - cpu_before
        self.samples += samples
        return sum(sample.requests / sample.seconds for sample in samples)

    def extra(self, prefix: str) -> dict[str, object]:
        """CPU and latency over all rounds, in microseconds."""
        requests = sum(sample.requests for sample in self.samples)
        client_cpu = sum(sample.cpu_seconds for sample in self.samples)
        return {
            f"{prefix}server_cpu_us_per_1000_keys": round(self.server_cpu_seconds / requests * 1e6),
            f"{prefix}client_cpu_us_per_1000_keys": round(client_cpu / requests * 1e6),
            f"{prefix}p50_us": round(median([sample.p50_us for sample in self.samples])),
            f"{prefix}p99_us": round(median([sample.p99_us for sample in self.samples])),
        }
