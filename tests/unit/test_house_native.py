"""Native rooms use only the rooms that native/README.md allows them, in sources and in CMake."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

_NATIVE = Path(__file__).resolve().parents[2] / "native"
_INCLUDE = re.compile(r'^\s*#\s*include\s+["<]([a-z_]+)/([\w./]+)[">]', re.MULTILINE)
_TEST_ONLY = {"testing", "tests"}
_DOUBLES = re.compile(r'\bfc_testing\b|\bfc_fault_device\b|"testing/[\w.]+"')
_FOR_BENCH = {"fc_fault_device", '"testing/fault_device.hpp"'}
_OUR_SUFFIXES = {".cpp", ".hpp"}


def _rows() -> Iterator[tuple[str, str, str]]:
    """The rows of the table of rooms: folder, purpose, what it may use."""
    for line in (_NATIVE / "README.md").read_text().splitlines():
        cells = [cell.strip().strip("`").rstrip("/") for cell in line.strip().strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 3:
            yield cells[0], cells[1], cells[2]


def _allowed() -> dict[str, set[str] | None]:
    """The rooms that each room of src/ may use; None where it may use all."""
    allowed: dict[str, set[str] | None] = {}
    for folder, _, uses in _rows():
        room = folder.removeprefix("src/")
        if "/" in room:
            continue
        names = set(re.findall(r"[a-z_]+", uses))
        allowed[room] = None if names == {"all"} else names - {"include"}
    return allowed


def _folder(room: str) -> Path:
    return _NATIVE / "src" / room if (_NATIVE / "src" / room).is_dir() else _NATIVE / room


def _sources(room: str) -> list[Path]:
    return sorted(path for path in _folder(room).rglob("*") if path.suffix in _OUR_SUFFIXES)


def _used_in_text(text: str, rooms: set[str]) -> set[str]:
    """Rooms whose private headers a source includes."""
    return {room for room, _ in _INCLUDE.findall(text)} & rooms


def test_includes_are_seen() -> None:
    text = (
        '#include "memory/arena.hpp"\n#include <nvm/log.hpp>\n// "index/x.hpp"\n#include <vector>'
    )
    assert _used_in_text(text, {"memory", "nvm", "index"}) == {"memory", "nvm"}


def test_the_table_lists_every_room() -> None:
    listed = {folder for folder, _, _ in _rows()}
    rooms = {
        f"src/{path.name}"
        for path in (_NATIVE / "src").iterdir()
        if path.is_dir() and any(path.rglob("*.*pp"))
    }
    assert len(rooms) >= 7
    assert rooms <= listed
    assert all(purpose for _, purpose, _ in _rows())


def test_the_table_has_no_cycle() -> None:
    allowed = {room: uses or set() for room, uses in _allowed().items() if uses is not None}
    done: set[str] = set()
    while ready := {room for room, uses in allowed.items() if room not in done and uses <= done}:
        done |= ready
    assert done == set(allowed), f"not in order: {set(allowed) - done}"


@pytest.mark.parametrize("room", sorted(_allowed()))
def test_rooms_include_only_what_they_may(room: str) -> None:
    allowed = _allowed()
    may = allowed[room]
    if may is None:
        may = set(allowed)
    wrong = {
        f"{path.relative_to(_NATIVE)} includes {used}/"
        for path in _sources(room)
        for used in _used_in_text(path.read_text(), set(allowed)) - may - {room}
    }
    assert not wrong


@pytest.mark.parametrize("room", sorted(_allowed()))
def test_rooms_link_only_what_they_may(room: str) -> None:
    allowed = _allowed()
    may = allowed[room]
    listing = _folder(room) / "CMakeLists.txt"
    if may is None or not listing.exists():
        return
    linked = set(re.findall(r"\bfc_([a-z_]+)\b", listing.read_text())) & set(allowed)
    assert linked - {room} <= may


def test_test_doubles_never_link_into_production() -> None:
    production = [
        path
        for path in _NATIVE.rglob("*")
        if (path.suffix in _OUR_SUFFIXES or path.name == "CMakeLists.txt")
        and not _TEST_ONLY & set(path.relative_to(_NATIVE).parts)
        and path != _NATIVE / "CMakeLists.txt"
    ]
    assert len(production) > 10
    # A benchmark is not production: it may measure on a device that is made slow.
    wrong = [
        str(path.relative_to(_NATIVE))
        for path in production
        for used in _DOUBLES.findall(path.read_text())
        if not ("bench" in path.relative_to(_NATIVE).parts and used in _FOR_BENCH)
    ]
    assert not wrong


def test_public_headers_need_no_private_one() -> None:
    headers = sorted((_NATIVE / "include" / "feature_cache").glob("*.hpp"))
    assert headers
    rooms = set(_allowed())
    wrong = [path.name for path in headers if _used_in_text(path.read_text(), rooms)]
    assert not wrong
