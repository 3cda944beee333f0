"""The node as those see it who are there before it and after it: metrics and the admin service."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cache_daemon.metrics import HistogramLike, SampleLike, SampleSource

__all__ = ["HeldNode", "NodeHolder", "NotServing"]


class NotServing(Exception):
    """There is no node to ask: not yet, or not any more. The message says which."""


class HeldNode(SampleSource, Protocol):
    """What is asked of a node; `cache_daemon._native.Node` is one."""

    def resize_domain(self, namespace: str, domain: str, budget_bytes: int) -> int: ...
    def flush_namespace(self, namespace: str) -> int: ...


class NodeHolder:
    """A node that may not be there. Without one there are no samples; else see `NotServing`.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._node: HeldNode | None = None
        self._why = "the daemon is recovering; try again when it serves"

    def put(self, node: HeldNode) -> None:
        """From now on `node` is asked."""
        self._node = node

    def take_away(self) -> None:
        """From now on nobody is asked: the daemon stops."""
        self._node, self._why = None, "the daemon is stopping"

    def samples(self) -> Sequence[SampleLike]:
        node = self._node
        return [] if node is None else node.samples()

    def histograms(self) -> Sequence[HistogramLike]:
        node = self._node
        return [] if node is None else node.histograms()

    def resize_domain(self, namespace: str, domain: str, budget_bytes: int) -> int:
        return self._asked().resize_domain(namespace, domain, budget_bytes)

    def flush_namespace(self, namespace: str) -> int:
        return self._asked().flush_namespace(namespace)

    def _asked(self) -> HeldNode:
        node = self._node
        if node is None:
            raise NotServing(self._why)
        return node
