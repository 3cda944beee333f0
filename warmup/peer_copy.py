"""Peer copy: the items of a warm node, with the time that they have left to live."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from warmup.protocols import CopyRefused, Peer, PeerDomain

__all__ = ["PeerCopy"]

_log = logging.getLogger(__name__)

_SLICE_S = 0.5  # of a copy at a time, so that it can be ended
_RETRY_S = 1.0
_TRIES = 5  # of one peer, each time that it brought nothing


class PeerCopy:
    """Copies from the first of `peers` that can be copied from, and goes on with the next.

    `run` blocks; the rest may be used from any thread.
    """

    def __init__(
        self, peers: Sequence[Peer], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._peers = list(peers)
        self._clock = clock
        self._stopping = threading.Event()
        self.problems: list[str] = []

    @property
    def items(self) -> int:
        """Copied so far, from all peers."""
        return sum(peer.items for peer in self._peers)

    @property
    def bytes(self) -> int:
        return sum(peer.bytes for peer in self._peers)

    def stop(self) -> None:
        self._stopping.set()
        for peer in self._peers:
            peer.stop()

    def describe(self, deadline: float) -> Sequence[PeerDomain]:
        """What the first peer that answers has; it is the first to be copied from. () if none."""
        for peer in list(self._peers):
            if self._stopping.is_set() or self._clock() > deadline:
                break
            try:
                domains = peer.describe()
            except CopyRefused as error:
                self._refused(peer, error)
                continue
            self._peers.remove(peer)
            self._peers.insert(0, peer)
            return domains
        return ()

    def run(self, domains: Sequence[tuple[str, str]], deadline: float) -> bool:
        """Whether all of `domains` was copied, from one peer."""
        for peer in self._peers:
            tries = 0
            while not self._stopping.is_set() and self._clock() < deadline:
                before = peer.items
                try:
                    if peer.copy(domains, min(_SLICE_S, max(deadline - self._clock(), 0.01))):
                        return True
                except CopyRefused as error:
                    tries = 0 if peer.items != before else tries + 1
                    if tries == _TRIES:
                        self._refused(peer, error)
                        break
                    self._stopping.wait(min(_RETRY_S, max(deadline - self._clock(), 0.0)))
        return False

    def _refused(self, peer: Peer, error: CopyRefused) -> None:
        _log.info("peer copy: %s: %s", peer.address, error)
        self.problems.append(f"{peer.address}: {error}")
