"""The JSON Schema of the config file: completion and checks while typing, in editors.

The models' own schema, and for each known type of store the schema of its options.
"""

from typing import Any

from cache_daemon.config_model import Config
from cache_daemon.stores import options_model

__all__ = ["json_schema"]

_BUILT_IN_TYPES = ("lmdb", "redis")
_DIALECT = "https://json-schema.org/draft/2020-12/schema"

_IS_SHARDED = {"properties": {"topology": {"const": "sharded"}}, "required": ["topology"]}
_SHARDED = {
    "if": _IS_SHARDED,
    "then": {"required": ["sharding"]},
    "else": {"properties": {"sharding": {"type": "null"}}},
}
# All but a root keep values.
_VALUES = {
    "if": {
        "properties": {
            "sharding": {"properties": {"role": {"const": "root"}}, "required": ["role"]}
        },
        "required": ["sharding"],
        "allOf": [_IS_SHARDED],
    },
    "else": {
        "required": ["memory"],
        "properties": {"namespaces": {"additionalProperties": {"required": ["domains"]}}},
    },
}


def json_schema() -> dict[str, Any]:
    """The schema as a JSON-able dict."""
    schema = Config.model_json_schema(mode="validation")
    definitions = schema["$defs"]
    store = definitions["StoreSettings"]
    store["allOf"] = [_when(type_, definitions) for type_ in _BUILT_IN_TYPES]
    return (
        {"$schema": _DIALECT, "title": "feature cache configuration"}
        | {key: value for key, value in schema.items() if key != "title"}
        | {"allOf": [_SHARDED, _VALUES]}
    )


def _when(type_: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """If a store is of `type_`, its options are those of that type."""
    model = options_model(type_)
    if model is None:
        return {}
    name = f"{type_}-options"
    options = model.model_json_schema(ref_template=f"#/$defs/{type_}-{{model}}")
    for inner, definition in options.pop("$defs", {}).items():
        definitions[f"{type_}-{inner}"] = definition
    definitions[name] = options
    return {
        "if": {"properties": {"type": {"const": type_}}, "required": ["type"]},
        "then": {"properties": {"options": {"$ref": f"#/$defs/{name}"}}},
    }
