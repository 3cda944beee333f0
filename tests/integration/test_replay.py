"""Replay on a real node from real logs, with a real Redis that counts what it is asked for."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks._store_meter import StoreMeter
from cache_daemon._native import (
    DomainConfig,
    NamespaceConfig,
    Node,
    NodeConfig,
    RecordConfig,
    StoreConfig,
    WarmPlan,
    WarmResult,
    encode_get,
    inspect_request_log,
)
from cache_daemon.fetch import FetchLoop
from cache_daemon.stores.redis import RedisOptions, RedisStore
from sharding.connection import Connection, ZooKeeperConfig
from sharding.shared_document import ZnodeDocument
from tests.s3_server import BUCKET, S3Server
from tests.servers import RedisServer, wait_until
from warmup.backend import BackendOptions, open_backend
from warmup.documents import BackendDocument
from warmup.fleet_rate import Document
from warmup.snapshots import SnapshotStore
from warmup.warmer import Outcome, Sources, Warmer, WarmSettings

KEYS = [b"key %05d" % number for number in range(6000)]
_VALUE = b"v" * 100


class Filled:
    """A node that reads from Redis, and what fetches for it. A context manager."""

    def __init__(
        self, redis: RedisServer, *, record: RecordConfig | None = None, memory: int = 16 << 20
    ) -> None:
        domain = DomainConfig(name="all", budget_bytes=memory // 2)
        namespaces = [
            NamespaceConfig(name="pin", domains=[domain], default_domain="all", store="features")
        ]
        self.node = Node(
            NodeConfig(
                memory_bytes=memory,
                namespaces=namespaces,
                stores=[StoreConfig(name="features", timeout_ms=2000)],
                record=record,
            )
        )
        self._store = RedisStore(RedisOptions(unix_socket=redis.unix_socket))
        self._loop = FetchLoop(self.node, "features", self._store, 4)
        self._loop.start()

    def __enter__(self) -> "Filled":
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.request_stop()
        self.node.stop()
        assert self._loop.join(10)
        self._store.close()
        self.node.shutdown()

    def ask(self, keys: list[bytes], cache_only: bool = False) -> list[int]:
        request = encode_get([("pin", keys, "")], cache_only=cache_only)
        return list(self.node.batch_get(request, 10.0).statuses(0))

    def held(self, keys: list[bytes]) -> int:
        return sum(status == 1 for status in self.ask(keys, cache_only=True))


@pytest.fixture
def filled_redis(redis_server: RedisServer) -> RedisServer:
    with redis_server.client() as client:
        client.mset({b"pin:" + key: _VALUE for key in KEYS})
        client.config_resetstat()
    return redis_server


@pytest.fixture
def snapshots(filled_redis: RedisServer, tmp_path: Path) -> SnapshotStore:
    """What a warm node has recorded: key n was asked for the more often the lower n is."""
    record = RecordConfig(dir=str(tmp_path / "log"), sample=1.0, window_ms=1000, host="warm")
    with Filled(filled_redis, record=record) as warm:
        for times in range(3):
            for first in range(0, len(KEYS) // (times + 1), 1000):
                warm.ask(KEYS[first : first + 1000])
    store = SnapshotStore(open_backend(f"file://{tmp_path}/snapshots"), "test", "separate")
    for path in sorted((tmp_path / "log").glob("*.fcrl")):
        data = path.read_bytes()
        store.upload(path, inspect_request_log(data), time.time())
    with filled_redis.client() as client:
        client.config_resetstat()
    return store


def warmer_of(
    filled: Filled, store: SnapshotStore, document: Document | None = None, **settings: float
) -> Warmer:
    return Warmer(
        WarmSettings(plan="replay", **settings),  # type: ignore[arg-type]
        Sources(
            make_plan=lambda: WarmPlan(filled.node),
            snapshots=store,
            fleet_document=document,
            node_name=f"{os.getpid()}-{id(filled)}",
        ),
    )


def meter_of(redis: RedisServer) -> StoreMeter:
    """Counts the keys that Redis is asked for, as it says itself."""
    return StoreMeter(redis.client())


def test_a_new_node_has_what_the_warm_one_was_asked(
    filled_redis: RedisServer, snapshots: SnapshotStore
) -> None:
    with Filled(filled_redis) as new:
        warmer = warmer_of(new, snapshots, rate=100_000.0, target_hit_ratio=1.0)
        outcome = warmer.run()
        assert outcome.state == "warmed", outcome
        assert outcome.predicted_hit_ratio == pytest.approx(1.0)
        assert sum(new.held(KEYS[n : n + 1000]) for n in range(0, len(KEYS), 1000)) == len(KEYS)
        progress = warmer.progress()
    assert progress.keys_fetched == progress.keys_total == len(KEYS)
    assert progress.phase == "ended"


def test_the_most_valuable_keys_come_first_and_the_target_ends_it(
    filled_redis: RedisServer, snapshots: SnapshotStore
) -> None:
    # The first third makes up 6000/11000 of what was asked, and more than that is not wanted.
    with Filled(filled_redis) as new:
        outcome = warmer_of(new, snapshots, rate=2000.0, target_hit_ratio=0.5).run()
        assert outcome.state == "warmed"
        assert 0.5 <= (outcome.predicted_hit_ratio or 0) < 0.95
        assert new.held(KEYS[:1000]) == 1000


def test_the_rate_holds_in_every_second_at_the_store(
    filled_redis: RedisServer, snapshots: SnapshotStore
) -> None:
    with Filled(filled_redis) as new, meter_of(filled_redis) as meter:
        outcome = warmer_of(new, snapshots, rate=1500.0, target_hit_ratio=1.0).run()
    assert outcome.state == "warmed"
    assert meter.keys == len(KEYS)
    assert meter.busiest_second() <= 1.02 * 1500


def test_what_the_node_holds_is_not_asked_for_again(
    filled_redis: RedisServer, snapshots: SnapshotStore
) -> None:
    with Filled(filled_redis) as new:
        new.ask(KEYS[:2500])
        with meter_of(filled_redis) as meter:
            outcome = warmer_of(new, snapshots, rate=100_000.0, target_hit_ratio=1.0).run()
    assert outcome.state == "warmed"
    assert meter.keys == len(KEYS) - 2500


def test_a_full_cache_ends_it(filled_redis: RedisServer, snapshots: SnapshotStore) -> None:
    with Filled(filled_redis, memory=2 << 20) as new:

        def fill() -> dict[tuple[str, str], tuple[float, float]]:
            by_name = {s.name: s.value for s in new.node.samples() if "domain" in s.labels}
            evicted = by_name["feature_cache_domain_evictions_total"]
            return {("pin", "all"): (evicted, by_name["feature_cache_domain_items"])}

        sources = Sources(make_plan=lambda: WarmPlan(new.node), snapshots=snapshots, fill=fill)
        settings = WarmSettings(plan="replay", rate=1000.0, target_hit_ratio=1.0, max_seconds=30)
        with meter_of(filled_redis) as meter:
            outcome = Warmer(settings, sources).run()
        held = sum(new.held(KEYS[n : n + 1000]) for n in range(0, len(KEYS), 1000))
    assert outcome.state == "warmed"
    assert "full" in outcome.reason
    assert held < 0.8 * len(KEYS), "it is too large for the test"
    assert meter.keys < len(KEYS), "what has no room is not asked for"


def test_max_duration_bounds_it(filled_redis: RedisServer, snapshots: SnapshotStore) -> None:
    with Filled(filled_redis) as new:
        began = time.monotonic()
        warmer = warmer_of(new, snapshots, rate=100.0, target_hit_ratio=1.0, max_seconds=1.0)
        outcome = warmer.run()
        assert time.monotonic() - began < 3
    assert outcome.state == "partial"
    assert "its time is over" in outcome.reason


def test_stop_ends_it_at_once(filled_redis: RedisServer, snapshots: SnapshotStore) -> None:
    with Filled(filled_redis) as new:
        warmer = warmer_of(new, snapshots, rate=100.0, target_hit_ratio=1.0)
        outcomes: list[Outcome] = []
        thread = threading.Thread(target=lambda: outcomes.append(warmer.run()))
        thread.start()
        wait_until(lambda: warmer.progress().keys_done > 0)
        began = time.monotonic()
        warmer.stop()
        thread.join(5)
        assert time.monotonic() - began < 2
    assert outcomes[0].state == "stopped"


def test_no_snapshot_fails_and_so_do_damaged_ones(
    filled_redis: RedisServer, snapshots: SnapshotStore, tmp_path: Path
) -> None:
    empty = SnapshotStore(open_backend(f"file://{tmp_path}/nowhere"), "test", "separate")
    with Filled(filled_redis) as new:
        outcome = warmer_of(new, empty, max_seconds=1.0).run()
        assert outcome.state == "failed"
        assert "no snapshots" in outcome.reason
        for path in (tmp_path / "snapshots").rglob("*.fcrl"):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 0x10
            path.write_bytes(data)
        outcome = warmer_of(new, snapshots, max_seconds=5.0).run()
    assert outcome.state == "failed"
    assert "not those that were uploaded" in outcome.reason


def test_a_snapshot_of_other_namespaces_brings_nothing(
    filled_redis: RedisServer, tmp_path: Path
) -> None:
    record = RecordConfig(dir=str(tmp_path / "log"), sample=1.0, host="other")
    domain = DomainConfig(name="all", budget_bytes=1 << 20)
    other = Node(
        NodeConfig(
            memory_bytes=8 << 20,
            namespaces=[NamespaceConfig(name="board", domains=[domain], default_domain="all")],
            record=record,
        )
    )
    other.batch_get(encode_get([("board", KEYS[:10], "")]), 1.0)
    other.shutdown()
    store = SnapshotStore(open_backend(f"file://{tmp_path}/snapshots"), "test", "separate")
    (path,) = (tmp_path / "log").glob("*.fcrl")
    store.upload(path, inspect_request_log(path.read_bytes()), time.time())
    with Filled(filled_redis) as new:
        plan = WarmPlan(new.node)
        (snapshot,) = store.find()
        added = plan.add(store.read(snapshot))
        assert added.unknown_namespace == 10
        outcome = warmer_of(new, store, max_seconds=5.0).run()
    assert outcome.state == "failed"
    assert "of other namespaces" in outcome.reason


# ---- what a store may do


def test_a_store_that_is_down_for_a_while(
    start_redis: Callable[..., RedisServer], snapshots: SnapshotStore
) -> None:
    redis = start_redis()
    with redis.client() as client:
        client.mset({b"pin:" + key: _VALUE for key in KEYS})
    with Filled(redis) as new:
        warmer = warmer_of(new, snapshots, rate=3000.0, target_hit_ratio=1.0, max_seconds=60.0)
        outcomes: list[Outcome] = []
        thread = threading.Thread(target=lambda: outcomes.append(warmer.run()))
        thread.start()
        wait_until(lambda: warmer.progress().keys_done > 1000)
        redis.pause()
        wait_until(lambda: warmer.progress().keys_failed > 0, 20)
        done = warmer.progress().keys_done
        time.sleep(1.0)
        assert warmer.progress().keys_done < done + 500, "it is left alone"
        redis.resume()
        thread.join(60)
        assert outcomes[0].state == "warmed", outcomes
        assert sum(new.held(KEYS[n : n + 1000]) for n in range(0, len(KEYS), 1000)) == len(KEYS)


def test_a_store_that_stays_down(
    start_redis: Callable[..., RedisServer], snapshots: SnapshotStore
) -> None:
    redis = start_redis()
    with Filled(redis) as new:
        redis.kill()
        began = time.monotonic()
        outcome = warmer_of(new, snapshots, target_hit_ratio=1.0, max_seconds=3.0).run()
        assert time.monotonic() - began < 20
    assert outcome.state == "failed"


def test_live_misses_go_before_a_replay(
    filled_redis: RedisServer, snapshots: SnapshotStore
) -> None:
    with filled_redis.client() as client:
        client.mset({b"pin:live %d" % number: b"live" for number in range(200)})
    with Filled(filled_redis) as serving:
        warmer = warmer_of(serving, snapshots, rate=5000.0, target_hit_ratio=1.0)
        thread = threading.Thread(target=warmer.run)
        thread.start()
        took = []
        for number in range(200):
            began = time.monotonic()
            assert serving.ask([b"live %d" % number]) == [3]
            took.append(time.monotonic() - began)
        warmer.stop()
        thread.join(10)
    assert sorted(took)[len(took) // 2] < 0.05


# ---- plans


def test_results_are_counted_and_failures_come_again(filled_redis: RedisServer) -> None:
    with Filled(filled_redis) as filled:
        plan = WarmPlan(filled.node)
        results: list[WarmResult] = []
        assert plan.issue(10, 1.0, results.append) == 0
        assert plan.retry_failed() == 0
        assert plan.keys == plan.keys_left == 0
        with pytest.raises(KeyError):
            plan.drop_domains([("pin", "nothing")])
        with pytest.raises(ValueError, match="no request log"):
            plan.add(b"x" * 200)
        assert results == []


# ---- fleets


@pytest.fixture(params=["file", "s3", "zookeeper"])
def documents(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Document]]:
    """The same document as each node has it."""
    with ExitStack() as stack:

        def make() -> Document:
            if request.param == "zookeeper":
                hosts = request.getfixturevalue("zookeeper_hosts")
                connection = Connection(ZooKeeperConfig(hosts))
                connection.start()
                stack.callback(connection.close)
                assert connection.wait_connected(10)
                return ZnodeDocument(connection, "/warmup/fleet-rate")
            if request.param == "file":
                return BackendDocument(open_backend(f"file://{tmp_path}/fleet"), "fleet-rate")
            server: S3Server = request.getfixturevalue("s3_server")
            url = f"s3://{BUCKET}/{tmp_path.name}"
            options = BackendOptions(endpoint=server.endpoint)
            return BackendDocument(open_backend(url, options), "fleet-rate")

        yield make


def test_nodes_that_warm_at_once_share_a_rate(
    filled_redis: RedisServer, snapshots: SnapshotStore, documents: Callable[[], Document]
) -> None:
    fleet_rate, nodes = 4000.0, 4
    with ExitStack() as stack, meter_of(filled_redis) as meter:
        warmers = []
        for _ in range(nodes):
            filled = stack.enter_context(Filled(filled_redis))
            settings = {"rate": 3000.0, "fleet_rate": fleet_rate, "target_hit_ratio": 1.0}
            warmers.append(warmer_of(filled, snapshots, documents(), **settings))
        outcomes: list[Outcome] = []
        threads = [
            threading.Thread(target=lambda warmer=warmer: outcomes.append(warmer.run()))
            for warmer in warmers
        ]
        for thread in threads:
            thread.start()
            time.sleep(0.5)  # they come one after the other
        for thread in threads:
            thread.join(60)
    assert [outcome.state for outcome in outcomes] == ["warmed"] * nodes
    assert meter.keys == nodes * len(KEYS)
    assert meter.busiest_second() <= 1.02 * fleet_rate


_CHILD = """\
import sys, time
from pathlib import Path
from tests.integration.test_replay import Filled, warmer_of
from warmup.backend import open_backend
from warmup.snapshots import SnapshotStore

class Redis:
    unix_socket = Path(sys.argv[1])

store = SnapshotStore(open_backend(sys.argv[2]), "test", "separate")
with Filled(Redis()) as filled:
    warmer = warmer_of(filled, store, rate=500.0, target_hit_ratio=1.0)
    print("begins", flush=True)
    warmer.run()
"""


def test_a_killed_replay_hurts_nobody(
    filled_redis: RedisServer, snapshots: SnapshotStore, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/snapshots"
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(filled_redis.unix_socket), url],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "begins\n"
    time.sleep(0.5)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with Filled(filled_redis) as again:
        outcome = warmer_of(again, snapshots, rate=100_000.0, target_hit_ratio=1.0).run()
    assert outcome.state == "warmed"
