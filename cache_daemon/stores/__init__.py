"""Feature stores: where misses go when the upstream is not another cache node.

A store answers whole batches and nothing else. The daemon wraps each one in a `GuardedStore`, so a
store itself knows neither limits nor retries; it only tells what happened by the exception it
raises::

    StoreError                 the call failed; its keys answer ERROR
    ├── StoreUnavailable       no connection, or the store is starting up; worth another try
    │   └── StoreBreakerOpen   not asked at all: the circuit breaker is open
    ├── StoreTimeout           no answer within the time given; its keys answer TIMED_OUT
    ├── StoreThrottled         a rate limit, ours or the store's; its keys answer THROTTLED
    └── StoreAnswerError       an answer that makes no sense, or a refusal; asking again is no use

    StoreConfigError           (a ValueError) options that cannot work; raised while starting only
"""

from cache_daemon.stores._base import (
    Groups,
    Store,
    StoreAnswerError,
    StoreBreakerOpen,
    StoreConfigError,
    StoreError,
    StoreThrottled,
    StoreTimeout,
    StoreUnavailable,
    Values,
)
from cache_daemon.stores._factory import make_store, options_model

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
    "make_store",
    "options_model",
]
