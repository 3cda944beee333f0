"""What a warm-up asks of the node that it fills, and of nodes that are warm; native code has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["CopyRefused", "KeyPlan", "Peer", "PeerDomain", "PlanAdded", "WarmResult"]


class PlanAdded(Protocol):
    """What became of the keys of one log."""

    @property
    def keys(self) -> int: ...
    @property
    def new_keys(self) -> int: ...
    @property
    def unknown_namespace(self) -> int: ...
    @property
    def not_fetchable(self) -> int: ...
    @property
    def hashed(self) -> int: ...
    @property
    def not_owned(self) -> int: ...
    @property
    def over_limit(self) -> int: ...


class WarmResult(Protocol):
    """What became of the keys of one `KeyPlan.issue`."""

    @property
    def held(self) -> int: ...
    @property
    def fetched(self) -> int: ...
    @property
    def not_found(self) -> int: ...
    @property
    def timed_out(self) -> int: ...
    @property
    def throttled(self) -> int: ...
    @property
    def error(self) -> int: ...
    @property
    def skipped(self) -> int: ...
    @property
    def seconds(self) -> float: ...


class KeyPlan(Protocol):
    """`cache_daemon._native.WarmPlan`; its stub says what each does.

    `add` raises ValueError for a log that cannot be read, and RuntimeError comes from all methods
    once the node was shut down.
    """

    def own(self, shard_count: int, shards: npt.NDArray[np.uint32]) -> None: ...
    def add(self, data: bytes, weight: float = 1.0) -> PlanAdded: ...
    def drop_domains(self, domains: Sequence[tuple[str, str]]) -> int: ...
    def drop_held(self) -> int: ...
    def order(self, realtime_ttl_s: float) -> None: ...
    def issue(self, max_keys: int, timeout_s: float, done: Callable[[WarmResult], None]) -> int: ...
    def retry_failed(self) -> int: ...
    def predicted_hit_ratio(self, sample: int = 200_000) -> float: ...
    @property
    def keys(self) -> int: ...
    @property
    def keys_left(self) -> int: ...


class CopyRefused(Exception):
    """A peer cannot be copied from, or not any more; the message says why."""


class PeerDomain(Protocol):
    """What a peer has of one eviction domain."""

    @property
    def namespace(self) -> str: ...
    @property
    def domain(self) -> str: ...
    @property
    def items(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def ttl_s(self) -> float: ...  # 0: no expiry
    @property
    def mean_ttl_left_s(self) -> float: ...  # of its items; 0: they do not expire


class Peer(Protocol):
    """A warm node, and how far the copy of its items is."""

    @property
    def address(self) -> str: ...
    def describe(self) -> Sequence[PeerDomain]:
        """Raises CopyRefused."""

    def copy(self, domains: Sequence[tuple[str, str]], seconds: float) -> bool:
        """Copies for at most so long, and goes on where it was; True: that is all.

        Raises CopyRefused.
        """

    def stop(self) -> None:
        """Lets `copy` return soon; from another thread."""

    @property
    def items(self) -> int: ...  # copied
    @property
    def bytes(self) -> int: ...
