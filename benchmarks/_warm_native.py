"""The native parts of the warm-up benchmark: the request log by itself, and peer copy."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks._harness import Figure, Metric, Settings, median
from benchmarks._native import Round, build, rounds_by_metric

__all__ = ["METRICS", "measure"]

_LOG = Metric(
    "log_bytes_per_key", "log size over the entropy of what it tells (1 M ids, Zipf 0.9)", limit=1.2
)
_DECODE = Metric("replay_decode", "keys read, filtered and merged a second on a core", 1.0)
_COPY = Metric("peer_copy", "bytes copied from a peer over loopback, values of 1 KiB", 0.6)
_COPY_SMALL = Metric("peer_copy_200_bytes", "the same with values of 200 bytes")
_DECODE_LEAST = 5e6  # keys/s
METRICS: Sequence[Metric] = (_LOG, _DECODE, _COPY, _COPY_SMALL)


def measure(bench: str, metrics: Sequence[str], settings: Settings) -> Iterator[Figure]:
    """Measures the named ones of `METRICS`. Raises RuntimeError when a program fails."""
    if _LOG.name in metrics or _DECODE.name in metrics:
        keys = "1000000" if settings.quick else "10000000"
        found = _by_metric([build("fc_request_log_bench"), "3", keys, "1000000"])
        if _LOG.name in metrics:
            yield _log_figure(bench, found["log_bytes_per_key"], found["recording"])
        if _DECODE.name in metrics:
            yield _decode_figure(bench, found["replay_decode"])
    for metric, value_bytes in ((_COPY, 1024), (_COPY_SMALL, 200)):
        if metric.name in metrics:
            mebibytes = "128" if settings.quick else "1024"
            program = build("fc_copy_bench", grpc=True)
            found = _by_metric([program, "5", mebibytes, str(value_bytes)])
            yield _copy_figure(bench, metric, found["peer_copy"])


def _by_metric(command: Sequence[str | Path]) -> dict[str, list[Round]]:
    """All rounds of each metric: a program may print them in turns."""
    found: dict[str, list[Round]] = {}
    for name, rounds in rounds_by_metric(command):
        found.setdefault(name, []).extend(rounds)
    return found


def _of(rounds: Sequence[Round], name: str) -> float:
    return median([each[name] for each in rounds])


def _log_figure(bench: str, rounds: Sequence[Round], recording: Sequence[Round]) -> Figure:
    size, entropy = _of(rounds, "bytes"), _of(rounds, "entropy")
    return Figure(
        bench=bench,
        metric=_LOG.name,
        value=size / entropy,
        unit="of the entropy",
        lower_is_better=True,
        limit=_LOG.limit,
        extra={
            "bytes_per_key": round(size, 3),
            "entropy_bytes_per_key": round(entropy, 3),
            "keys": int(rounds[0]["keys"]),
            "distinct": int(rounds[0]["distinct"]),
            "offer_ns_per_key": round(_of(recording, "offer_ns_per_key"), 1),
            "write_ns_per_key": round(_of(recording, "write_ns_per_key"), 1),
        },
    )


def _decode_figure(bench: str, rounds: Sequence[Round]) -> Figure:
    return Figure(
        bench=bench,
        metric=_DECODE.name,
        value=_of(rounds, "keys_per_second"),
        unit="keys/s",
        peer="what is wanted",
        peer_value=_DECODE_LEAST,
        bar=_DECODE.bar,
        extra={
            "order_seconds": round(_of(rounds, "order_seconds"), 3),
            "planned": int(rounds[0]["planned"]),
        },
    )


def _copy_figure(bench: str, metric: Metric, rounds: Sequence[Round]) -> Figure:
    return Figure(
        bench=bench,
        metric=metric.name,
        value=_of(rounds, "bytes_per_second") / 1e6,
        unit="MB/s",
        peer="a bare gRPC stream of the same bytes",
        peer_value=_of(rounds, "bare_bytes_per_second") / 1e6,
        bar=metric.bar,
        extra={"items": int(rounds[0]["items"])},
    )
