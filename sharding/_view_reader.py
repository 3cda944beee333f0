"""Reads the external view, and of it only what changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from sharding import layout
from sharding.connection import Connection, Watch
from sharding.errors import CorruptState
from sharding.layout import ChunkRef, Head, NodesChunk, ShardsChunk
from sharding.model import IdealState, ShardMap

# A head may be replaced while its chunks are read; each time that costs one more round.
_ATTEMPTS_MAX = 5

_Chunk = TypeVar("_Chunk", NodesChunk, ShardsChunk)


def read_ideal(connection: Connection) -> IdealState | None:
    """The ideal state, None before there is one. Raises `CorruptState`."""
    head_path = layout.head_path(layout.IDEAL)
    for _ in range(_ATTEMPTS_MAX):
        znode = connection.get(head_path)
        if znode is None:
            return None
        head = layout.decode_head(head_path, znode.data)
        node_paths, shard_paths = layout.chunk_paths(layout.IDEAL, head)
        paths = [*node_paths, *shard_paths]
        znodes = connection.get_many(paths)
        read = [
            (path, znode.data)
            for path, znode in zip(paths, znodes, strict=True)
            if znode is not None
        ]
        if len(read) == len(paths):
            found = layout.assemble_ideal(
                head,
                [layout.decode_nodes_chunk(*one) for one in read[: len(node_paths)]],
                [layout.decode_shards_chunk(*one) for one in read[len(node_paths) :]],
            )
            if found is not None:
                return found
    raise CorruptState(head_path, f"its chunks were not there {_ATTEMPTS_MAX} times")


class ViewReader:
    """The newest view that could be read. For one thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._nodes: dict[int, tuple[ChunkRef, NodesChunk]] = {}
        self._shards: dict[int, tuple[ChunkRef, ShardsChunk]] = {}
        self.map: ShardMap | None = None
        self.chunks_read = 0  # ever

    def read(self, watch: Watch | None) -> ShardMap | None:
        """The newest map, None before there is one; `watch` waits for the next.

        Raises `Disconnected`, and `CorruptState` for a view that cannot be believed; `map` is then
        the last good one, and stays.
        """
        head_path = layout.head_path(layout.VIEW)
        for _ in range(_ATTEMPTS_MAX):
            znode = self._connection.get(head_path, watch)
            if znode is None:
                if self.map is not None:
                    raise CorruptState(head_path, "is gone")
                return None
            head = layout.decode_head(head_path, znode.data)
            if self.map is not None:
                if head.version == self.map.version:
                    return self.map
                if head.version < self.map.version:
                    raise CorruptState(
                        head_path, f"went back from version {self.map.version} to {head.version}"
                    )
            found = self._assemble(head)
            if found is not None:
                self.map = found
                return found
        raise CorruptState(head_path, f"its chunks were not there {_ATTEMPTS_MAX} times")

    def _assemble(self, head: Head) -> ShardMap | None:
        node_paths, shard_paths = layout.chunk_paths(layout.VIEW, head)
        nodes = self._chunks(head.nodes, node_paths, self._nodes, layout.decode_nodes_chunk)
        if nodes is None:
            return None
        shards = self._chunks(head.shards, shard_paths, self._shards, layout.decode_shards_chunk)
        if shards is None:
            return None
        return layout.assemble_view(head, nodes, shards)

    def _chunks(
        self,
        refs: Sequence[ChunkRef],
        paths: Sequence[str],
        known: dict[int, tuple[ChunkRef, _Chunk]],
        decode: Callable[[str, bytes], _Chunk],
    ) -> list[_Chunk] | None:
        """All of them, from ZooKeeper only those that are not known; None when one is not there."""
        wanted = [
            index for index, ref in enumerate(refs) if index not in known or known[index][0] != ref
        ]
        znodes = self._connection.get_many([paths[index] for index in wanted])
        for index, znode in zip(wanted, znodes, strict=True):
            if znode is None:
                return None
            chunk = decode(paths[index], znode.data)
            self.chunks_read += 1
            if chunk.index != index or chunk.version != refs[index].version:
                return None
            known[index] = (refs[index], chunk)
        return [known[index][1] for index in range(len(refs))]
