"""Sizes, durations and shares as people write them in a config file.

`Size`, `Duration`, `Share`, `Budget`, `Lateness` and `Durability` are pydantic field types: they
read `4GiB`, `1h30m`, `40%` and `p99`, hold plain numbers (bytes, seconds, 0..1), and write
themselves back in the same notation, so that printed effective settings are a valid config again.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, PlainValidator, WithJsonSchema

__all__ = [
    "Budget",
    "BudgetField",
    "CountOrAuto",
    "Durability",
    "DurabilityField",
    "Duration",
    "Lateness",
    "LatenessField",
    "NvmBudgetField",
    "Share",
    "Size",
    "SizeOrAuto",
    "format_duration",
    "format_share",
    "format_size",
    "parse_budget",
    "parse_durability",
    "parse_duration",
    "parse_lateness",
    "parse_share",
    "parse_size",
]

_SIZE_UNITS = {
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_DURATION_UNITS_MS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}
# 16 EiB and 1,000 years: beyond them a number is a slip of the keyboard, and native code keeps
# sizes and times in signed 64-bit integers.
_SIZE_MAX = (1 << 63) - 1
_DURATION_MS_MAX = 1000 * 366 * 86_400_000

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|d|h|m|s))+")
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|d|h|m|s)")
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_PERCENTILE = re.compile(r"p(\d+(?:\.\d+)?)")
_MICROSECONDS = re.compile(r"(\d+)us")
_LATENESS_US_MAX = 60_000_000


def parse_size(value: object) -> int:
    """Bytes of `512MiB`, `1.5GiB`, `4GB` or a plain integer, rounded down to a whole byte.

    Raises ValueError with a hint when the text is not a size.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is None:
            raise ValueError(f"{value!r} is not a size; write 512MiB, 4GiB or a number of bytes")
        number, unit = match.groups()
        factor = _SIZE_UNITS.get(unit or "B")
        if factor is None:
            raise ValueError(f"unknown unit {unit!r} in {value!r}; use {', '.join(_SIZE_UNITS)}")
        if "." in number and factor == 1:
            raise ValueError(f"{value!r} is not a whole number of bytes")
        size = int(Decimal(number) * factor)
    if not 0 <= size <= _SIZE_MAX:
        raise ValueError(f"{value!r} is out of range")
    return size


def format_size(size: int) -> str:
    """Text of the largest binary unit that expresses `size` exactly; `parse_size` reads it back."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size and size % _SIZE_UNITS[unit] == 0:
            return f"{size // _SIZE_UNITS[unit]}{unit}"
    return f"{size}B"


def parse_duration(value: object) -> float:
    """Seconds of `250ms`, `5m`, `1h30m` or 0; a whole number of milliseconds.

    Raises ValueError with a hint: a plain number has no unit and could mean anything.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and value == 0:
        return 0.0
    text = value.strip() if isinstance(value, str) else ""
    if text == "0":
        return 0.0
    if not _DURATION.fullmatch(text):
        raise ValueError(
            f"{value!r} is not a duration; write it with its unit: 250ms, 30s, 5m or 1h30m"
        )
    total = 0.0
    for number, unit in _DURATION_PART.findall(text):
        total += float(number) * _DURATION_UNITS_MS[unit]
    milliseconds = round(total)
    # Decimal fractions such as 1.001s are not exact in binary; what is left is far below 1 µs.
    if abs(total - milliseconds) > 1e-3:
        raise ValueError(f"{value!r} is not a whole number of milliseconds")
    if milliseconds > _DURATION_MS_MAX:
        raise ValueError(f"{value!r} is out of range")
    return milliseconds / 1000


def format_duration(seconds: float) -> str:
    """Text such as `1h30m`; `parse_duration` reads it back."""
    left = round(seconds * 1000)
    if left == 0:
        return "0s"
    parts = []
    for unit, factor in _DURATION_UNITS_MS.items():
        count, left = divmod(left, factor)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)


def parse_share(value: object) -> float:
    """A share in 0..1 of `10%` or 0.1. Raises ValueError."""
    share = -1.0
    if isinstance(value, int | float) and not isinstance(value, bool):
        share = float(value)
    elif isinstance(value, str) and (match := _SHARE.fullmatch(value.strip())):
        share = float(match.group(1)) / 100
    if not 0 <= share <= 1:
        raise ValueError(f"{value!r} is not a share; write 10%, or a number from 0 to 1")
    return share


def format_share(share: float) -> str:
    """Text such as `10%`; `parse_share` reads it back."""
    return f"{share * 100:.10g}%"


@dataclass(frozen=True)
class Budget:
    """Bytes of an eviction domain or of NVM: a size, or a share of the arena or the devices."""

    size: int = 0  # bytes; used when share is 0
    share: float = 0.0  # of the whole, in 0..1

    def bytes_of(self, whole_bytes: int) -> int:
        """Bytes of this budget where `whole_bytes` are shared out."""
        return int(self.share * whole_bytes) if self.share else self.size

    def __str__(self) -> str:
        return format_share(self.share) if self.share else format_size(self.size)


def parse_budget(value: object) -> Budget:
    """A budget of `512MiB` or `40%`. Raises ValueError."""
    if isinstance(value, Budget):
        return value
    if isinstance(value, str) and value.strip().endswith("%"):
        budget = Budget(share=parse_share(value))
    elif isinstance(value, float):
        raise ValueError(f"{value!r} is not a budget; write a size (512MiB) or a share (40%)")
    else:
        budget = Budget(size=parse_size(value))
    if not budget.share and not budget.size:
        raise ValueError("a budget must be above 0")
    return budget


@dataclass(frozen=True)
class Lateness:
    """When a read of an NVM device counts as late: a time, or a quantile of recent reads."""

    microseconds: int = 0  # used when quantile is 0
    quantile: float = 0.0  # in 0.5..1

    def __str__(self) -> str:
        if self.quantile:
            return f"p{self.quantile * 100:.10g}"
        if self.microseconds % 1000:
            return f"{self.microseconds}us"
        return format_duration(self.microseconds / 1e6)


def parse_lateness(value: object) -> Lateness:
    """A lateness of `p99`, `p99.9`, `2ms` or `500us`. Raises ValueError."""
    if isinstance(value, Lateness):
        return value
    text = value.strip() if isinstance(value, str) else ""
    if match := _PERCENTILE.fullmatch(text):
        quantile = float(Decimal(match.group(1)) / 100)
        if not 0.5 <= quantile < 1:
            raise ValueError(f"{value!r} is out of range; a quantile lies from p50 to below p100")
        return Lateness(quantile=quantile)
    if match := _MICROSECONDS.fullmatch(text):
        microseconds = int(match.group(1))
    else:
        try:
            microseconds = round(parse_duration(value) * 1e6)
        except ValueError:
            raise ValueError(
                f"{value!r} is no lateness; write a quantile of recent reads (p99), "
                "or a time (2ms, 500us)"
            ) from None
    if not 0 < microseconds <= _LATENESS_US_MAX:
        raise ValueError(f"{value!r} is out of range; it must be above 0 and at most 1m")
    return Lateness(microseconds=microseconds)


_WINDOW_MIN_S = 0.001
_WINDOW_MAX_S = 10.0


@dataclass(frozen=True)
class Durability:
    """What NVM holds after power loss: drop_nvm, sync, or bounded with its window."""

    kind: str = "drop_nvm"
    window_s: float = 0.1  # of bounded

    def to_json(self) -> str | dict[str, str]:
        """As it is written in a config file."""
        return {"bounded": format_duration(self.window_s)} if self.kind == "bounded" else self.kind


def parse_durability(value: object) -> Durability:
    """A durability of `drop_nvm`, `sync` or `{bounded: 100ms}`. Raises ValueError."""
    if isinstance(value, Durability):
        return value
    if value in ("drop_nvm", "sync"):
        return Durability(str(value))
    if not isinstance(value, Mapping) or list(value) != ["bounded"]:
        raise ValueError(
            f"{value!r} is no durability; write drop_nvm, sync, or {{bounded: 100ms}} "
            "with how much of the last changes may be lost"
        )
    window_s = parse_duration(value["bounded"])
    if not _WINDOW_MIN_S <= window_s <= _WINDOW_MAX_S:
        raise ValueError(f"{value['bounded']} is out of range; a window is from 1ms to 10s")
    return Durability("bounded", window_s)


def _schema(description: str, pattern: str, *numbers: dict[str, Any]) -> WithJsonSchema:
    text = {"type": "string", "pattern": pattern}
    return WithJsonSchema({"description": description, "anyOf": [text, *numbers]})


_SIZE_PATTERN = r"^\d+(\.\d+)?\s*(B|KiB|MiB|GiB|TiB|kB|MB|GB|TB)?$"
_DURATION_PATTERN = r"^(\d+(\.\d+)?(ms|d|h|m|s))+$|^0$"
_SHARE_PATTERN = r"^\d+(\.\d+)?\s*%$"
_LATENESS_PATTERN = r"^p\d+(\.\d+)?$|^\d+us$|^(\d+(\.\d+)?(ms|d|h|m|s))+$"
_BYTES = {"type": "integer", "minimum": 0}

Size = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(format_size, return_type=str, when_used="json"),
    _schema("bytes: 512MiB, 4GiB or a plain number", _SIZE_PATTERN, _BYTES),
]
"""Bytes."""

SizeOrAuto = Annotated[
    int,
    BeforeValidator(lambda value: 0 if value == "auto" else parse_size(value)),
    PlainSerializer(
        lambda size: format_size(size) if size else "auto", return_type=str, when_used="json"
    ),
    _schema("bytes, or auto", rf"^auto$|{_SIZE_PATTERN}", _BYTES),
]
"""Bytes; 0 for `auto`."""

CountOrAuto = Annotated[
    int,
    BeforeValidator(lambda value: 0 if value == "auto" else value),
    PlainSerializer(lambda count: count or "auto", return_type=int | str, when_used="json"),
    WithJsonSchema(
        {
            "description": "a number, or auto",
            "anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 0}],
        }
    ),
]
"""A number; 0 for `auto`."""

Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration, return_type=str, when_used="json"),
    _schema("a duration: 250ms, 5m, 1h30m or 0", _DURATION_PATTERN, {"const": 0}),
]
"""Seconds."""

Share = Annotated[
    float,
    BeforeValidator(parse_share),
    PlainSerializer(format_share, return_type=str, when_used="json"),
    _schema("a share: 10% or 0.1", _SHARE_PATTERN, {"type": "number", "minimum": 0, "maximum": 1}),
]
"""A share in 0..1."""

BudgetField = Annotated[
    Budget,
    PlainValidator(parse_budget),
    PlainSerializer(str, return_type=str, when_used="json"),
    _schema(
        "bytes of an eviction domain: a size, or a share of the arena (40%)",
        rf"{_SIZE_PATTERN}|{_SHARE_PATTERN}",
        _BYTES,
    ),
]
"""A `Budget`."""

NvmBudgetField = Annotated[
    Budget,
    PlainValidator(parse_budget),
    PlainSerializer(str, return_type=str, when_used="json"),
    _schema(
        "bytes of a namespace on NVM: a size, or a share of all devices (50%)",
        rf"{_SIZE_PATTERN}|{_SHARE_PATTERN}",
        _BYTES,
    ),
]
"""A `Budget` of the NVM tier."""

LatenessField = Annotated[
    Lateness,
    PlainValidator(parse_lateness),
    PlainSerializer(str, return_type=str, when_used="json"),
    _schema("when a read is late: p99 of recent reads, or 2ms, or 500us", _LATENESS_PATTERN),
]
"""A `Lateness`."""

DurabilityField = Annotated[
    Durability,
    PlainValidator(parse_durability),
    PlainSerializer(Durability.to_json, when_used="json"),
    WithJsonSchema(
        {
            "description": "what NVM holds after power loss: drop_nvm, sync or {bounded: 100ms}",
            "anyOf": [
                {"enum": ["drop_nvm", "sync"]},
                {
                    "type": "object",
                    "properties": {"bounded": {"type": "string", "pattern": _DURATION_PATTERN}},
                    "required": ["bounded"],
                    "additionalProperties": False,
                },
            ],
        }
    ),
]
"""A `Durability`."""
