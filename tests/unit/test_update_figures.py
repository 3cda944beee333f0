"""The tables of the documents are made from measured figures and from nothing else."""

from pathlib import Path

import pytest

from benchmarks._harness import Figure
from tools.update_figures import BEGIN, END, read_figures, replace_table, table

_ROOT = Path(__file__).resolve().parents[2]


def _line(metric: str, value: float) -> str:
    figure = Figure(
        bench="wire",
        metric=metric,
        value=value,
        unit="req/s",
        peer="redis",
        peer_value=500.0,
        bar=2.0,
    )
    return figure.to_json()


def test_harness_output_becomes_rows() -> None:
    figures = read_figures([_line("a", 1000.0), "", _line("b", 250.0)])
    rows = table(figures).splitlines()[2:]
    assert rows == [
        "| wire | `a` | 1,000 req/s | redis | 500 req/s | 2 | 2 |",
        "| wire | `b` | 250 req/s | redis | 500 req/s | 0.5 | 2 |",
    ]


def test_a_limit_stands_where_a_bar_would() -> None:
    figure = Figure(bench="nvm", metric="m", value=9.2, unit="B", limit=10.0)
    assert table(read_figures([figure.to_json()])).splitlines()[2:] == [
        "| nvm | `m` | 9.2 B |  |  |  | at most 10 B |",
    ]


def test_a_later_figure_replaces_an_earlier_one() -> None:
    figures = read_figures([_line("a", 1.0), _line("a", 2.0)])
    assert [figure["value"] for figure in figures] == [2.0]


def test_a_line_that_is_no_figure_is_refused() -> None:
    with pytest.raises(ValueError, match="line 1 is no figure: it lacks metric"):
        read_figures(['{"bench": "wire", "value": 1}'])


def test_only_what_is_between_the_markers_changes() -> None:
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    once = replace_table(document, "new")
    assert once == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert replace_table(once, "new") == once


@pytest.mark.parametrize("document", ["none", f"{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_a_document_without_its_markers_is_refused(document: str) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        replace_table(document, "new")


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_the_documents_have_their_markers(name: str) -> None:
    document = (_ROOT / name).read_text()
    assert replace_table(document, "new") != document
