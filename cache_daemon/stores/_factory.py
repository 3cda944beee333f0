"""From a `type` in the config to a store object."""

import importlib
from collections.abc import Mapping
from typing import Any, cast

from pydantic import BaseModel

from cache_daemon.stores._base import Store, StoreConfigError

__all__ = ["make_store", "options_model"]

# Imported only when asked for, so that a daemon without Redis does not load its client.
_BUILT_IN = {
    "lmdb": ("cache_daemon.stores.lmdb", "LmdbStore"),
    "redis": ("cache_daemon.stores.redis", "RedisStore"),
}


def _store_class(type_: str) -> type[Any]:
    module_name, class_name = _BUILT_IN.get(type_) or type_.partition(":")[::2]
    if not module_name or not class_name:
        raise StoreConfigError(
            f"unknown store type {type_!r}; use {', '.join(_BUILT_IN)} or module:Class"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise StoreConfigError(
            f"store type {type_!r}: cannot import {module_name!r}: {error}"
        ) from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type) or not callable(getattr(found, "get_many", None)):
        raise StoreConfigError(
            f"store type {type_!r}: {module_name!r} has no class {class_name!r} with get_many()"
        )
    return found


def options_model(type_: str) -> type[BaseModel] | None:
    """The pydantic model of a store type's options; None for a class that declares none.

    A class of the user's own declares one by an attribute `Options`. Raises StoreConfigError for a
    type that does not exist.
    """
    model = getattr(_store_class(type_), "Options", None)
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def make_store(name: str, type_: str, options: Mapping[str, Any]) -> Store:
    """Opens the store `name` of type `lmdb`, `redis` or `module:Class`.

    A class with an `Options` model is constructed with one validated instance of it, any other with
    the options as keyword arguments. Raises pydantic.ValidationError for bad options and
    StoreConfigError for those that look right and cannot work (a missing path, say).
    """
    store_class = _store_class(type_)
    model = options_model(type_)
    if model is not None:
        return cast(Store, store_class(model.model_validate(dict(options))))
    try:
        return cast(Store, store_class(**options))
    except TypeError as error:
        raise StoreConfigError(f"store {name!r}: {type_} refuses its options: {error}") from error
