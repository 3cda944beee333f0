"""The rate that nodes share: never more than it in all, whoever comes, goes, stalls or dies."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warmup.fleet_rate import FleetRate

_FLEET = 1000.0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Document:
    """As a store would keep it; fails or is slow as a test wants."""

    data: bytes | None = None
    version: int = 0
    broken: bool = False
    conflicts: int = 0  # so many writes find that somebody was first
    loses_answers: bool = False  # writes come through, and fail all the same

    def read(self) -> tuple[bytes | None, str]:
        if self.broken:
            raise OSError("the store is away")
        return self.data, str(self.version) if self.data is not None else ""

    def write(self, data: bytes, tag: str) -> bool:
        if self.broken:
            raise OSError("the store is away")
        if self.conflicts:
            self.conflicts -= 1
            return False
        if tag != (str(self.version) if self.data is not None else ""):
            return False
        self.data, self.version = data, self.version + 1
        if self.loses_answers:
            raise OSError("the answer got lost")
        return True


@dataclass
class Fleet:
    clock: Clock = field(default_factory=Clock)
    document: Document = field(default_factory=Document)
    nodes: dict[str, FleetRate] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)

    def join(self, name: str, document: Document | None = None) -> FleetRate:
        def rate(value: float) -> None:
            self.rates[name] = value

        node = FleetRate(document or self.document, name, _FLEET, rate, clock=self.clock)
        self.nodes[name] = node
        return node

    @property
    def spent(self) -> float:
        return sum(self.rates.values())

    def beats(self, count: int) -> None:
        for _ in range(count):
            for node in list(self.nodes.values()):
                node.step()
                assert self.spent <= _FLEET * 1.000001
            self.clock.now += 1.0


def test_one_node_has_all_of_it() -> None:
    fleet = Fleet()
    fleet.join("a")
    fleet.beats(1)
    assert fleet.rates == {"a": _FLEET}


def test_those_who_come_get_their_even_share() -> None:
    fleet = Fleet()
    fleet.join("a")
    fleet.beats(2)
    for name in "bcd":
        fleet.join(name)
    fleet.beats(4)
    assert fleet.rates == dict.fromkeys("abcd", pytest.approx(_FLEET / 4))


def test_who_leaves_gives_it_back() -> None:
    fleet = Fleet()
    for name in "ab":
        fleet.join(name)
    fleet.beats(3)
    fleet.nodes.pop("a").stop()
    assert fleet.rates["a"] == 0
    fleet.beats(2)
    assert fleet.rates["b"] == pytest.approx(_FLEET)


def test_who_dies_is_forgotten_after_its_lease() -> None:
    fleet = Fleet()
    for name in "ab":
        fleet.join(name)
    fleet.beats(3)
    del fleet.nodes["a"]  # it may spend until its own time is over
    fleet.beats(4)
    assert fleet.rates["b"] == pytest.approx(_FLEET / 2)
    fleet.rates["a"] = 0
    fleet.beats(5)
    assert fleet.rates["b"] == pytest.approx(_FLEET)


def test_who_cannot_beat_stops_before_others_forget_it() -> None:
    fleet = Fleet()
    away = Document()
    fleet.join("a", away)
    # One document, of which one node is parted later.
    fleet.document = away
    fleet.join("b")
    fleet.beats(3)
    parted = Document(data=away.data, version=away.version, broken=True)
    fleet.nodes["a"]._document = parted
    fleet.beats(20)
    assert fleet.rates["a"] == 0
    assert fleet.rates["b"] == pytest.approx(_FLEET)
    fleet.nodes["a"]._document = away
    fleet.beats(4)
    assert fleet.rates["a"] == pytest.approx(_FLEET / 2)


def test_a_write_whose_answer_is_lost_is_not_spent() -> None:
    fleet = Fleet()
    fleet.join("a")
    fleet.document.loses_answers = True
    fleet.beats(3)
    assert fleet.spent == 0
    assert "lost" in fleet.nodes["a"].problem
    fleet.document.loses_answers = False
    fleet.beats(2)
    assert fleet.rates["a"] == pytest.approx(_FLEET)


def test_many_nodes_converge() -> None:
    fleet = Fleet()
    for number in range(300):
        fleet.join(f"node-{number}")
    fleet.beats(6)
    assert fleet.spent == pytest.approx(_FLEET)
    assert max(fleet.rates.values()) <= 1.01 * _FLEET / 300


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"[]",
        b'{"version": 1}',
        b'{"version": 2, "nodes": {}}',
        b'{"version": 1, "nodes": {"x": {"rate": -5, "beat": 1, "spends_s": 3}}}',
        b'{"version": 1, "nodes": {"x": {"rate": "many", "beat": 1, "spends_s": 3}}}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_such_document_is_told_and_left_alone(data: bytes) -> None:
    fleet = Fleet()
    fleet.document.data = data
    fleet.join("a").step()
    assert fleet.spent == 0
    assert fleet.nodes["a"].problem
    assert fleet.document.data == data


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["step", "join", "leave", "die", "part", "heal", "conflict", "wait"]),
        st.integers(0, 5),
    ),
    min_size=10,
    max_size=120,
)


@settings(max_examples=100, deadline=None)
@given(_STEPS)
def test_never_more_than_all_of_it(steps: list[tuple[str, int]]) -> None:
    """Whatever happens in whatever order: what is spent, and what is written, never exceeds it."""
    fleet = Fleet()
    away = Document(broken=True)
    for number, (what, which) in enumerate(steps):
        names = sorted(fleet.nodes)
        name = names[which % len(names)] if names else ""
        if what == "join" or not name:
            fleet.join(f"{number}").step()
        elif what == "step":
            fleet.nodes[name].step()
        elif what == "leave":
            fleet.nodes.pop(name).stop()
        elif what == "die":
            fleet.nodes.pop(name)
            fleet.rates[name] = 0.0
        elif what == "part":
            fleet.nodes[name]._document = away
        elif what == "heal":
            fleet.nodes[name]._document = fleet.document
        elif what == "conflict":
            fleet.document.conflicts = which
        else:
            # Every node that lives beats once in its time, as its thread does, whether it helps
            # or not: so a node that is parted learns that its time is over.
            for _ in range(which + 1):
                fleet.clock.now += 1.0
                for node in fleet.nodes.values():
                    node.step()
        assert fleet.spent <= _FLEET * 1.000001
