"""The store protocol and its exceptions; the tree is drawn in the package's docstring."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from cache_daemon._native import HintedValue

__all__ = [
    "Groups",
    "Store",
    "StoreAnswerError",
    "StoreBreakerOpen",
    "StoreConfigError",
    "StoreError",
    "StoreThrottled",
    "StoreTimeout",
    "StoreUnavailable",
    "Values",
]

Groups: TypeAlias = Sequence[tuple[str, list[bytes]]]
"""What a batch asks: (namespace, its keys), each namespace and each key of it once."""

Values: TypeAlias = Sequence[Sequence["bytes | HintedValue | None"]]
"""What a store answers: one sequence a group, one entry a key, in the order asked."""


class Store(Protocol):
    """A feature store. Called from several threads at once."""

    def get_many(self, groups: Groups, timeout_s: float) -> Values:
        """Looks up a batch of keys of several namespaces.

        Returns one sequence a group, one entry a key: the value, a `HintedValue` (value with the
        domain it should enter and its own TTL), or None. None is a statement, "there is no such
        value", and may be cached as such; a store that does not know must raise, or answer the
        group with an empty sequence, which makes its keys ERROR and leaves the other groups good.

        Raises one of the `StoreError` family, within about `timeout_s` seconds. A call that hangs
        beyond that is abandoned: it keeps its slot, and what it returns later is dropped.
        """
        ...

    def close(self) -> None:
        """Gives back connections and files. Idempotent; no call follows it."""
        ...


class StoreError(Exception):
    """The store did not answer a batch."""


class StoreUnavailable(StoreError):
    """The store cannot be reached, or says that it cannot answer just now."""


class StoreBreakerOpen(StoreUnavailable):
    """The store failed so often that it is left alone for a while."""


class StoreTimeout(StoreError):
    """The store did not answer within the time given."""


class StoreThrottled(StoreError):
    """A rate limit forbids the call: our own or one that the store reports."""


class StoreAnswerError(StoreError):
    """The store answered with an error or with something that is no answer."""


class StoreConfigError(ValueError):
    """A store's options cannot work; the message says which and what to do."""
