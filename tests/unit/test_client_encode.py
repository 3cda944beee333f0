"""The request encoder against protobuf's own parser: what we write is what the contract says."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_daemon import _native
from cache_daemon._proto.feature_cache.v1 import feature_cache_pb2 as pb

_KEYS = st.lists(st.binary(min_size=1, max_size=300), max_size=50)
_NAMES = st.text(max_size=20)


@settings(max_examples=200, deadline=None)
@given(
    columns=st.lists(st.tuples(_NAMES, _KEYS, _NAMES), max_size=4),
    request_id=st.integers(0, 2**64 - 1),
    cache_only=st.booleans(),
)
def test_a_get_parses_to_the_same_columns(
    columns: list[tuple[str, list[bytes], str]], request_id: int, cache_only: bool
) -> None:
    encoded = _native.encode_get(columns, request_id=request_id, cache_only=cache_only)
    parsed = pb.BatchGetRequest.FromString(encoded)
    assert parsed.request_id == request_id
    assert parsed.cache_only == cache_only
    assert [(c.namespace, c.domain) for c in parsed.columns] == [(n, d) for n, _, d in columns]
    for column, (_, keys, _) in zip(parsed.columns, columns, strict=True):
        assert column.keys == b"".join(keys)
        assert list(column.key_lengths) == [len(key) for key in keys]
        assert not column.ids
    assert parsed.SerializeToString() == encoded  # nothing that protobuf would not write


@settings(max_examples=200, deadline=None)
@given(
    items=st.lists(st.tuples(st.binary(min_size=1, max_size=40), st.binary(max_size=500))),
    ttl=st.one_of(st.none(), st.integers(0, 2**32 - 1)),
)
def test_a_put_parses_to_the_same_items(items: list[tuple[bytes, bytes]], ttl: int | None) -> None:
    keys, values = [key for key, _ in items], [value for _, value in items]
    encoded = _native.encode_put([("pin", keys, "hot", values, ttl)])
    (column,) = pb.BatchPutRequest.FromString(encoded).columns
    assert (column.keys.namespace, column.keys.domain) == ("pin", "hot")
    assert column.keys.keys == b"".join(keys)
    assert column.values == b"".join(values)
    assert list(column.value_lengths) == [len(value) for value in values]
    assert list(column.ttl_ms) == ([] if ttl is None else [ttl])


@pytest.mark.parametrize("dtype", ["int64", "uint64", "int32", "uint8", ">i8", ">u4"])
def test_ids_of_any_integer_type_arrive_as_the_same_numbers(dtype: str) -> None:
    ids = np.array([0, 1, 100, 127], dtype)
    parsed = pb.BatchGetRequest.FromString(_native.encode_get([("pin", ids, "")]))
    assert list(parsed.columns[0].ids) == [0, 1, 100, 127]
    assert not parsed.columns[0].key_lengths


def test_a_negative_id_is_its_twos_complement() -> None:
    parsed = pb.BatchGetRequest.FromString(_native.encode_get([("pin", np.array([-1]), "")]))
    assert list(parsed.columns[0].ids) == [2**64 - 1]


def test_ids_of_a_strided_array_are_those_it_shows() -> None:
    ids = np.arange(20)[::2]
    parsed = pb.BatchGetRequest.FromString(_native.encode_get([("pin", ids, "")]))
    assert list(parsed.columns[0].ids) == list(range(0, 20, 2))


@pytest.mark.parametrize("blob", [b"abcdef", bytearray(b"abcdef"), np.frombuffer(b"abcdef", "u1")])
def test_keys_may_come_as_a_blob_with_lengths(blob: Any) -> None:
    encoded = _native.encode_get([("pin", (blob, np.array([1, 2, 3])), "")])
    (column,) = pb.BatchGetRequest.FromString(encoded).columns
    assert (column.keys, list(column.key_lengths)) == (b"abcdef", [1, 2, 3])


def test_text_keys_are_utf8_and_tuples_are_sequences_too() -> None:
    (column,) = pb.BatchGetRequest.FromString(
        _native.encode_get([("pin", ("pin:é", "b"), "")])
    ).columns
    assert (column.keys, list(column.key_lengths)) == ("pin:éb".encode(), [6, 1])


def test_rows_of_an_array_are_values() -> None:
    rows = np.arange(12, dtype="float32").reshape(3, 4)
    ttls = np.array([0, 5, 300])
    encoded = _native.encode_put([("pin", np.arange(3), "", rows, ttls)])
    (column,) = pb.BatchPutRequest.FromString(encoded).columns
    assert column.values == rows.tobytes()
    assert list(column.value_lengths) == [16, 16, 16]
    assert list(column.ttl_ms) == [0, 5, 300]


def test_a_delete_parses_to_the_same_columns() -> None:
    encoded = _native.encode_delete([("a", [b"x", b"yz"], ""), ("b", np.array([7]), "")])
    first, second = pb.BatchDeleteRequest.FromString(encoded).columns
    assert (first.namespace, first.keys, list(first.key_lengths)) == ("a", b"xyz", [1, 2])
    assert (second.namespace, list(second.ids)) == ("b", [7])


@pytest.mark.parametrize(
    "keys",
    [
        [1.5],
        [b"a", None],
        [["a"]],
        b"abc",
        "abc",
        7,
        None,
        np.array([1.5]),
        np.array([[1, 2]]),
        np.array([True]),
        (b"abc", np.array([1, 1])),
        (b"abc", np.array([2**31, 5])),
        (b"abc", np.array([1.5, 1.5])),
        (np.zeros((2, 2), "u1")[:, 0], np.array([1, 1])),
    ],
)
def test_keys_that_are_neither_ids_nor_bytes_are_refused(keys: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        _native.encode_get([("pin", keys, "")])


@pytest.mark.parametrize(
    ("values", "ttl"),
    [
        ([b"a"], None),
        ([b"a", b"b", b"c"], None),
        (np.zeros((3, 4)), None),
        (np.zeros((2, 8))[:, ::2], None),
        (np.array([object(), object()]), None),
        ([b"a", 5], None),
        ((b"abc", np.array([1, 1])), None),
        ([b"a", b"b"], -1),
        ([b"a", b"b"], 2**32),
        ([b"a", b"b"], np.array([1])),
        ([b"a", b"b"], np.array([1, -1])),
        ([b"a", b"b"], np.array([1.5, 2.5])),
    ],
)
def test_values_and_ttls_that_do_not_fit_their_keys_are_refused(values: Any, ttl: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        _native.encode_put([("pin", [b"k1", b"k2"], "", values, ttl)])


@pytest.mark.parametrize("columns", [[("pin", [b"a"])], ["pin"], [("pin", [b"a"], None)], [None]])
def test_columns_of_the_wrong_shape_are_refused(columns: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        _native.encode_get(columns)
