"""What the demo shows while it runs: a live view on a terminal, plain lines anywhere else."""

import time
from collections.abc import Sequence
from datetime import datetime, timezone
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from benchmarks.demo.daemon_stats import DaemonStats
from benchmarks.demo.replay import Progress

__all__ = ["View"]

_LINE_EVERY_S = 2.5
_REFRESH_PER_SECOND = 4
_BAR_WIDTH = 10
_LEVELS = "▁▂▃▄▅▆▇█"
_HISTORY_POINTS = 50


class View:
    """A context manager; `update` may be called as often as one likes.

    On a terminal one frame is drawn over and over; elsewhere a line is printed every 2.5 s.
    """

    def __init__(self, console: Console, times: Sequence[int], seconds_max: float) -> None:
        """`times` are the seconds since 1970 of all interactions, in order."""
        self._console = console
        self._times = times
        self._seconds_max = seconds_max
        self._last_line_s = 0.0
        self._history: list[float] = []  # hit ratios, one for each share of the time
        self._live = (
            Live(console=console, refresh_per_second=_REFRESH_PER_SECOND)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> "View":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, progress: Progress, stats: DaemonStats, *, last: bool = False) -> None:
        """Shows a reading; `last` shows it even if a line was printed just before."""
        self._remember(progress)
        if self._live:
            self._live.update(self._frame(progress, stats))
        elif last or time.monotonic() - self._last_line_s >= _LINE_EVERY_S:
            self._last_line_s = time.monotonic()
            self._console.print(self._line(progress, stats), highlight=False, soft_wrap=True)

    def _remember(self, progress: Progress) -> None:
        if progress.requests and len(self._history) < self._share_done(progress) * _HISTORY_POINTS:
            self._history.append(progress.recent_overall_hit_ratio)

    def _share_done(self, progress: Progress) -> float:
        """By the clock or by the data, whichever ends the replay first."""
        by_clock = progress.elapsed_s / self._seconds_max
        by_data = progress.position / max(1, len(self._times) - 1)
        return min(1.0, max(by_clock, by_data))

    def _date(self, progress: Progress) -> str:
        seconds = int(self._times[progress.position])
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%b %Y")

    def _line(self, progress: Progress, stats: DaemonStats) -> str:
        ratios = " ".join(
            f"{name}={ratio:.1%}" for name, ratio in progress.recent_hit_ratio.items()
        )
        return (
            f"{self._share_done(progress):4.0%} {self._date(progress)} "
            f"{progress.requests:,} requests, {progress.recent_rate:,.0f}/s, "
            f"p50 {progress.recent_p50_s * 1e3:.2f} ms, p99 {progress.recent_p99_s * 1e3:.2f} ms; "
            f"hit ratio {ratios}, from NVM {progress.recent_nvm_hit_ratio:.1%}; "
            f"store reads saved {stats.reads_saved(progress.keys):,} keys"
        )

    def _frame(self, progress: Progress, stats: DaemonStats) -> RenderableType:
        share = self._share_done(progress)
        head = Table.grid(padding=(0, 2))
        head.add_row(
            f"[bold]{self._date(progress)}[/]",
            ProgressBar(total=1.0, completed=share, width=30),
            f"{share:4.0%}",
            f"{progress.elapsed_s:3.0f} s",
        )
        figures = Text.from_markup(
            f"[bold]{progress.recent_rate:,.0f}[/] requests/s   "
            f"[bold]{progress.recent_p50_s * 1e3:.2f}[/] ms p50   "
            f"[bold]{progress.recent_p99_s * 1e3:.2f}[/] ms p99   "
            f"{progress.requests:,} requests"
        )
        saved = Text.from_markup(
            f"feature store: {stats.store_calls:,} calls for {stats.store_keys:,} keys, "
            f"[bold]{stats.reads_saved(progress.keys):,}[/] key reads saved\n"
            f"{progress.checked_values:,} values checked, "
            + (
                f"[bold red]{progress.failure_count} failures[/]"
                if progress.failure_count
                else "all right"
            )
        )
        levels = [_LEVELS[min(7, int(8 * ratio))] for ratio in self._history]
        climb = Text.from_markup(
            f"hit ratio over time  [bold]{''.join(levels)}[/]  "
            f"[bold]{progress.recent_nvm_hit_ratio:.1%}[/] of keys from NVM"
        )
        parts: list[RenderableType] = [
            head,
            figures,
            climb,
            self._namespaces(progress, stats),
            saved,
        ]
        return Panel(Group(*parts), title="feature cache: MovieLens ranking requests", expand=False)

    def _namespaces(self, progress: Progress, stats: DaemonStats) -> Table:
        table = Table(box=None, padding=(0, 1, 0, 0))
        table.add_column("namespace, domain")
        for column in ("hit ratio", "", "of hits", "items", "memory", "evicted"):
            table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
        for name, ratio in progress.recent_hit_ratio.items():
            bar = ProgressBar(total=1.0, completed=ratio, width=_BAR_WIDTH)
            table.add_row(f"[bold]{name}[/]", f"[bold]{ratio:.1%}[/]", bar)
            for domain in stats.domains(name):
                used, budget = (
                    size / (1 << 20) for size in (domain.used_bytes, domain.budget_bytes)
                )
                table.add_row(
                    *(f"  {domain.name}", "", ""),
                    f"{_per(domain.hits, stats.hits(name)):.0%}",
                    f"{domain.items:,}",
                    f"{used:.1f}/{budget:.1f} MiB",
                    f"{domain.evictions:,}",
                )
            if (nvm := stats.nvm_of(name)) is not None:
                used, budget = (size / (1 << 20) for size in (nvm.used_bytes, nvm.budget_bytes))
                table.add_row(
                    *("  (NVM)", "", ""),
                    f"{_per(nvm.hits, stats.hits(name)):.0%}",
                    f"{nvm.items:,}",
                    f"{used:.1f}/{budget:.1f} MiB",
                    f"{nvm.evicted:,}",
                )
        return table


def _per(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
