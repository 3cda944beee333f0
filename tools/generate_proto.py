"""Generates `cache_daemon/_proto` from `proto/`, or checks that it is up to date.

Usage: python tools/generate_proto.py [--check | --output DIR]

The plain output of protoc would not do inside a package, so two things are changed in it:

- Imports become absolute inside `cache_daemon._proto`, so that no top-level package of the name
  `feature_cache` is needed, or shadowed, in the process of whoever embeds us.
- Messages live in a descriptor pool of our own. The default pool is shared by the whole process and
  refuses a second file of the same name or a second message of the same full name; a ranker that
  generated its own code from our .proto files would then fail to import one of the two.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path

__all__ = ["OUTPUT", "PACKAGE", "differences", "generate", "main"]

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "proto"
OUTPUT = ROOT / "cache_daemon" / "_proto"
PACKAGE = "cache_daemon._proto"

POOL_IMPORT = "from google.protobuf import descriptor_pool as _descriptor_pool"
POOL_OURS = f"from {PACKAGE}._pool import POOL as _POOL"
POOL_MODULE = '''"""A descriptor pool of our own, apart from the process-wide one."""

from google.protobuf.descriptor_pool import DescriptorPool

__all__ = ["POOL"]

POOL = DescriptorPool()
'''
INIT_MODULE = '"""Generated from proto/ by tools/generate_proto.py: do not edit."""\n'


def generate(output: Path) -> None:
    """Writes the whole generated package into `output`, which need not exist."""
    protos = sorted(SOURCES.rglob("*.proto"))
    if not protos:
        raise SystemExit(f"no .proto files under {SOURCES}")
    with tempfile.TemporaryDirectory() as scratch:
        _protoc(protos, Path(scratch))
        for made in sorted(Path(scratch).rglob("*.py*")):
            target = output / made.relative_to(scratch)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_rewrite(made.read_text(encoding="utf-8"), made.name))
    for folder in [output, *(path for path in output.rglob("*") if path.is_dir())]:
        if folder.name != "__pycache__":
            (folder / "__init__.py").write_text(INIT_MODULE)
    (output / "_pool.py").write_text(POOL_MODULE)


def _protoc(protos: list[Path], output: Path) -> None:
    # The plugins are looked up beside this interpreter, whether or not its venv is activated.
    binaries = Path(sys.executable).parent
    well_known = resources.files("grpc_tools") / "_proto"
    command = [
        *(sys.executable, "-m", "grpc_tools.protoc", f"-I{SOURCES}", f"-I{well_known}"),
        f"--plugin=protoc-gen-mypy={binaries / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={binaries / 'protoc-gen-mypy_grpc'}",
        *(f"--{plugin}_out={output}" for plugin in ("python", "grpc_python")),
        *(f"--{plugin}_out=quiet:{output}" for plugin in ("mypy", "mypy_grpc")),
        *(str(proto.relative_to(SOURCES)) for proto in protos),
    ]
    done = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"protoc failed:\n{done.stderr}")


def _rewrite(text: str, name: str) -> str:
    text = re.sub(r"^from feature_cache\b", f"from {PACKAGE}.feature_cache", text, flags=re.M)
    if name.endswith("_pb2.py"):
        for old, new in ((POOL_IMPORT, POOL_OURS), ("_descriptor_pool.Default()", "_POOL")):
            if old not in text:
                raise SystemExit(f"{name}: protoc no longer writes {old!r}; adapt this script")
            text = text.replace(old, new)
    return text


def differences(expected: Path, actual: Path) -> list[str]:
    """Relative paths of files that are missing, left over or different in `actual`, sorted."""
    listings = [
        {
            str(path.relative_to(root)): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        for root in (expected, actual)
    ]
    names = listings[0].keys() | listings[1].keys()
    return sorted(name for name in names if listings[0].get(name) != listings[1].get(name))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 on a difference")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    if not options.check:
        generate(options.output)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        stale = differences(Path(scratch), options.output)
    for name in stale:
        print(f"{name} does not match proto/: run python tools/generate_proto.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
