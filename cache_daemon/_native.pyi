"""The native data plane: engine, request path, gRPC server and client transport.

Nothing here runs Python per key, and every call that can wait releases the interpreter lock.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt

__all__ = [
    "Channel",
    "DomainConfig",
    "FetchBatch",
    "HintedValue",
    "Histogram",
    "KeptShards",
    "LeafConfig",
    "NamespaceConfig",
    "Node",
    "NodeConfig",
    "NvmConfig",
    "PeerCopy",
    "PeerDomain",
    "PersistConfig",
    "PlanAdded",
    "RecordConfig",
    "RecoveryProgress",
    "Reply",
    "RequestLogError",
    "RequestLogInfo",
    "RootConfig",
    "RouteRule",
    "RpcError",
    "Sample",
    "Server",
    "ShardMap",
    "StartReport",
    "StoreConfig",
    "WarmPlan",
    "WarmResult",
    "WriteReply",
    "build_info",
    "describe_peer",
    "encode_delete",
    "encode_get",
    "encode_put",
    "inspect_request_log",
    "shard_of",
]

# ---- configuration -------------------------------------------------------------------------------

@final
class DomainConfig:
    """One eviction domain: a pool of a namespace with its own TTL, byte budget and policy."""
    def __init__(
        self,
        *,
        name: str,
        budget_bytes: int,
        policy: str = "s3fifo",  # s3fifo | lru | fifo | tinylfu
        ttl_ms: int = 0,  # 0: no expiry
        ttl_jitter: float = 0.1,  # a TTL is shortened by up to this share
        refresh_ahead: float = 0.0,  # refresh hot keys in this last share of their TTL; 0: never
    ) -> None: ...
    name: str
    budget_bytes: int
    policy: str
    ttl_ms: int
    ttl_jitter: float
    refresh_ahead: float

@final
class RouteRule:
    """Which domain a fetched value enters when nobody hints: all conditions given must hold."""
    def __init__(self, *, domain: str, prefix: bytes = b"", asked_at_least: int = 0) -> None: ...
    domain: str
    prefix: bytes
    asked_at_least: int

@final
class NamespaceConfig:
    def __init__(
        self,
        *,
        name: str,
        domains: Sequence[DomainConfig],
        default_domain: str,
        rules: Sequence[RouteRule] = ...,
        store: str = "",  # "": misses are not fetched
        negative_ttl_ms: int = 0,  # 0: not-found answers are not cached
        fetch_timeout_ms: int = 1000,  # how long a read waits for the store when it has no deadline
        nvm_budget_bytes: int = 0,  # 0: its evicted items are dropped
        nvm_admission: str = "all",  # all | frequency | reject_first
        nvm_admission_frequency: int = 2,  # asked so often of late, at most 15
        nvm_promotion: str = "second_hit",  # second_hit | always | never
        speculative_budget: float = 0.0,  # of its keys asked, in any second; 0: off
        speculative_after_us: int = 0,  # a read of a device is late then; 0: by the quantile
        speculative_after_quantile: float = 0.99,  # of recent reads
    ) -> None: ...
    name: str
    domains: list[DomainConfig]
    default_domain: str
    rules: list[RouteRule]
    store: str
    negative_ttl_ms: int
    fetch_timeout_ms: int
    nvm_budget_bytes: int
    nvm_admission: str
    nvm_admission_frequency: int
    nvm_promotion: str
    speculative_budget: float
    speculative_after_us: int
    speculative_after_quantile: float

@final
class StoreConfig:
    """The native side of one store: what waits for it and for how long."""
    def __init__(
        self,
        *,
        name: str,
        max_batch_keys: int = 2000,  # keys of one get_many call at most
        concurrency: int = 4,  # get_many calls outstanding at most
        timeout_ms: int = 1000,  # a call is abandoned after this
        queue_keys: int = 1_000_000,  # misses that may wait; beyond: THROTTLED
    ) -> None: ...
    name: str
    max_batch_keys: int
    concurrency: int
    timeout_ms: int
    queue_keys: int

@final
class NvmConfig:
    """The NVM tier: files or block devices below the DRAM tier."""
    def __init__(
        self,
        *,
        devices: Sequence[tuple[str, int]],  # path and bytes; 0: all of a block device
        region_bytes: int = 0,  # 0: chosen from the smallest namespace budget, at most 16 MiB
        io: str = "auto",  # auto | io_uring | threads
        direct: bool = True,  # O_DIRECT where the file system has it
        queue_depth: int = 128,  # reads that a device works on at most
        io_threads: int = 64,  # of the thread pool
        coalesce_gap_bytes: int = 4096,  # records so near become one read
        queued_reads: int = 65536,  # records that may wait; beyond: THROTTLED
        read_memory_bytes: int = 16 << 20,
        write_buffers: int = 2,  # regions being written, beyond one open a namespace
        write_bytes_per_second: int = 0,  # 0: no limit
        errors_max: int = 16,  # of late; then the device is out of service
        probe_interval_ms: int = 5000,  # how often a device that is out is tried again
    ) -> None: ...
    devices: list[tuple[str, int]]
    region_bytes: int
    io: str
    direct: bool
    queue_depth: int
    io_threads: int
    coalesce_gap_bytes: int
    queued_reads: int
    read_memory_bytes: int
    write_buffers: int
    write_bytes_per_second: int
    errors_max: int
    probe_interval_ms: int

@final
class PersistConfig:
    """What outlives the process."""
    def __init__(
        self,
        *,
        dir: str,  # on tmpfs or hugetlbfs
        name: str = "feature-cache",  # of the files there
        durability: str = "drop_nvm",  # drop_nvm | bounded | sync
        durability_window_ms: int = 100,  # of bounded
        journal: str = "",  # file of the invalidation log; "": beside the first device
        keep_on_clock_doubt: bool = False,  # after a reboot into an earlier time of day
        spill_on_shutdown: bool = False,  # an orderly stop moves DRAM's items to NVM
        shutdown_limit_ms: int = 20_000,  # for what an orderly stop writes
    ) -> None: ...
    dir: str
    name: str
    durability: str
    durability_window_ms: int
    journal: str
    keep_on_clock_doubt: bool
    spill_on_shutdown: bool
    shutdown_limit_ms: int

@final
class RootConfig:
    def __init__(
        self,
        *,
        threads: int = 2,  # that complete sub-requests
        connections_per_leaf: int = 1,
        leaf_timeout_ms: int = 0,  # of one sub-request; 0: what is left of the caller's deadline
        attempts: int = 3,  # replicas that are asked for a key at most
        retry_budget: float = 0.2,  # retried sub-requests: share of the first ones
        hedge: bool = True,  # ask another replica when one is late
        hedge_after_us: int = 0,  # 0: a quantile of recent sub-requests
        hedge_quantile: float = 0.99,
        hedge_budget: float = 0.02,  # hedged sub-requests: share of the first ones
        store_budget: float = 0.05,  # keys that only a store can answer: share of keys asked
    ) -> None: ...
    threads: int
    connections_per_leaf: int
    leaf_timeout_ms: int
    attempts: int
    retry_budget: float
    hedge: bool
    hedge_after_us: int
    hedge_quantile: float
    hedge_budget: float
    store_budget: float

@final
class LeafConfig:
    def __init__(
        self,
        *,
        write_log_bytes: int = 16 << 20,  # of recent writes, for a replica that was away
    ) -> None: ...
    write_log_bytes: int

@final
class RecordConfig:
    """The request log of a node (docs/request_log.md)."""
    def __init__(
        self,
        *,
        dir: str,  # of the log alone; one daemon each
        sample: float = 0.1,  # share of the requests or of the keys
        by: str = "requests",  # requests; keys: a key is always or never recorded
        window_ms: int = 600_000,  # of one file, aligned to the time of day
        max_bytes: int = 1 << 30,  # of all files in dir
        buffer_bytes: int = 8 << 20,  # between requests and the writer
        dictionary_keys: int = 1 << 20,  # distinct keys that a file tells apart at a time
        host: str = "",  # stands in the files
        privacy: Mapping[str, str] = ...,  # by namespace: plain (as if left out), hash or exclude
        hash_key: str = "",  # at least 16 bytes, where a namespace is hashed; cannot be read back
    ) -> None: ...
    @property
    def dir(self) -> str: ...
    @property
    def sample(self) -> float: ...
    @property
    def by(self) -> str: ...
    @property
    def window_ms(self) -> int: ...
    @property
    def max_bytes(self) -> int: ...
    @property
    def buffer_bytes(self) -> int: ...
    @property
    def dictionary_keys(self) -> int: ...
    @property
    def host(self) -> str: ...
    @property
    def privacy(self) -> dict[str, str]: ...

@final
class NodeConfig:
    def __init__(
        self,
        *,
        memory_bytes: int,  # never exceeded: arena, index, tables and ghosts together
        namespaces: Sequence[NamespaceConfig],
        stores: Sequence[StoreConfig] = ...,
        segment_bytes: int = 0,  # 0: chosen from the smallest domain, at most 1 MiB
        expected_item_bytes: int = 256,  # key and value together; sizes the index
        huge_pages: bool = True,
        max_value_bytes: int = 8 << 20,
        max_batch_keys: int = 16384,
        max_reply_bytes: int = 64 << 20,
        max_pending_batches: int = 4096,
        refresh_keys_per_second: int = 1000,
        nvm: NvmConfig | None = None,  # None: no NVM tier
        persist: PersistConfig | None = None,  # None: nothing outlives the process
        root: RootConfig | None = None,  # given: a root; without memory it keeps nothing
        leaf: LeafConfig | None = None,  # given: a leaf
        shard_count: int = 0,  # of a leaf: the cluster's shards, which may leave it and come back
        instances: int = 0,  # that the node is split over; 0: as few as max_instance_bytes allows
        max_instance_bytes: int = 256 << 30,
        record: RecordConfig | None = None,  # None: nothing is recorded
    ) -> None: ...
    memory_bytes: int
    namespaces: list[NamespaceConfig]
    stores: list[StoreConfig]
    segment_bytes: int
    expected_item_bytes: int
    huge_pages: bool
    max_value_bytes: int
    max_batch_keys: int
    max_reply_bytes: int
    max_pending_batches: int
    refresh_keys_per_second: int
    nvm: NvmConfig | None
    persist: PersistConfig | None
    root: RootConfig | None
    leaf: LeafConfig | None
    shard_count: int
    instances: int
    max_instance_bytes: int
    record: RecordConfig | None
    def instance_count(self) -> int:
        """Over how many instances the node is split."""
    def arena_bytes(self) -> int:
        """Bytes that the domains' budgets may share, after index and tables are taken off.

        Of all instances together.

        Raises ValueError when the memory is too small, or the NVM budgets do not fit the devices.
        """
    def nvm_memory_bytes(self) -> int:
        """Bytes of the memory that the NVM tier takes: index slots, buffers, tables."""

# ---- the cluster ---------------------------------------------------------------------------------

@final
class ShardMap:
    """Which leaf has which shard, as one version of the external view says. Immutable."""
    def __init__(
        self,
        version: int,
        leaves: Sequence[tuple[str, str, str]],  # name, address, zone
        first: npt.NDArray[np.uint32],  # shard_count + 1: the replicas of shard s are first[s]..
        leaf: npt.NDArray[np.uint32],  # one a replica
        state: npt.NDArray[np.uint8],  # one a replica: 0 warming, 1 online
    ) -> None:
        """Raises ValueError for arrays that contradict each other."""
    @property
    def version(self) -> int: ...
    @property
    def shard_count(self) -> int: ...

@final
class KeptShards:
    """What an earlier process left of a leaf's shards."""
    @property
    def shard_count(self) -> int: ...
    @property
    def shards(self) -> list[int]: ...  # all that was held: their items are there still
    @property
    def away_ms(self) -> int: ...  # since that process was alive last, at the least

def shard_of(namespace: str, key: bytes, shard_count: int) -> int:
    """The shard of a key. Raises ValueError for a cluster without shards."""

# ---- the node ------------------------------------------------------------------------------------

@final
class Sample:
    """One counter or gauge of a native room."""
    @property
    def name(self) -> str: ...
    @property
    def help(self) -> str: ...
    @property
    def kind(self) -> str: ...  # counter | gauge
    @property
    def labels(self) -> dict[str, str]: ...
    @property
    def value(self) -> float: ...

@final
class Histogram:
    """One latency histogram; `counts` has one more entry than `bounds` (the overflow)."""
    @property
    def name(self) -> str: ...
    @property
    def help(self) -> str: ...
    @property
    def labels(self) -> dict[str, str]: ...
    @property
    def bounds(self) -> list[float]: ...  # seconds, upper bounds
    @property
    def counts(self) -> list[int]: ...  # per bucket, not cumulative
    @property
    def sum(self) -> float: ...  # seconds

@final
class HintedValue:
    """A store's answer that carries hints: the domain it should enter, its own TTL."""
    def __init__(self, value: bytes | None, *, domain: str = "", ttl_ms: int = 0) -> None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def domain(self) -> str: ...
    @property
    def ttl_ms(self) -> int: ...

@final
class FetchBatch:
    """Deduplicated misses that one `get_many` call answers. Ends by `complete` or `fail`, once."""
    @property
    def groups(self) -> list[tuple[str, list[bytes]]]: ...
    @property
    def keys(self) -> int: ...
    @property
    def timeout_s(self) -> float: ...  # what is left of the store's timeout
    @property
    def priority(self) -> int: ...  # 0 live, 1 speculative, 2 refresh or replay
    def complete(self, values: Sequence[Sequence[bytes | HintedValue | None]]) -> None:
        """Answers every key: bytes or HintedValue = found, None = not found.

        A group that is missing, too short, too long or holds anything else answers ERROR for its
        keys; the other groups are used.
        """
    def fail(self, reason: str) -> None:
        """Answers every key with ERROR, or with THROTTLED or TIMED_OUT when `reason` says so."""

@final
class RecoveryProgress:
    """How far a start has come; read it from another thread while the node is made."""
    def __init__(self) -> None: ...
    @property
    def phase(self) -> str: ...  # "", memory, nvm
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...  # 0: not known yet

@final
class StartReport:
    """How a node started."""
    @property
    def memory(self) -> str: ...  # off | new | clean | checked | cold
    @property
    def memory_reason(self) -> str: ...  # why it was checked or cold
    @property
    def pages(self) -> str: ...  # what the memory lies on
    @property
    def memory_ms(self) -> float: ...
    @property
    def memory_items(self) -> int: ...
    @property
    def memory_dropped(self) -> int: ...
    @property
    def nvm(self) -> str: ...  # off | new | kept | rebuilt | empty
    @property
    def nvm_reason(self) -> str: ...
    @property
    def nvm_ms(self) -> float: ...
    @property
    def nvm_items(self) -> int: ...
    @property
    def nvm_dropped(self) -> int: ...
    @property
    def set_aside(self) -> int: ...  # files of an unknown format

@final
class Node:
    """Engine, single-flight table and store queues of one process."""
    def __init__(self, config: NodeConfig, progress: RecoveryProgress | None = None) -> None:
        """Raises ValueError for a bad config, MemoryError when memory cannot be reserved and
        OSError when an NVM device or the directory of `persist` cannot be used.

        May take long where an earlier process left much behind: `progress` tells how far it is."""
    def batch_get(self, request: bytes, timeout_s: float) -> Reply:
        """Serves one encoded BatchGetRequest in process. Raises RpcError as the server would."""
    def batch_put(self, request: bytes, timeout_s: float) -> WriteReply: ...
    def batch_delete(self, request: bytes, timeout_s: float) -> WriteReply: ...
    def batch_get_async(
        self, request: bytes, timeout_s: float, done: Callable[[Reply | RpcError], None]
    ) -> None: ...
    def batch_put_async(
        self, request: bytes, timeout_s: float, done: Callable[[WriteReply | RpcError], None]
    ) -> None: ...
    def batch_delete_async(
        self, request: bytes, timeout_s: float, done: Callable[[WriteReply | RpcError], None]
    ) -> None: ...
    def take_fetch(self, store: str, wait_s: float) -> FetchBatch | None:
        """Waits up to `wait_s` for misses of `store`; None when there are none, or after stop."""
    def resize_domain(self, namespace: str, domain: str, budget_bytes: int) -> int:
        """Returns the old budget. Raises KeyError (unknown name), ValueError (no room)."""
    def flush_namespace(self, namespace: str) -> int:
        """Drops every item of the namespace; returns how many."""
    def set_shard_map(self, shard_map: ShardMap) -> None:
        """Of a root: routes by this map, unless it is older than the one there is."""
    def newest_map_version(self) -> int:
        """Of a root: the newest version that any leaf told of."""
    def set_owned(
        self,
        version: int,
        shard_count: int,
        shards: npt.NDArray[np.uint32],
        written_since: npt.NDArray[np.uint64] = ...,
        readable: npt.NDArray[np.uint8] = ...,
    ) -> None:
        """Of a leaf: answers for these shards alone; waits for writes under way.

        `version`: of the newest map it knows. `written_since`, one a shard: the map version from
        which on its writes reach all of its replicas; writes by older maps are refused.
        `readable`, one a shard: 0 where it takes writes and answers no reads.
        """
    def drop_shards(self, shard_count: int, shards: npt.NDArray[np.uint32]) -> None:
        """Of a leaf: hides all that it holds of these shards, for good. ValueError for others."""
    def hold_shards(self, shard_count: int, shards: npt.NDArray[np.uint32]) -> None:
        """Of a leaf: the shards that it has all writes of. The next process finds these alone.

        What is no longer among them is dropped. Raises ValueError as drop_shards.
        """
    def kept_shards(self) -> KeptShards:
        """Of a leaf: as this process found it when it started."""
    def recent_writes(
        self, shard_count: int, shards: npt.NDArray[np.uint32], age_s: float
    ) -> tuple[bool, int, list[tuple[str, list[bytes]]]]:
        """Of a leaf: (complete, map version, [(namespace, keys)]) of what was put or deleted.

        Not complete: the log does not reach back that far, or a shard was not this leaf's all that
        time.
        """
    def samples(self) -> list[Sample]: ...
    def histograms(self) -> list[Histogram]: ...
    def start_report(self) -> StartReport: ...
    def stop(self) -> None:
        """Answers what waits with TIMED_OUT and wakes every take_fetch. Idempotent."""
    def shutdown(self) -> bool:
        """The orderly end: stops, writes what shall outlive the process, and marks it as whole.

        Takes at most `shutdown_limit_ms`. False when not all was written. Idempotent. Close servers
        over the node first; what is called on the node itself later is refused, and no samples are
        given any more.
        """

# ---- warm-up -------------------------------------------------------------------------------------

class RequestLogError(ValueError):
    """Bytes that are no request log, or not all of one; the message says what to do."""

    reason: str  # truncated, bad_checksum, newer_version, bad_format

@final
class RequestLogInfo:
    """What stands in one file of the request log."""
    @property
    def version(self) -> int: ...
    @property
    def host(self) -> str: ...
    @property
    def window_start_ms(self) -> int: ...  # since 1970
    @property
    def window_ms(self) -> int: ...
    @property
    def sample(self) -> float: ...  # share that was recorded
    @property
    def by(self) -> str: ...  # requests, keys
    @property
    def complete(self) -> bool: ...  # it was ended in order, not cut off between two blocks
    @property
    def requests(self) -> int: ...
    @property
    def keys(self) -> int: ...
    @property
    def distinct_keys(self) -> int: ...  # as often as a dictionary learned them
    @property
    def dropped_keys(self) -> int: ...  # sampled, and lost before they were written
    @property
    def namespaces(self) -> list[tuple[str, str, int, int]]:
        """Name, privacy (plain, hash, exclude), keys and distinct keys."""

def inspect_request_log(data: bytes | bytearray | memoryview) -> RequestLogInfo:
    """Reads a whole file and checks all of it. Raises RequestLogError."""

@final
class PlanAdded:
    """What became of the keys of one log, counted each time that they stand there."""
    @property
    def keys(self) -> int: ...
    @property
    def new_keys(self) -> int: ...  # distinct ones that the plan did not have
    @property
    def unknown_namespace(self) -> int: ...
    @property
    def not_fetchable(self) -> int: ...  # of namespaces without a store
    @property
    def hashed(self) -> int: ...
    @property
    def not_owned(self) -> int: ...
    @property
    def over_limit(self) -> int: ...  # of keys beyond `max_keys`

@final
class WarmResult:
    """What became of the keys of one `WarmPlan.issue`."""
    @property
    def held(self) -> int: ...  # the cache had them
    @property
    def fetched(self) -> int: ...
    @property
    def not_found(self) -> int: ...
    @property
    def timed_out(self) -> int: ...
    @property
    def throttled(self) -> int: ...
    @property
    def error(self) -> int: ...
    @property
    def skipped(self) -> int: ...  # no store, or another leaf's
    @property
    def seconds(self) -> float: ...

@final
class WarmPlan:
    """Which keys a warm-up asks for: those of any number of logs, each once, the best first.

    Safe from any thread. After `Node.shutdown` methods that ask the node raise RuntimeError.
    """
    def __init__(self, node: Node, *, max_keys: int = 10_000_000) -> None:
        """`max_keys`: distinct ones that are kept in memory at most, about 50 bytes each."""
    def own(self, shard_count: int, shards: npt.NDArray[np.uint32]) -> None:
        """Keys of these shards alone enter from now on. Raises ValueError for a shard beyond."""
    def add(self, data: bytes | bytearray | memoryview, weight: float = 1.0) -> PlanAdded:
        """Adds the keys of a file of the request log; what they count is multiplied by `weight`.

        Raises RequestLogError; what stood before the fault stays in the plan.
        """
    def drop_domains(self, domains: Sequence[tuple[str, str]]) -> int:
        """Takes out the keys of (namespace, domain), "": of all its domains; returns how many.

        A key is of the domain that its requests hinted, else of its namespace's default domain.
        Raises KeyError for an unknown one.
        """
    def drop_held(self) -> int:
        """Takes out what the node has already; returns how many keys."""
    def order(self, realtime_ttl_s: float) -> None:
        """By weight, then by TTL, the largest first; domains with a shorter TTL than that last.

        `issue` begins with the first key.
        """
    def issue(self, max_keys: int, timeout_s: float, done: Callable[[WarmResult], None]) -> int:
        """Asks the node for the next keys; returns how many, 0: none are left.

        `done` is called once, in a thread of the node's, unless there was none left.
        """
    def retry_failed(self) -> int:
        """Puts keys that failed since the last call at the end, each at most twice; how many."""
    def predicted_hit_ratio(self, sample: int = 200_000) -> float:
        """The share of the logged traffic that the node has in its cache now, 0 to 1.

        Of more than `sample` keys, as many are looked at, chosen evenly by weight.
        """
    @property
    def keys(self) -> int: ...  # that are, or were, to be asked for
    @property
    def keys_left(self) -> int: ...
    @property
    def total_weight(self) -> float: ...  # of all that was added

@final
class PeerDomain:
    """What a warm node has of one eviction domain."""
    @property
    def namespace(self) -> str: ...
    @property
    def domain(self) -> str: ...
    @property
    def items(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def ttl_s(self) -> float: ...  # as configured; 0: no expiry
    @property
    def mean_ttl_left_s(self) -> float: ...  # of some of its items; 0: they do not expire

def describe_peer(address: str, timeout_s: float) -> list[PeerDomain]:
    """What the node at `address` has to be copied. Raises RpcError."""

@final
class PeerCopy:
    """Copies items of a warm node's memory into `node`, with the time that they have left to live.

    What is written to `node` meanwhile wins. Safe from any thread; `run` is one at a time.
    """
    def __init__(
        self,
        node: Node,
        address: str,
        domains: Sequence[tuple[str, str]],  # namespace, domain
        *,
        shard_count: int = 0,  # of a leaf, with
        shards: npt.NDArray[np.uint32] | None = None,  # those that are wanted; None: all items
        map_version: int = 0,  # the peer must go by this shard map, or a newer one
        bytes_per_second: int = 0,  # that are taken; 0: what the peer gives
        cursor: int = 0,  # of an earlier copy from this life of the peer
    ) -> None: ...
    def run(self, seconds: float) -> bool:
        """Copies for at most so long; True: that was all. It may be called again and goes on.

        Raises RpcError with a code of gRPC's: FAILED_PRECONDITION while a leaf cannot give these
        shards, RESOURCE_EXHAUSTED while it gives as many copies as it may.
        """
    def stop(self) -> None:
        """Lets `run` return soon, and every later one at once."""
    @property
    def cursor(self) -> int: ...
    @property
    def items(self) -> int: ...  # that came
    @property
    def bytes(self) -> int: ...  # of their keys and values
    @property
    def installed(self) -> int: ...
    @property
    def void(self) -> int: ...  # not installed: written here since
    @property
    def rejected(self) -> int: ...  # not installed: no room, or of no domain here

@final
class Server:
    """The gRPC data service, health and reflection on TCP and Unix sockets."""
    def __init__(
        self,
        node: Node | None,  # None: attached later; until then calls are refused
        addresses: Sequence[str],  # host:port (port 0: any) or unix:/path
        *,
        max_message_bytes: int = 64 << 20,
        reflection: bool = True,
        misses_until_attached: bool = False,  # reads are answered MISS meanwhile, writes refused
        max_batch_keys: int = 16384,  # of a read that is answered so
        copy_bytes_per_second: int = 256 << 20,  # given to nodes that copy, all together; 0: none
        copies_at_once: int = 2,
    ) -> None:
        """Raises OSError when an address cannot be bound."""
    @property
    def addresses(self) -> list[str]: ...
    def attach(self, node: Node) -> None:
        """From now on calls go to `node`. Once, and only where there was none."""
    def set_serving(self, serving: bool) -> None:
        """What grpc.health.v1 answers."""
    def drain(self, timeout_s: float) -> bool:
        """Refuses new calls, waits for accepted ones; False when some had to be cancelled."""
    def stop(self) -> None: ...

# ---- client transport ----------------------------------------------------------------------------

class RpcError(Exception):
    """A call that ended without a reply."""

    code: int  # grpc.StatusCode as a number
    details: str

@final
class Reply:
    """A BatchGetResponse; the arrays are views into it (no copy) and keep it alive."""
    @property
    def request_id(self) -> int: ...
    @property
    def columns(self) -> int: ...
    def statuses(self, column: int) -> npt.NDArray[np.uint8]: ...
    def value_lengths(self, column: int) -> npt.NDArray[np.uint32]: ...
    def values(self, column: int) -> npt.NDArray[np.uint8]: ...
    def as_bytes(self, column: int) -> list[bytes | None]:
        """One bytes object a key; None where the status carries no value."""
    def gather(self, column: int, out: npt.NDArray[np.uint8], valid: npt.NDArray[np.bool_]) -> None:
        """Copies each value of exactly out.shape[1] bytes into its row and sets `valid`; other rows
        are zeroed."""

@final
class WriteReply:
    @property
    def columns(self) -> int: ...
    def statuses(self, column: int) -> npt.NDArray[np.uint8]: ...

@final
class Channel:
    """One native gRPC connection to a FeatureCache service."""
    def __init__(
        self,
        target: str,  # host:port or unix:/path
        *,
        root_certificates: bytes | None = None,  # given: TLS
        private_key: bytes | None = None,
        certificate_chain: bytes | None = None,
        server_name: str = "",
        max_message_bytes: int = 64 << 20,
    ) -> None: ...
    def batch_get(self, request: bytes, timeout_s: float) -> Reply: ...
    def batch_put(self, request: bytes, timeout_s: float) -> WriteReply: ...
    def batch_delete(self, request: bytes, timeout_s: float) -> WriteReply: ...
    def batch_get_async(
        self, request: bytes, timeout_s: float, done: Callable[[Reply | RpcError], None]
    ) -> None: ...
    def batch_put_async(
        self, request: bytes, timeout_s: float, done: Callable[[WriteReply | RpcError], None]
    ) -> None: ...
    def batch_delete_async(
        self, request: bytes, timeout_s: float, done: Callable[[WriteReply | RpcError], None]
    ) -> None: ...
    def close(self) -> None: ...

# Keys of one column: an integer numpy array (ids), a sequence of bytes or str, or (blob, lengths).
_Keys = Any

def encode_get(
    columns: Sequence[tuple[str, _Keys, str]],  # namespace, keys, domain hint or ""
    *,
    request_id: int = 0,
    cache_only: bool = False,
) -> bytes:
    """Encodes a BatchGetRequest. Raises ValueError for keys that are neither ids nor bytes."""

def encode_put(
    columns: Sequence[tuple[str, _Keys, str, Any, Any]],  # ..., values, ttl_ms or None
) -> bytes:
    """Encodes a BatchPutRequest.

    Values: a sequence of bytes, a C-contiguous array with one row a key, or (blob, lengths).
    TTL: None, one int in milliseconds, or an integer array.
    """

def encode_delete(columns: Sequence[tuple[str, _Keys, str]]) -> bytes: ...
def build_info() -> dict[str, str]:
    """Versions and switches of this build: compiler, grpc, simd, format."""
