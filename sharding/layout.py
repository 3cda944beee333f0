"""What lies where in ZooKeeper, and how it is written: paths, and a codec for each kind of znode.

Small things that people read are JSON; what grows with shards or nodes is binary:

    0   4  magic: "FC", one letter for the kind, format version (1)
    4   8  XXH3-64 of all that follows, little-endian as every number here
    12  4  bytes of the payload before compression
    16  …  payload, zlib

Nobody writes a znode above `ZNODE_BYTES_MAX`, a quarter of what ZooKeeper takes. The map of shards
(`/view`) and the ideal state (`/ideal`) are cut into chunks of `CHUNK_SHARDS` shards and of
`CHUNK_NODES` nodes. Each chunk has two slots, `<n>a` and `<n>b`; a writer writes the one that the
head does not name, and the head last. So what a head names stays whole until the next head is
there, however many transactions that takes, and whether its writer lives to write it or not. A
chunk carries its version and is believed only when it is the one that the head names. Unchanged
chunks are neither written nor read again.

Every decoder raises `CorruptState` and nothing else, whatever the bytes are, and takes bounded
memory for them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ValidationError

from sharding._envelope import FORMAT, ZNODE_BYTES_MAX, Reader, open_sealed, seal
from sharding.errors import CorruptState
from sharding.model import (
    NODES_MAX,
    SHARDS_MAX,
    ClusterConfig,
    CurrentState,
    IdealState,
    Leaf,
    LiveNode,
    NodeOverride,
    ShardMap,
    Target,
)

__all__ = [
    "CHUNK_NODES",
    "CHUNK_SHARDS",
    "CONFIG",
    "CURRENT",
    "EPOCH",
    "FORMAT",
    "IDEAL",
    "LEADER",
    "LIVE",
    "NODES",
    "TARGET",
    "VIEW",
    "ZNODE_BYTES_MAX",
    "ChunkRef",
    "CorruptState",
    "Head",
    "NodesChunk",
    "ShardsChunk",
    "assemble_ideal",
    "assemble_view",
    "chunk_paths",
    "current_path",
    "decode_config",
    "decode_current",
    "decode_epoch",
    "decode_head",
    "decode_live",
    "decode_nodes_chunk",
    "decode_override",
    "decode_shards_chunk",
    "decode_target",
    "encode_config",
    "encode_current",
    "encode_epoch",
    "encode_ideal",
    "encode_live",
    "encode_override",
    "encode_target",
    "encode_view",
    "head_path",
    "live_path",
    "override_path",
    "target_path",
]

CHUNK_SHARDS = 1000
CHUNK_NODES = 400

CONFIG = "/config"
NODES = "/nodes"
LIVE = "/live"
CURRENT = "/current"
TARGET = "/target"
IDEAL = "/ideal"
VIEW = "/view"
LEADER = "/leader"
EPOCH = "/epoch"

_SLOTS = "ab"
_CURRENT, _TARGET, _HEAD, _NODES_CHUNK, _SHARDS_CHUNK = b"C", b"T", b"H", b"N", b"S"
_JSON_BYTES_MAX = 16 << 10

_VERSION = struct.Struct("<Q")
_CURRENT_HEADER = struct.Struct("<QHI")  # target version, bytes of the instance id, bits
_TARGET_HEADER = struct.Struct("<QI")  # version, bits
_HEAD_HEADER = struct.Struct("<QIHH")  # version, shards, node chunks, shard chunks
_NODES_HEADER = struct.Struct("<QHHI")  # version, chunk, nodes, bytes of text
_SHARDS_HEADER = struct.Struct("<QHHI")  # version, chunk, shards, replicas

_WORDS = 4  # of a node: name, address, zone, instance

_Model = TypeVar("_Model", bound=BaseModel)


def live_path(name: str) -> str:
    return f"{LIVE}/{name}"


def override_path(name: str) -> str:
    return f"{NODES}/{name}"


def current_path(name: str) -> str:
    return f"{CURRENT}/{name}"


def target_path(name: str) -> str:
    return f"{TARGET}/{name}"


def head_path(root: str) -> str:
    """The head below `VIEW` or `IDEAL`."""
    return f"{root}/head"


# ---- JSON ----------------------------------------------------------------------------------------


def encode_config(config: ClusterConfig) -> bytes:
    return _encode_json(config)


def decode_config(data: bytes) -> ClusterConfig:
    return _decode_json(ClusterConfig, CONFIG, data)


def encode_override(override: NodeOverride) -> bytes:
    return _encode_json(override)


def decode_override(path: str, data: bytes) -> NodeOverride:
    return _decode_json(NodeOverride, path, data)


def encode_live(node: LiveNode) -> bytes:
    return _encode_json(node)


def decode_live(path: str, data: bytes) -> LiveNode:
    """`path` ends in the node's name, which must be the one inside."""
    node = _decode_json(LiveNode, path, data)
    if not path.endswith(f"/{node.name}"):
        raise CorruptState(path, f"is the registration of {node.name}")
    return node


def encode_epoch(epoch: int) -> bytes:
    return b"%d" % epoch


def decode_epoch(data: bytes) -> int:
    """An empty znode is epoch 0: nobody has led yet."""
    if data and not (len(data) <= 18 and data.isdigit()):
        raise CorruptState(EPOCH, "is not a number")
    return int(data or b"0")


class _Format(BaseModel):
    format: int


def _encode_json(record: BaseModel) -> bytes:
    body = record.model_dump_json(indent=1).encode()
    return b'{\n "format": %d,' % FORMAT + body[1:] + b"\n"


def _decode_json(model: type[_Model], path: str, data: bytes) -> _Model:
    if len(data) > _JSON_BYTES_MAX:
        raise CorruptState(path, f"{len(data)} bytes; at most {_JSON_BYTES_MAX}")
    try:
        written = _Format.model_validate_json(data).format
        if written != FORMAT:
            raise CorruptState(path, f"format {written}; this release reads {FORMAT}")
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptState(path, f"{where}: {first['msg']}" if where else first["msg"]) from None


def _pack_bits(shards: npt.NDArray[np.uint32], count: int) -> bytes:
    bits = np.zeros(count, dtype=np.bool_)
    bits[shards] = True
    return np.packbits(bits, bitorder="little").tobytes()


# ---- current state and target of a node ----------------------------------------------------------


def encode_current(current: CurrentState) -> bytes:
    """Two bits a shard up to the highest: held, and online."""
    instance = current.instance_id.encode()
    count = int(current.shards[-1]) + 1 if len(current.shards) else 0
    return seal(
        _CURRENT,
        _CURRENT_HEADER.pack(current.target_version, len(instance), count)
        + instance
        + _pack_bits(current.shards, count)
        + _pack_bits(current.shards[current.states == 1], count),
    )


def decode_current(path: str, data: bytes) -> CurrentState:
    reader = Reader(path, open_sealed(_CURRENT, path, data))
    target_version, instance_bytes, count = reader.header(_CURRENT_HEADER)
    _check_bits(reader, count)
    instance = _text(reader, instance_bytes)
    held, online = reader.bits(count), reader.bits(count)
    reader.end()
    if bool((online & ~held).any()):
        raise reader.fail("a shard is online that is not held")
    shards = np.flatnonzero(held).astype(np.uint32)
    return CurrentState(instance, target_version, shards, online[shards].astype(np.uint8))


def encode_target(target: Target) -> bytes:
    count = int(target.shards[-1]) + 1 if len(target.shards) else 0
    header = _TARGET_HEADER.pack(target.version, count)
    return seal(_TARGET, header + _pack_bits(target.shards, count))


def decode_target(path: str, data: bytes) -> Target:
    """Shards may lie beyond the cluster's shard_count: that is for the caller to see."""
    reader = Reader(path, open_sealed(_TARGET, path, data))
    version, count = reader.header(_TARGET_HEADER)
    _check_bits(reader, count)
    shards = np.flatnonzero(reader.bits(count)).astype(np.uint32)
    reader.end()
    return Target(version, shards)


def _check_bits(reader: Reader, count: int) -> None:
    if count > SHARDS_MAX:
        raise reader.fail(f"{count} shards; at most {SHARDS_MAX}")


def _text(reader: Reader, size: int) -> str:
    try:
        return reader.take(size).decode()
    except UnicodeDecodeError:
        raise reader.fail("text that is not UTF-8") from None


# ---- view and ideal state: a head, chunks of nodes, chunks of shards -----------------------------


@dataclass(frozen=True)
class ChunkRef:
    """Which chunk a head believes."""

    version: int
    slot: int  # 0 or 1: `<n>a` or `<n>b`


@dataclass(frozen=True)
class Head:
    version: int
    shard_count: int
    nodes: tuple[ChunkRef, ...]
    shards: tuple[ChunkRef, ...]


@dataclass(frozen=True)
class NodesChunk:
    version: int
    index: int
    nodes: tuple[Leaf, ...]  # of an ideal state: names alone


@dataclass(frozen=True)
class ShardsChunk:
    version: int
    index: int
    counts: npt.NDArray[np.uint8]  # replicas of each shard
    node: npt.NDArray[np.uint16]
    state: npt.NDArray[np.uint8]  # of an ideal state: zeros


def chunk_paths(root: str, head: Head) -> tuple[list[str], list[str]]:
    """Where the chunks of nodes and of shards lie that a head below `root` names."""
    return (
        [_chunk_path(root, "nodes", i, ref.slot) for i, ref in enumerate(head.nodes)],
        [_chunk_path(root, "chunks", i, ref.slot) for i, ref in enumerate(head.shards)],
    )


def _chunk_path(root: str, kind: str, index: int, slot: int) -> str:
    return f"{root}/{kind}/{index}{_SLOTS[slot]}"


def encode_view(
    view: ShardMap, before: tuple[Head, ShardMap | None] | None
) -> tuple[Head, list[tuple[str, bytes]]]:
    """The new head, and what to write where: the changed chunks in any order, then the head.

    `before` is what ZooKeeper holds now: its head (None: there is none), and the map of it (None:
    unreadable, so all is written again). ValueError unless the version rises.
    """
    old_head, old = before or (None, None)
    return _encode(
        VIEW,
        _Tables(view.version, view.leaves, view.first, view.leaf, view.state),
        old_head,
        _Tables(old.version, old.leaves, old.first, old.leaf, old.state) if old else None,
    )


def encode_ideal(
    ideal: IdealState, before: tuple[Head, IdealState | None] | None
) -> tuple[Head, list[tuple[str, bytes]]]:
    """As `encode_view`."""
    old_head, old = before or (None, None)
    return _encode(IDEAL, _tables_of(ideal), old_head, _tables_of(old) if old else None)


def _tables_of(ideal: IdealState) -> _Tables:
    nodes = tuple(Leaf(name, "", "") for name in ideal.nodes)
    states = np.zeros(len(ideal.replicas), dtype=np.uint8)
    return _Tables(ideal.version, nodes, ideal.first, ideal.replicas, states)


def decode_head(path: str, data: bytes) -> Head:
    reader = Reader(path, open_sealed(_HEAD, path, data))
    version, shard_count, node_chunks, shard_chunks = reader.header(_HEAD_HEADER)
    if shard_count > SHARDS_MAX or shard_chunks != _chunks(shard_count, CHUNK_SHARDS):
        raise reader.fail(f"{shard_count} shards in {shard_chunks} chunks")
    if node_chunks > _chunks(NODES_MAX, CHUNK_NODES):
        raise reader.fail(f"{node_chunks} chunks of nodes")
    count = node_chunks + shard_chunks
    versions = reader.array("<u8", count).tolist()
    slots = reader.array("u1", count).tolist()
    reader.end()
    if count and (max(slots) > 1 or max(versions) > version):
        raise reader.fail("names a chunk that there cannot be")
    refs = [ChunkRef(*ref) for ref in zip(versions, slots, strict=True)]
    return Head(version, shard_count, tuple(refs[:node_chunks]), tuple(refs[node_chunks:]))


def decode_nodes_chunk(path: str, data: bytes) -> NodesChunk:
    reader = Reader(path, open_sealed(_NODES_CHUNK, path, data))
    version, index, count, size = reader.header(_NODES_HEADER)
    if count > CHUNK_NODES:
        raise reader.fail(f"{count} nodes; at most {CHUNK_NODES}")
    text = _text(reader, size)
    reader.end()
    # None of them has a control character.
    words = text.split("\n") if count else []
    if len(words) != _WORDS * count:
        raise reader.fail(f"{len(words)} words for {count} nodes")
    rows = (words[at : at + _WORDS] for at in range(0, len(words), _WORDS))
    return NodesChunk(version, index, tuple(Leaf(*row) for row in rows))


def decode_shards_chunk(path: str, data: bytes) -> ShardsChunk:
    reader = Reader(path, open_sealed(_SHARDS_CHUNK, path, data))
    version, index, count, entries = reader.header(_SHARDS_HEADER)
    if count > CHUNK_SHARDS:
        raise reader.fail(f"{count} shards; at most {CHUNK_SHARDS}")
    counts = reader.array("u1", count).astype(np.uint8)
    if int(counts.sum(dtype=np.int64)) != entries:
        raise reader.fail("counts and replicas differ")
    # The low bytes of all, then the high ones: the latter compress to next to nothing.
    low, high = reader.array("u1", entries), reader.array("u1", entries)
    node = low.astype(np.uint16) | (high.astype(np.uint16) << np.uint16(8))
    state = reader.array("u1", entries).astype(np.uint8)
    reader.end()
    return ShardsChunk(version, index, counts, node, state)


def assemble_view(
    head: Head, nodes: Sequence[NodesChunk], shards: Sequence[ShardsChunk]
) -> ShardMap | None:
    """The map of a head and its chunks; None when a chunk is not the one that the head names.

    None means that the head was read too early or too late: read it again. CorruptState when the
    parts are the right ones and contradict each other.
    """
    if not _named(head, nodes, shards):
        return None
    leaves, first, leaf, state = _join(VIEW, head, nodes, shards)
    try:
        return ShardMap(head.version, leaves, first, leaf, state)
    except ValueError as error:
        raise CorruptState(head_path(VIEW), str(error)) from None


def assemble_ideal(
    head: Head, nodes: Sequence[NodesChunk], shards: Sequence[ShardsChunk]
) -> IdealState | None:
    """As `assemble_view`."""
    if not _named(head, nodes, shards):
        return None
    leaves, first, replicas, _ = _join(IDEAL, head, nodes, shards)
    try:
        return IdealState(head.version, tuple(node.name for node in leaves), first, replicas)
    except ValueError as error:
        raise CorruptState(head_path(IDEAL), str(error)) from None


def _named(head: Head, nodes: Sequence[NodesChunk], shards: Sequence[ShardsChunk]) -> bool:
    return [(i, ref.version) for i, ref in enumerate(head.nodes)] == [
        (chunk.index, chunk.version) for chunk in nodes
    ] and [(i, ref.version) for i, ref in enumerate(head.shards)] == [
        (chunk.index, chunk.version) for chunk in shards
    ]


def _join(
    root: str, head: Head, nodes: Sequence[NodesChunk], shards: Sequence[ShardsChunk]
) -> tuple[tuple[Leaf, ...], npt.NDArray[np.uint32], npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
    counts = np.concatenate([np.zeros(0, np.uint8), *(chunk.counts for chunk in shards)])
    if len(counts) != head.shard_count:
        raise CorruptState(
            head_path(root), f"{head.shard_count} shards, and {len(counts)} in its chunks"
        )
    first = np.zeros(len(counts) + 1, dtype=np.uint32)
    np.cumsum(counts, out=first[1:], dtype=np.uint32)
    node = np.concatenate([np.zeros(0, np.uint16), *(chunk.node for chunk in shards)])
    state = np.concatenate([np.zeros(0, np.uint8), *(chunk.state for chunk in shards)])
    leaves = tuple(leaf for chunk in nodes for leaf in chunk.nodes)
    return leaves, first, node.astype(np.uint32), state


@dataclass(frozen=True)
class _Tables:
    """What view and ideal state have in common."""

    version: int
    nodes: tuple[Leaf, ...]
    first: npt.NDArray[np.uint32]
    node: npt.NDArray[np.uint32]
    state: npt.NDArray[np.uint8]

    @property
    def shard_count(self) -> int:
        return len(self.first) - 1

    def node_chunk(self, index: int) -> tuple[Leaf, ...]:
        return self.nodes[index * CHUNK_NODES : (index + 1) * CHUNK_NODES]

    def shard_chunk(self, index: int) -> tuple[bytes, bytes, bytes, bytes]:
        """Counts, low and high bytes of the nodes, states."""
        first = self.first[index * CHUNK_SHARDS : (index + 1) * CHUNK_SHARDS + 1]
        entries = slice(int(first[0]), int(first[-1]))
        node = self.node[entries]
        return (
            np.diff(first).astype(np.uint8).tobytes(),
            (node & 0xFF).astype(np.uint8).tobytes(),
            (node >> 8).astype(np.uint8).tobytes(),
            self.state[entries].tobytes(),
        )


def _encode(
    root: str, new: _Tables, old_head: Head | None, old: _Tables | None
) -> tuple[Head, list[tuple[str, bytes]]]:
    if old_head is not None and new.version <= old_head.version:
        raise ValueError(f"version {new.version} after {old_head.version}")
    writes: list[tuple[str, bytes]] = []
    old_nodes = old_head.nodes if old_head else ()
    old_shards = old_head.shards if old_head else ()

    def reference(kind: str, index: int, old_refs: tuple[ChunkRef, ...], data: bytes) -> ChunkRef:
        slot = 1 - old_refs[index].slot if index < len(old_refs) else 0
        writes.append((_chunk_path(root, kind, index, slot), data))
        return ChunkRef(new.version, slot)

    nodes = []
    for index in range(_chunks(len(new.nodes), CHUNK_NODES)):
        part = new.node_chunk(index)
        if old is not None and index < len(old_nodes) and part == old.node_chunk(index):
            nodes.append(old_nodes[index])
        else:
            data = _encode_nodes_chunk(new.version, index, part)
            nodes.append(reference("nodes", index, old_nodes, data))
    shards = []
    for index in range(_chunks(new.shard_count, CHUNK_SHARDS)):
        tables = new.shard_chunk(index)
        if old is not None and index < len(old_shards) and tables == old.shard_chunk(index):
            shards.append(old_shards[index])
        else:
            header = _SHARDS_HEADER.pack(new.version, index, len(tables[0]), len(tables[1]))
            data = seal(_SHARDS_CHUNK, header + b"".join(tables))
            shards.append(reference("chunks", index, old_shards, data))
    head = Head(new.version, new.shard_count, tuple(nodes), tuple(shards))
    return head, [*writes, (head_path(root), _encode_head(head))]


def _encode_head(head: Head) -> bytes:
    refs = head.nodes + head.shards
    return seal(
        _HEAD,
        _HEAD_HEADER.pack(head.version, head.shard_count, len(head.nodes), len(head.shards))
        + np.array([ref.version for ref in refs], dtype="<u8").tobytes()
        + bytes(ref.slot for ref in refs),
    )


def _encode_nodes_chunk(version: int, index: int, nodes: Sequence[Leaf]) -> bytes:
    rows = ((node.name, node.address, node.zone, node.instance) for node in nodes)
    text = "\n".join(word for row in rows for word in row).encode()
    if text.count(b"\n") != max(_WORDS * len(nodes) - 1, 0):
        raise ValueError("a name, address, zone or instance with a line break")
    header = _NODES_HEADER.pack(version, index, len(nodes), len(text))
    return seal(_NODES_CHUNK, header + text)


def _chunks(count: int, size: int) -> int:
    return (count + size - 1) // size
