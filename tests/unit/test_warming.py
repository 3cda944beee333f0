"""When a daemon fills its node and when it gives up, with warm-ups that do what a test wants.

With real ones it is in tests/e2e/test_warmup*.py.
"""

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cache_daemon.cluster_status import ClusterStatus
from cache_daemon.config import parse_config
from cache_daemon.lifecycle import Lifecycle, State
from cache_daemon.pipeline import StartError
from cache_daemon.warming import NodeWarming, make_warming
from cache_daemon.warmup_status import UploadStatus, WarmupRefused
from tests.servers import wait_until
from warmup.warmer import Outcome, Progress

_CONFIG = """\
listen: {{grpc: [127.0.0.1:7070]}}
memory: {{size: 64MiB}}
namespaces: {{pin: {{store: s, domains: {{all: {{budget: 60%}}}}}}}}
stores: {{s: {{type: redis}}}}
warmup: {{snapshots: {{url: 'file:///nowhere'}}, {more}}}
"""
_WARMED = Outcome("warmed", "97.0% of the recorded traffic would hit")


class Warm:
    """A warm-up that ends when it is told to, or as the test says."""

    def __init__(self, outcome: Outcome | Exception | None) -> None:
        self.outcome = outcome  # None: it runs until it is stopped
        self.hangs = False
        self.stopped = threading.Event()
        self.running = threading.Event()

    def run(self) -> Outcome:
        self.running.set()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        if self.outcome is not None:
            return self.outcome
        self.stopped.wait(60)
        if self.hangs:
            time.sleep(60)
        return Outcome("stopped", "it was told to")

    def stop(self) -> None:
        self.stopped.set()

    def progress(self) -> Progress:
        return Progress(phase="replay", keys_done=7, keys_total=9, problems=("slow",))


class World:
    """A `NodeWarming` over scripted parts. The next warm-ups are in `script`."""

    def __init__(self, more: str = "max_duration: 30s", membership: Any = None) -> None:
        self.script: list[Warm | Exception] = []
        self.tasks: list[tuple[float, list[int] | None]] = []
        self.lifecycle = Lifecycle()
        self.lifecycle.advance(State.WARMING)
        parts: Any = self
        self.warming = NodeWarming(parse_config(_CONFIG.format(more=more)), self.lifecycle, parts)
        node: Any = object()
        self.warming.attach(node, membership)
        self.kept = 0
        self.ends: list[Exception | None] = []

    def start_uploads(self, owned: Any) -> Any:
        del owned
        return self

    def kept_items(self, node: Any) -> int:
        del node
        return self.kept

    def make_warmer(
        self, node: Any, seconds: float, shards: Any, view: Any, membership: Any
    ) -> Any:
        del node, view, membership
        self.tasks.append((seconds, None if shards is None else shards.tolist()))
        made = self.script.pop(0)
        if isinstance(made, Exception):
            raise made
        return made

    def status(self) -> UploadStatus:
        return UploadStatus(uploaded=3)

    def stop(self) -> None:
        """Of the uploads."""

    def begin(self, *script: Warm | Exception) -> None:
        self.script += script
        self.warming.begin(self.ends.append)

    def wait(self) -> Exception | None:
        wait_until(lambda: bool(self.ends), 10, "the end of the one at the start")
        self.lifecycle.advance(State.SERVING)
        (end,) = self.ends
        return end


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.warming.close()


class Leaf:
    """The membership of a leaf, as far as it is looked at."""

    def __init__(self) -> None:
        self.online = self.shards_warming = 0

    def status(self) -> ClusterStatus:
        return ClusterStatus(
            "leaf", "c", shards_online=self.online, shards_warming=self.shards_warming
        )

    def owned(self) -> Any:
        return np.array([1, 2], np.uint32), object()


def test_it_ends_and_the_node_serves(world: World) -> None:
    assert world.warming.status().state == "pending"
    world.begin(Warm(_WARMED))
    assert world.wait() is None
    status = world.warming.status()
    assert (status.state, status.reason, status.serving_cold) == ("warmed", _WARMED.reason, False)
    assert (status.keys_done, status.phase, status.keys_per_second) == (7, "", 0.0)
    assert status.uploads == UploadStatus(uploaded=3)
    assert world.tasks == [(30.0, None)]
    assert {
        sample.labels["outcome"]: sample.value
        for sample in world.warming.samples()
        if sample.name == "feature_cache_warmup_runs_total"
    } == {"warmed": 1, "partial": 0, "failed": 0, "stopped": 0}


def test_while_it_runs_it_says_how_far_it_is(world: World) -> None:
    warm = Warm(None)
    world.begin(warm)
    assert warm.running.wait(10)
    status = world.warming.status()
    assert (status.state, status.phase, status.reason) == ("running", "replay", "slow")
    assert "7 of 9 keys" in world.warming.tell_progress()


@pytest.mark.parametrize("what", [Warm(Outcome("failed", "no snapshots")), OSError("no snapshots")])
def test_when_nothing_came_it_serves_cold(world: World, what: Any) -> None:
    world.begin(what)
    assert world.wait() is None
    status = world.warming.status()
    assert (status.state, status.serving_cold) == ("failed", True)
    assert "no snapshots" in status.reason
    # Later an operator has it filled.
    world.script.append(Warm(_WARMED))
    world.warming.start(None)
    wait_until(lambda: world.warming.status().state == "warmed", 10)
    wait_until(lambda: not world.warming.status().serving_cold, 10)


@pytest.mark.parametrize("what", [Warm(Outcome("failed", "no snapshots")), OSError("no snapshots")])
def test_or_does_not_start_where_that_is_wanted(what: Any) -> None:
    world = World("on_failure: fail")
    world.begin(what)
    error = world.wait()
    assert isinstance(error, StartError)
    assert "no snapshots" in str(error)
    assert not world.warming.status().serving_cold


@pytest.mark.parametrize("on_failure", ["fail", "serve_cold"])
def test_what_a_restart_kept_is_not_cold(on_failure: str) -> None:
    world = World(f"on_failure: {on_failure}")
    world.kept = 5
    world.begin(Warm(Outcome("failed", "S3 does not answer")))
    assert world.wait() is None
    status = world.warming.status()
    assert (status.state, status.reason) == ("failed", "S3 does not answer")
    assert not status.serving_cold


@pytest.mark.parametrize("state", ["partial", "stopped"])
def test_some_of_it_is_enough_to_start(state: str) -> None:
    world = World("on_failure: fail")
    world.begin(Warm(Outcome(state)))
    assert world.wait() is None


def test_what_hangs_is_left_behind_in_time() -> None:
    world = World("max_duration: 200ms")
    warm = Warm(None)
    warm.hangs = True
    began = time.monotonic()
    world.begin(warm)
    assert world.wait() is None
    assert time.monotonic() - began < 5
    assert warm.stopped.is_set()
    # It had brought nothing so far.
    assert world.warming.status().state == "failed"
    assert "its time is over: slow" in world.warming.status().reason


def test_an_operator_ends_it_and_begins_another(world: World) -> None:
    warm = Warm(None)
    world.begin(warm)
    assert warm.running.wait(10)
    with pytest.raises(WarmupRefused, match="the daemon is WARMING"):
        world.warming.start(None)
    assert world.warming.stop()
    assert world.wait() is None
    assert world.warming.status().state == "stopped"
    assert not world.warming.status().serving_cold
    assert not world.warming.stop()
    second = Warm(None)
    world.script.append(second)
    world.warming.start(12.5)
    assert second.running.wait(10)
    assert world.tasks[-1] == (12.5, None)
    with pytest.raises(WarmupRefused, match="one runs already"):
        world.warming.start(None)
    assert world.warming.stop()
    wait_until(lambda: world.warming.status().state == "stopped", 10)


def test_a_stop_of_the_daemon_ends_it(world: World) -> None:
    warm = Warm(None)
    world.begin(warm)
    assert warm.running.wait(10)
    began = time.monotonic()
    world.warming.close()
    assert time.monotonic() - began < 4
    assert world.wait() is None
    assert warm.stopped.is_set()


def test_a_node_without_a_source_refuses(world: World) -> None:
    bare = World("plan: none")
    bare.lifecycle.advance(State.SERVING)
    assert bare.warming.status().state == "off"
    with pytest.raises(WarmupRefused, match="nothing to be filled from"):
        bare.warming.start(None)
    bare.warming.fill(np.array([1], np.uint32), None)  # type: ignore[arg-type]
    assert bare.tasks == []
    del world


def test_a_leaf_waits_for_its_first_shards() -> None:
    leaf = Leaf()
    world = World(membership=leaf)
    world.begin(Warm(_WARMED))
    time.sleep(0.2)
    assert not world.ends
    leaf.shards_warming = 10
    time.sleep(0.2)
    world.warming.fill(np.array([1, 2, 3], np.uint32), None)  # type: ignore[arg-type]
    assert world.tasks == [(30.0, [1, 2, 3])]
    leaf.online, leaf.shards_warming = 6, 4
    time.sleep(0.2)
    assert not world.ends
    # All of the first are online; others have come, which are warmed while it serves.
    leaf.online, leaf.shards_warming = 10, 5
    assert world.wait() is None
    assert world.warming.status().state == "warmed"


def test_a_leaf_that_kept_its_shards_has_nothing_to_fill() -> None:
    leaf = Leaf()
    leaf.online = 5
    world = World(membership=leaf)
    world.begin()
    assert world.wait() is None
    status = world.warming.status()
    assert (status.state, status.reason) == ("warmed", "its shards were kept")


def test_a_leaf_without_shards_serves_in_time() -> None:
    world = World("max_duration: 200ms", Leaf())
    world.begin()
    assert world.wait() is None
    assert world.warming.status().serving_cold
    assert "no shard was assigned to this leaf" in world.warming.status().reason


def test_shards_that_come_go_before_what_an_operator_began() -> None:
    leaf = Leaf()
    leaf.online = 2
    world = World(membership=leaf)
    world.begin()
    world.wait()
    by_hand = Warm(None)
    world.script.append(by_hand)
    world.warming.start(None)
    assert by_hand.running.wait(10)
    assert world.tasks == [(30.0, [1, 2])]
    world.script.append(Warm(_WARMED))
    world.warming.fill(np.array([9], np.uint32), None)  # type: ignore[arg-type]
    assert by_hand.stopped.is_set()
    assert world.tasks[-1] == (30.0, [9])


def test_shards_that_come_one_after_the_other_wait_for_s3_once() -> None:
    leaf = Leaf()
    leaf.online = 2
    world = World("max_duration: 3s", leaf)
    world.begin()
    world.wait()
    script = [Warm(_WARMED), Warm(Outcome("failed", "no answer")), Warm(_WARMED), Warm(_WARMED)]
    world.script += script
    for shard in range(4):
        world.warming.fill(np.array([shard], np.uint32), None)  # type: ignore[arg-type]
        time.sleep(0.2)
    seconds = [task[0] for task in world.tasks]
    # After the one that failed there is what that left; after one that went well, all of it.
    assert seconds[0] == seconds[1] == 3.0
    assert 1.0 <= seconds[2] < 2.9
    assert seconds[3] == 3.0


def test_the_parts_are_made_by_the_config() -> None:
    config = parse_config(_CONFIG.format(more="record: {dir: /nowhere/log}"))
    warming = make_warming(config, Lifecycle())
    assert warming.status().state == "pending"
    assert warming.status().max_seconds == 600
    warming.close()
