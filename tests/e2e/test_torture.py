"""Daemons killed under load: twenty kills in all modes; `make torture` is the long run of it."""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.torture.lives import MODES, Lives, Mode
from tests.torture.model import Fault

KILLS = {"ample": 6, "evicting": 5, "nvm": 4, "reboot": 2, "bounded": 2, "dropped": 1}
SEED = 20_26


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def lives_of(mode: Mode, seed: int, folder: Path, stack: ExitStack) -> Lives:
    lives = Lives(mode, seed, folder)
    stack.callback(lives.discard)
    return lives


def test_there_are_twenty_kills_in_all_modes() -> None:
    assert KILLS.keys() == MODES.keys()
    assert sum(KILLS.values()) == 20


@pytest.mark.parametrize("name", MODES)
def test_nothing_is_wrong_after_kills(name: str, tmp_path: Path, stack: ExitStack) -> None:
    lives = lives_of(MODES[name], SEED, tmp_path, stack)
    outcome = lives.run(KILLS[name])
    print(f"seed {SEED}: {outcome.to_json()}")
    assert outcome.kills == KILLS[name]
    assert outcome.counts["puts"] > 100
    assert outcome.counts["compared"] > 100
    if name not in ("reboot", "bounded", "dropped"):
        assert outcome.counts["found"] > outcome.counts["compared"] / 20, "it starts cold"


def test_a_daemon_that_forgets_is_noticed(tmp_path: Path, stack: ExitStack) -> None:
    forgets = dataclasses.replace(MODES["ample"], persist=False)
    with pytest.raises(Fault, match=r"is missing(.*\n)+mode ample, seed 2026, after 1 kills"):
        lives_of(forgets, SEED, tmp_path, stack).run(5)


def test_nothing_is_left_behind(tmp_path: Path, stack: ExitStack) -> None:
    folder = tmp_path / "torture"
    folder.mkdir()
    lives_of(dataclasses.replace(MODES["evicting"], persist=False), SEED, folder, stack).run(1)
    assert not folder.exists()
