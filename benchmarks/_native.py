"""Native benchmark programs: built when they are missing or stale, run, their lines read.

A program prints one JSON object a round on stdout, with the metric that it belongs to, and its
progress on stderr.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

__all__ = ["ROOT", "build", "free_memory_bytes", "rounds_by_metric"]

ROOT = Path(__file__).resolve().parent.parent
_OPTIONS = ("-DCMAKE_BUILD_TYPE=Release", "-DFC_BENCH=ON")

Round = Mapping[str, float]


def build(program: str, *, grpc: bool = False) -> Path:
    """Builds a program of `native/bench/`; needs cmake, ninja and a compiler.

    `grpc`: it needs the rooms with gRPC. Raises RuntimeError when that fails.
    """
    if shutil.which("cmake") is None:
        raise RuntimeError("cmake is missing: run `make setup` first")
    folder = ROOT / "build" / ("bench-grpc" if grpc else "bench")
    if not (folder / "build.ninja").exists():
        options = (*_OPTIONS, f"-DFC_GRPC={'ON' if grpc else 'OFF'}")
        _run_quietly(("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options))
    _run_quietly(("cmake", "--build", folder, "--target", program))
    return folder / "native" / "bench" / program


def rounds_by_metric(command: Sequence[str | Path]) -> Iterator[tuple[str, list[Round]]]:
    """Runs a program and yields each metric with its rounds as soon as these have ended.

    Raises RuntimeError when the program fails; what it says stands on stderr then.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None  # it was asked for
            lines = (json.loads(line) for line in process.stdout)
            for metric, rounds in groupby(lines, key=lambda line: str(line["metric"])):
                yield metric, list(rounds)
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} failed with {process.returncode}")


def free_memory_bytes() -> int:
    """Memory that a program may take without pushing out another."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo does not say what memory is available")


def _run_quietly(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"{Path(command[0]).name} failed with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
