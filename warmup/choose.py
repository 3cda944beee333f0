"""Which eviction domains are copied from a peer, and which are replayed."""

from __future__ import annotations

from collections.abc import Sequence

from warmup.protocols import PeerDomain

__all__ = ["domains_to_copy"]

# What is copied should live for a while after it came: else the store is asked again at once.
_OUTLIVES = 4.0  # times the transfer, and by
_OUTLIVES_S = 30.0


def domains_to_copy(
    domains: Sequence[PeerDomain], bytes_per_second: float, realtime_ttl_s: float
) -> list[tuple[str, str]]:
    """Those whose items outlive their transfer, as (namespace, domain).

    The transfer is of all that is chosen, so the longest-lived are taken first and each makes the
    bar higher for the next. Real-time domains never are: theirs are to be fresh.
    """
    chosen: list[tuple[str, str]] = []
    seconds = 0.0
    by_life = sorted(domains, key=lambda each: (-_life_s(each), each.namespace, each.domain))
    for each in by_life:
        if not each.items or (each.ttl_s and each.ttl_s < realtime_ttl_s):
            continue
        with_it = seconds + each.bytes / max(bytes_per_second, 1.0)
        if _life_s(each) > max(_OUTLIVES * with_it, with_it + _OUTLIVES_S):
            seconds = with_it
            chosen.append((each.namespace, each.domain))
    return chosen


def _life_s(domain: PeerDomain) -> float:
    return domain.mean_ttl_left_s if domain.ttl_s else float("inf")
