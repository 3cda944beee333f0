"""The judge of the torture test: it must catch every kind of fault, and nothing that is right.

Times are seconds; a daemon dies at 10 and is back at 11 where a test says so.
"""

import random

import pytest

from tests.torture.load import Room
from tests.torture.model import Fault, Model, Rules, Write
from tests.torture.values import make_value, origin

NS, KEY, OTHER = "pin", b"key", b"other"
STRICT = Rules()
EVICTS = Rules(may_evict=True)
RETURNS = Rules(may_evict=True, may_return=True)


class Cache:
    """A model of one key, told in few words."""

    def __init__(self, rules: Rules = STRICT) -> None:
        self.model = Model(rules)

    def begin(self, at: float, size: int = 50, ttl: float | None = None) -> Write:
        (write,) = self.model.begin_puts(NS, [KEY], [size], [ttl], at)
        return write

    def end(self, write: Write, at: float) -> bytes:
        self.model.acknowledge([write], at)
        return value_of(write)

    def put(self, at: float, size: int = 50, ttl: float | None = None) -> bytes:
        return self.end(self.begin(at, size, ttl), at + 0.1)

    def delete(self, at: float) -> None:
        self.model.acknowledge(self.model.begin_deletes(NS, [KEY], at), at + 0.1)

    def flush(self, at: float) -> None:
        self.model.acknowledge([self.model.begin_flush(NS, at)], at + 0.1)

    def read(self, at: float, value: bytes | None) -> None:
        self.model.check(NS, [KEY], [value], at, at + 0.1)

    def settle(self, at: float, value: bytes | None) -> None:
        self.model.settle(NS, [KEY], [value], at, at + 0.1)
        self.model.all_settled(NS)


def value_of(write: Write, key: bytes = KEY) -> bytes:
    assert write.size is not None
    return make_value(key, write.number, write.size)


@pytest.fixture(params=[STRICT, EVICTS, RETURNS], ids=["strict", "evicts", "returns"])
def cache(request: pytest.FixtureRequest) -> Cache:
    return Cache(request.param)


# ---- what is right -------------------------------------------------------------------------------


def test_what_was_acknowledged_may_be_read(cache: Cache) -> None:
    value = cache.put(1)
    cache.read(2, value)
    cache.model.end_life(10)
    cache.settle(11, value)
    newer = cache.put(12)
    cache.read(13, newer)
    cache.delete(14)
    cache.read(15, None)


def test_a_read_beside_a_write_may_show_either(cache: Cache) -> None:
    old = cache.put(1)
    write = cache.begin(2)
    cache.read(2.5, old)
    cache.read(2.5, value_of(write))
    cache.end(write, 3)


def test_two_writes_at_once_end_either_way(cache: Cache) -> None:
    for first_wins in (True, False):
        one, two = cache.begin(1), cache.begin(1.5)
        values = cache.end(one, 2), cache.end(two, 2.5)
        cache.read(3, values[0] if first_wins else values[1])
        cache.delete(4)


@pytest.mark.parametrize("happened", [True, False])
def test_what_was_not_acknowledged_happened_or_not(cache: Cache, happened: bool) -> None:
    old = cache.put(1)
    write = cache.begin(9)
    cache.model.end_life(10)
    cache.settle(11, value_of(write) if happened else old)


def test_a_put_beside_a_flush_is_there_or_not() -> None:
    for there in (True, False):
        cache = Cache(STRICT)
        flush = cache.model.begin_flush(NS, 1)
        value = cache.put(1.2)
        cache.model.acknowledge([flush], 2)
        cache.settle(3, value if there else None)


def test_time_to_live_is_shortened_by_a_tenth_at_most() -> None:
    cache = Cache(STRICT)
    value = cache.put(1, ttl=10)
    cache.read(9.5, value)
    cache.read(10.5, value)
    cache.read(10.6, None)
    with pytest.raises(Fault, match="is missing"):
        cache.read(9, None)


def test_an_absent_key_may_return_where_the_device_loses_reads() -> None:
    cache = Cache(RETURNS)
    value = cache.put(1)
    cache.settle(2, None)
    cache.settle(3, value)


def test_a_cache_that_evicts_may_lack_anything() -> None:
    cache = Cache(EVICTS)
    cache.put(1)
    cache.read(2, None)


# ---- planted faults ------------------------------------------------------------------------------


def test_a_missing_key_is_a_fault_where_nothing_is_evicted() -> None:
    cache = Cache(STRICT)
    cache.put(1)
    with pytest.raises(Fault, match=r"'key' is missing\n.*nothing(.*\n)+.*put #1.*\n.*the read"):
        cache.read(2, None)


def test_a_deleted_value_that_comes_back_is_a_fault(cache: Cache) -> None:
    value = cache.put(1)
    cache.delete(2)
    with pytest.raises(Fault, match="has come back: #1"):
        cache.read(3, value)


def test_an_overwritten_value_that_comes_back_is_a_fault(cache: Cache) -> None:
    value = cache.put(1)
    cache.put(2)
    cache.model.end_life(10)
    with pytest.raises(Fault, match="has come back: #1"):
        cache.settle(11, value)


def test_a_flushed_value_that_comes_back_is_a_fault(cache: Cache) -> None:
    value = cache.put(1)
    cache.flush(2)
    with pytest.raises(Fault, match="has come back: #1"):
        cache.read(3, value)


def test_a_value_older_than_a_rejected_put_is_a_fault(cache: Cache) -> None:
    value = cache.put(1)
    cache.model.reject([cache.begin(2)], 2.1)
    cache.read(3, None)
    with pytest.raises(Fault, match="has come back: #1"):
        cache.read(3, value)


def test_a_value_older_than_one_that_was_seen_is_a_fault(cache: Cache) -> None:
    old = cache.put(1)
    write = cache.begin(2)  # never acknowledged
    cache.read(3, value_of(write))
    with pytest.raises(Fault, match="has come back: #1"):
        cache.read(4, old)


def test_what_a_restart_showed_as_absent_stays_so() -> None:
    cache = Cache(EVICTS)
    value = cache.put(1)
    cache.settle(2, None)
    with pytest.raises(Fault, match="the value of this key, write 1, whole"):
        cache.settle(3, value)


def test_what_a_restart_showed_is_settled(cache: Cache) -> None:
    old = cache.put(1)
    write = cache.begin(9)
    cache.model.end_life(10)
    cache.settle(11, value_of(write))
    with pytest.raises(Fault, match="wrong value: the value of this key, write 1"):
        cache.settle(12, old)


def test_a_settled_flush_is_not_forgotten(cache: Cache) -> None:
    value = cache.put(1)
    cache.flush(2)
    cache.settle(3, None)
    with pytest.raises(Fault):
        cache.settle(4, value)


def test_a_value_past_its_time_is_a_fault_also_when_nobody_ran(cache: Cache) -> None:
    value = cache.put(9, ttl=1)
    cache.model.end_life(10)
    with pytest.raises(Fault, match="served after its expiry: #1"):
        cache.settle(11, value)


def test_a_write_that_hangs_expires_after_the_daemon_s_end(cache: Cache) -> None:
    value = value_of(cache.begin(9, ttl=1))
    cache.model.end_life(10)
    cache.read(10.9, value)
    with pytest.raises(Fault, match="served after its expiry"):
        cache.read(11.2, value)


@pytest.mark.parametrize("size", [1, 20, 47, 48, 500, 70_000])
def test_a_value_of_another_key_is_a_fault(cache: Cache, size: int) -> None:
    write = cache.begin(1, size)
    cache.end(write, 1.1)
    cache.read(2, value_of(write))
    wrong = value_of(write, OTHER)
    if size == 1 and wrong == value_of(write):
        wrong = bytes([wrong[0] ^ 1])
    with pytest.raises(Fault, match="has a wrong value"):
        cache.read(3, wrong)


@pytest.mark.parametrize("size", [3, 48, 500])
def test_any_flipped_byte_is_a_fault(cache: Cache, size: int) -> None:
    value = cache.put(1, size)
    for place in range(size):
        damaged = bytearray(value)
        damaged[place] ^= 0x10
        with pytest.raises(Fault, match="has a wrong value"):
            cache.read(2, bytes(damaged))
    with pytest.raises(Fault, match="has a wrong value"):
        cache.read(2, value[:-1])


def test_a_value_never_written_is_a_fault(cache: Cache) -> None:
    with pytest.raises(Fault, match="has a wrong value"):
        cache.read(2, make_value(KEY, 77, 90))


def test_only_what_came_last_may_be_lost_with_the_power() -> None:
    cache = Cache(EVICTS)
    value = cache.put(1)
    cache.delete(9.5)
    cache.model.end_life(10, forgotten_after=9.4)
    cache.read(11, value)
    cache = Cache(EVICTS)
    value = cache.put(1)
    cache.delete(9)
    cache.model.end_life(10, forgotten_after=9.4)
    with pytest.raises(Fault, match="has come back"):
        cache.read(11, value)


# ---- values and room -----------------------------------------------------------------------------


def test_a_value_says_where_it_comes_from() -> None:
    value = make_value(KEY, 7, 100)
    assert origin(KEY, value) == "the value of this key, write 7, whole"
    assert "another key, write 7" in origin(OTHER, value)
    assert "differ from place 60" in origin(KEY, value[:60] + bytes([value[60] ^ 1]) + value[61:])
    assert "garbled" in origin(KEY, bytes(100))
    assert "of no write" in origin(KEY, b"x")


def test_values_differ_by_key_write_and_size() -> None:
    rng = random.Random(1)
    seen = {
        make_value(b"%d" % rng.randrange(50), number, size)
        for number in range(100)
        for size in (47, 48, 49, 1000)
    }
    assert len(seen) == 400


def test_room_is_given_back_once_for_two_flushes_at_once() -> None:
    room = Room(100)
    assert room.take(60)
    assert not room.take(60)
    first, second = room.before_flush(), room.before_flush()
    room.after_flush(first)
    assert room.take(30)
    room.after_flush(second)
    assert room.taken == 30, "what was written after the first flush is still there"
    assert Room(0).take(1 << 40)
