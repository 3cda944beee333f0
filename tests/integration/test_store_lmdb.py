"""The LMDB store on real files: layout, readers beside a writer, faults."""

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from cache_daemon.stores import (
    Store,
    StoreAnswerError,
    StoreConfigError,
    StoreError,
    StoreTimeout,
    make_store,
)
from cache_daemon.stores.lmdb import KEY_BYTES_MAX, LmdbWriter


def write(path: Path, namespace: str, items: dict[bytes, bytes]) -> None:
    with LmdbWriter(path, sync=False) as writer:
        assert writer.write_many(namespace, items) == len(items)


def open_store(path: Path, **options: object) -> Store:
    return make_store("features", "lmdb", {"path": str(path), **options})


def test_reads_back_what_was_written_in_the_order_asked(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    texts = {
        chance.randbytes(chance.randint(1, KEY_BYTES_MAX)): chance.randbytes(size)
        for size in (0, 1, 200, 70_000)
        for _ in range(125)
    }
    ids = {n.to_bytes(8, "little"): b"%d" % n for n in range(500)}
    write(tmp_path, "pin_text", texts)
    write(tmp_path, "pïn id", ids)
    store = open_store(tmp_path)
    asked_texts = [*texts, *(chance.randbytes(9) for _ in range(500))]
    asked_ids = [n.to_bytes(8, "little") for n in range(1000)]
    chance.shuffle(asked_texts)
    chance.shuffle(asked_ids)

    answers = store.get_many([("pin_text", asked_texts), ("pïn id", asked_ids)], 1.0)

    assert answers == [[texts.get(k) for k in asked_texts], [ids.get(k) for k in asked_ids]]
    store.close()


def test_a_key_too_long_for_lmdb_has_no_value_and_cannot_be_written(tmp_path: Path) -> None:
    long_key = b"k" * 1024
    with LmdbWriter(tmp_path) as writer:
        writer.write_many("n", {b"a": b"1"})
        with pytest.raises(ValueError, match="1024 bytes; LMDB holds 1 to 511"):
            writer.write_many("n", {b"b": b"2", long_key: b"3"})
        with pytest.raises(ValueError, match="0 bytes"):
            writer.write_many("n", [(b"", b"")])
    store = open_store(tmp_path)
    assert store.get_many([("n", [b"a", long_key, b"b"])], 1.0) == [[b"1", None, None]]
    store.close()


def test_a_namespace_without_database_costs_only_its_own_keys(tmp_path: Path) -> None:
    write(tmp_path, "n", {b"a": b"1"})
    store = open_store(tmp_path)
    assert store.get_many([("n", [b"a"]), ("other", [b"a"])], 1.0) == [[b"1"], []]
    with pytest.raises(StoreAnswerError, match="no database of other"):
        store.get_many([("other", [b"a"])], 1.0)
    store.close()


def test_sees_what_another_process_writes_and_a_file_that_grows(tmp_path: Path) -> None:
    write(tmp_path, "n", {b"a": b"old"})
    store = open_store(tmp_path)
    groups = [("n", [b"a", b"9999"]), ("later", [b"z"])]
    assert store.get_many(groups, 1.0) == [[b"old", None], []]
    # 40 MB: far beyond the size of the file that was mapped.
    script = (
        "import sys\n"
        "from cache_daemon.stores.lmdb import LmdbWriter\n"
        "with LmdbWriter(sys.argv[1], sync=False) as writer:\n"
        "    writer.write_many('n', {b'%d' % n: bytes(4000) for n in range(10000)})\n"
        "    writer.write_many('n', {b'a': b'new'})\n"
        "    writer.write_many('later', {b'z': b'26'})\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)
    assert store.get_many(groups, 1.0) == [[b"new", bytes(4000)], [b"26"]]
    store.close()


def test_threads_read_at_once(tmp_path: Path) -> None:
    items = {n.to_bytes(8, "little"): b"%d" % n for n in range(2000)}
    for namespace in ("a", "b", "c"):
        write(tmp_path, namespace, items)
    store = open_store(tmp_path)
    start = threading.Barrier(8)
    wrong: list[object] = []

    def read(seed: int) -> None:
        chance = random.Random(seed)
        start.wait(10)  # all open the databases at the same time
        for _ in range(20):
            keys = chance.sample(list(items), 200)
            for namespace in chance.sample(["a", "b", "c"], 3):
                found = store.get_many([(namespace, keys)], 1.0)
                if found != [[items[key] for key in keys]]:
                    wrong.append((namespace, seed))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []
    store.close()


def test_the_simulated_delay_is_uniform_and_keeps_the_timeout(tmp_path: Path) -> None:
    write(tmp_path, "n", {b"a": b"1"})
    store = open_store(tmp_path, simulated_delay={"min": "10ms", "max": "30ms"})
    durations = []
    for _ in range(20):
        started = time.monotonic()
        assert store.get_many([("n", [b"a"])], 1.0) == [[b"1"]]
        durations.append(time.monotonic() - started)
    assert min(durations) >= 0.010
    assert max(durations) - min(durations) > 0.004  # 20 draws from a range of 20 ms
    started = time.monotonic()
    with pytest.raises(StoreTimeout):
        store.get_many([("n", [b"a"])], 0.005)
    assert 0.005 <= time.monotonic() - started < 0.5
    store.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "path\n  Field required"),
        ({"path": "x", "pth": "y"}, "pth\n  Extra inputs are not permitted"),
        ({"path": "x", "map_size": "lots"}, "not a size"),
        ({"path": "x", "simulated_delay": {"min": "3ms", "max": "1ms"}}, "is above max"),
        ({"path": "x", "simulated_delay": {"max": 3}}, "write it with its unit"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_store("features", "lmdb", options)


def test_a_path_that_is_no_environment_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(StoreConfigError, match=r"no data\.mdb there"):
        open_store(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()  # a typo must not create an empty store
    (tmp_path / "data.mdb").write_bytes(random.randbytes(16384))
    with pytest.raises(StoreConfigError, match="cannot open the LMDB environment"):
        open_store(tmp_path)


def test_one_environment_serves_one_store_a_process(tmp_path: Path) -> None:
    write(tmp_path, "n", {b"a": b"1"})
    store = open_store(tmp_path)
    with pytest.raises(StoreConfigError, match="already open"):
        open_store(tmp_path)
    assert store.get_many([("n", [b"a"])], 1.0) == [[b"1"]]
    store.close()
    with pytest.raises(StoreError):
        store.get_many([("n", [b"a"])], 1.0)
    reopened = open_store(tmp_path)
    assert reopened.get_many([("n", [b"a"])], 1.0) == [[b"1"]]
    reopened.close()
