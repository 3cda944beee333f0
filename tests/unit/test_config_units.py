"""Sizes, durations and shares: what people write, what is refused, and that both ways agree."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_daemon.config_units import (
    Budget,
    format_duration,
    format_share,
    format_size,
    parse_budget,
    parse_duration,
    parse_share,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        ("512MiB", 512 << 20),
        ("512 MiB", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("31.9MiB", 33_449_574),
        ("4GB", 4_000_000_000),
        ("16kB", 16_000),
        ("100B", 100),
        ("100", 100),
        (100, 100),
        (0, 0),
    ],
)
def test_sizes_are_read(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("4G", "unknown unit 'G'"),
        ("4Gb", "unknown unit 'Gb'"),
        ("4gib", "unknown unit"),
        ("-1", "not a size"),
        (-1, "out of range"),
        (1 << 63, "out of range"),
        ("99999999TiB", "out of range"),
        ("0.3B", "whole number of bytes"),
        ("", "not a size"),
        ("1e9", "not a size"),
        ("4GiB of it", "not a size"),
        (True, "not a size"),
        (1.5, "not a size"),
        (None, "not a size"),
        ([4], "not a size"),
    ],
)
def test_what_is_no_size_is_refused_with_a_hint(text: object, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        parse_size(text)


@given(st.integers(0, (1 << 63) - 1))
def test_a_size_is_read_back_as_written(size: int) -> None:
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("250ms", 0.25),
        ("30s", 30),
        ("5m", 300),
        ("1h30m", 5400),
        ("2d", 172_800),
        ("1.5s", 1.5),
        ("1.001s", 1.001),
        ("1m500ms", 60.5),
        ("0", 0),
        (0, 0),
        ("0s", 0),
    ],
)
def test_durations_are_read(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (5, "with its unit"),
        ("5", "with its unit"),
        (1.5, "with its unit"),
        ("5 m", "with its unit"),
        ("5min", "with its unit"),
        ("-5s", "with its unit"),
        ("", "with its unit"),
        (None, "with its unit"),
        (False, "with its unit"),
        ("0.1ms", "whole number of milliseconds"),
        ("9999999999d", "out of range"),
    ],
)
def test_what_is_no_duration_is_refused_with_a_hint(text: object, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        parse_duration(text)


@given(st.integers(0, 10 * 366 * 86_400_000))
def test_a_duration_is_read_back_as_written(milliseconds: int) -> None:
    assert parse_duration(format_duration(milliseconds / 1000)) == milliseconds / 1000


@pytest.mark.parametrize(("text", "share"), [("10%", 0.1), ("0%", 0), ("100 %", 1), (0.25, 0.25)])
def test_shares_are_read(text: object, share: float) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["101%", 1.1, -0.1, "10", "ten%", True, None, float("nan")])
def test_what_is_no_share_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="not a share"):
        parse_share(text)


@given(st.integers(0, 1000))
def test_a_share_is_read_back_as_written(per_mille: int) -> None:
    assert parse_share(format_share(per_mille / 1000)) == pytest.approx(per_mille / 1000)


def test_a_budget_is_a_size_or_a_share() -> None:
    assert parse_budget("40%").bytes_of(1000) == 400
    assert parse_budget("64KiB").bytes_of(1000) == 64 << 10
    assert str(parse_budget("40%")) == "40%"
    assert str(parse_budget("64KiB")) == "64KiB"
    assert parse_budget(Budget(size=5)) == Budget(size=5)


@pytest.mark.parametrize("text", [0, "0%", "0B", 0.4, None, "120%"])
def test_what_is_no_budget_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"budget|share|size"):
        parse_budget(text)
