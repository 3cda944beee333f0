"""What daemons are asked for that record and warm up, and the store that they ask, for `warmup`."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import redis

from benchmarks._daemon import DaemonError
from benchmarks._servers import RunningServer
from cache_daemon.client import Client, Status

__all__ = ["Ids", "Request", "ask", "fill_redis", "wait_for_snapshots"]

Ids = npt.NDArray[np.uint64]
Request = Mapping[str, Ids]
"""The ids that one request asks for, by namespace."""

VALUE_BYTES = 200
_POLL_S = 0.05
_FILL_KEYS = 10_000
_HITS = np.array([Status.HIT_DRAM, Status.HIT_NVM], np.uint8)


def ask(client: Client, request: Request) -> tuple[int, int]:
    """Sends one request; returns how many cells were hits, of how many.

    Raises DaemonError where a cell has no value and the store has one for each.
    """
    hits = cells = 0
    reply = client.batch_get(request)
    for name in request:
        column = reply[name]
        hits += int(np.isin(column.statuses, _HITS).sum())
        cells += len(column.statuses)
        if not column.found.all():
            status = Status(int(column.statuses[~column.found][0])).name
            raise DaemonError(f"a cell of {name} has no value: {status}")
    return hits, cells


def fill_redis(server: RunningServer, namespace: str, ids: Ids) -> None:
    """One value an id, as the daemon's store of type redis asks for it."""
    with redis.Redis(port=server.port) as client:
        for first in range(0, ids.size, _FILL_KEYS):
            part = ids[first : first + _FILL_KEYS]
            prefix = namespace.encode() + b":"
            client.mset(
                {
                    prefix + key: key * (VALUE_BYTES // 8)
                    for key in (int(number).to_bytes(8, "little") for number in part)
                }
            )


def wait_for_snapshots(folder: Path, timeout_s: float) -> int:
    """Waits until the windows that were recorded are uploaded; returns the bytes of their logs.

    `folder`: where a `file://` store lies. Raises DaemonError when nothing comes, or it goes on.
    """
    deadline = time.monotonic() + timeout_s
    before: Sequence[Path] = ()
    since = time.monotonic()
    while time.monotonic() < deadline:
        logs = sorted(folder.rglob("*.fcrl"))
        if list(before) != logs:
            before, since = logs, time.monotonic()
        if logs and time.monotonic() - since > timeout_s / 3:
            return sum(path.stat().st_size for path in logs)
        time.sleep(_POLL_S)
    raise DaemonError(f"{len(before)} snapshots in {folder} after {timeout_s:g} s")
