"""`python -m benchmarks list | run NAME [--metric M] [--quick] [--json]`."""

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks._harness import Bench, Figure, Settings, discover, goal

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

_SHOWN_FIELDS = 8  # extra fields of one figure that the table shows; JSON has all


@app.command("list")
def list_benchmarks() -> None:
    """Lists every benchmark, its metrics and what they must reach."""
    table = Table("bench", "metric", "bar", "what")
    for bench in discover().values():
        for metric in bench.metrics:
            table.add_row(bench.name, metric.name, metric.goal, metric.what)
    Console().print(table)


@app.command("run")
def run_benchmark(
    name: Annotated[str, typer.Argument(help="a benchmark, or `all`")],
    metric: Annotated[list[str] | None, typer.Option(help="only this metric; repeatable")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="within a minute on warm caches")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
) -> None:
    """Runs a benchmark with its peers in the same run and prints each figure as it is ready."""
    benches = discover()
    if name != "all" and name not in benches:
        raise typer.BadParameter(f"no benchmark {name!r}; known: {', '.join(benches)}")
    chosen = list(benches.values()) if name == "all" else [benches[name]]
    wanted = [(bench, _chosen_metrics(bench, metric)) for bench in chosen]
    figures: list[Figure] = []
    for bench, names in wanted:
        for figure in bench.run(names, Settings(quick=quick)):
            figures.append(figure)
            if as_json:
                print(figure.to_json(), flush=True)
            else:
                print(f"measured {figure.bench} {figure.metric}", file=sys.stderr, flush=True)
    if not as_json:
        Console().print(_table(figures))


def _chosen_metrics(bench: Bench, asked: list[str] | None) -> list[str]:
    known = [metric.name for metric in bench.metrics]
    unknown = [name for name in asked or [] if name not in known]
    if unknown:
        raise typer.BadParameter(
            f"{bench.name} has no metric {unknown[0]!r}; known: {', '.join(known)}"
        )
    return [name for name in known if not asked or name in asked]


def _table(figures: list[Figure]) -> Table:
    table = Table("metric", "value", "peer", "peer value", "ratio", "bar", "more")
    for figure in figures:
        ratio = figure.ratio
        colour = "red" if figure.missed else "green"
        more = [f"{key}={_short(value)}" for key, value in figure.extra.items()][:_SHOWN_FIELDS]
        table.add_row(
            f"{figure.bench} {figure.metric}",
            f"[{colour}]{_short(figure.value)} {figure.unit}[/]",
            figure.peer or "",
            "" if figure.peer_value is None else f"{_short(figure.peer_value)} {figure.unit}",
            "" if ratio is None else f"[{colour}]{ratio:.2f}x[/]",
            goal(figure.bar, figure.limit),
            "\n".join(more),
        )
    return table


def _short(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    app()
