"""`python -m benchmarks.demo`: a daemon serves ranking requests over MovieLens for about a minute.

Exit codes: 0 all went well; 1 a value differed from the store's, a request or the daemon failed,
the hit ratio did not climb, or nothing came from NVM; 2 the command line or the config was wrong.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from benchmarks.demo import dataset, features
from benchmarks.demo.candidates import ranking_requests
from benchmarks.demo.daemon_stats import DaemonStats, StatsReader
from benchmarks.demo.replay import NAMESPACES, Replay
from benchmarks.demo.server import DaemonError, DaemonProcess, derive_config, routing_rules
from benchmarks.demo.summary import Outcome, as_dict, summary_table
from benchmarks.demo.view import View
from cache_daemon.cachectl_admin import DaemonUnreachable, RequestRefused
from cache_daemon.client import Client, FeatureCacheError
from cache_daemon.stores.lmdb import LmdbOptions, LmdbStore

_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
_DATA_TO_DRAM = 4.5  # how many times larger than DRAM, its index and tables the data is
_DATA_TO_NVM = 2.0  # so that NVM evicts, too
_SEED = 20_160_101
_WORKERS = 4
_POLL_S = 0.25
_STORE_SAMPLE = 200  # keys a namespace that are compared with the store at the end
_CLIMB_MIN = 0.1


def main(
    seconds: Annotated[float, typer.Option(min=1, max=3600, help="how long to replay")] = 50.0,
    stride: Annotated[int, typer.Option(min=1, help="replay every n-th interaction")] = 5,
    config: Annotated[Path, typer.Option(help="the config to derive the daemon's from")] = _CONFIG,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """A daemon serves ranking requests over MovieLens; shows the hit ratio climbing."""
    console = Console(stderr=as_json)
    with tempfile.TemporaryDirectory(prefix="feature-cache-demo-") as folder:
        try:
            outcome = _run(console, Path(folder), config, seconds, stride)
        except (DaemonError, DaemonUnreachable, RequestRefused) as error:
            console.print(str(error), style="red", markup=False, soft_wrap=True)
            raise typer.Exit(1) from error
        except (OSError, ValueError) as error:
            console.print(str(error), style="red", markup=False, soft_wrap=True)
            raise typer.Exit(2) from error
    if as_json:
        print(json.dumps(as_dict(outcome)))
    else:
        console.print(summary_table(outcome))
    for problem in outcome.problems:
        console.print(f"failed: {problem}", style="bold red", markup=False, soft_wrap=True)
    if outcome.problems:
        raise typer.Exit(1)


def _run(console: Console, folder: Path, config: Path, seconds: float, stride: int) -> Outcome:
    data = dataset.load()
    console.print(
        f"MovieLens: {len(data.items):,} ratings of {len(data.item_ids):,} films by "
        f"{len(data.user_ids):,} users"
    )
    tables = features.build(data)
    count = features.write_store(tables, data, folder / "features")
    dram_bytes = int(tables.total_bytes / _DATA_TO_DRAM)
    nvm_bytes = int(tables.total_bytes / _DATA_TO_NVM)
    settings = derive_config(config, folder, dram_bytes=dram_bytes, nvm_bytes=nvm_bytes)
    delay = settings["stores"]["features"]["options"].get("simulated_delay", {})
    console.print(
        f"feature store: LMDB, {count:,} values, {tables.total_bytes / (1 << 20):.1f} MiB, "
        f"{delay.get('min', '0')} to {delay.get('max', '0')} away; the cache has "
        f"{dram_bytes / (1 << 20):.1f} MiB of DRAM and {nvm_bytes / (1 << 20):.1f} MiB of NVM",
        soft_wrap=True,
    )
    for line in routing_rules(settings):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    with DaemonProcess(settings, folder) as daemon:

        def connect() -> Client:
            return Client(daemon.addresses.grpc)

        replay = Replay(
            ranking_requests(data, seed=_SEED, stride=stride),
            data,
            tables,
            connect,
            workers=_WORKERS,
            seconds_max=seconds,
        )
        with StatsReader(daemon.addresses.admin) as reader:
            stats = _watch(console, replay, reader, data, seconds, daemon)
        progress = replay.progress()
        problems = list(progress.failures)
        problems += _compare_with_store(connect, data, folder / "features")
        daemon.stop()
    checked = progress.checked_values + _STORE_SAMPLE * len(NAMESPACES)
    p50, p99 = replay.latency_quantiles_s()
    cold, warm = replay.cold_and_warm_hit_ratio()
    if warm < cold + _CLIMB_MIN:
        problems.append(f"the hit ratio did not climb: {cold:.1%} at first, {warm:.1%} at last")
    if not progress.nvm_hits:
        problems.append("no value came from NVM (HIT_NVM), although DRAM is far too small")
    return Outcome(
        progress,
        stats,
        p50,
        p99,
        cold,
        warm,
        tables.total_bytes,
        nvm_bytes,
        checked,
        tuple(problems),
    )


def _watch(
    console: Console,
    replay: Replay,
    reader: StatsReader,
    data: dataset.Dataset,
    seconds: float,
    daemon: DaemonProcess,
) -> DaemonStats:
    """Shows the replay until it ends; returns the daemon's last counters."""
    with View(console, data.times.tolist(), seconds) as view:
        replay.start()
        try:
            while replay.running:
                daemon.check_alive()
                view.update(replay.progress(), reader.read())
                time.sleep(_POLL_S)
        finally:
            replay.stop()
        stats = reader.read()
        view.update(replay.progress(), stats, last=True)
    return stats


def _compare_with_store(
    connect: Callable[[], Client], data: dataset.Dataset, path: Path
) -> list[str]:
    """Asks the daemon for a random sample of keys and compares each value with the store's."""
    chooser = random.Random(_SEED)
    store = LmdbStore(LmdbOptions(path=path))
    problems = []
    try:
        with connect() as client:
            for namespace in NAMESPACES:
                ids = data.user_ids if namespace == features.USER_SEQUENCE else data.item_ids
                chosen = sorted(chooser.sample(ids.tolist(), _STORE_SAMPLE))
                keys = [features.key_of(entity_id) for entity_id in chosen]
                (expected,) = store.get_many([(namespace, keys)], timeout_s=10.0)
                reply = client.batch_get({namespace: np.array(chosen, np.uint64)}, timeout=10.0)
                got = reply[namespace].to_bytes()
                wrong = sum(ours != theirs for ours, theirs in zip(got, expected, strict=True))
                if wrong:
                    problems.append(f"{namespace}: {wrong} of {len(keys)} differ from the store")
    except FeatureCacheError as error:
        problems.append(f"the sample could not be read: {error}")
    finally:
        store.close()
    return problems


if __name__ == "__main__":
    typer.run(main)
    sys.exit(0)
