"""Values that say which write they come from, so that no other can be taken for them."""

import hashlib
import struct

__all__ = ["make_value", "origin"]

_HEAD = struct.Struct("<8sQII")  # digest of the key, number of the write, size, checksum of those
_LEAST_SAID = 2 * _HEAD.size  # shorter ones are all digest: what they are must be asked


def make_value(key: bytes, number: int, size: int) -> bytes:
    """The value of `size` bytes that write `number` puts for `key`."""
    seed = b"%d %d %b" % (number, size, key)
    if size < _LEAST_SAID:
        return hashlib.shake_128(seed).digest(size)
    head = _head(key, number, size)
    return head + hashlib.shake_128(seed).digest(size - len(head))


def origin(key: bytes, value: bytes) -> str:
    """What a value that should not be there seems to be."""
    if len(value) < _LEAST_SAID:
        return f"{len(value)} bytes of no write of this key: {value[:16].hex()}"
    digest, number, size, _ = _HEAD.unpack_from(value)
    whose = "this key" if digest == _digest(key) else "another key"
    if value[: _HEAD.size] != _HEAD.pack(digest, number, size, _checksum(digest, number, size)):
        return f"{len(value)} bytes whose head is garbled: {value[:32].hex()}"
    if digest != _digest(key):
        return f"the value of {whose}, write {number}, {size} bytes"
    right = make_value(key, number, size)
    if value == right:
        return f"the value of {whose}, write {number}, whole"
    wrong = [i for i, (a, b) in enumerate(zip(value, right, strict=False)) if a != b]
    where = f"{len(wrong)} bytes differ from place {wrong[0]} on" if wrong else "only its length is"
    return f"the value of {whose}, write {number}, {size} bytes, damaged: {where}"


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=8).digest()


def _checksum(digest: bytes, number: int, size: int) -> int:
    text = b"%b %d %d" % (digest, number, size)
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


def _head(key: bytes, number: int, size: int) -> bytes:
    digest = _digest(key)
    return _HEAD.pack(digest, number, size, _checksum(digest, number, size))
