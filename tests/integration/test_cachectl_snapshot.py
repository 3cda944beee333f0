"""`cachectl snapshot` over real logs in a directory and in a real S3."""

import json
import time
import uuid
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from cache_daemon._native import (
    DomainConfig,
    NamespaceConfig,
    Node,
    NodeConfig,
    RecordConfig,
    encode_get,
    inspect_request_log,
)
from cache_daemon.cachectl import app
from tests.s3_server import BUCKET, S3Server
from warmup.backend import BackendOptions, open_backend
from warmup.snapshots import SnapshotStore


def record(folder: Path, host: str) -> Path:
    """The log of one host: 50 keys, asked for twice."""
    domain = DomainConfig(name="all", budget_bytes=1 << 20)
    node = Node(
        NodeConfig(
            memory_bytes=8 << 20,
            namespaces=[NamespaceConfig(name="pin", domains=[domain], default_domain="all")],
            record=RecordConfig(dir=str(folder), sample=1.0, host=host),
        )
    )
    keys = [b"key %d" % number for number in range(50)]
    for _ in range(2):
        node.batch_get(encode_get([("pin", keys, "")]), 5.0)
    node.shutdown()
    (path,) = folder.glob("*.fcrl")
    return path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["snapshot", *arguments])


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """How the command is told where snapshots lie; two hosts have uploaded theirs."""
    url, options, place = f"file://{tmp_path}/snapshots", BackendOptions(), []
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        url, options = f"s3://{BUCKET}/{uuid.uuid4().hex}", BackendOptions(server.endpoint)
        place = ["--endpoint", server.endpoint]
    store = SnapshotStore(open_backend(url, options), "default", "colocated")
    for host in ("host-a", "host-b"):
        path = record(tmp_path / host, host)
        store.upload(path, inspect_request_log(path.read_bytes()), time.time())
    return ["--url", url, *place]


def test_list_names_all(place: list[str]) -> None:
    result = run("list", *place)
    assert result.exit_code == 0, result.output
    assert "host-a" in result.output
    assert "2 snapshots" in result.output
    lines = run("list", "host-b", *place, "--json").output.splitlines()
    (found,) = (json.loads(line) for line in lines)
    assert (found["host"], found["keys"], found["distinct_keys"]) == ("host-b", 100, 50)


def test_inspect_shows_namespaces(place: list[str]) -> None:
    result = run("inspect", *place)
    assert result.exit_code == 0
    assert "pin" in result.output
    assert "100% of requests" in result.output


def test_verify_reads_all_and_tells_damage(place: list[str], tmp_path: Path) -> None:
    result = run("verify", *place)
    assert result.exit_code == 0, result.output
    assert "2 snapshots read, 0 damaged" in result.output
    if not place[1].startswith("file"):
        return
    (log,) = (tmp_path / "snapshots").rglob("host-a*.fcrl")
    data = bytearray(log.read_bytes())
    data[len(data) // 2] ^= 1
    log.write_bytes(data)
    result = run("verify", *place)
    assert result.exit_code == 1
    assert "not those that were uploaded" in result.output
    assert "2 snapshots read, 1 damaged" in result.output


def test_the_place_may_come_from_a_config(place: list[str], tmp_path: Path) -> None:
    snapshots = {"url": place[1]} | ({"endpoint": place[3]} if len(place) > 2 else {})
    config = {
        "listen": {"grpc": [f"unix:{tmp_path}/data.sock"]},
        "memory": {"size": "8MiB"},
        "namespaces": {"pin": {"domains": {"all": {"budget": "50%"}}}},
        "warmup": {"plan": "none", "snapshots": snapshots},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    result = run("list", "--config", str(path))
    assert result.exit_code == 0, result.output
    assert "2 snapshots" in result.output


def test_wrong_usage_and_places_that_are_not_there(tmp_path: Path) -> None:
    assert run("list").exit_code == 2
    assert run("list", "--url", "ftp://x").exit_code == 2
    assert "0 snapshots" in run("list", "--url", f"file://{tmp_path}/none").output
    result = run("list", "--url", f"s3://{BUCKET}/x", "--endpoint", "http://127.0.0.1:9")
    assert result.exit_code == 3
