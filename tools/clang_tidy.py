"""Runs clang-tidy over the native sources, two at a time, skipping what passed before unchanged.

What passed is remembered in the build directory under a digest of the source, every native header
and the settings; so a second run costs a second, and a changed header checks everything again.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

__all__ = ["main"]

_FILE_SECONDS_MAX = 300  # one translation unit that takes longer is reported as a failure


def _digest(paths: list[Path]) -> str:
    hasher = hashlib.sha256()
    for path in paths:
        hasher.update(str(path).encode() + b"\0" + path.read_bytes() + b"\0")
    return hasher.hexdigest()


def _sources(build: Path, native: Path) -> list[Path]:
    """The translation units of ours that the build knows, in order and without generated code."""
    entries = json.loads((build / "compile_commands.json").read_text())
    found = {Path(entry["directory"], entry["file"]).resolve() for entry in entries}
    return sorted(path for path in found if path.is_relative_to(native))


def _check(source: Path, build: Path) -> tuple[Path, str]:
    """Returns the source and what clang-tidy complains of; empty when it is clean."""
    tool = Path(sys.executable).parent / "clang-tidy"
    command = [str(tool), "--quiet", "-p", str(build), str(source)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_FILE_SECONDS_MAX, check=False
        )
    except subprocess.TimeoutExpired:
        return source, f"{source}: no verdict within {_FILE_SECONDS_MAX} s"
    return source, "" if done.returncode == 0 else done.stdout + done.stderr


def main() -> int:
    """Returns the exit status: 0 when every file is clean."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--build", type=Path, required=True, help="has compile_commands.json")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8))
    options = parser.parse_args()

    root = Path(__file__).resolve().parent.parent
    native = root / "native"
    shared = [root / ".clang-tidy", Path(__file__), *sorted(native.rglob("*.hpp"))]
    common = _digest(shared)
    memory = options.build / ".clang_tidy_passed.json"
    passed: dict[str, str] = json.loads(memory.read_text()) if memory.exists() else {}

    sources = _sources(options.build, native)
    if not sources:
        print(f"{options.build}: no native source is built there", file=sys.stderr)
        return 1
    wanted = {path: _digest([path]) + common for path in sources}
    stale = [path for path in sources if passed.get(str(path)) != wanted[path]]
    failures = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for source, complaint in pool.map(lambda path: _check(path, options.build), stale):
            if complaint:
                failures += 1
                print(complaint)
            else:
                passed[str(source)] = wanted[source]
    memory.write_text(json.dumps(passed, indent=1))
    print(
        f"clang-tidy: {len(sources)} files, {len(stale)} checked, {failures} with findings",
        file=sys.stderr,
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
