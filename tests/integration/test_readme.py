"""The README's client example runs as it stands against the config that it is shown with."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cache_daemon.client import Client
from tests.daemons import CacheDaemon

_ROOT = Path(__file__).resolve().parents[2]
_ADDRESS = "127.0.0.1:7070"


def _example() -> str:
    found = re.search(
        r"<!-- example: client -->\n```python\n(.*?)```", (_ROOT / "README.md").read_text(), re.S
    )
    assert found, "the README has lost its client example"
    return found[1]


def _config() -> dict[str, Any]:
    """configs/colocated.yaml without its store and its NVM, at a size for tests."""
    config: dict[str, Any] = yaml.safe_load((_ROOT / "configs/colocated.yaml").read_text())
    assert _ADDRESS in config["listen"]["grpc"], "README and configs/colocated.yaml differ"
    for namespace in config["namespaces"].values():
        for key in ("store", "negative_ttl", "fetch_timeout", "nvm", "speculative"):
            namespace.pop(key, None)
        for domain in namespace["domains"].values():
            domain.pop("refresh_ahead", None)
    return {"memory": {"size": "64MiB"}, "namespaces": config["namespaces"]}


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    daemon = CacheDaemon(tmp_path, _config())
    with daemon:
        yield daemon.data_address


def test_the_client_example_prints_what_was_put(address: str) -> None:
    vectors = np.full((2, 64), 0.5, np.float32)
    with Client(address) as client:
        written = client.batch_put(
            {"pin_visual": (np.array([11, 13]), vectors), "user": ([b"u:7"], [b"clicked 12"])}
        )
        assert written.all_stored
    example = _example()
    assert _ADDRESS in example
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(example.replace(_ADDRESS, address), {})
    assert output.getvalue() == "0.5 b'clicked 12' ['HIT_DRAM', 'MISS', 'HIT_DRAM']\n"


def test_the_client_example_is_ten_lines() -> None:
    assert len(_example().strip().splitlines()) <= 10
