"""What a cache may answer, given what it acknowledged.

Every write has a time at which it began and one at which it was acknowledged. A write took effect
at some moment in between; one that was never acknowledged did so until the daemon's end, or never.
So of a key's writes those are possible at a read that began before the read ended and that no
acknowledged write followed for certain: one that began after their end and ended before the read
began. A read may show any possible write, and nothing else:

- the value of a possible put that has not expired for certain;
- nothing, when a delete, a flush or an expired put is possible, or where the cache may evict.

Several clients may write one key at once. Times are those of one clock that does not stop.
"""

import math
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.torture.values import make_value, origin

__all__ = ["CLOCK_SLACK_S", "TTL_JITTER", "Fault", "Model", "Rules", "Write"]

# Expiry is kept in ticks of 32 ms: one of the write, one of the read.
CLOCK_SLACK_S = 0.064
TTL_JITTER = 0.1  # the default: a TTL is shortened by up to this share
_REMEMBERED = 12  # writes of a key that no longer count, for the message of a fault


class Fault(AssertionError):
    """The cache answered what it may not; the text has the key's history."""


@dataclass(frozen=True)
class Rules:
    """What a cache may do beyond forgetting nothing."""

    may_evict: bool = False
    # A key that was absent may come back: what lies on NVM is not always found (a lost read).
    may_return: bool = False


@dataclass
class Write:
    """One write of a key: a put, or what leaves nothing (`size` None): a delete, a flush."""

    what: str
    begin: float
    number: int = 0
    size: int | None = None
    ttl_s: float | None = None
    end: float = math.inf
    acknowledged: bool = False

    def surely_expired(self, at: float) -> bool:
        return self.ttl_s is not None and self.end + self.ttl_s + CLOCK_SLACK_S < at

    def maybe_expired(self, at: float) -> bool:
        if self.ttl_s is None:
            return False
        return self.begin + self.ttl_s * (1 - TTL_JITTER) - CLOCK_SLACK_S < at

    def __str__(self) -> str:
        size = "" if self.size is None else f" #{self.number}, {self.size} B"
        ttl = "" if self.ttl_s is None else f", ttl {self.ttl_s:g} s"
        end = "" if math.isinf(self.end) else f"..{self.end:.4f}"
        known = "acknowledged" if self.acknowledged else "not acknowledged"
        return f"{self.begin:.4f}{end} {self.what}{size}{ttl}, {known}"


def _nothing() -> Write:
    return Write("nothing", -math.inf, end=-math.inf, acknowledged=True)


@dataclass
class _History:
    writes: list[Write] = field(default_factory=lambda: [_nothing()])
    past: deque[str] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))


class Model:
    """The writes of all keys, and the judge of reads. Thread-safe.

    A write is told before it is sent (`begin_*`) and when its reply came (`acknowledge`,
    `reject`). `end_life` says that nothing under way can happen any more.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._lock = threading.Lock()
        self._keys: dict[tuple[str, bytes], _History] = {}
        self._flushes: dict[str, list[Write]] = defaultdict(list)
        self._pending: dict[int, Write] = {}
        self._number = 0

    # ---- writes

    def begin_puts(
        self, namespace: str, keys: Sequence[bytes], sizes: Sequence[int],
        ttls: Sequence[float | None], now: float,
    ) -> list[Write]:  # fmt: skip
        """Puts that are about to be sent; their values are `make_value(key, number, size)`."""
        with self._lock:
            writes = []
            for key, size, ttl_s in zip(keys, sizes, ttls, strict=True):
                self._number += 1
                write = Write("put", now, self._number, size, ttl_s)
                writes.append(self._add(namespace, key, write))
            return writes

    def begin_deletes(self, namespace: str, keys: Sequence[bytes], now: float) -> list[Write]:
        with self._lock:
            return [self._add(namespace, key, Write("delete", now)) for key in keys]

    def begin_flush(self, namespace: str, now: float) -> Write:
        with self._lock:
            write = Write("flush", now)
            self._flushes[namespace].append(write)
            self._pending[id(write)] = write
            return write

    def acknowledge(self, writes: Iterable[Write], now: float) -> None:
        with self._lock:
            for write in writes:
                self._settle(write, now)

    def reject(self, writes: Iterable[Write], now: float) -> None:
        """A rejected put leaves neither its value nor an older one."""
        with self._lock:
            for write in writes:
                write.what = f"rejected put of {write.size} B"
                write.size = write.ttl_s = None
                self._settle(write, now)

    def end_life(self, now: float, forgotten_after: float = math.inf) -> None:
        """The daemon is gone: what it did not acknowledge happened before now, or never.

        forgotten_after: writes that ended after this time may be lost although they were
            acknowledged (power loss with `durability: bounded`).
        """
        with self._lock:
            for write in self._pending.values():
                write.end = min(write.end, now)
            self._pending.clear()
            if math.isinf(forgotten_after):
                return
            for history in self._keys.values():
                for write in history.writes:
                    write.acknowledged &= write.end <= forgotten_after
            for flushes in self._flushes.values():
                for write in flushes:
                    write.acknowledged &= write.end <= forgotten_after

    # ---- reads

    def check(
        self, namespace: str, keys: Sequence[bytes], values: Sequence[bytes | None],
        begin: float, end: float,
    ) -> None:  # fmt: skip
        """Judges a read that was sent at `begin` and answered by `end`. Raises Fault."""
        with self._lock:
            for key, value in zip(keys, values, strict=True):
                self._judge(namespace, key, value, begin, end)

    def settle(
        self, namespace: str, keys: Sequence[bytes], values: Sequence[bytes | None],
        begin: float, end: float,
    ) -> None:  # fmt: skip
        """`check` of a read while nobody writes; what it showed is the key's state from now on."""
        with self._lock:
            for key, value in zip(keys, values, strict=True):
                shown = self._judge(namespace, key, value, begin, end)
                self._collapse(namespace, key, shown, begin, end)

    def all_settled(self, namespace: str) -> None:
        """Every key of the namespace went through `settle`: its flushes are in their histories."""
        with self._lock:
            self._flushes[namespace].clear()

    def keys(self, namespace: str) -> list[bytes]:
        """All keys that were ever written."""
        with self._lock:
            return [key for name, key in self._keys if name == namespace]

    # ---- inside; all with the lock held

    def _add(self, namespace: str, key: bytes, write: Write) -> Write:
        self._keys.setdefault((namespace, key), _History()).writes.append(write)
        self._pending[id(write)] = write
        return write

    def _settle(self, write: Write, now: float) -> None:
        write.end = min(write.end, now)
        write.acknowledged = True
        self._pending.pop(id(write), None)

    def _writes(self, namespace: str, key: bytes) -> list[Write]:
        history = self._keys.get((namespace, key))
        own = history.writes if history is not None else [_nothing()]
        return own + self._flushes[namespace]

    def _possible(self, writes: list[Write], begin: float, end: float) -> list[Write]:
        followed = max(
            (write.begin for write in writes if write.acknowledged and write.end < begin),
            default=-math.inf,
        )
        return [write for write in writes if write.begin < end and write.end >= followed]

    def _judge(
        self, namespace: str, key: bytes, value: bytes | None, begin: float, end: float
    ) -> list[Write]:
        """The writes that the read may have shown. Raises Fault where there is none."""
        writes = self._writes(namespace, key)
        possible = self._possible(writes, begin, end)
        if value is None:
            gone = [write for write in possible if write.size is None or write.maybe_expired(end)]
            if gone or self.rules.may_evict:
                return []
            raise self._fault(namespace, key, begin, end, "is missing")
        shown = [w for w in possible if self._is_of(w, key, value) and not w.surely_expired(begin)]
        if not shown:
            known = [write for write in writes if self._is_of(write, key, value)]
            if not known:
                what = f"has a wrong value: {origin(key, value)}"
            elif any(write in possible for write in known):
                what = f"is served after its expiry: #{known[-1].number}"
            else:
                what = f"has come back: #{known[-1].number}"
            raise self._fault(namespace, key, begin, end, what)
        if len(shown) == 1:  # it has happened, whether it was acknowledged or not
            (write,) = shown
            write.acknowledged = True
            write.end = min(write.end, end)
            self._pending.pop(id(write), None)
        return shown

    def _collapse(
        self, namespace: str, key: bytes, shown: list[Write], begin: float, end: float
    ) -> None:
        history = self._keys.setdefault((namespace, key), _History())
        before = self._writes(namespace, key)
        if shown:
            history.writes = shown
        elif self.rules.may_return:
            history.writes = self._possible(before, begin, end)
        else:
            history.writes = [Write("seen absent", begin, end=end, acknowledged=True)]
        kept = {id(write) for write in history.writes}
        history.past.extend(str(write) for write in before if id(write) not in kept)

    def _is_of(self, write: Write, key: bytes, value: bytes) -> bool:
        return write.size == len(value) and make_value(key, write.number, write.size) == value

    def _fault(self, namespace: str, key: bytes, begin: float, end: float, what: str) -> Fault:
        history = self._keys.get((namespace, key))
        past = list(history.past) if history is not None else []
        lines = [f"  (before) {line}" for line in past]
        lines += [f"  {write}" for write in sorted(self._writes(namespace, key), key=_begin_of)]
        text = "\n".join(lines)
        return Fault(f"{namespace}/{key!r} {what}\n{text}\n  {begin:.4f}..{end:.4f} the read")


def _begin_of(write: Write) -> float:
    return write.begin
