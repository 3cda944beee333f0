"""The rules of the house that a reader cannot be trusted to notice: who may import whom, what is
public, how long files are, and that nothing names the machine it was written on."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("cache_daemon", "sharding", "warmup", "benchmarks")
_LINES_MAX = 600

# Who may not know whom. A prefix covers the package and everything below it.
_FORBIDDEN_IMPORTS = {
    "cache_daemon": ("benchmarks", "tests", "tools"),
    "sharding": ("cache_daemon", "benchmarks", "tests", "tools"),
    "warmup": ("cache_daemon", "benchmarks", "tests", "tools"),
    "benchmarks": ("tests", "tools"),
}
# The composition root is known only to what starts it.
_KNOW_APP = {"cache_daemon/cli.py"}
_FILE_READS = {"open", "read_text", "read_bytes"}
_ENVIRONMENT = {"environ", "environb", "getenv"}


def _tracked() -> list[Path]:
    """Every file of the checkout that is or would be committed, generated code left out."""
    # The checkout may belong to another user than the one who tests it, as in a container.
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    command += ["--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=_ROOT, capture_output=True, check=True, text=True).stdout
    paths = [_ROOT / name for name in listed.split("\0") if name]
    return [path for path in paths if path.is_file() and "_proto" not in path.parts]


def _modules(*packages: str) -> list[Path]:
    found = [path for package in packages for path in (_ROOT / package).rglob("*.py")]
    return sorted(path for path in found if "_proto" not in path.parts)


def _name(path: Path) -> str:
    return path.relative_to(_ROOT).as_posix()


def _imports(tree: ast.Module, package: tuple[str, ...]) -> Iterator[str]:
    """Absolute dotted names of everything that a module of `package` imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join((*base, *((node.module,) if node.module else ())))
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def _imports_of(path: Path) -> set[str]:
    package = path.relative_to(_ROOT).parent.parts
    return set(_imports(ast.parse(path.read_text()), package))


def _under(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import cache_daemon.app", "cache_daemon.app"),
        ("def f():\n    from cache_daemon import app", "cache_daemon.app"),
        ("from . import app", "cache_daemon.app"),
        ("from ..warmup import replay", "warmup.replay"),
    ],
)
def test_imports_are_seen_in_every_form(source: str, expected: str) -> None:
    package = ("cache_daemon", "stores") if ".." in source else ("cache_daemon",)
    if ".." in source:
        expected = f"cache_daemon.{expected}"
    assert expected in set(_imports(ast.parse(source), package))


@pytest.mark.parametrize("package", sorted(_FORBIDDEN_IMPORTS))
def test_imports_point_one_way(package: str) -> None:
    modules = _modules(package)
    assert modules, f"{package} has no modules"
    wrong = [
        f"{_name(path)} imports {module}"
        for path in modules
        for module in sorted(_imports_of(path))
        for prefix in _FORBIDDEN_IMPORTS[package]
        if _under(module, prefix)
    ]
    assert not wrong


def test_only_what_starts_the_daemon_knows_the_composition_root() -> None:
    knowing = {
        _name(path)
        for path in _modules(*_PACKAGES)
        if any(_under(module, "cache_daemon.app") for module in _imports_of(path))
    }
    assert knowing <= _KNOW_APP


def test_only_metrics_knows_prometheus() -> None:
    knowing = {
        _name(path)
        for path in _modules("cache_daemon", "sharding", "warmup")
        if any(_under(module, "prometheus_client") for module in _imports_of(path))
    }
    assert knowing <= {"cache_daemon/metrics.py"}


def test_only_the_connection_knows_kazoo() -> None:
    knowing = {
        _name(path)
        for path in _modules("cache_daemon", "sharding", "warmup", "benchmarks")
        if any(_under(module, "kazoo") for module in _imports_of(path))
    }
    assert knowing == {"sharding/_kazoo.py", "sharding/connection.py"}


def _outside_reads(tree: ast.Module) -> Iterator[str]:
    """Where a module reads a file or the environment."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in _ENVIRONMENT:
            yield f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id == "open":
                yield f"line {node.lineno}: open()"
            if isinstance(function, ast.Attribute) and function.attr in _FILE_READS - {"open"}:
                yield f"line {node.lineno}: {function.attr}()"


def test_reads_are_seen() -> None:
    source = "import os\nos.environ['A']\nos.getenv('A')\nopen('x')\nPath('x').read_text()"
    assert len(list(_outside_reads(ast.parse(source)))) == 4


# What these read is what they are for: request logs, and snapshots that lie in a directory.
_READ_LOGS = {"warmup/_file_backend.py", "warmup/snapshots.py", "warmup/uploader.py"}


def test_only_config_reads_files_and_the_environment() -> None:
    wrong = [
        f"{_name(path)} {read}"
        for path in _modules("cache_daemon", "sharding", "warmup")
        if not path.name.startswith("config") and _name(path) not in _READ_LOGS
        for read in _outside_reads(ast.parse(path.read_text()))
    ]
    assert not wrong


def test_no_module_keeps_state() -> None:
    wrong = [
        f"{_name(path)} line {node.lineno}"
        for path in _modules("cache_daemon", "sharding", "warmup")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Global)
    ]
    assert not wrong, "dependencies come by constructor, not by `global`"


# ---- public names ------------------------------------------------------------------------------


def _is_command(node: ast.stmt) -> bool:
    """A typer command: its name belongs to the command line, not to importers."""
    return isinstance(node, ast.FunctionDef) and any(
        isinstance(decorator, ast.Call)
        and isinstance(decorator.func, ast.Attribute)
        and decorator.func.attr in {"command", "callback"}
        for decorator in node.decorator_list
    )


def _targets(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    elif isinstance(node, ast.Assign):
        yield from (target.id for target in node.targets if isinstance(target, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id


def _public_problems(tree: ast.Module) -> list[str]:
    """How the names that a module defines and the names that it lists in `__all__` differ."""
    listed: set[str] | None = None
    defined: set[str] = set()
    imported: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            listed = set(ast.literal_eval(node.value))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            imported |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif not _is_command(node):
            defined |= {name for name in _targets(node) if not name.startswith("_")}
    if listed is None:
        return [f"no __all__, but defines {sorted(defined)}"] if defined else []
    problems = [f"defines {name}, which __all__ does not list" for name in defined - listed]
    problems += [f"lists {name}, which it does not have" for name in listed - defined - imported]
    return sorted(problems)


def test_differences_of_public_names_are_seen() -> None:
    source = "__all__ = ['a', 'gone']\ndef a(): ...\nclass B: ...\ndef _c(): ..."
    assert _public_problems(ast.parse(source)) == [
        "defines B, which __all__ does not list",
        "lists gone, which it does not have",
    ]


def test_public_names_are_listed() -> None:
    wrong = [
        f"{_name(path)} {problem}"
        for path in _modules(*_PACKAGES)
        if path.name == "__init__.py" or not path.name.startswith("_")
        for problem in _public_problems(ast.parse(path.read_text()))
    ]
    assert not wrong


# ---- files -------------------------------------------------------------------------------------


def test_files_are_short() -> None:
    sources = [
        path
        for path in _tracked()
        if path.suffix in {".py", ".pyi", ".cpp", ".hpp", ".sh", ".md", ".proto", ".yaml"}
    ]
    assert len(sources) > 50
    sources.remove(_ROOT / "cache_daemon" / "_native.pyi")  # one module has one stub
    long = {_name(path): len(path.read_text().splitlines()) for path in sources}
    assert not {name: lines for name, lines in long.items() if lines > _LINES_MAX}


def test_nothing_names_the_machine_it_was_written_on() -> None:
    # Put together here, so that this file does not find itself.
    folders = [re.escape(f"/{name}/") for name in ("work", "root", "opt/wheels", "home/[a-z]+")]
    pattern = re.compile(r"(?<![\w.*}$])(?:" + "|".join(folders) + r"|\.library\b)")
    wrong = [
        f"{_name(path)}:{number}: {line.strip()[:100]}"
        for path in _tracked()
        if path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not wrong


def test_every_shell_script_stops_at_the_first_error() -> None:
    scripts = [path for path in _tracked() if path.read_bytes().startswith(b"#!/usr/bin/env bash")]
    assert len(scripts) >= 4
    assert not [_name(path) for path in scripts if "set -euo pipefail" not in path.read_text()]


def test_docs_link_only_to_files_that_exist() -> None:
    broken = [
        f"{_name(path)} -> {target}"
        for path in _tracked()
        if path.suffix == ".md"
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
        if "://" not in target and not (path.parent / target).exists()
    ]
    assert not broken
