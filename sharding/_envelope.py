"""The envelope of binary znodes: magic, checksum, compression. `sharding.layout` describes it."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt
import xxhash

from sharding.errors import CorruptState

FORMAT = 1
ZNODE_BYTES_MAX = 256 << 10

_ENVELOPE = struct.Struct("<4sQI")
_MAGIC = b"FC"
# Before compression. The largest is a chunk of shards with all the replicas that it may have.
_PAYLOAD_BYTES_MAX = 1 << 20


def seal(kind: bytes, payload: bytes) -> bytes:
    if len(payload) > _PAYLOAD_BYTES_MAX:
        raise ValueError(f"a payload of {len(payload)} bytes; at most {_PAYLOAD_BYTES_MAX}")
    body = struct.pack("<I", len(payload)) + zlib.compress(payload, 6)
    data = (
        _MAGIC + kind + bytes([FORMAT]) + struct.pack("<Q", xxhash.xxh3_64_intdigest(body)) + body
    )
    if len(data) > ZNODE_BYTES_MAX:
        raise ValueError(f"a znode of {len(data)} bytes; at most {ZNODE_BYTES_MAX}")
    return data


def open_sealed(kind: bytes, path: str, data: bytes) -> bytes:
    """The payload; CorruptState unless it is one that `seal` made."""
    if len(data) < _ENVELOPE.size or data[:2] != _MAGIC:
        raise CorruptState(path, f"{len(data)} bytes that this software did not write")
    if data[3] != FORMAT:
        raise CorruptState(path, f"format {data[3]}; this release reads {FORMAT}")
    if data[2:3] != kind:
        raise CorruptState(path, f"holds another kind of state ({data[2:3]!r})")
    _, checksum, size = _ENVELOPE.unpack_from(data)
    if xxhash.xxh3_64_intdigest(data[12:]) != checksum:
        raise CorruptState(path, "bad checksum")
    if size > _PAYLOAD_BYTES_MAX:
        raise CorruptState(path, f"a payload of {size} bytes; at most {_PAYLOAD_BYTES_MAX}")
    unpacker = zlib.decompressobj()
    try:
        # The limit is what keeps a few bytes from becoming gigabytes; one more shows a longer one.
        payload = unpacker.decompress(data[_ENVELOPE.size :], size + 1)
    except zlib.error as error:
        raise CorruptState(path, f"does not decompress: {error}") from None
    if len(payload) != size or not unpacker.eof or unpacker.unused_data:
        raise CorruptState(path, "the payload is shorter or longer than it says")
    return payload


class Reader:
    """Takes a payload apart; every short read is a CorruptState."""

    def __init__(self, path: str, payload: bytes) -> None:
        self._path = path
        self._payload = payload
        self._at = 0

    def header(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.take(layout.size))

    def take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._payload):
            raise CorruptState(self._path, "ends early")
        taken = self._payload[self._at : end]
        self._at = end
        return taken

    def array(self, dtype: str, count: int) -> npt.NDArray[np.generic]:
        kind = np.dtype(dtype)
        return np.frombuffer(self.take(kind.itemsize * count), dtype=kind)

    def bits(self, count: int) -> npt.NDArray[np.bool_]:
        packed = np.frombuffer(self.take((count + 7) // 8), dtype=np.uint8)
        return np.unpackbits(packed, count=count, bitorder="little").astype(np.bool_)

    def end(self) -> None:
        if self._at != len(self._payload):
            raise CorruptState(self._path, "holds more than it says")

    def fail(self, why: str) -> CorruptState:
        return CorruptState(self._path, why)
