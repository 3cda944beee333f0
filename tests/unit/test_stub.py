"""The stub of the native extension says what the extension is."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import cache_daemon._native as native

_ROOT = Path(__file__).resolve().parents[2]
_STUB = _ROOT / "cache_daemon" / "_native.pyi"
_ALLOWLIST = _ROOT / "tools" / "stubtest_allowlist.txt"


def _stub_module() -> ast.Module:
    return ast.parse(_STUB.read_text())


def _stub_all() -> list[str]:
    for node in _stub_module().body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            assert isinstance(names, list)
            return names
    raise AssertionError(f"{_STUB} has no __all__")


def test_stubtest_agrees() -> None:
    command = [sys.executable, "-m", "mypy.stubtest", "cache_daemon._native", "--concise"]
    command += ["--allowlist", str(_ALLOWLIST)]
    done = subprocess.run(
        command, cwd=_ROOT, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_public_names_of_stub_and_extension_are_the_same() -> None:
    public = {name for name in dir(native) if not name.startswith("_")}
    assert set(_stub_all()) == public


def test_stub_defines_exactly_what_it_lists() -> None:
    defined = {
        node.name
        for node in _stub_module().body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    }
    assert defined == set(_stub_all())


def test_stub_members_exist_in_the_extension() -> None:
    # stubtest trusts __getattr__ and dynamic bases; this looks at each class itself.
    missing = [
        f"{node.name}.{member.name}"
        for node in _stub_module().body
        if isinstance(node, ast.ClassDef)
        for member in node.body
        if isinstance(member, ast.FunctionDef)
        and not hasattr(getattr(native, node.name), member.name)
    ]
    assert not missing


def test_every_bound_class_and_function_is_documented_or_obvious() -> None:
    assert inspect.getdoc(native), "the extension needs a module docstring"
