"""How a daemon process stops: by signals, under load, with a store that hangs, by an operator."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from cache_daemon.client import FeatureCacheError, Unavailable
from tests.daemon_process import ITEMS, KEYS, ONCE, Start, begin_reads, slow
from tests.servers import wait_until


def test_no_accepted_request_is_lost_by_sigterm_under_load(
    config: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    daemon = start(slow(config, tmp_path, 1.0))
    with daemon.client() as client:
        client.batch_put({"pin": (KEYS[:500], list(ITEMS.values())[:500])})

    # Readers that go on all the time, hits only, before and after the signal.
    others: list[Any] = []

    def load() -> None:
        with daemon.client(timeout=30, retry=ONCE) as client:
            try:
                while len(others) < 1_000_000:
                    others.append(client.batch_get({"pin": KEYS[:500]})["pin"].to_bytes())
            except FeatureCacheError as error:
                others.append(error)

    loaders = [threading.Thread(target=load) for _ in range(2)]
    for thread in loaders:
        thread.start()
    wait_until(lambda: len(others) > 10, what="hits")
    # And reads that wait for the store when the signal comes.
    accepted: list[Any] = []
    threads = begin_reads(daemon, 20, accepted)
    daemon.signal()
    assert daemon.wait() == 0, daemon.log
    for thread in [*threads, *loaders]:
        thread.join(30)

    assert sorted(accepted) == sorted([b"cold %d" % number] for number in range(20))
    replies = [other for other in others if isinstance(other, list)]
    refusals = [other for other in others if not isinstance(other, list)]
    assert all(reply == list(ITEMS.values())[:500] for reply in replies)
    assert [type(refusal) for refusal in refusals] == [Unavailable, Unavailable], refusals


def test_while_draining_it_says_so_and_refuses_new_calls(
    config: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    daemon = start(slow(config, tmp_path, 2.0))
    accepted: list[Any] = []
    threads = begin_reads(daemon, 1, accepted)
    with daemon.client(retry=ONCE) as client:
        client.batch_put({"pin": ([b"k"], [b"v"])})
        daemon.signal()
        wait_until(lambda: daemon.http("/readyz")[0] == 503, what="not ready")
        assert daemon.http("/healthz")[0] == 200

        def is_refused() -> bool:
            try:
                client.batch_get({"pin": [b"k"]})
            except FeatureCacheError:
                return True
            return False

        # It says that it drains a moment before it does.
        wait_until(is_refused, 1.0, "calls are refused")
    assert daemon.wait() == 0
    threads[0].join(10)
    assert accepted == [[b"cold 0"]]


def test_a_drain_takes_bounded_time(config: dict[str, Any], start: Start, tmp_path: Path) -> None:
    config["drain_timeout"] = "500ms"
    daemon = start(slow(config, tmp_path, 50.0))
    accepted: list[Any] = []
    threads = begin_reads(daemon, 2, accepted)
    started = time.monotonic()
    daemon.signal()
    assert daemon.wait() == 0, daemon.log
    assert time.monotonic() - started < 6  # the hanging store call did not hold it up
    for thread in threads:
        thread.join(10)
    assert accepted == [[None], [None]]  # late, but not without a reply
    assert "time is over" in daemon.log


def test_a_second_signal_stops_at_once(
    config: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    config["drain_timeout"] = "1m"
    daemon = start(slow(config, tmp_path, 50.0))
    threads = begin_reads(daemon, 1, [])
    daemon.signal()
    wait_until(lambda: "draining for at most 1m" in daemon.log)
    started = time.monotonic()
    daemon.signal(signal.SIGINT)
    assert daemon.wait() == 3, daemon.log
    assert time.monotonic() - started < 6
    for thread in threads:
        thread.join(10)


def test_an_operator_can_drain_it(config: dict[str, Any], start: Start) -> None:
    daemon = start(config)
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("cachectl")),
            *("drain", "--admin", daemon.addresses["admin"]),
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert daemon.wait() == 0
    assert "an operator asks for it" in daemon.log
