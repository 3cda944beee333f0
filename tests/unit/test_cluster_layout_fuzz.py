"""Whatever lies in a znode, a decoder answers with a value or with `CorruptState`."""

import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import xxhash

from sharding import layout
from sharding.errors import CorruptState
from sharding.model import (
    ClusterConfig,
    CurrentState,
    Leaf,
    LiveNode,
    NodeOverride,
    ShardMap,
    Target,
    shards_array,
)

Decoder = Callable[[bytes], object]

SHARDS = shards_array([1, 5, 900, 4095])
VIEW = ShardMap(
    9,
    tuple(Leaf(f"leaf-{i}", f"h{i}:1", "z") for i in range(9)),
    2 * np.arange(1501, dtype=np.uint32),
    np.tile(np.array([1, 2, 8, 0], np.uint32), 750),
    np.tile(np.array([1, 0, 1], np.uint8), 1000),
)
WRITES = dict(layout.encode_view(VIEW, None)[1])
LIVE = LiveNode(name="x", address="h:1", zone="z", cluster="c", instance_id="i")

DECODERS: dict[str, tuple[Decoder, bytes]] = {
    "config": (
        layout.decode_config,
        layout.encode_config(ClusterConfig(cluster="c", shard_count=9)),
    ),
    "live": (lambda data: layout.decode_live("/live/x", data), layout.encode_live(LIVE)),
    "override": (
        lambda data: layout.decode_override("/nodes/x", data),
        layout.encode_override(NodeOverride(weight=2)),
    ),
    "epoch": (layout.decode_epoch, layout.encode_epoch(12)),
    "current": (
        lambda data: layout.decode_current("/current/x", data),
        layout.encode_current(CurrentState("id", 3, SHARDS, np.array([0, 1, 1, 0], np.uint8))),
    ),
    "target": (
        lambda data: layout.decode_target("/target/x", data),
        layout.encode_target(Target(4, SHARDS)),
    ),
    "head": (lambda data: layout.decode_head("/view/head", data), WRITES["/view/head"]),
    "nodes": (lambda data: layout.decode_nodes_chunk("/n", data), WRITES["/view/nodes/0a"]),
    "shards": (lambda data: layout.decode_shards_chunk("/s", data), WRITES["/view/chunks/1a"]),
}
BINARY = sorted(set(DECODERS) - {"config", "live", "override", "epoch"})


def seal(kind: bytes, payload: bytes, size: int | None = None, level: int = 6) -> bytes:
    """An envelope that is right, whatever is in it."""
    body = struct.pack("<I", len(payload) if size is None else size) + zlib.compress(payload, level)
    return b"FC" + kind + b"\x01" + struct.pack("<Q", xxhash.xxh3_64_intdigest(body)) + body


def survives(decode: Decoder, data: bytes) -> bool:
    """Whether the decoder believed it; anything but CorruptState ends the test."""
    try:
        decode(data)
    except CorruptState as error:
        return not error.why
    return True


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_damaged_bytes(name: str) -> None:
    decode, good = DECODERS[name]
    assert survives(decode, good)
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    believed = 0
    for _ in range(3000):
        data = bytearray(good)
        kind = rng.randrange(4)
        if kind == 0:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[rng.randrange(len(data)) :]
        elif kind == 2:
            data = bytearray(rng.randbytes(rng.randrange(300)))
        else:
            at = rng.randrange(len(data))
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        believed += survives(decode, bytes(data)) and bytes(data) != good
    # A checksum stands before what is binary; a flip within a JSON string is another string.
    assert name not in BINARY or believed == 0, f"seed {seed}"


@pytest.mark.parametrize("name", BINARY)
def test_payloads_that_lie_behind_a_right_checksum(name: str) -> None:
    decode, good = DECODERS[name]
    kind, payload = good[2:3], zlib.decompress(good[16:])
    assert seal(kind, payload) == good
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(3000):
        data = bytearray(payload)
        for _ in range(rng.randrange(1, 4)):
            # Most of what can go wrong is in the numbers at the front.
            at = rng.randrange(min(len(data), 24) if rng.random() < 0.7 else len(data))
            data[at] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        survives(decode, seal(kind, bytes(data)))


@pytest.mark.parametrize("name", BINARY)
def test_a_bomb_is_refused_in_bounded_memory(name: str) -> None:
    decode, good = DECODERS[name]
    bomb = zlib.compress(bytes(200 << 20), 9)
    tracemalloc.start()
    try:
        for size in (1, 1 << 20, (1 << 20) + 1, 200 << 20, (1 << 32) - 1):
            body = struct.pack("<I", size) + bomb
            head = good[:4] + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))
            with pytest.raises(CorruptState):
                decode(head + body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_a_newer_format_says_so() -> None:
    decode, good = DECODERS["target"]
    with pytest.raises(CorruptState, match="format 2; this release reads 1"):
        decode(good[:3] + b"\x02" + good[4:])


def test_chunks_that_contradict_their_head() -> None:
    head = layout.decode_head("/view/head", WRITES["/view/head"])
    nodes = [layout.decode_nodes_chunk("/n", WRITES["/view/nodes/0a"])]
    shards = [
        layout.decode_shards_chunk("/s", WRITES[f"/view/chunks/{index}a"]) for index in (0, 1)
    ]
    assert layout.assemble_view(head, nodes, shards) == VIEW
    assert layout.assemble_view(head, nodes, shards[:1]) is None
    assert layout.assemble_view(head, nodes, shards[::-1]) is None
    few = [layout.NodesChunk(9, 0, nodes[0].nodes[:8])]
    with pytest.raises(CorruptState, match="leaf 8 of 8"):
        layout.assemble_view(head, few, shards)
    twice = [layout.NodesChunk(9, 0, nodes[0].nodes[:8] + nodes[0].nodes[:1])]
    with pytest.raises(CorruptState, match="two leaves of one name"):
        layout.assemble_view(head, twice, shards)
