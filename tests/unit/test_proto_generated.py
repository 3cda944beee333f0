"""The committed generated code is what proto/ gives, and it bears a stranger's copy beside it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "generate_proto.py"
GENERATED = ROOT / "cache_daemon" / "_proto"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_committed_code_matches_the_protos() -> None:
    done = run(str(TOOL), "--check")
    assert done.returncode == 0, done.stderr


def test_check_sees_stale_missing_and_left_over_files(tmp_path: Path) -> None:
    assert run(str(TOOL), "--output", str(tmp_path)).returncode == 0
    stub = tmp_path / "feature_cache" / "v1" / "admin_pb2.pyi"
    stub.write_text(stub.read_text() + "# edited\n")
    (tmp_path / "feature_cache" / "v1" / "admin_pb2_grpc.py").unlink()
    (tmp_path / "feature_cache" / "left_over.py").write_text("")
    done = run(str(TOOL), "--check", "--output", str(tmp_path))
    assert done.returncode == 1
    for name in ("admin_pb2.pyi", "admin_pb2_grpc.py", "left_over.py"):
        assert name in done.stderr
    assert "feature_cache_pb2.py " not in done.stderr


def test_every_proto_has_its_module() -> None:
    protos = sorted((ROOT / "proto").rglob("*.proto"))
    assert protos
    for proto in protos:
        module = GENERATED / proto.relative_to(ROOT / "proto")
        for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi"):
            assert module.with_name(proto.stem + suffix).is_file()


def test_package_data_ships_the_stubs() -> None:
    spec = importlib.util.find_spec("cache_daemon._proto.feature_cache.v1.admin_pb2_grpc")
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).with_suffix(".pyi").is_file()


@pytest.mark.parametrize("ours_first", [True, False])
def test_lives_beside_another_package_with_the_same_protos(
    tmp_path: Path, ours_first: bool
) -> None:
    """A ranker may have generated its own, older or newer, code from the same file names."""
    other = tmp_path / "proto"
    target = other / "feature_cache" / "v1"
    target.mkdir(parents=True)
    for proto in (ROOT / "proto" / "feature_cache" / "v1").glob("*.proto"):
        text = proto.read_text()
        changed = text.replace(
            "message GetStatusRequest {}", "message GetStatusRequest { bool x = 7; }"
        )
        (target / proto.name).write_text(changed)
    compiled = run(
        "-m",
        "grpc_tools.protoc",
        f"-I{other}",
        f"--python_out={tmp_path}",
        str(target / "admin.proto"),
        str(target / "feature_cache.proto"),
    )
    assert compiled.returncode == 0, compiled.stderr
    ours = "from cache_daemon._proto.feature_cache.v1 import admin_pb2 as a, feature_cache_pb2"
    theirs = "from feature_cache.v1 import admin_pb2 as b, feature_cache_pb2"
    first, second = (ours, theirs) if ours_first else (theirs, ours)
    done = run(
        "-c",
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{first}\n{second}\n"
        "assert b.GetStatusRequest(x=True).x\n"
        "assert 'x' not in a.GetStatusRequest.DESCRIPTOR.fields_by_name\n"
        "assert a.Sample(labels={'k': 'v'}).labels['k'] == 'v'\n"
        "print('both')",
    )
    assert done.stdout == "both\n", done.stderr
