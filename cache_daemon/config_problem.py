"""What is wrong with a config, said so that it can be mended."""

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from cache_daemon.config_units import (
    format_duration,
    format_share,
    format_size,
    parse_duration,
    parse_share,
    parse_size,
)

__all__ = [
    "MISSING",
    "ConfigError",
    "Path",
    "Problem",
    "at_path",
    "nearest",
    "one_slip_one_line",
    "translate",
]

Path = tuple[str | int, ...]

MISSING = "missing; it has no default"

_SHOWN_KEYS_MAX = 12
_EMPTY = "at least one is needed"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where."""

    path: Path
    message: str
    line: int = 0  # 1-based line in the file; 0: unknown

    @property
    def where(self) -> str:
        """The path as people write it: `stores.features.options`, `listen.grpc[0]`."""
        text = ""
        for part in self.path:
            if isinstance(part, int):
                text += f"[{part}]"
            else:
                text += f".{part}" if text else part
        return text or "(top level)"


class ConfigError(Exception):
    """A config that cannot be used. `problems` holds all of them; the text has one a line."""

    def __init__(self, problems: Iterable[Problem], source: str = "config") -> None:
        self.problems = tuple(problems)
        self.source = source
        super().__init__("\n".join(self._line(problem) for problem in self.problems))

    def _line(self, problem: Problem) -> str:
        source = f"{self.source}:{problem.line}" if problem.line else self.source
        return f"{source}: {problem.where}: {problem.message}"


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that ends an error message: the nearest known word, or all of them when none is."""
    choices = sorted(known)
    lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.5)
    if close:
        return f"did you mean {lower[close[0]]!r}?"
    shown = ", ".join(choices[:_SHOWN_KEYS_MAX])
    return f"known here: {shown}{', ...' if len(choices) > _SHOWN_KEYS_MAX else ''}"


def at_path(node: Any, *path: str | int) -> Any:
    """What is at `path` below `node` in raw settings; None where there is nothing."""
    for part in path:
        if isinstance(node, Mapping):
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        else:
            return None
    return node


def translate(model: type[BaseModel], error: ValidationError, raw: Any) -> list[Problem]:
    """The problems that pydantic found in the raw settings of a model, in our words."""
    return one_slip_one_line(
        [_translate(model, details, raw) for details in error.errors(include_url=False)]
    )


def one_slip_one_line(problems: list[Problem]) -> list[Problem]:
    """Without those that follow from others.

    A misspelt key that is required would be complained of as missing, too; and pydantic calls a
    list empty when all of its items are bad.
    """
    explained = {
        (*problem.path[:-1], name)
        for problem in problems
        if problem.message.startswith("unknown key")
        for name in re.findall(r"did you mean '(.*)'", problem.message)
    }
    explained |= {problem.path[:-1] for problem in problems}
    return [
        problem
        for problem in problems
        if problem.message not in (MISSING, _EMPTY) or problem.path not in explained
    ]


def _translate(model: type[BaseModel], details: Mapping[str, Any], raw: Any) -> Problem:
    # The value is shown as it is in the file, not as pydantic had converted it by then.
    path: Path = tuple(part for part in details["loc"] if part != "[key]")
    context = details.get("ctx", {})
    is_key = details["loc"][-1:] == ("[key]",)
    found = path[-1] if is_key else at_path(raw, *path)
    match details["type"]:
        case "extra_forbidden":
            return Problem(
                path, f"unknown key; {nearest(str(path[-1]), _known_keys(model, path[:-1]))}"
            )
        case "missing":
            return Problem(path, MISSING)
        case "too_short":
            return Problem(path, _EMPTY)
        case "invalid_key":
            return Problem(path, "a key must be text")
        case "literal_error":
            choices = re.findall(r"'([^']*)'", str(context["expected"]))
            return Problem(
                path, f"{reprlib.repr(found)} is not known; {nearest(str(found), choices)}"
            )
        case "value_error":
            return Problem(path, str(context["error"]))
        case "string_pattern_mismatch":
            return Problem(
                path, f"{reprlib.repr(found)} is no name; use letters, digits, '_', '-' and '.'"
            )
        case "model_type" | "dict_type":
            return Problem(path, f"a mapping is expected here (found {reprlib.repr(found)})")
        case "greater_than_equal" | "less_than_equal" | "greater_than" | "less_than":
            side = "at least" if "ge" in context else "above" if "gt" in context else "at most"
            bound = _in_notation_of(found, next(iter(context.values())))
            return Problem(path, f"{found} is out of range; it must be {side} {bound}")
    return Problem(path, f"{details['msg'].lower()} (found {reprlib.repr(found)})")


def _in_notation_of(found: object, bound: float) -> str:
    """A bound as it would be written in place of `found`."""
    if isinstance(found, str):
        for parse, format_ in (
            (parse_size, lambda value: format_size(int(value))),
            (parse_duration, format_duration),
            (parse_share, format_share),
        ):
            with suppress(ValueError):
                parse(found)
                return format_(bound)
    return f"{bound:g}"


def _known_keys(model: type[BaseModel], path: Path) -> list[str]:
    """The field names of the model at `path` below `model`."""
    current: Any = model
    for part in path:
        if _is_model(current):
            field = current.model_fields.get(part)
            current = _inner(field.annotation) if field else None
        else:
            current = _inner(get_args(current)[-1 if get_origin(current) is dict else 0])
    return list(current.model_fields) if _is_model(current) else []


def _inner(annotation: Any) -> Any:
    """What an optional annotation holds when it is not None."""
    if get_origin(annotation) in (Union, UnionType):
        return next(choice for choice in get_args(annotation) if choice is not NoneType)
    return annotation


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
