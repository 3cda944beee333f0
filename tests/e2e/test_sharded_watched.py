"""Every query of the cluster's dashboard and rules, asked of a Prometheus that watches one."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.daemons import Prometheus
from tests.servers import wait_until
from tests.sharded_daemons import Cluster
from tests.zookeeper import ZooKeeperServer

_DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
_RULES = "feature-cache-cluster.rules.yml"


def _dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(
        (_DEPLOY / "grafana" / "feature-cache-cluster.json").read_text()
    )
    return read


def _panel_queries() -> list[tuple[str, str, str]]:
    """Title, expression and legend of each target of each panel."""
    return [
        (panel["title"], target["expr"], target["legendFormat"])
        for panel in _dashboard()["panels"]
        for target in panel.get("targets", [])
    ]


def _with_variables(expression: str) -> str:
    expression = expression.replace("$instance", ".*").replace("$__rate_interval", "3s")
    assert "$" not in expression, f"a variable without a value: {expression}"
    return expression


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has scraped two leaves and a root of a cluster that has settled."""
    folder = tmp_path_factory.mktemp("watched")
    config = yaml.safe_load((_DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert _RULES in config["rule_files"]
    with ExitStack() as stack:
        server = ZooKeeperServer(tmp_path_factory.mktemp("zookeeper"))
        stack.enter_context(server)
        cluster = stack.enter_context(Cluster(folder, f"{server.address}/watched", leaves=2))
        cluster.start()
        nodes = (cluster.root, *cluster.leaves)
        config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
        config["rule_files"] = [str(_DEPLOY / "prometheus" / name) for name in config["rule_files"]]
        (job,) = config["scrape_configs"]
        targets = [str(node.daemon.addresses["http"]) for node in nodes]
        job["static_configs"] = [{"targets": targets}]
        found = Prometheus(tmp_path_factory.mktemp("prometheus"), config)
        stack.enter_context(found)
        wait_until(
            lambda: len(found.query("feature_cache_cluster_info")) == 3, 20, "three daemons scraped"
        )
        yield found


@pytest.mark.parametrize(("title", "expression", "legend"), _panel_queries())
def test_panel_shows_something(
    prometheus: Prometheus, title: str, expression: str, legend: str
) -> None:
    query = _with_variables(expression)

    def has_values() -> bool:
        values = [value for _, value in prometheus.query(query)]
        return bool(values) and not any(math.isnan(value) for value in values)

    wait_until(has_values, timeout_s=10, what=f"{title}: {query} has values")
    wanted = set(re.findall(r"{{(\w+)}}", legend))
    for labels, _ in prometheus.query(query):
        assert wanted <= labels.keys(), (title, labels)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ('sum(feature_cache_cluster_shards{state="online"}) by (job)', 2 * 64 + 64),
        ("count(feature_cache_cluster_shard_count == 64)", 3),
        ("sum(feature_cache_cluster_is_leader)", 1),
        ("sum(feature_cache_cluster_registered)", 2),
        ("sum(feature_cache_cluster_moves)", 0),
        ("sum(feature_cache_cluster_problems)", 0),
        ("min(feature_cache_cluster_session_connected)", 1),
    ],
)
def test_figures_make_sense(prometheus: Prometheus, expression: str, expected: float) -> None:
    def found() -> list[float]:
        return [value for _, value in prometheus.query(expression)]

    wait_until(lambda: found() == [expected], 10, f"{expression} is {expected}, not {found()}")


def test_rules_are_evaluated_on_metrics_that_exist(prometheus: Prometheus) -> None:
    rules = yaml.safe_load((_DEPLOY / "prometheus" / _RULES).read_text())["groups"][0]["rules"]

    def evaluated() -> list[dict[str, Any]]:
        groups = prometheus.get("rules")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    wait_until(lambda: all(rule["health"] == "ok" for rule in evaluated()), 10, "rules evaluated")
    names = set(prometheus.get("label/__name__/values"))
    for rule in rules:
        used = set(re.findall(r"\bfeature_cache_\w+", rule["expr"]))
        assert used <= names, f"{used - names} is in no scrape"


def test_a_healthy_cluster_fires_no_alert(prometheus: Prometheus) -> None:
    alerts = prometheus.get("alerts")["alerts"]
    cluster = [alert for alert in alerts if "Cluster" in alert["labels"]["alertname"]]
    assert [alert for alert in cluster if alert["state"] == "firing"] == []
