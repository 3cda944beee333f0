"""The demo's data, features and ranking requests: real, repeatable, and as large as promised."""

import itertools
from pathlib import Path

import lmdb
import numpy as np
import pytest
import yaml

from benchmarks.demo import dataset, features
from benchmarks.demo.candidates import CANDIDATES_MAX, CANDIDATES_MIN, ranking_requests
from benchmarks.demo.dataset import Dataset
from benchmarks.demo.features import FeatureTables
from benchmarks.demo.server import derive_config, routing_rules
from cache_daemon.config import parse_config
from cache_daemon.config_node import budgets, node_config
from cache_daemon.config_nvm import nvm_plan
from cache_daemon.stores.lmdb import LmdbOptions, LmdbStore

_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


@pytest.fixture(scope="module")
def data() -> Dataset:
    return dataset.load()


@pytest.fixture(scope="module")
def tables(data: Dataset) -> FeatureTables:
    return features.build(data)


def test_the_data_set_is_whole_and_in_order(data: Dataset) -> None:
    assert len(data.items) == len(data.users) == len(data.ratings) == len(data.times) == 100_004
    assert (len(data.item_ids), len(data.user_ids)) == (9066, 671)
    assert (np.diff(data.times) >= 0).all()
    assert (np.diff(data.item_ids) > 0).all()
    assert set(np.unique(data.ratings)) <= {half / 2 for half in range(1, 11)}
    toy_story = int(np.searchsorted(data.item_ids, 1))
    assert data.titles[toy_story] == "Toy Story"
    assert data.years[toy_story] == 1995
    genres = np.array(data.genre_names)[data.genres[toy_story]]
    assert set(genres) == {"Adventure", "Animation", "Children", "Comedy", "Fantasy"}
    assert np.count_nonzero(data.items == toy_story) == 247


def test_films_that_are_alike_have_embeddings_that_are_alike(
    data: Dataset, tables: FeatureTables
) -> None:
    """Sequels rated by the same people are nearer to each other than to most of the catalogue."""
    embedding = tables.item_embedding
    first, second = (
        int(np.flatnonzero(np.array(data.titles) == title)[0])
        for title in ("Toy Story", "Toy Story 2")
    )
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    likeness = unit @ unit[first]
    assert (likeness > likeness[second]).sum() < len(data.item_ids) // 50


def test_features_have_their_shapes_and_say_what_the_ratings_say(
    data: Dataset, tables: FeatureTables
) -> None:
    assert tables.item_embedding.shape == (9066, 256)
    assert tables.item_stats.shape == (9066, 96)
    assert np.isfinite(tables.item_embedding).all()
    assert np.isfinite(tables.item_stats).all()
    film = int(np.searchsorted(data.item_ids, 1))
    mine = data.items == film
    assert tables.item_stats[film, 0] == mine.sum()
    assert tables.item_stats[film, 1] == pytest.approx(data.ratings[mine].mean(), abs=1e-4)
    assert tables.item_stats[film, 6:16].sum() == mine.sum()


def test_a_user_sequence_holds_every_interaction_in_order(
    data: Dataset, tables: FeatureTables
) -> None:
    user = int(np.bincount(data.users).argmax())
    value = tables.user_sequence[user]
    events = np.frombuffer(value[4 * (256 + 8) :], features.EVENT_DTYPE)
    mine = np.flatnonzero(data.users == user)
    assert events["item_id"].tolist() == data.item_ids[data.items[mine]].tolist()
    assert (np.diff(events["time"]) >= 0).all()
    assert len(value) == features.sequence_bytes(len(mine))
    assert len(value) > 200_000, "the longest sequence is meant to be long"


def test_the_store_holds_every_value(data: Dataset, tables: FeatureTables, tmp_path: Path) -> None:
    count = features.write_store(tables, data, tmp_path / "features")
    assert count == 2 * 9066 + 671
    store = LmdbStore(LmdbOptions(path=tmp_path / "features"))
    try:
        for namespace, ids in (
            (features.ITEM_EMBEDDING, data.item_ids),
            (features.ITEM_STATS, data.item_ids),
            (features.USER_SEQUENCE, data.user_ids),
        ):
            keys = [int(entity).to_bytes(8, "little") for entity in ids]
            (values,) = store.get_many([(namespace, keys)], timeout_s=30.0)
            assert list(values) == [tables.value(namespace, index) for index in range(len(ids))]
    finally:
        store.close()
    stored = lmdb.open(str(tmp_path / "features"), readonly=True, max_dbs=8).stat()["entries"]
    assert stored == 3, "one database a namespace"


def test_features_are_the_same_each_time(data: Dataset, tables: FeatureTables) -> None:
    again = features.build(data)
    assert again.user_sequence == tables.user_sequence
    assert np.array_equal(again.item_stats, tables.item_stats)


def test_requests_ask_for_500_to_1000_distinct_films_and_the_one_watched(data: Dataset) -> None:
    for request in itertools.islice(ranking_requests(data, seed=3, stride=97), 400):
        assert CANDIDATES_MIN <= len(request.items) <= CANDIDATES_MAX
        assert len(np.unique(request.items)) == len(request.items)
        assert data.items[request.position] in request.items
        assert data.users[request.position] == request.user


def test_requests_can_be_repeated_and_follow_the_seed(data: Dataset) -> None:
    one, two, other = (
        [request.items.tolist() for request in itertools.islice(requests, 60)]
        for requests in (
            ranking_requests(data, seed=3),
            ranking_requests(data, seed=3),
            ranking_requests(data, seed=4),
        )
    )
    assert one == two
    assert one != other


def test_requests_know_nothing_of_the_future(data: Dataset) -> None:
    """Of films that are not out yet only the one that was really rated may be asked for."""
    for request in itertools.islice(ranking_requests(data, seed=3, stride=211), 200):
        year = int(np.datetime64(int(data.times[request.position]), "s").astype(object).year)
        others = request.items[request.items != data.items[request.position]]
        seen = data.items[: request.position]
        unseen = np.setdiff1d(others, seen)
        assert (data.years[unseen] <= year).all()


def test_popular_films_are_asked_for_far_more_often_than_others(data: Dataset) -> None:
    asked = np.zeros(len(data.item_ids), np.int64)
    for request in itertools.islice(ranking_requests(data, seed=3, stride=200), 400):
        asked[request.items] += 1
    ranked = np.sort(asked)[::-1]
    assert ranked[:900].sum() > 0.4 * ranked.sum()
    assert np.count_nonzero(ranked) > 5000, "the tail of the catalogue is asked for, too"


def test_the_derived_config_is_valid_and_its_dram_a_quarter_of_the_data(
    tables: FeatureTables, tmp_path: Path
) -> None:
    dram_bytes, nvm_bytes = tables.total_bytes // 4, tables.total_bytes // 2
    derived = derive_config(_CONFIG, tmp_path, dram_bytes=dram_bytes, nvm_bytes=nvm_bytes)
    config = parse_config(yaml.safe_dump(derived))
    native = node_config(config)
    assert config.memory.size == dram_bytes + native.nvm_memory_bytes()
    assert sum(budgets(config).values()) <= tables.total_bytes // 4
    plan = nvm_plan(config)
    assert plan is not None
    assert plan.devices == ((str(tmp_path / "nvm"), nvm_bytes),)
    assert tables.total_bytes >= 20 * plan.region_bytes
    assert all(space.nvm for space in config.namespaces.values())
    assert max(map(len, tables.user_sequence)) < plan.region_bytes - 4096, "every value fits"
    assert config.topology == "colocated"
    assert set(config.namespaces) == {"item_embedding", "item_stats", "user_sequence"}
    assert str(tmp_path) in str(config.stores["features"].options["path"])
    rules = "\n".join(routing_rules(derived))
    assert "asked_at_least" in rules
    assert "long_lasting" in rules
    domains = {name for space in config.namespaces.values() for name in space.domains}
    assert len(domains) >= 2


def test_a_config_that_is_not_the_demos_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("memory: {size: 1MiB}\n")
    with pytest.raises(ValueError, match="stores"):
        derive_config(tmp_path / "other.yaml", tmp_path, dram_bytes=1 << 20, nvm_bytes=1 << 20)
