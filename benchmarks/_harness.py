"""What every benchmark shares: the shape of a figure, the registry, alternating rounds.

A benchmark is a module of this package, its name without an underscore at the front, that exposes
`BENCH`, an object that satisfies `Bench`; nothing else registers it.
"""

import importlib
import json
import pkgutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import benchmarks

__all__ = ["Bench", "Figure", "Metric", "Settings", "alternate", "discover", "goal", "median"]

# Rounds are paired (ours, peer); more than this would only hide a benchmark that does not settle.
MAX_ROUNDS = 101


@dataclass(frozen=True)
class Metric:
    """One metric of a benchmark: its name, what it measures, what it must reach.

    Without a bar and a limit it is reported only.
    """

    name: str
    what: str
    bar: float | None = None  # the least ratio to the peer
    limit: float | None = None  # the highest value, in the figure's unit

    @property
    def goal(self) -> str:
        """The bar or the limit in words; empty without either."""
        return goal(self.bar, self.limit)


@dataclass(frozen=True)
class Settings:
    """How to run. `quick`: the whole benchmark within a minute on warm caches."""

    quick: bool = False


@dataclass(frozen=True)
class Figure:
    """One measured figure beside its peer; `ratio` above 1 means better than the peer.

    `extra` holds whatever else explains the figure; its keys join the JSON object.
    """

    bench: str
    metric: str
    value: float
    unit: str
    peer: str | None = None
    peer_value: float | None = None
    lower_is_better: bool = False
    bar: float | None = None
    limit: float | None = None
    extra: Mapping[str, object] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """How many times better than the peer; None without a peer or at a zero divisor."""
        if self.peer_value is None:
            return None
        over, under = (
            (self.peer_value, self.value) if self.lower_is_better else (self.value, self.peer_value)
        )
        return over / under if under else None

    @property
    def missed(self) -> bool:
        """Whether it stays below its bar or exceeds its limit."""
        ratio = self.ratio
        below = self.bar is not None and ratio is not None and ratio < self.bar
        return below or (self.limit is not None and self.value > self.limit)

    def to_json(self) -> str:
        """One line of JSON."""
        ratio = self.ratio
        line: dict[str, object] = {
            "bench": self.bench,
            "metric": self.metric,
            "value": _rounded(self.value),
            "unit": self.unit,
            "peer": self.peer,
            "peer_value": None if self.peer_value is None else _rounded(self.peer_value),
            "ratio": None if ratio is None else round(ratio, 3),
            "bar": self.bar,
            "limit": self.limit,
        }
        clash = line.keys() & self.extra.keys()
        if clash:
            raise ValueError(f"extra fields of {self.metric} hide {sorted(clash)}")
        return json.dumps(line | dict(self.extra))


class Bench(Protocol):
    """A benchmark: a name, its metrics, and a run that yields figures as they are ready."""

    @property
    def name(self) -> str: ...

    @property
    def metrics(self) -> Sequence[Metric]: ...

    def run(self, metrics: Sequence[str], settings: Settings) -> Iterator[Figure]:
        """Measures the named metrics (all of them known), each with its peers in this same run."""
        ...


def goal(bar: float | None, limit: float | None) -> str:
    """What a figure must reach, in words: `1.8x`, `at most 10`, both, or nothing."""
    words = [] if bar is None else [f"{bar:g}x"]
    if limit is not None:
        words.append(f"at most {limit:g}")
    return ", ".join(words)


def discover() -> dict[str, Bench]:
    """Every benchmark by name, in order of name."""
    found: dict[str, Bench] = {}
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name.startswith("_"):
            continue
        bench: Bench | None = getattr(
            importlib.import_module(f"benchmarks.{module.name}"), "BENCH", None
        )
        if bench is not None:
            found[bench.name] = bench
    return dict(sorted(found.items()))


def alternate(
    ours: Callable[[], float], peer: Callable[[], float], rounds: int
) -> tuple[list[float], list[float]]:
    """Measures both sides `rounds` times, swapping who goes first, so that drift hits both."""
    if not 1 <= rounds <= MAX_ROUNDS:
        raise ValueError(f"rounds must be 1 to {MAX_ROUNDS}, not {rounds}")
    our_values: list[float] = []
    peer_values: list[float] = []
    for round_number in range(rounds):
        if round_number % 2 == 0:
            our_values.append(ours())
            peer_values.append(peer())
        else:
            peer_values.append(peer())
            our_values.append(ours())
    return our_values, peer_values


def median(values: Sequence[float]) -> float:
    """The median, as every figure reports it."""
    return statistics.median(values)


def _rounded(value: float) -> float:
    """Four significant digits say all that a run on shared cores can."""
    return float(f"{value:.4g}")
