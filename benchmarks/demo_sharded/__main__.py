"""`python -m benchmarks.demo_sharded`: three leaves, a root and ZooKeeper; a leaf is killed.

Exit codes: 0 no batch failed, no value was wrong, and the cluster recovered; 1 otherwise.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks._cluster import ClusterError, ShardedCluster
from benchmarks._cluster_load import Load, Second, by_second
from benchmarks._zookeeper import zookeeper
from cache_daemon.cachectl_admin import DaemonUnreachable, RequestRefused

_LEAVES = 3
_SHARDS = 256
_KILLED = 1  # its place among the leaves
_MISSING_MAX = 0.001  # of the keys asked, but for the second of the kill and the one after
_HEADER = "  s  batches   hits missing  slowest   shards online/warming"


@dataclass(frozen=True)
class _Times:
    """How many seconds each part takes."""

    warm: int
    without: int  # the leaf that was killed
    back: int
    items: int


_FULL = _Times(8, 14, 12, 40_000)
_QUICK = _Times(3, 6, 5, 8_000)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="within twenty seconds")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """A cluster of three leaves loses one under load; shows the recovery, second by second."""
    console = Console(stderr=as_json, highlight=False)
    with tempfile.TemporaryDirectory(prefix="feature-cache-sharded-") as folder:
        try:
            report = _run(console, Path(folder), _QUICK if quick else _FULL)
        except (ClusterError, DaemonUnreachable, RequestRefused, RuntimeError) as error:
            console.print(str(error), style="red", markup=False, soft_wrap=True)
            raise typer.Exit(1) from error
    if as_json:
        print(json.dumps(report))
    for problem in report["problems"]:
        console.print(f"failed: {problem}", style="bold red", markup=False, soft_wrap=True)
    if report["problems"]:
        raise typer.Exit(1)


def _run(console: Console, folder: Path, times: _Times) -> dict[str, Any]:
    with (
        zookeeper(folder) as ensemble,
        ShardedCluster(folder, ensemble.hosts, leaves=_LEAVES, shard_count=_SHARDS) as cluster,
    ):
        began = time.monotonic()
        cluster.start()
        console.print(
            f"ZooKeeper at {ensemble.hosts}, {_LEAVES} leaves, {_SHARDS} shards on 2 of them each, "
            f"a root at {cluster.root.target}: up and assigned in {time.monotonic() - began:.1f} s",
            soft_wrap=True,
        )
        killed = cluster.leaves[_KILLED]
        console.print(_HEADER, style="bold")
        with Load(cluster.root.client, items=times.items) as load:
            watch = _Watch(console, cluster, load)
            watch.run(times.warm)
            killed.kill()
            kill_at = time.monotonic() - load.began
            watch.say(f"kill -9 {killed.name}")
            watch.run(times.without)
            killed.start()
            watch.say(f"{killed.name} is started again")
            watch.run(times.back)
            killed.wait()
        settled = cluster.wait_settled(killed)
        watch.say(f"every shard has both replicas again; {settled:.1f} s after the load")
        seconds = by_second(load.batches(), load.began)
        report = _report(seconds, load, kill_at)
        console.print(
            f"{report['batches']:,} batches of 1,000 keys: {report['failed_batches']} failed, "
            f"{report['wrong_values']} wrong values, {report['missing_cells']} cells without a "
            f"value ({report['missing_cells_outside']} outside the two seconds of the kill)",
            soft_wrap=True,
        )
        return report


class _Watch:
    """Prints a line a second: what the load saw in it, and who holds what at its end."""

    def __init__(self, console: Console, cluster: ShardedCluster, load: Load) -> None:
        self._console = console
        self._cluster = cluster
        self._load = load
        self._shown = 0

    def say(self, text: str) -> None:
        self._console.print(f"---- {text}", style="bold yellow", markup=False)

    def run(self, seconds: int) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            next_at = self._load.began + self._shown + 1
            time.sleep(max(0.0, next_at - time.monotonic()))
            found = by_second(self._load.batches(), self._load.began)
            # A batch that is still on its way belongs to a second that was shown without it.
            second = found[self._shown] if self._shown < len(found) else Second()
            self._shown += 1
            shards = "  ".join(self._shards())
            self._console.print(
                f"{self._shown:>3}  {second.batches:>7} {second.hit_ratio:>6.1%} "
                f"{second.missing:>7} {second.seconds_max * 1e3:>5.0f} ms   {shards}",
                markup=False,
                soft_wrap=True,
            )

    def _shards(self) -> Iterator[str]:
        for leaf in self._cluster.leaves:
            try:
                cluster = leaf.status().cluster
            except (DaemonUnreachable, RequestRefused):
                yield f"{leaf.name} -/-"
                continue
            leads = "*" if cluster.leader else ""
            yield f"{leaf.name}{leads} {cluster.shards_online}/{cluster.shards_warming}"


def _report(seconds: list[Second], load: Load, kill_at: float) -> dict[str, Any]:
    around = {int(kill_at), int(kill_at) + 1}
    outside = [second for number, second in enumerate(seconds) if number not in around]
    missing_outside = sum(second.missing for second in outside)
    keys_outside = sum(second.keys for second in outside)
    failed = sum(second.failed for second in seconds)
    wrong = sum(second.wrong for second in seconds)
    problems = []
    if failed:
        problems.append(f"{failed} batches failed: {'; '.join(load.failures())}")
    if wrong:
        problems.append(f"{wrong} values were wrong")
    if missing_outside > _MISSING_MAX * keys_outside:
        problems.append(f"{missing_outside} of {keys_outside} cells without a value")
    if seconds and seconds[-1].hit_ratio < 0.5:
        problems.append(f"the hit ratio did not recover: {seconds[-1].hit_ratio:.1%} at last")
    return {
        "batches": sum(second.batches for second in seconds),
        "failed_batches": failed,
        "wrong_values": wrong,
        "missing_cells": sum(second.missing for second in seconds),
        "missing_cells_outside": missing_outside,
        "kill_second": int(kill_at),
        "hit_ratio_by_second": [round(second.hit_ratio, 4) for second in seconds],
        "missing_by_second": [second.missing for second in seconds],
        "slowest_ms_by_second": [round(second.seconds_max * 1e3, 1) for second in seconds],
        "problems": problems,
    }


if __name__ == "__main__":
    typer.run(main)
    sys.exit(0)
