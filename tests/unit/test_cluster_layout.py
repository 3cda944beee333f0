"""What is written to ZooKeeper reads back the same, stays small, and changes only where it must."""

import time
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from sharding import layout
from sharding.errors import CorruptState
from sharding.model import (
    SHARDS_MAX,
    ClusterConfig,
    CurrentState,
    IdealState,
    Leaf,
    LiveNode,
    NodeOverride,
    ReplicaState,
    ShardMap,
    Target,
    shards_array,
)

WARMING, ONLINE = ReplicaState.WARMING, ReplicaState.ONLINE
NODE = LiveNode(name="leaf-1", address="10.0.0.1:7070", zone="a", cluster="prod", instance_id="ab")


def u32(values: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    return np.asarray(values, dtype=np.uint32)


def u8(values: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    return np.asarray(values, dtype=np.uint8)


def random_map(
    shards: int, replicas: int, leaves: int, version: int = 7, seed: int = 1
) -> ShardMap:
    random = np.random.default_rng(seed)
    first_leaf = random.integers(0, leaves, shards)
    # Distinct leaves of a shard: steps of a size that does not divide the number of them.
    leaf = (first_leaf[:, None] + np.arange(replicas)[None, :] * 7) % leaves
    return ShardMap(
        version,
        tuple(
            Leaf(f"leaf-{i:05}", f"10.1.{i // 250}.{i % 250}:7070", f"z{i % 20}")
            for i in range(leaves)
        ),
        u32(np.arange(shards + 1) * replicas),
        u32(leaf.ravel()),
        u8(random.integers(0, 2, shards * replicas)),
    )


def read_view(written: dict[str, bytes]) -> ShardMap | None:
    """As a spectator reads: the head, and of the rest what it names."""
    path = layout.head_path(layout.VIEW)
    head = layout.decode_head(path, written[path])
    nodes, shards = layout.chunk_paths(layout.VIEW, head)
    return layout.assemble_view(
        head,
        [layout.decode_nodes_chunk(path, written[path]) for path in nodes],
        [layout.decode_shards_chunk(path, written[path]) for path in shards],
    )


# ---- JSON ----------------------------------------------------------------------------------------


def test_config_reads_back_and_says_its_format() -> None:
    config = ClusterConfig(cluster="prod", shard_count=4096, replicas=3, freeze_below=0.5)
    data = layout.encode_config(config)
    assert layout.decode_config(data) == config
    assert b'"format": 1' in data


def test_live_node_and_override_read_back() -> None:
    data = layout.encode_live(NODE)
    assert layout.decode_live("/live/leaf-1", data) == NODE
    override = NodeOverride(enabled=False, weight=2.5)
    assert layout.decode_override("/nodes/x", layout.encode_override(override)) == override


def test_a_registration_under_another_name_is_corrupt() -> None:
    with pytest.raises(CorruptState, match=r"/live/leaf-2: is the registration of leaf-1"):
        layout.decode_live("/live/leaf-2", layout.encode_live(NODE))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "EOF"),
        (b"\xff\xfe", "/config"),
        (b"[]", "object"),
        (b"{}", "format: Field required"),
        (b'{"format": 2}', "format 2; this release reads 1"),
        (b'{"format": 1, "cluster": "c", "shard_count": 0}', "shard_count"),
        (b'{"format": 1, "cluster": "c", "shard_count": 4, "freeze_below": NaN}', "freeze_below"),
        (b'{"format": 1, "cluster": "c", "shard_count": 4, "replicas": 17}', "replicas"),
        (b'{"format": 1, "cluster": "c\\n", "shard_count": 4}', "cluster"),
        (b"[" * 16000, "/config"),
        (b" " * 20000, "20000 bytes"),
    ],
)
def test_garbage_in_json_says_where(data: bytes, why: str) -> None:
    with pytest.raises(CorruptState, match=r"/config: ") as caught:
        layout.decode_config(data)
    assert why in str(caught.value)


def test_keys_of_a_later_release_are_left_out() -> None:
    data = layout.encode_config(ClusterConfig(cluster="c", shard_count=4)).rstrip()[:-1]
    assert layout.decode_config(data + b', "colour": "red"}').shard_count == 4


def test_epoch() -> None:
    assert layout.decode_epoch(b"") == 0
    assert layout.decode_epoch(layout.encode_epoch(41)) == 41
    for garbage in (b"-1", b"x", b"9" * 19, b"\xd9\xa1"):
        with pytest.raises(CorruptState):
            layout.decode_epoch(garbage)


# ---- current state and target --------------------------------------------------------------------


@pytest.mark.parametrize("shards", [[], [0], [5], [7, 8, 4095], list(range(1000))])
def test_current_and_target_read_back(shards: list[int]) -> None:
    states = [ONLINE if shard % 3 else WARMING for shard in shards]
    current = CurrentState("instance-1", 42, shards_array(shards), u8(states))
    assert layout.decode_current("/current/x", layout.encode_current(current)) == current
    target = Target(1 << 63, shards_array(shards))
    assert layout.decode_target("/target/x", layout.encode_target(target)) == target


def test_the_largest_current_state_fits_into_a_znode() -> None:
    random = np.random.default_rng(1)
    shards = np.flatnonzero(random.integers(0, 2, SHARDS_MAX))
    current = CurrentState(
        "i" * 128, 1, shards_array(shards), u8(random.integers(0, 2, len(shards)))
    )
    data = layout.encode_current(current)
    assert 200_000 < len(data) <= layout.ZNODE_BYTES_MAX
    assert layout.decode_current("/current/x", data) == current


def test_one_kind_is_not_taken_for_another() -> None:
    with pytest.raises(CorruptState, match="another kind"):
        layout.decode_current("/current/x", layout.encode_target(Target(1, shards_array([1]))))


# ---- view and ideal state ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shards", "replicas", "leaves"), [(1, 1, 1), (999, 2, 20), (1001, 3, 501), (2500, 2, 1000)]
)
def test_a_view_reads_back(shards: int, replicas: int, leaves: int) -> None:
    view = random_map(shards, replicas, leaves)
    _, writes = layout.encode_view(view, None)
    assert writes[-1][0] == "/view/head"
    assert read_view(dict(writes)) == view


def test_a_view_of_shards_without_replicas_and_of_nobody() -> None:
    view = ShardMap(1, (), u32([0] * 5), u32([]), u8([]))
    assert read_view(dict(layout.encode_view(view, None)[1])) == view


def test_ideal_state_reads_back_with_its_order() -> None:
    ideal = IdealState(3, ("a", "b", "c"), u32([0, 2, 2, 5]), u32([2, 0, 1, 2, 0]))
    head, writes = layout.encode_ideal(ideal, None)
    written = dict(writes)
    nodes, shards = layout.chunk_paths(layout.IDEAL, head)
    assert head == layout.decode_head("/ideal/head", written["/ideal/head"])
    read = layout.assemble_ideal(
        head,
        [layout.decode_nodes_chunk(path, written[path]) for path in nodes],
        [layout.decode_shards_chunk(path, written[path]) for path in shards],
    )
    assert read == ideal


def test_only_changed_chunks_are_written_and_the_old_map_stays_whole_until_the_head() -> None:
    old = random_map(5000, 2, 600)
    old_head, writes = layout.encode_view(old, None)
    written = dict(writes)
    state = old.state.copy()
    state[2 * 3141] ^= 1
    new = replace(old, version=8, state=state)
    new_head, writes = layout.encode_view(new, (old_head, old))
    assert [path for path, _ in writes] == ["/view/chunks/3b", "/view/head"]
    written.update(writes[:-1])
    assert read_view(written) == old, "as when the writer dies before the head"
    written.update(writes[-1:])
    assert read_view(written) == new
    # The next one takes the first slot again.
    newest = replace(old, version=9)
    _, writes = layout.encode_view(newest, (new_head, new))
    assert [path for path, _ in writes] == ["/view/chunks/3a", "/view/head"]


def test_a_chunk_of_another_version_is_not_believed() -> None:
    old = random_map(2000, 2, 20)
    head, writes = layout.encode_view(old, None)
    written = dict(writes)
    for version in (8, 9):  # Two publishes later the slot of the first is written again.
        new = replace(old, version=version, state=old.state ^ np.uint8(1))
        new_head, writes = layout.encode_view(new, (head, old))
        if version == 8:
            written_head = written["/view/head"]
        written.update(writes)
        head, old = new_head, new
    written["/view/head"] = written_head
    assert read_view(written) is None


def test_all_is_written_where_the_old_map_is_unreadable() -> None:
    old = random_map(2000, 2, 20)
    head, _ = layout.encode_view(old, None)
    _, writes = layout.encode_view(replace(old, version=8), (head, None))
    assert [path for path, _ in writes] == [
        "/view/nodes/0b",
        "/view/chunks/0b",
        "/view/chunks/1b",
        "/view/head",
    ]


def test_a_version_never_goes_back() -> None:
    view = random_map(10, 1, 3)
    head, _ = layout.encode_view(view, None)
    with pytest.raises(ValueError, match="version 7 after 7"):
        layout.encode_view(view, (head, view))


def test_a_large_cluster_fits_and_is_read_fast() -> None:
    view = random_map(100_000, 3, 5000)
    _, writes = layout.encode_view(view, None)
    sizes = [len(data) for _, data in writes]
    assert max(sizes) <= layout.ZNODE_BYTES_MAX // 4
    assert sum(sizes) < 1_500_000
    written = dict(writes)
    started = time.perf_counter()
    read = read_view(written)
    seconds = time.perf_counter() - started
    assert read == view
    assert seconds < 0.5


def test_the_fullest_chunk_fits_into_a_znode() -> None:
    random = np.random.default_rng(3)
    leaves = tuple(Leaf(f"n{i:05}", "x" * 260, "z" * 128, "i" * 128) for i in range(60_000))
    leaf = np.concatenate([random.choice(60_000, 64, replace=False) for _ in range(1000)])
    view = ShardMap(
        1, leaves, u32(np.arange(1001) * 64), u32(leaf), u8(random.integers(0, 2, 64_000))
    )
    _, writes = layout.encode_view(view, None)
    assert max(len(data) for _, data in writes) <= layout.ZNODE_BYTES_MAX
    assert read_view(dict(writes)) == view


# ---- the values themselves -----------------------------------------------------------------------


def test_a_map_answers_who_holds_a_shard() -> None:
    leaves = (Leaf("a", "a:1", "x"), Leaf("b", "b:1", "y"))
    view = ShardMap(1, leaves, u32([0, 2, 2, 3]), u32([1, 0, 1]), u8([1, 0, 0]))
    assert view.replicas(0) == [(leaves[1], ONLINE), (leaves[0], WARMING)]
    assert view.replicas(1) == []
    with pytest.raises(IndexError):
        view.replicas(3)
    shards, states = view.held_by("b")
    assert shards.tolist() == [0, 2]
    assert states.tolist() == [1, 0]
    assert view.held_by("nobody")[0].tolist() == []
    assert view.shard_of_replica().tolist() == [0, 0, 2]
    with pytest.raises(ValueError, match="read-only"):
        view.leaf[0] = 1


@pytest.mark.parametrize(
    ("first", "leaf", "state", "why"),
    [
        ([0, 1], [2], [1], "leaf 2 of 2"),
        ([0, 1], [0], [2], "unknown state 2"),
        ([0, 2], [0], [1], "offsets end at 2"),
        ([0, 2, 1], [0], [1], "offsets fall"),
        ([1, 1], [0], [1], "offsets"),
        ([0, 1], [0], [1, 1], "2 states of 1"),
        ([0, 2], [1, 1], [1, 0], "shard 0 twice"),
        ([], [], [], "shards"),
    ],
)
def test_a_map_that_contradicts_itself_is_refused(
    first: list[int], leaf: list[int], state: list[int], why: str
) -> None:
    leaves = (Leaf("a", "a:1", "x"), Leaf("b", "b:1", "y"))
    with pytest.raises(ValueError, match=why):
        ShardMap(1, leaves, u32(first), u32(leaf), u8(state))
