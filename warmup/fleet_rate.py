"""What all nodes that warm up at once may ask of a store together, as a document that they share.

Each has a grant there, and the sum of all grants never exceeds the whole: a node takes only what
nobody has. One that comes finds nothing, and is counted; the others go down to their even share at
their next beat, and it takes what they left. A node writes less only when it asks for less already,
and asks for more only when it has written it.

A grant is a lease. It says for how long its node will spend it without another beat; the others
forget it when they have seen no new beat for twice that time, each by its own clock. So clocks of
hosts do not matter, and neither does who dies when.
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol

__all__ = ["Document", "FleetRate"]

_log = logging.getLogger(__name__)

_VERSION = 1
_BEAT_S = 1.0
_BEAT_S_EACH = 0.05  # of so many nodes a document can be changed by one after the other
_SPENDS_BEATS = 3  # without a beat of ours
_FORGOTTEN_AFTER = 2.0  # times as long
_SPENDS_S_MAX = 3600.0
_TRIES = 8  # of one beat, when others are quicker
_BYTES_MAX = 1 << 20
_NODES_MAX = 10_000


@dataclass(frozen=True)
class _Grant:
    rate: float
    beat: int
    spends_s: float  # for so long after that beat


class Document(Protocol):
    """See `warmup.documents.SharedDocument`."""

    def read(self) -> tuple[bytes | None, str]: ...
    def write(self, data: bytes, tag: str) -> bool: ...


class FleetRate:
    """This node's part. `on_rate` gets keys a second, in a thread of this object's; 0 at first."""

    def __init__(
        self,
        document: Document,
        node: str,
        fleet_rate: float,
        on_rate: Callable[[float], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        beat_s: float = _BEAT_S,
    ) -> None:
        self._document = document
        self._node = node
        self._fleet_rate = fleet_rate
        self._on_rate = on_rate
        self._clock = clock
        self._beat_s = beat_s
        self._beat = random.getrandbits(32)  # another one of this name must not look like this one
        self._rate = 0.0
        self._spends_until = -float("inf")  # by the last write that succeeded
        self._seen: dict[str, tuple[int, float]] = {}  # beat of the others, and when it was new
        self._members = 1
        self._problem = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fleet-rate", daemon=True)

    @property
    def rate(self) -> float:
        """Keys a second that this node may ask for."""
        return self._rate

    @property
    def members(self) -> int:
        """Nodes that share, this one included."""
        return self._members

    @property
    def problem(self) -> str:
        """Why there is no rate to be had; "" while there is one."""
        return self._problem

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Takes nothing any more and gives its grant back, if it can. Idempotent."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(2.0)
        self._set_rate(0.0)
        try:
            self._change(leave=True)
        except Exception as error:  # of any kind of document
            _log.info("fleet rate: the grant ends by its lease: %s", error)

    def step(self) -> float:
        """One beat; returns the seconds until the next one. `start` calls it; tests by hand."""
        try:
            self._change()
        except Exception as error:  # of any kind of document
            self._problem = str(error)
        if self._clock() > self._spends_until:
            self._set_rate(0.0)  # others may soon take it
        return self._interval_s() * random.uniform(0.8, 1.0)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._stopping.wait(self.step())

    def _interval_s(self) -> float:
        return max(self._beat_s, _BEAT_S_EACH * self._members)

    def _change(self, *, leave: bool = False) -> None:
        for _ in range(_TRIES):
            data, tag = self._document.read()
            grants = _decode(data)
            now = self._clock()
            self._forget_the_dead(grants, now)
            grants.pop(self._node, None)
            others = sum(grant.rate for grant in grants.values())
            self._members = len(grants) + 1
            rate = max(0.0, min(self._fleet_rate / self._members, self._fleet_rate - others))
            spends_s = min(_SPENDS_BEATS * self._interval_s(), _SPENDS_S_MAX)
            self._beat += 1
            if not leave:
                grants[self._node] = _Grant(rate, self._beat, spends_s)
            if rate < self._rate:
                self._set_rate(rate)  # before anybody may take it
            if self._document.write(_encode(grants), tag):
                if not leave:
                    self._spends_until = now + spends_s
                    self._problem = ""
                    self._set_rate(rate)
                return
            if self._stopping.wait(random.uniform(0, 0.02 * self._members)) and not leave:
                return
        raise TimeoutError(f"{self._members} nodes change the fleet rate all at once")

    def _forget_the_dead(self, grants: dict[str, _Grant], now: float) -> None:
        for name, grant in list(grants.items()):
            if name == self._node:
                continue
            known, since = self._seen.get(name, (None, now))
            if known != grant.beat:
                since = now
            self._seen[name] = (grant.beat, since)
            if now - since > _FORGOTTEN_AFTER * grant.spends_s:
                _log.info("fleet rate: %s has not been heard of for %.0f s", name, now - since)
                del grants[name]
        self._seen = {name: seen for name, seen in self._seen.items() if name in grants}

    def _set_rate(self, rate: float) -> None:
        if rate != self._rate:
            self._rate = rate
            self._on_rate(rate)


def _encode(grants: dict[str, _Grant]) -> bytes:
    nodes = {name: asdict(grant) for name, grant in grants.items()}
    return json.dumps({"version": _VERSION, "nodes": nodes}).encode()


def _decode(data: bytes | None) -> dict[str, _Grant]:
    """Raises ValueError for what is no such document."""
    if data is None:
        return {}
    try:
        if len(data) > _BYTES_MAX:
            raise ValueError("too large")
        document = json.loads(data)
        version = document["version"]
        grants = {
            str(name): _Grant(
                float(entry["rate"]),
                int(entry["beat"]),
                min(float(entry["spends_s"]), _SPENDS_S_MAX),
            )
            for name, entry in document["nodes"].items()
        }
        if version == _VERSION and len(grants) > _NODES_MAX:
            raise ValueError("too many nodes")
        if not all(grant.rate >= 0 and grant.spends_s > 0 for grant in grants.values()):
            raise ValueError("a grant is negative")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"this is no document of a fleet rate ({error}); delete it") from error
    if version != _VERSION:
        raise ValueError(
            f"the document of the fleet rate is of version {version}: update this node, or give it "
            "a warmup.name of its own"
        )
    return grants
