"""The arithmetic and the registry that every benchmark relies on."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks._harness import Figure, Metric, alternate, discover


def _figure(value: float, peer_value: float | None, **fields: float) -> Figure:
    return Figure("wire", "m", value, "s", peer="them", peer_value=peer_value, **fields)  # type: ignore[arg-type]


def test_a_ratio_above_one_is_better_than_the_peer() -> None:
    assert _figure(300, 100).ratio == 3
    assert _figure(100, 300, lower_is_better=True).ratio == 3
    assert _figure(100, None).ratio is None
    assert _figure(100, 0).ratio is None


def test_a_figure_is_one_json_object_a_line() -> None:
    figure = Figure("b", "m", 1234567.0, "keys/s", "p", 1000.0, bar=2.0, extra={"p50_us": 3})
    assert "\n" not in figure.to_json()
    assert json.loads(figure.to_json()) == {
        "bench": "b",
        "metric": "m",
        "value": 1235000.0,
        "unit": "keys/s",
        "peer": "p",
        "peer_value": 1000.0,
        "ratio": 1234.567,
        "bar": 2.0,
        "limit": None,
        "p50_us": 3,
    }
    with pytest.raises(ValueError, match="ratio"):
        Figure("b", "m", 1.0, "s", extra={"ratio": 9}).to_json()


def test_a_bar_is_on_the_ratio_and_a_limit_on_the_value() -> None:
    assert not _figure(300, 100, bar=3.0).missed
    assert _figure(299, 100, bar=3.0).missed
    assert _figure(100, 299, bar=3.0, lower_is_better=True).missed
    assert not _figure(10, None, limit=10.0).missed
    assert _figure(10.1, None, limit=10.0).missed
    assert not _figure(10.1, None).missed
    assert json.loads(_figure(10, None, limit=10.0).to_json())["limit"] == 10.0


def test_what_a_metric_must_reach_is_said_in_words() -> None:
    assert Metric("m", "what", bar=0.85).goal == "0.85x"
    assert Metric("m", "what", limit=1.12).goal == "at most 1.12"
    assert Metric("m", "what", bar=5, limit=8).goal == "5x, at most 8"
    assert Metric("m", "what").goal == ""


def test_rounds_alternate_who_goes_first() -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return float(len(order))

    assert alternate(lambda: side("us"), lambda: side("them"), 3) == ([1, 4, 5], [2, 3, 6])
    assert order == ["us", "them", "them", "us", "us", "them"]
    for rounds in (0, 1000):
        with pytest.raises(ValueError, match="rounds"):
            alternate(lambda: 0.0, lambda: 0.0, rounds)


def test_every_benchmark_is_found_and_its_metrics_are_distinct() -> None:
    found = discover()
    assert found.keys() >= {"wire", "misses", "hit_ratio"}
    for name, bench in found.items():
        assert bench.name == name
        metrics = [metric.name for metric in bench.metrics]
        assert metrics
        assert len(set(metrics)) == len(metrics)


def test_an_unknown_name_is_answered_with_those_that_are_known() -> None:
    runner = CliRunner(env={"COLUMNS": "200"})
    unknown = runner.invoke(app, ["run", "nothing"])
    assert unknown.exit_code == 2
    assert "misses" in unknown.output
    unknown = runner.invoke(app, ["run", "misses", "--metric", "nothing"])
    assert unknown.exit_code == 2
    assert "cold_keys" in unknown.output
