"""What tests of deploy/ share: the tools that read its files, and systemd's restrictions."""

import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["DEPLOY", "ROOT", "confined", "run", "scripts", "settings_of", "unit_here"]

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"

_INSTALLED = "/opt/feature-cache/bin/"
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_MDWE = 65  # Linux 6.3: memory is writable or executable, never made both
_PR_MDWE_REFUSE_EXEC_GAIN = 1


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    assert shutil.which(command[0]), f"{command[0]} is not installed (make setup does it)"
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def scripts() -> Path:
    """Where this environment has its console scripts."""
    return Path(sys.executable).parent


def settings_of(unit: Path) -> dict[str, list[str]]:
    """The keys of a unit, each with its values in order."""
    settings: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            settings.setdefault(name, []).append(value)
    return settings


def unit_here(unit: Path, folder: Path) -> Path:
    """A copy with the paths of this environment: systemd checks that they are executable."""
    copy = folder / unit.name
    copy.write_text(unit.read_text().replace(_INSTALLED, f"{scripts()}/"))
    assert _INSTALLED not in copy.read_text()
    return copy


def confined(umask: int) -> list[str]:
    """Python under what a unit's NoNewPrivileges, MemoryDenyWriteExecute and UMask make of it.

    A program of its own confines itself and becomes the one that is wanted: a hook between fork and
    exec would run in a copy of the test's process, whose gRPC threads are gone but not their locks.
    """
    confine = (
        "import ctypes, os, sys\n"
        f"os.umask({umask})\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        f"for option, value in (({_PR_SET_NO_NEW_PRIVS}, 1), "
        f"({_PR_SET_MDWE}, {_PR_MDWE_REFUSE_EXEC_GAIN})):\n"
        "    if libc.prctl(option, value, 0, 0, 0) != 0:\n"
        "        raise OSError(ctypes.get_errno(), f'prctl {option}')\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
    )
    return [sys.executable, "-c", confine]
