"""What a leaf knows of its shards: who is warmed next, and since when it lacks writes."""

import numpy as np

from sharding._holdings import Holdings
from sharding.model import Shards, shards_array

DELAYS = (1.0, 60.0)


def held(*shards: int) -> Holdings:
    made = Holdings()
    made.add(shards_array(list(shards)))
    return made


def some(*shards: int) -> Shards:
    return shards_array(list(shards))


def test_new_shards_are_warming_and_of_unknown_age() -> None:
    holdings = held(9, 3)
    holdings.add(some(5))
    assert holdings.shards().tolist() == [3, 5, 9]
    assert (holdings.count(online=False), holdings.count(online=True)) == (3, 0)
    job = holdings.next_job(some(3, 5, 7), 0.0, 100)
    assert job is not None
    assert job.shards.tolist() == [3, 5], "those that the view names"
    assert job.away_since is None


def test_warmed_ones_go_online_unless_they_are_gone() -> None:
    holdings = held(1, 2, 3)
    holdings.remove(some(2))
    holdings.warmed(some(1, 2))
    current = holdings.current("i", 4)
    assert (current.shards.tolist(), current.states.tolist()) == ([1, 3], [1, 0])
    assert (current.instance_id, current.target_version) == ("i", 4)


def test_a_loss_makes_all_warming_again_and_remembers_since_when() -> None:
    holdings = held(1, 2, 3)
    holdings.warmed(some(1, 2))
    holdings.all_warming(100.0)
    holdings.warmed(some(1))
    holdings.all_warming(200.0)
    jobs = []
    while (job := holdings.next_job(some(1, 2, 3), 0.0, 100)) is not None:
        jobs.append((job.shards.tolist(), job.away_since))
        holdings.warmed(job.shards)
    # 2 was not up to date when it was lost again, and 3 never was.
    assert jobs == [([1], 200.0), ([2], 100.0), ([3], None)]


def test_jobs_are_bounded() -> None:
    holdings = held(*range(10))
    job = holdings.next_job(some(*range(10)), 0.0, 4)
    assert job is not None
    assert job.shards.tolist() == [0, 1, 2, 3]


def test_failures_wait_longer_each_time_and_not_for_others() -> None:
    holdings = held(1, 2)
    named = some(1, 2)
    waits = []
    now = 0.0
    for _ in range(9):
        holdings.failed(some(1), now, DELAYS)
        retry_at = holdings.next_retry_at()
        assert retry_at is not None
        waits.append(retry_at - now)
        job = holdings.next_job(named, now, 10)
        assert job is not None
        assert job.shards.tolist() == [2]
        now = retry_at
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    holdings.warmed(some(1, 2))
    assert holdings.next_retry_at() is None
    assert holdings.next_job(named, now, 10) is None


def test_against_a_plain_model() -> None:
    seed = int(np.random.default_rng().integers(1 << 32))
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    holdings = Holdings()
    model: dict[int, bool] = {}
    for _ in range(500):
        some_shards = shards_array(random.integers(0, 50, random.integers(0, 6)))
        match random.integers(4):
            case 0:
                new = shards_array([s for s in some_shards.tolist() if s not in model])
                holdings.add(new)
                model |= dict.fromkeys(new.tolist(), False)
            case 1:
                holdings.remove(some_shards)
                for shard in some_shards.tolist():
                    model.pop(shard, None)
            case 2:
                holdings.warmed(some_shards)
                model |= {s: True for s in some_shards.tolist() if s in model}
            case _:
                if random.random() < 0.1:
                    holdings.all_warming(1.0)
                    model = dict.fromkeys(model, False)
        current = holdings.current("x", 1)
        found = dict(zip(current.shards.tolist(), map(bool, current.states.tolist()), strict=True))
        assert found == model
