"""Features of films and users, made from the data set, and the store that serves them.

Three namespaces; all keys are the eight little-endian bytes of a MovieLens id:

| namespace | key | value |
|---|---|---|
| `item_embedding` | film | 256 float32: factors of the ratings, hashed genres, decade and words |
| `item_stats` | film | 96 float32: 16 counters, then 80 of the title's hashed letter trigrams |
| `user_sequence` | user | 256 float32 embedding, 8 float32 counters, then 96 bytes an interaction |
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.demo.dataset import Dataset
from cache_daemon.stores.lmdb import LmdbWriter

__all__ = [
    "EMBEDDING_DIM",
    "EVENT_DTYPE",
    "ITEM_EMBEDDING",
    "ITEM_STATS",
    "STATS_DIM",
    "USER_SEQUENCE",
    "FeatureTables",
    "build",
    "key_of",
    "sequence_bytes",
    "write_store",
]

ITEM_EMBEDDING = "item_embedding"
ITEM_STATS = "item_stats"
USER_SEQUENCE = "user_sequence"

EMBEDDING_DIM = 256
STATS_DIM = 96
_LATENT_DIM = 192  # the rest of an embedding describes content, for films that nobody has rated
_COUNTERS = 16
_USER_COUNTERS = 8
_EVENT_LATENT_DIM = 40

# One interaction of a user's sequence: who ranks sequences wants the film's factors beside its id.
EVENT_DTYPE = np.dtype(
    [
        ("item_id", "<i8"),
        ("time", "<i4"),
        ("rating", "<f4"),
        ("factors", "<f2", (_EVENT_LATENT_DIM,)),
    ]
)

_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FeatureTables:
    """Every feature value by film or user index.

    `item_embedding` float32 [n, 256], `item_stats` float32 [n, 96], `user_sequence` m values.
    """

    item_embedding: _Floats
    item_stats: _Floats
    user_sequence: tuple[bytes, ...]

    def value(self, namespace: str, index: int) -> bytes:
        """The bytes that the store holds. Raises KeyError for a namespace that does not exist."""
        if namespace == USER_SEQUENCE:
            return self.user_sequence[index]
        tables = {ITEM_EMBEDDING: self.item_embedding, ITEM_STATS: self.item_stats}
        value: bytes = tables[namespace][index].tobytes()
        return value

    @property
    def total_bytes(self) -> int:
        """Bytes of all keys and values."""
        items, users = len(self.item_embedding), len(self.user_sequence)
        values = self.item_embedding.nbytes + self.item_stats.nbytes
        return values + sum(map(len, self.user_sequence)) + 8 * (2 * items + users)


def key_of(entity_id: int) -> bytes:
    """The store's key of a film or user: its id as eight little-endian bytes."""
    return int(entity_id).to_bytes(8, "little")


def sequence_bytes(interactions: int) -> int:
    """Bytes of the `user_sequence` of a user with so many interactions."""
    return 4 * (EMBEDDING_DIM + _USER_COUNTERS) + interactions * EVENT_DTYPE.itemsize


def build(dataset: Dataset) -> FeatureTables:
    """Builds every feature; about a second."""
    item_latent, user_latent = _latent_factors(dataset)
    embedding = np.hstack([item_latent, _content(dataset)]).astype(np.float32)
    profile = np.hstack([_item_counters(dataset), _title_trigrams(dataset)]).astype(np.float32)
    return FeatureTables(
        np.ascontiguousarray(embedding),
        np.ascontiguousarray(profile),
        _sequences(dataset, item_latent, user_latent),
    )


def write_store(tables: FeatureTables, dataset: Dataset, path: Path) -> int:
    """Writes every value into a new LMDB environment at `path`; returns how many."""
    item_keys = [key_of(entity_id) for entity_id in dataset.item_ids]
    user_keys = [key_of(entity_id) for entity_id in dataset.user_ids]
    with LmdbWriter(path, sync=False) as writer:
        return sum(
            writer.write_many(
                namespace,
                [(key, tables.value(namespace, index)) for index, key in enumerate(keys)],
            )
            for namespace, keys in (
                (ITEM_EMBEDDING, item_keys),
                (ITEM_STATS, item_keys),
                (USER_SEQUENCE, user_keys),
            )
        )


def _latent_factors(dataset: Dataset) -> tuple[_Floats, _Floats]:
    """Truncated SVD of ratings centred by user: factors of films [n, 192] and users [m, 192]."""
    ratings = np.zeros((len(dataset.item_ids), len(dataset.user_ids)), np.float64)
    means = _mean_by(dataset.users, dataset.ratings, len(dataset.user_ids))
    ratings[dataset.items, dataset.users] = dataset.ratings - means[dataset.users] + 0.1
    # There are far fewer users than films: the eigenvectors of the small Gram matrix give both.
    eigenvalues, vectors = np.linalg.eigh(ratings.T @ ratings)
    best = np.argsort(eigenvalues)[::-1][:_LATENT_DIM]
    scale = np.sqrt(np.maximum(eigenvalues[best], 1e-9))
    users = vectors[:, best]
    root = np.sqrt(scale)
    return (ratings @ users / root).astype(np.float32), (users * root).astype(np.float32)


def _content(dataset: Dataset) -> _Floats:
    """Genres, decade and words of the title, each hashed with a sign, unit length: [n, 64]."""
    rows = []
    for index, title in enumerate(dataset.titles):
        genres = np.flatnonzero(dataset.genres[index])
        words = [f"genre:{dataset.genre_names[genre]}" for genre in genres]
        words.append(f"decade:{dataset.years[index] // 10}")
        words += [f"word:{word}" for word in title.lower().split()]
        rows.append(_hashed(words, EMBEDDING_DIM - _LATENT_DIM))
    return np.array(rows, np.float32)


def _title_trigrams(dataset: Dataset) -> _Floats:
    """Letter trigrams of the title, hashed with a sign, unit length: [n, 80]."""
    rows = []
    for title in dataset.titles:
        padded = f"  {title.lower()} "
        trigrams = [padded[start : start + 3] for start in range(len(padded) - 2)]
        rows.append(_hashed(trigrams, STATS_DIM - _COUNTERS))
    return np.array(rows, np.float32)


def _hashed(tokens: list[str], dim: int) -> _Floats:
    """Feature hashing (Weinberger et al., 2009): one bucket and one sign a token."""
    row = np.zeros(dim, np.float32)
    for token in tokens:
        # crc32, not hash(): the same on every run and machine.
        code = zlib.crc32(token.encode())
        row[(code >> 1) % dim] += 1.0 if code & 1 else -1.0
    length = float(np.linalg.norm(row))
    return row / length if length else row


def _item_counters(dataset: Dataset) -> _Floats:
    """Ratings of a film: count, mean, spread, first and last day, year, histogram of ten bins."""
    count = len(dataset.item_ids)
    counters = np.zeros((count, _COUNTERS), np.float32)
    ratings = np.bincount(dataset.items, minlength=count)
    mean = _mean_by(dataset.items, dataset.ratings, count)
    square = _mean_by(dataset.items, dataset.ratings**2, count)
    counters[:, 0] = ratings
    counters[:, 1] = mean
    counters[:, 2] = np.sqrt(np.maximum(square - mean**2, 0))
    days = (dataset.times // 86_400).astype(np.float32)
    counters[:, 3] = np.inf
    np.minimum.at(counters[:, 3], dataset.items, days)
    np.maximum.at(counters[:, 4], dataset.items, days)
    counters[:, 5] = dataset.years
    histogram = np.rint(dataset.ratings * 2).astype(np.int64) - 1  # half a star to five stars
    np.add.at(counters, (dataset.items, 6 + histogram), 1)
    return counters


def _sequences(dataset: Dataset, items: _Floats, users: _Floats) -> tuple[bytes, ...]:
    """Each user's value: embedding, counters, and every interaction in the order of time."""
    values = []
    for index in range(len(dataset.user_ids)):
        mine = np.flatnonzero(dataset.users == index)
        events = np.zeros(len(mine), EVENT_DTYPE)
        films = dataset.items[mine]
        events["item_id"] = dataset.item_ids[films]
        events["time"] = dataset.times[mine]
        events["rating"] = dataset.ratings[mine]
        events["factors"] = items[films, :_EVENT_LATENT_DIM]
        embedding = np.zeros(EMBEDDING_DIM, np.float32)
        embedding[:_LATENT_DIM] = users[index]
        counters = np.zeros(_USER_COUNTERS, np.float32)
        stars = dataset.ratings[mine]
        genres = dataset.genres[films].sum(axis=0)
        span_days = (dataset.times[mine[-1]] - dataset.times[mine[0]]) / 86_400
        counters[:7] = (
            len(mine),
            stars.mean(),
            stars.std(),
            (stars >= 4).mean(),
            span_days,
            genres.argmax(),
            genres.max() / len(mine),
        )
        values.append(embedding.tobytes() + counters.tobytes() + events.tobytes())
    return tuple(values)


def _mean_by(groups: npt.NDArray[np.int32], values: _Floats, count: int) -> npt.NDArray[np.float64]:
    sums = np.bincount(groups, weights=values, minlength=count)
    return sums / np.maximum(np.bincount(groups, minlength=count), 1)
