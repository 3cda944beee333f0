"""How a daemon starts: how far a recovery has come, and what it found; for log, metrics and status.

Nothing here waits or works: the engine recovers while its node is made, in a thread of the
composition root, and writes down how far it is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cache_daemon.metrics import HistogramLike, SampleLike

__all__ = ["Progress", "ProgressLike", "Report", "Start", "StartSample"]

_log = logging.getLogger(__name__)

_PREFIX = "feature_cache_start_"
_OFF = "off"
_COLD = ("cold", "empty")  # what was there could not be used


class ProgressLike(Protocol):
    """What the engine writes down meanwhile; `cache_daemon._native.RecoveryProgress` is one."""

    @property
    def phase(self) -> str: ...
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...  # 0: not known yet


class Report(Protocol):
    """What a start found; `cache_daemon._native.StartReport` is one and says what the words are."""

    @property
    def memory(self) -> str: ...
    @property
    def memory_reason(self) -> str: ...
    @property
    def pages(self) -> str: ...
    @property
    def memory_ms(self) -> float: ...
    @property
    def memory_items(self) -> int: ...
    @property
    def memory_dropped(self) -> int: ...
    @property
    def nvm(self) -> str: ...
    @property
    def nvm_reason(self) -> str: ...
    @property
    def nvm_ms(self) -> float: ...
    @property
    def nvm_items(self) -> int: ...
    @property
    def nvm_dropped(self) -> int: ...
    @property
    def set_aside(self) -> int: ...


@dataclass(frozen=True)
class Progress:
    """How far a recovery has come, at the moment of asking."""

    phase: str  # memory, nvm; "": it has not begun to look
    done: int
    total: int  # 0: not known yet
    seconds: float  # since it began

    @property
    def share(self) -> float:
        """Of the phase, in 0..1; 0 where its total is not known."""
        return min(1.0, self.done / self.total) if self.total else 0.0

    def __str__(self) -> str:
        if not self.phase:
            return "recovering"
        if not self.total:
            return f"recovering {self.phase}: {self.done:,}"
        return f"recovering {self.phase}: {self.share:.0%} of {self.total:,}"


@dataclass(frozen=True)
class StartSample:
    """One gauge of a start."""

    name: str
    help: str
    value: float
    labels: dict[str, str] = field(default_factory=dict)
    kind: str = "gauge"


class Start:
    """The start of one node, from before it is made; a source of samples. Thread-safe."""

    def __init__(self, progress: ProgressLike) -> None:
        self._progress = progress
        self._began = time.monotonic()
        self._told = (self._began, "", 0)  # when, phase and done of the last line in the log
        self._report: Report | None = None

    @property
    def progress(self) -> Progress | None:
        """How far it is; None once it has ended."""
        if self._report is not None:
            return None
        now = self._progress
        return Progress(now.phase, now.done, now.total, time.monotonic() - self._began)

    @property
    def report(self) -> Report | None:
        """What it found; None until it has ended."""
        return self._report

    def tell_progress(self) -> str:
        """Says in the log how far it is, and how fast; returns the line. Main thread only."""
        progress, now = self.progress, time.monotonic()
        if progress is None:
            return ""
        line = str(progress)
        then, phase, done = self._told
        if phase == progress.phase and progress.done > done:
            line += f", {(progress.done - done) / (now - then):,.0f}/s"
        self._told = (now, progress.phase, progress.done)
        _log.info("%s, %.0f s", line, progress.seconds)
        return line

    def end(self, report: Report) -> None:
        """The node is made; says in the log what was found."""
        self._report = report
        if report.memory != _OFF:
            _tell("memory", report.memory, report.memory_reason, _memory_line(report))
        if report.memory != _OFF and report.nvm != _OFF:
            _tell("nvm", report.nvm, report.nvm_reason, _nvm_line(report))

    # ---- a source of samples

    def samples(self) -> Sequence[SampleLike]:
        report, progress = self._report, self.progress
        if progress is not None:
            return [
                StartSample(
                    "feature_cache_recovery_progress",
                    "While the daemon recovers: how much of the phase is done, from 0 to 1.",
                    progress.share,
                    {"phase": progress.phase},
                )
            ]
        return [] if report is None else _samples(report)

    def histograms(self) -> Sequence[HistogramLike]:
        return []


def _tell(what: str, how: str, reason: str, line: str) -> None:
    level = logging.WARNING if how in _COLD else logging.INFO
    _log.log(level, "%s: %s%s", what, line, f": {reason}" if reason else "")


def _memory_line(report: Report) -> str:
    pages = f" on {report.pages}" if report.pages else ""
    if report.memory in ("clean", "checked"):
        return (
            f"{report.memory}, adopted {report.memory_items:,} items in {report.memory_ms:.0f} ms"
            f"{pages}{_dropped(report.memory_dropped)}"
        )
    return f"{report.memory}, starts empty{pages}{_dropped(report.memory_dropped)}"


def _nvm_line(report: Report) -> str:
    if report.nvm in ("kept", "rebuilt"):
        return (
            f"{report.nvm}, {report.nvm_items:,} items in {report.nvm_ms:.0f} ms"
            f"{_dropped(report.nvm_dropped)}"
        )
    return f"{report.nvm}, starts empty{_dropped(report.nvm_dropped)}"


def _dropped(items: int) -> str:
    return f", {items:,} dropped" if items else ""


def _samples(report: Report) -> list[SampleLike]:
    def gauge(name: str, help: str, value: float, **labels: str) -> StartSample:
        return StartSample(_PREFIX + name, help, value, labels)

    items = "Items that the last start kept from before."
    dropped = "Items from before that the last start dropped: removed from the config, or damaged."
    return [
        gauge(
            "info",
            "How the last start went; always 1.",
            1,
            memory=report.memory,
            nvm=report.nvm,
            pages=report.pages,
        ),
        gauge("memory_seconds", "How long adopting the memory took.", report.memory_ms / 1000),
        gauge("nvm_seconds", "How long recovering the NVM tier took.", report.nvm_ms / 1000),
        gauge("items", items, report.memory_items, tier="dram"),
        gauge("items", items, report.nvm_items, tier="nvm"),
        gauge("dropped_items", dropped, report.memory_dropped, tier="dram"),
        gauge("dropped_items", dropped, report.nvm_dropped, tier="nvm"),
        StartSample(
            _PREFIX + "set_aside_total",
            "Files of an unknown format that the last start found and set aside.",
            report.set_aside,
            kind="counter",
        ),
    ]
