"""A node's place in its cluster, as cachectl and Prometheus show it."""

from rich.console import Console

from cache_daemon._proto.feature_cache.v1 import admin_pb2
from cache_daemon.admin import _cluster_status
from cache_daemon.cachectl_view import status_dict, status_table
from cache_daemon.cluster_status import ClusterStatus, cluster_samples

_LEAF = ClusterStatus(
    role="leaf",
    cluster="prod",
    node="leaf-1",
    session="disconnected",
    session_age_seconds=12.4,
    map_version=17,
    map_age_seconds=12.5,
    shard_count=1024,
    leaves=3,
    shards_online=680,
    shards_warming=3,
    leader=True,
    moves=3,
    frozen="1 of 3 leaves is there",
    problems=("zone a has no room",),
)
_ROOT = ClusterStatus(role="root", cluster="prod")


def _reply(status: ClusterStatus) -> admin_pb2.GetStatusResponse:
    return admin_pb2.GetStatusResponse(state="SERVING", cluster=_cluster_status(status))


def _shown(status: ClusterStatus) -> str:
    console = Console(width=120, record=True, force_terminal=False, quiet=False)
    with console.capture() as capture:
        console.print(status_table(_reply(status)))
    return capture.get()


def _values(status: ClusterStatus) -> dict[tuple[str, str], float]:
    return {
        (sample.name.removeprefix("feature_cache_cluster_"), sample.labels.get("state", "")): (
            sample.value
        )
        for sample in cluster_samples(status)
    }


def test_a_leaf_that_leads_and_has_lost_zookeeper_is_shown() -> None:
    text = _shown(_LEAF)
    for expected in (
        "leaf leaf-1 of prod, leads it",
        "disconnected, last heard of 12 s ago",
        "version 17, 12.5 s old, 3 leaves",
        "680 online, 3 warming, of 1,024",
        "3 under way, frozen: 1 of 3 leaves is there",
        "zone a has no room",
    ):
        assert expected in text


def test_a_root_without_a_map_is_shown() -> None:
    text = _shown(_ROOT)
    assert "root of prod" in text
    assert "none yet" in text
    assert "moves" not in text


def test_the_status_as_json_has_all_of_it() -> None:
    found = status_dict(_reply(_LEAF))["cluster"]
    assert found["node"] == "leaf-1"
    assert found["problems"] == ["zone a has no room"]
    assert found["session_age_seconds"] == 12.4
    assert found["map_version"] == 17
    assert status_dict(_reply(_ROOT))["cluster"]["session_age_seconds"] == -1
    assert status_dict(admin_pb2.GetStatusResponse())["cluster"] is None


def test_metrics_say_what_the_status_says() -> None:
    values = _values(_LEAF)
    assert values["map_version", ""] == 17
    assert values["session_connected", ""] == 0
    assert values["shards", "online"] == 680
    assert values["shards", "warming"] == 3
    assert values["is_leader", ""] == 1
    assert values["moves", ""] == 3
    assert values["frozen", ""] == 1
    assert values["problems", ""] == 1
    assert values["registered", ""] == 1
    root = _values(_ROOT)
    assert root["map_version", ""] == 0
    assert not {("moves", ""), ("registered", "")} & root.keys(), "not a root's to know"
