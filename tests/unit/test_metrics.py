"""The collector's families in Prometheus' own parsers, and the HTTP endpoint over real sockets."""

import contextlib
import http.client
import json
import logging
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families

from cache_daemon import http as cache_http
from cache_daemon.http import HttpError, HttpServer
from cache_daemon.metrics import HistogramLike, Metrics, SampleLike


@dataclass(frozen=True)
class Sample:
    name: str
    kind: str
    value: float
    labels: dict[str, str] = field(default_factory=dict)
    help: str = "What it counts."


@dataclass(frozen=True)
class Histogram:
    name: str
    bounds: list[float]
    counts: list[int]
    sum: float
    labels: dict[str, str] = field(default_factory=dict)
    help: str = "What it times."


@dataclass
class Source:
    """A source of hand-made samples; the real node is scraped in tests/integration."""

    kept: Sequence[SampleLike] = ()
    kept_histograms: Sequence[HistogramLike] = ()
    failure: Exception | None = None

    def samples(self) -> Sequence[SampleLike]:
        if self.failure is not None:
            raise self.failure
        return self.kept

    def histograms(self) -> Sequence[HistogramLike]:
        return self.kept_histograms


def metrics_of(*sources: Source, state: str = "SERVING") -> Metrics:
    return Metrics(sources, state=lambda: state, build_info={"version": "1.2.3", "simd": "avx2"})


def series(metrics: Metrics) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Sample name → labels → value, as Prometheus reads it."""
    _, body = metrics.render()
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in found.setdefault(sample.name, {}), f"{sample.name} twice"
            found[sample.name][labels] = sample.value
    return found


def test_counters_and_gauges_keep_type_help_labels_and_value() -> None:
    labels = {"namespace": "pin_text", "domain": "long_lasting"}
    source = Source(
        [
            Sample("feature_cache_domain_hits_total", "counter", 7, labels, "Hits."),
            Sample("feature_cache_domain_hits_total", "counter", 5, {**labels, "domain": "b"}),
            Sample("feature_cache_domain_used_bytes", "gauge", 2**40, labels, "Bytes in use."),
        ]
    )
    _, body = metrics_of(source).render()
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    hits = families["feature_cache_domain_hits"]
    assert (hits.type, hits.documentation) == ("counter", "Hits.")
    assert [(sample.labels["domain"], sample.value) for sample in hits.samples] == [
        ("long_lasting", 7),
        ("b", 5),
    ]
    used = families["feature_cache_domain_used_bytes"]
    assert (used.type, used.samples[0].value, used.samples[0].labels) == ("gauge", 2**40, labels)


def test_histogram_buckets_are_cumulative_and_end_in_infinity() -> None:
    source = Source(
        kept_histograms=[
            Histogram(
                "feature_cache_stage_seconds", [1e-5, 0.001], [3, 2, 1], 0.25, {"stage": "dram"}
            )
        ]
    )
    found = series(metrics_of(source))
    buckets = found["feature_cache_stage_seconds_bucket"]
    by_edge = {dict(labels)["le"]: value for labels, value in buckets.items()}
    assert {float(edge): value for edge, value in by_edge.items()} == {
        1e-5: 3,
        0.001: 5,
        float("inf"): 6,
    }
    assert "+Inf" in by_edge
    stage = (("stage", "dram"),)
    assert found["feature_cache_stage_seconds_count"][stage] == 6
    assert found["feature_cache_stage_seconds_sum"][stage] == 0.25


def test_openmetrics_is_served_when_asked_for() -> None:
    source = Source(
        [Sample("feature_cache_a_total", "counter", 1)],
        [Histogram("feature_cache_stage_seconds", [0.1], [1, 1], 0.3)],
    )
    content_type, body = metrics_of(source).render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    parsed = parse_openmetrics(body.decode())  # type: ignore[no-untyped-call]
    families = {family.name: family.type for family in parsed}
    assert families["feature_cache_a"] == "counter"
    assert families["feature_cache_stage_seconds"] == "histogram"


def test_clashing_series_cost_only_themselves() -> None:
    first = Source([Sample("feature_cache_a_total", "counter", 1, {"store": "s"})])
    second = Source(
        [
            Sample("feature_cache_a_total", "counter", 2, {"store": "s"}),
            Sample("feature_cache_a_total", "gauge", 3, {"store": "t"}),
            Sample("feature_cache_b", "gauge", 4),
        ],
        [Histogram("feature_cache_h", [0.1], [1], 0.0)],  # an overflow bucket is missing
    )
    found = series(metrics_of(first, second))
    assert found["feature_cache_a_total"] == {(("store", "s"),): 1}
    assert found["feature_cache_b"] == {(): 4}
    assert found["feature_cache_scrape_conflicts"] == {(): 3}
    assert "feature_cache_h_bucket" not in found


def test_a_failing_source_does_not_hide_the_others(caplog: pytest.LogCaptureFixture) -> None:
    broken = Source(failure=RuntimeError("gone"))
    metrics = metrics_of(broken, Source([Sample("feature_cache_b", "gauge", 4)]))
    with caplog.at_level(logging.CRITICAL):
        series(metrics)
        found = series(metrics)
    assert found["feature_cache_b"] == {(): 4}
    assert found["feature_cache_scrape_errors_total"] == {(): 2}


def test_state_build_and_process_are_there() -> None:
    found = series(metrics_of(state="DRAINING"))
    assert found["feature_cache_state"] == {
        (("state", "STARTING"),): 0,
        (("state", "RECOVERING"),): 0,
        (("state", "WARMING"),): 0,
        (("state", "SERVING"),): 0,
        (("state", "DRAINING"),): 1,
        (("state", "STOPPED"),): 0,
    }
    assert found["feature_cache_build_info"] == {(("simd", "avx2"), ("version", "1.2.3")): 1}
    assert found["process_resident_memory_bytes"][()] > 1e6


# ---- the endpoint --------------------------------------------------------------------------------


class Endpoint:
    """A server whose daemon state a test sets."""

    def __init__(self) -> None:
        self.state = "SERVING"
        self.out_of_service: list[str] = []
        source = Source([Sample("feature_cache_b", "gauge", 4)])
        self.server = HttpServer(
            "127.0.0.1:0",
            metrics=metrics_of(source),
            state=lambda: self.state,
            out_of_service=lambda: self.out_of_service,
        )
        host, _, port = self.server.address.rpartition(":")
        self.host, self.port = host, int(port)

    def ask(self, path: str, method: str = "GET") -> tuple[int, bytes, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=5)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, response.read(), response.headers
        finally:
            connection.close()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.server.stop()


def test_metrics_over_http(endpoint: Endpoint) -> None:
    status, body, headers = endpoint.ask("/metrics?x=1")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain")
    assert b"feature_cache_b 4.0\n" in body
    head_status, head_body, head_headers = endpoint.ask("/metrics", "HEAD")
    assert (head_status, head_body) == (200, b"")
    assert int(head_headers["Content-Length"]) > 0


@pytest.mark.parametrize(
    ("state", "healthy", "started", "ready"),
    [
        ("STARTING", 200, 503, 503),
        ("RECOVERING", 200, 503, 503),
        ("WARMING", 200, 503, 503),
        ("SERVING", 200, 200, 200),
        ("DRAINING", 200, 200, 503),
        ("STOPPED", 503, 503, 503),
    ],
)
def test_probes_follow_the_state(
    endpoint: Endpoint, state: str, healthy: int, started: int, ready: int
) -> None:
    endpoint.state = state
    for path, expected in (("/healthz", healthy), ("/startupz", started), ("/readyz", ready)):
        status, body, _ = endpoint.ask(path)
        assert (status, json.loads(body)) == (expected, {"state": state})


def test_a_device_out_of_service_is_named_and_takes_nothing_out_of_traffic(
    endpoint: Endpoint,
) -> None:
    endpoint.out_of_service = ["/nvm/a"]
    status, body, _ = endpoint.ask("/healthz")
    assert (status, json.loads(body)) == (
        200,
        {"state": "SERVING", "nvm_out_of_service": ["/nvm/a"]},
    )
    status, body, _ = endpoint.ask("/readyz")
    assert (status, json.loads(body)) == (200, {"state": "SERVING"})


def test_other_methods_and_paths_are_refused(endpoint: Endpoint) -> None:
    status, _, headers = endpoint.ask("/metrics", "POST")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")
    assert endpoint.ask("/metrics", "DELETE")[0] == 405
    status, body, _ = endpoint.ask("/")
    assert status == 404
    assert b"/readyz" in body
    assert endpoint.ask("/metrics")[0] == 200


def test_garbage_leaves_the_server_serving(endpoint: Endpoint) -> None:
    for garbage in (
        b"\x00\xff\x16\x03\r\n\r\n",
        b"GET /" + b"a" * 70_000,
        b"GET / HTTP/9.9\r\n\r\n",
    ):
        with socket.create_connection((endpoint.host, endpoint.port), timeout=5) as connection:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    assert endpoint.ask("/healthz")[0] == 200


def answered(endpoint: Endpoint) -> bool:
    """False when turned away: by 503, or by a close that came before the request was sent."""
    try:
        status = endpoint.ask("/healthz")[0]
    except OSError:
        return False
    assert status in {200, 503}
    return status == 200


def test_connections_are_bounded_in_number_and_time(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_http, "CONNECTION_SECONDS_MAX", 1.0)
    idle = [
        socket.create_connection((endpoint.host, endpoint.port), timeout=5)
        for _ in range(cache_http.CONNECTIONS_MAX)
    ]
    try:
        assert not answered(endpoint)
        # A byte now and then keeps a socket timeout from firing; the deadline must not be fooled.
        deadline = time.monotonic() + 10
        while not answered(endpoint):
            assert time.monotonic() < deadline, "idle connections were never cut"
            for connection in idle:
                with contextlib.suppress(OSError):
                    connection.send(b"G")
            time.sleep(0.1)
    finally:
        for connection in idle:
            connection.close()


def test_a_taken_port_is_a_clear_error(endpoint: Endpoint) -> None:
    with pytest.raises(HttpError, match=rf"127\.0\.0\.1:{endpoint.port}.*another process"):
        HttpServer(endpoint.server.address, metrics=metrics_of(), state=lambda: "SERVING")


@pytest.mark.parametrize("address", ["", "localhost", ":9100", "127.0.0.1:x", "127.0.0.1:70000"])
def test_a_malformed_address_is_an_error(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        HttpServer(address, metrics=metrics_of(), state=lambda: "SERVING")


def test_stop_closes_the_port_and_may_be_repeated() -> None:
    made = Endpoint()
    made.server.stop()
    made.server.stop()
    with pytest.raises(ConnectionRefusedError):
        made.ask("/healthz")


def test_ipv6_loopback() -> None:
    server = HttpServer("[::1]:0", metrics=metrics_of(), state=lambda: "SERVING")
    try:
        assert server.address.startswith("[::1]:")
        port = int(server.address.rpartition(":")[2])
        connection = http.client.HTTPConnection("::1", port, timeout=5)
        connection.request("GET", "/readyz")
        assert connection.getresponse().status == 200
        connection.close()
    finally:
        server.stop()
