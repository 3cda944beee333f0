"""Writes measured figures into the tables of README.md and docs/benchmarks.md.

Input: the JSON lines of `python -m benchmarks run all --json`. The README shows the figures that
must reach a bar; docs/benchmarks.md shows all. What stands between the two marker lines of a
document is generated and replaced as a whole, so that no figure is ever typed by hand.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

__all__ = ["BEGIN", "END", "main", "read_figures", "replace_table", "table"]

BEGIN = "<!-- figures:begin -->"
END = "<!-- figures:end -->"
_HEADER = (
    "| bench | metric | ours | peer | peer's figure | ratio | bar |",
    "|---|---|--:|---|--:|--:|--:|",
)
_REQUIRED = ("bench", "metric", "value", "unit", "peer", "peer_value", "ratio")

_Figure = Mapping[str, object]


def read_figures(lines: Iterable[str]) -> list[_Figure]:
    """Parses JSON lines; of a metric that was measured twice the last counts.

    Raises ValueError for a line that is not a figure.
    """
    figures: dict[tuple[object, object], _Figure] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        figure = json.loads(line)
        missing = [name for name in _REQUIRED if name not in figure]
        if missing:
            raise ValueError(f"line {number} is no figure: it lacks {', '.join(missing)}")
        figures[figure["bench"], figure["metric"]] = figure
    return list(figures.values())


def _number(value: object) -> str:
    """Three significant digits, thousands separated; nothing for None."""
    if not isinstance(value, int | float):
        return ""
    if abs(value) >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def _quantity(value: object, unit: object) -> str:
    return f"{_number(value)} {unit}" if value is not None else ""


def _goal(figure: _Figure) -> str:
    """The least ratio, or the highest value; nothing for a figure that is reported only."""
    if figure.get("limit") is not None:
        return f"at most {_quantity(figure['limit'], figure['unit'])}"
    return _number(figure.get("bar"))


def table(figures: Sequence[_Figure]) -> str:
    """The figures as a Markdown table, in their order."""
    rows = [
        " | ".join(
            (
                f"| {figure['bench']}",
                f"`{figure['metric']}`",
                _quantity(figure["value"], figure["unit"]),
                str(figure["peer"] or ""),
                _quantity(figure["peer_value"], figure["unit"]),
                _number(figure["ratio"]),
                f"{_goal(figure)} |",
            )
        )
        for figure in figures
    ]
    return "\n".join((*_HEADER, *rows))


def replace_table(document: str, generated: str) -> str:
    """Puts `generated` between the marker lines. Raises ValueError unless both occur once."""
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise ValueError(f"the document needs exactly one {BEGIN} and one {END}")
    before, rest = document.split(BEGIN)
    _, after = rest.split(END)
    body = f"\n{generated}\n" if generated else "\n"
    return f"{before}{BEGIN}{body}{END}{after}"


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("figures", type=Path, help="JSON lines, one figure each")
    options = parser.parse_args()
    figures = read_figures(options.figures.read_text().splitlines())
    if not figures:
        print(f"{options.figures} has no figure; the tables stay as they are", file=sys.stderr)
        return 1
    root = Path(__file__).resolve().parent.parent
    with_goal = [figure for figure in figures if _goal(figure)]
    for path, chosen in ((root / "README.md", with_goal), (root / "docs/benchmarks.md", figures)):
        path.write_text(replace_table(path.read_text(), table(chosen)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
