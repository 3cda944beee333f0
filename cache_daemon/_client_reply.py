"""Replies as a caller reads them: columns that become arrays without a loop over keys."""

import enum
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from cache_daemon import _native
from cache_daemon._client_errors import InvalidRequest, ServerFault

__all__ = ["Column", "Reply", "Status", "WriteReply", "WriteStatus"]


class Status(enum.IntEnum):
    """What became of one key of a read: where its value came from, or why there is none."""

    UNSPECIFIED = 0
    HIT_DRAM = 1
    HIT_NVM = 2
    FETCHED = 3
    SPECULATIVE = 4
    NOT_FOUND = 5
    MISS = 6
    TIMED_OUT = 7
    THROTTLED = 8
    WRONG_SHARD = 9
    ERROR = 10


class WriteStatus(enum.IntEnum):
    """What became of one key of a write."""

    UNSPECIFIED = 0
    STORED = 1
    PARTIAL = 2
    REJECTED = 3
    ERROR = 4


class Column:
    """The values of one namespace, in the order of the keys that were asked.

    Arrays are read-only views into the reply: they cost nothing and keep it alive. Copy them to
    write to them.
    """

    def __init__(self, reply: _native.Reply, index: int, namespace: str) -> None:
        self.namespace = namespace
        self.statuses: npt.NDArray[np.uint8] = reply.statuses(index)
        """Shape (keys,): one `Status` a key."""
        self._reply = reply
        self._index = index

    def __len__(self) -> int:
        return self.statuses.size

    def __repr__(self) -> str:
        return f"<Column {self.namespace}: {len(self)} keys, {self.found.sum()} values>"

    @property
    def found(self) -> npt.NDArray[np.bool_]:
        """Shape (keys,): true where there is a value."""
        # Unsigned wrap-around makes one comparison of 1 <= status <= 4.
        return self.statuses - np.uint8(Status.HIT_DRAM) < Status.SPECULATIVE

    @property
    def lengths(self) -> npt.NDArray[np.uint32]:
        """Shape (keys,): bytes of each value, 0 where there is none."""
        return self._reply.value_lengths(self._index)

    @property
    def values(self) -> npt.NDArray[np.uint8]:
        """Shape (sum of lengths,): all values, one after the other."""
        return self._reply.values(self._index)

    @property
    def hits(self) -> int:
        """How many values the cache had, in DRAM or on NVM."""
        return int(np.count_nonzero(self.statuses - np.uint8(Status.HIT_DRAM) < Status.HIT_NVM))

    @property
    def hit_ratio(self) -> float:
        """Share of the keys whose value the cache had; 0 for no keys."""
        return self.hits / len(self) if len(self) else 0.0

    def to_bytes(self) -> list[bytes | None]:
        """One `bytes` a key, None where there is no value: a copy and an object each."""
        return self._reply.as_bytes(self._index)

    def to_numpy(
        self, dtype: npt.DTypeLike, dim: int | None = None
    ) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.bool_]]:
        """The values as one array, and which of its rows are values.

        With `dim`, each value is `dim` numbers and the array has the shape (keys, dim); without, it
        is one number and the shape is (keys,). Rows without a value, or with a value of another
        size, are zero and false in the mask, shape (keys,).

        When every key has a value of that size, the array is a read-only view into the reply and
        nothing is copied. Raises InvalidRequest when there are values but none has that size.
        """
        number = np.dtype(dtype)
        if number.hasobject or number.itemsize == 0 or (dim is not None and dim < 1):
            raise InvalidRequest(f"cannot read values as {dim or 1} numbers of type {number}")
        row_bytes = number.itemsize * (dim or 1)
        shape = (len(self),) if dim is None else (len(self), dim)
        lengths = self.lengths
        if self.values.size == len(self) * row_bytes and (lengths == row_bytes).all():
            array = self.values.view(number).reshape(shape)
            if array.flags.aligned:
                return array, np.ones(len(self), np.bool_)
        rows = np.empty((len(self), row_bytes), np.uint8)
        valid = np.empty(len(self), np.bool_)
        self._reply.gather(self._index, rows, valid)
        if not valid.any() and (found := self.found).any():
            size = int(lengths[found][0])
            raise InvalidRequest(
                f"{self.namespace}: values have {size} bytes, not the {row_bytes} of "
                f"{dim or 1} x {number}; check dtype and dim"
            )
        return rows.view(number).reshape(shape), valid


class Reply(Mapping[str, Column]):
    """The columns of one `batch_get` by namespace."""

    def __init__(self, reply: _native.Reply, key_counts: Mapping[str, int]) -> None:
        """Raises ServerFault when the reply does not answer the keys that were asked."""
        if reply.columns != len(key_counts):
            raise ServerFault(f"the reply has {reply.columns} columns for {len(key_counts)}")
        self._columns = {name: Column(reply, i, name) for i, name in enumerate(key_counts)}
        for name, keys in key_counts.items():
            if len(self._columns[name]) != keys:
                answered = len(self._columns[name])
                raise ServerFault(f"the reply answers {answered} of {keys} keys of {name}")

    def __getitem__(self, namespace: str) -> Column:
        return self._columns[namespace]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __repr__(self) -> str:
        return f"<Reply {list(self._columns.values())}>"

    @property
    def hit_ratio(self) -> float:
        """Share of all keys whose value the cache had; 0 for no keys."""
        keys = sum(len(column) for column in self._columns.values())
        return sum(column.hits for column in self._columns.values()) / keys if keys else 0.0


class WriteReply(Mapping[str, npt.NDArray[np.uint8]]):
    """What became of a write: by namespace one `WriteStatus` a key, shape (keys,)."""

    def __init__(self, reply: _native.WriteReply, key_counts: Mapping[str, int]) -> None:
        """Raises ServerFault when the reply does not answer the keys that were written."""
        if reply.columns != len(key_counts):
            raise ServerFault(f"the reply has {reply.columns} columns for {len(key_counts)}")
        self._columns = {name: reply.statuses(i) for i, name in enumerate(key_counts)}
        for name, keys in key_counts.items():
            if self._columns[name].size != keys:
                answered = self._columns[name].size
                raise ServerFault(f"the reply answers {answered} of {keys} keys of {name}")

    def __getitem__(self, namespace: str) -> npt.NDArray[np.uint8]:
        return self._columns[namespace]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    @property
    def all_stored(self) -> bool:
        """Whether every key was written everywhere (or, for a delete, is gone)."""
        return all(bool((s == WriteStatus.STORED).all()) for s in self._columns.values())
