"""Ranking requests: which films a ranker would score for a user, at every real interaction.

The candidates of a request come from the sources that retrieval stages commonly have: what is
popular by then, what fits the genres that the user likes, what others watch just now, and some
exploration of the catalogue. The film that the user then really rated is always among them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.demo.dataset import Dataset

__all__ = ["CANDIDATES_MAX", "CANDIDATES_MIN", "RankingRequest", "ranking_requests"]

CANDIDATES_MIN = 500
CANDIDATES_MAX = 1000

_POPULAR = 300
_BY_GENRE = 260  # for each of the user's two favourite genres
_RECENT = 200
_EXPLORED = 60
# Rankings are batch jobs in real systems: made anew after so many interactions, not at each.
_REFRESH_EVERY = 50
_DECAY = 0.98  # of popularity at each refresh: a half-life of about 1,700 interactions
_LIKED_STARS = 3.5

_Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RankingRequest:
    """One user and 500 to 1,000 films (indices of the data set) to score, without duplicates."""

    number: int
    position: int  # of the interaction in the data set
    user: int
    items: _Indices


def ranking_requests(dataset: Dataset, *, seed: int, stride: int = 1) -> Iterator[RankingRequest]:
    """Yields a request for every `stride`-th interaction, in the order of time.

    What is popular, recent or liked is known from all earlier interactions only. The same seed
    gives the same requests.
    """
    state = _Catalogue(dataset, np.random.default_rng(seed))
    for position in range(len(dataset.items)):
        if position % _REFRESH_EVERY == 0:
            state.refresh(position)
        if position % stride == 0:
            user = int(dataset.users[position])
            yield RankingRequest(position // stride, position, user, state.candidates(position))
        state.observe(position)


class _Catalogue:
    """What the retrieval stages know so far."""

    def __init__(self, dataset: Dataset, random: np.random.Generator) -> None:
        self._dataset = dataset
        self._random = random
        self._popularity = np.zeros(len(dataset.item_ids))
        self._liked_genres = np.zeros((len(dataset.user_ids), len(dataset.genre_names)))
        self._ranked: _Indices = np.empty(0, np.int64)
        self._by_genre: list[_Indices] = []
        self._recent: _Indices = np.empty(0, np.int64)

    def refresh(self, position: int) -> None:
        """Ranks anew the films that are out by the time of the interaction at `position`."""
        data = self._dataset
        self._popularity *= _DECAY
        year = 1970 + int(data.times[position] / (365.2425 * 86_400))
        out = np.flatnonzero(data.years <= year)
        # Films without ratings so far keep a stable order: the newest first.
        order = np.lexsort((-out, -data.years[out], -self._popularity[out]))
        self._ranked = out[order]
        genres = data.genres[self._ranked]
        self._by_genre = [self._ranked[genres[:, genre]] for genre in range(genres.shape[1])]
        latest = data.items[max(0, position - 4 * _RECENT) : position][::-1].astype(np.int64)
        _, first = np.unique(latest, return_index=True)
        self._recent = latest[np.sort(first)][:_RECENT]

    def candidates(self, position: int) -> _Indices:
        data = self._dataset
        liked = self._liked_genres[data.users[position]]
        favourites = np.argsort(-liked, kind="stable")[:2]
        parts = [np.array([data.items[position]], np.int64), self._ranked[:_POPULAR], self._recent]
        for genre in favourites:
            ranked = self._by_genre[genre]
            # Mostly the head of the genre's ranking, thinning out towards its tail.
            depth = self._random.exponential(_BY_GENRE, size=_BY_GENRE).astype(np.int64)
            parts += [ranked[: _BY_GENRE // 2], ranked[depth[depth < len(ranked)]]]
        parts.append(self._random.choice(self._ranked, _EXPLORED))
        chosen = _distinct(np.concatenate(parts))
        if len(chosen) < CANDIDATES_MIN:
            chosen = _distinct(np.concatenate([chosen, self._ranked[:CANDIDATES_MAX]]))
            chosen = chosen[:CANDIDATES_MIN]
        return chosen[:CANDIDATES_MAX]

    def observe(self, position: int) -> None:
        data = self._dataset
        item = data.items[position]
        self._popularity[item] += 1
        if data.ratings[position] >= _LIKED_STARS:
            self._liked_genres[data.users[position]] += data.genres[item]


def _distinct(items: _Indices) -> _Indices:
    """Each film once, in the order of first appearance."""
    _, first = np.unique(items, return_index=True)
    return items[np.sort(first)]
