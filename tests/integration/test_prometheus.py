"""Every query of the dashboard and of the rules, asked of a real Prometheus that scrapes a daemon.

The daemon serves real traffic from an LMDB store and an NVM file meanwhile: hits of both tiers,
misses, not-founds, evictions, expirations. A query that finds nothing would be an empty panel, or
an alert that never fires.
"""

import json
import math
import re
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cache_daemon.client import Client
from cache_daemon.stores.lmdb import LmdbWriter
from tests.daemons import CacheDaemon, Prometheus
from tests.servers import wait_until

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "feature-cache.json"
RULES = [
    DEPLOY / "prometheus" / name
    for name in ("feature-cache.rules.yml", "feature-cache-warmup.rules.yml")
]

STORED_ITEMS = 20_000
VALUE_BYTES = 400


def dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return read


def panel_queries() -> list[tuple[str, str]]:
    """Title and expression of each target of each panel."""
    return [
        (panel["title"], target["expr"])
        for panel in dashboard()["panels"]
        for target in panel.get("targets", [])
    ]


def rules() -> list[dict[str, Any]]:
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def daemon_config(store: Path) -> dict[str, Any]:
    long_lasting = {"budget": "40%"}
    ephemeral = {"budget": "20%", "ttl": "1s", "policy": "lru"}
    return {
        "memory": {"size": "12MiB", "expected_item_size": 400},
        "nvm": {
            "devices": [{"path": str(store.with_name("nvm")), "size": "6MiB"}],
            "region_size": "64KiB",
            "read_memory": "4MiB",
        },
        "namespaces": {
            "pin_text": {
                "store": "features",
                "nvm": {"budget": "60%"},
                "speculative": {"after": "p99", "budget": "5%"},
                "default_domain": "long_lasting",
                "negative_ttl": "30s",
                "domains": {"long_lasting": long_lasting, "ephemeral": ephemeral},
            },
            "user": {
                "store": "features",
                "nvm": {"budget": "40%"},
                "negative_ttl": "30s",
                "domains": {"real_time": {"budget": "20%", "ttl": "2s"}},
            },
        },
        "stores": {"features": {"type": "lmdb", "options": {"path": str(store)}}},
        "warmup": {
            "record": {"dir": str(store.with_name("request-log")), "window": "5s"},
            "snapshots": {"url": f"file://{store.with_name('snapshots')}"},
            "plan": "none",  # there is nothing to warm up from
        },
        "drain_timeout": "2s",
    }


def prometheus_config(target: str) -> dict[str, Any]:
    """The shipped config, with another target and a test's patience."""
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    config["rule_files"] = [str(DEPLOY / "prometheus" / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [target]}]
    return config


class Traffic:
    """Requests until stopped: a hot set, a cold tail, and keys that the store does not have."""

    def __init__(self, address: str) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=[address])
        self.failure: Exception | None = None
        self._thread.start()

    def _run(self, address: str) -> None:
        random = np.random.default_rng(7)
        try:
            with Client(address, timeout=2.0) as client:
                while not self._stop.wait(0.02):
                    cold = random.integers(0, STORED_ITEMS + 500, 200)
                    keys = np.concatenate([np.arange(300), cold]).astype(np.int64)
                    domain = "ephemeral" if random.random() < 0.3 else "long_lasting"
                    client.batch_get({"pin_text": keys, "user": keys}, domains={"pin_text": domain})
                    # Without the store: what waits here waits for NVM alone.
                    client.batch_get({"pin_text": cold[:50]}, cache_only=True)
                    client.batch_put({"user": ([b"session"], [b"v"])})
        except Exception as error:
            self.failure = error

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(10)
        if self.failure is not None:
            raise AssertionError("the traffic failed") from self.failure


@dataclass
class Watched:
    daemon: CacheDaemon
    prometheus: Prometheus


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    root = tmp_path_factory.mktemp("watched")
    store = root / "store"
    keys = [number.to_bytes(8, "little") for number in range(STORED_ITEMS)]
    values = [bytes([number % 251]) * VALUE_BYTES for number in range(STORED_ITEMS)]
    with LmdbWriter(store, map_size=256 << 20, sync=False) as writer:
        for namespace in ("pin_text", "user"):
            writer.write_many(namespace, zip(keys, values, strict=True))
    folders = [root / "daemon", root / "prometheus"]
    for folder in folders:
        folder.mkdir()
    with ExitStack() as stack:
        daemon = CacheDaemon(folders[0], daemon_config(store))
        stack.enter_context(daemon)
        prometheus = Prometheus(folders[1], prometheus_config(daemon.http_address))
        stack.enter_context(prometheus)
        traffic = Traffic(daemon.data_address)
        stack.callback(traffic.stop)
        # Four scrapes under traffic: what every rate over the windows below needs.
        scrapes = 'count_over_time(feature_cache_namespace_hits_total{namespace="user"}[1m])'
        wait_until(
            lambda: any(count >= 4 for _, count in prometheus.query(scrapes)),
            timeout_s=40,
            what="four scrapes of the daemon",
        )
        yield Watched(daemon, prometheus)


def with_variables(expression: str) -> str:
    """The query as Grafana sends it, with the variables at All."""
    for name, value in (("$__rate_interval", "3s"), ("$instance", ".*"), ("$namespace", ".*")):
        expression = expression.replace(name, value)
    assert "$" not in expression, f"a variable without a value: {expression}"
    return expression


@pytest.mark.parametrize(("title", "expression"), panel_queries())
def test_panel_shows_something(watched: Watched, title: str, expression: str) -> None:
    query = with_variables(expression)

    def has_values() -> bool:
        values = [value for _, value in watched.prometheus.query(query)]
        return bool(values) and not any(math.isnan(value) for value in values)

    wait_until(has_values, timeout_s=10, what=f"{title}: {query} has values")


@pytest.mark.parametrize(
    ("expression", "low", "high"),
    [
        ('feature_cache_state{state="SERVING"}', 1, 1),
        ('namespace:feature_cache_hit_ratio:rate5m{namespace="pin_text"}', 0.3, 0.99),
        ("sum(rate(feature_cache_domain_evictions_total[3s])) > 0", 0, math.inf),
        ('feature_cache_store_breaker_state{state="closed"}', 1, 1),
        ("sum by (namespace) (namespace_status:feature_cache_cells:share5m)", 0.999, 1.001),
        ("sum(feature_cache_namespace_nvm_hits_total) > 0", 1, math.inf),
        ("feature_cache_nvm_device_in_service", 1, 1),
        ("feature_cache_nvm_checksum_errors_total", 0, 0),
        ("sum(feature_cache_nvm_device_regions)", 95, 95),
        ("sum(feature_cache_namespace_nvm_budget_bytes)", 5 << 20, 6 << 20),
        ("feature_cache_scrape_conflicts", 0, 0),
        ("feature_cache_scrape_errors_total", 0, 0),
    ],
)
def test_figures_make_sense(watched: Watched, expression: str, low: float, high: float) -> None:
    wait_until(lambda: bool(watched.prometheus.query(expression)), 10, expression)
    for labels, value in watched.prometheus.query(expression):
        assert low <= value <= high, (labels, value)


def test_legends_name_labels_that_are_there(watched: Watched) -> None:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            wanted = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            for labels, _ in watched.prometheus.query(with_variables(target["expr"])):
                assert wanted <= labels.keys(), (panel["title"], labels)


def test_variables_have_choices(watched: Watched) -> None:
    queries = [v for v in dashboard()["templating"]["list"] if v["type"] == "query"]
    assert [variable["name"] for variable in queries] == ["instance", "namespace"]
    for variable in queries:
        match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert match is not None
        expression, label = match.groups()
        series = watched.prometheus.get("series", **{"match[]": with_variables(expression)})
        choices = {labels[label] for labels in series}
        assert choices == (
            {"pin_text", "user"} if label == "namespace" else {watched.daemon.http_address}
        )


def test_rules_are_evaluated_on_metrics_that_exist(watched: Watched) -> None:
    def evaluated() -> list[dict[str, Any]]:
        groups = watched.prometheus.get("rules")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    wait_until(lambda: all(rule["health"] == "ok" for rule in evaluated()), 10, "rules evaluated")
    # Those of clusters are evaluated, too; here they find nothing.
    ours = {rule["alert"] if "alert" in rule else rule["record"] for rule in rules()}
    assert ours <= {rule["name"] for rule in evaluated()}
    assert len(evaluated()) > len(rules())
    names = set(watched.prometheus.get("label/__name__/values"))
    for rule in rules():
        used = set(re.findall(r"\b(?:\w+:)?feature_cache_\w+(?::\w+)?", rule["expr"]))
        assert used <= names, f"{used - names} is in no scrape"
    statuses = {
        labels["status"] for labels, _ in watched.prometheus.query("feature_cache_cells_total")
    }
    assert {
        "HIT_DRAM",
        "HIT_NVM",
        "FETCHED",
        "NOT_FOUND",
        "TIMED_OUT",
        "THROTTLED",
        "ERROR",
    } <= statuses
    outcomes = watched.prometheus.query("feature_cache_store_calls_total")
    assert "ok" in {labels["outcome"] for labels, _ in outcomes}


def test_a_healthy_daemon_fires_no_alert(watched: Watched) -> None:
    alerts = watched.prometheus.get("alerts")["alerts"]
    assert [alert for alert in alerts if alert["state"] == "firing"] == []


def test_the_exposition_is_clean(watched: Watched) -> None:
    url = f"http://{watched.daemon.http_address}/metrics"
    with urllib.request.urlopen(url, timeout=10) as reply:
        exposition = reply.read()
    done = subprocess.run(["promtool", "check", "metrics"], input=exposition, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_it_is_served_in_a_scrapes_time(watched: Watched) -> None:
    durations = watched.prometheus.query("scrape_duration_seconds")
    assert durations
    assert max(value for _, value in durations) < 0.5
