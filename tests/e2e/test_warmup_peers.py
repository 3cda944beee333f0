"""A new daemon takes the items of a warm one: all, those that live long, or none. Real daemons."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.warmup_daemons import KEYS, Fleet


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path, f"file://{tmp_path}/snapshots") as fleet:
        yield fleet


def test_a_node_is_filled_by_its_peer(fleet: Fleet) -> None:
    peer = fleet.node("peer", plan="none", snapshots=None, ttl="1h").start()
    peer.ask()
    node = fleet.node(
        "new", plan="peer_copy", peers=[peer.target], snapshots=None, ttl="1h"
    ).start()
    assert node.warmup.state == "warmed", node.daemon.log
    assert node.warmup.items_copied >= 0.95 * len(KEYS)
    assert node.warmup.keys_fetched == 0
    assert node.hits() >= 0.95
    node.ask()


def test_what_a_peer_has_is_copied_and_the_rest_replayed(fleet: Fleet) -> None:
    recorder = fleet.recorder(ttl="1h").start()
    fleet.record(recorder)
    node = fleet.node("new", peers=[recorder.target], ttl="1h").start()
    assert node.warmup.state == "warmed", node.daemon.log
    assert node.warmup.items_copied > 0
    assert node.hits() >= 0.95
    # Without it, all is replayed.
    recorder.kill()
    alone = fleet.node("alone", peers=[recorder.target], ttl="1h").start()
    assert alone.warmup.state == "warmed", alone.daemon.log
    assert alone.warmup.items_copied == 0
    assert alone.hits() >= 0.95


def test_a_node_that_gives_no_copies_refuses(fleet: Fleet) -> None:
    peer = fleet.node("peer", plan="none", snapshots=None, peer_copy={"serve_rate": 0}).start()
    peer.ask()
    node = fleet.node(
        "new", plan="peer_copy", peers=[peer.target], snapshots=None, max_duration="5s"
    ).start()
    assert node.warmup.state == "failed"
    assert node.hits() == 0
