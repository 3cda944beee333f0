"""The settings of a daemon as frozen pydantic models, with every default and its reason.

A model checks what one section can know by itself; what spans sections is in `config_check`.
"""

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cache_daemon.config_base import Address, Name, StrictModel, TcpAddress
from cache_daemon.config_sharded import ShardingSettings
from cache_daemon.config_units import (
    BudgetField,
    CountOrAuto,
    Durability,
    DurabilityField,
    Duration,
    Lateness,
    LatenessField,
    NvmBudgetField,
    Share,
    Size,
    SizeOrAuto,
    format_size,
)
from cache_daemon.config_warmup import WarmupSettings
from cache_daemon.stores.guard import GuardOptions

__all__ = [
    "DOMAINS_MAX",
    "Config",
    "DomainSettings",
    "LimitSettings",
    "ListenSettings",
    "LogSettings",
    "MemorySettings",
    "NamespaceSettings",
    "NvmDeviceSettings",
    "NvmSettings",
    "NvmShareSettings",
    "PersistSettings",
    "RefreshSettings",
    "RuleSettings",
    "SpeculativeSettings",
    "StoreSettings",
]

# The engine's own limits, checked here so that an error names the key in the file.
_VALUE_BYTES_MAX = 8 << 20
_SEGMENT_BYTES_MIN = 16 << 10
_SEGMENT_BYTES_MAX = 1 << 20
_REGION_BYTES_MIN = 64 << 10
_REGION_BYTES_MAX = 16 << 20
_NVM_DEVICES_MAX = 16
_NVM_DEVICE_BYTES_MIN = 1 << 20
_COALESCE_GAP_MAX = 64 << 10
_READ_MEMORY_MIN = 4 << 20
_UINT32_MAX = (1 << 32) - 1
_TTL_SECONDS_MAX = 366 * 86_400
_SHARE_OF_TTL_MAX = 0.9
_ASKED_MAX = 15
_NAMESPACES_MAX = 256
_INSTANCES_MAX = 64
DOMAINS_MAX = 1024

_SHUTDOWN_SECONDS_MIN = 0.1
_SHUTDOWN_SECONDS_MAX = 3600

_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


class ListenSettings(StrictModel):
    """Where the daemon listens."""

    grpc: tuple[Address, ...] = Field(
        min_length=1,
        max_length=16,
        description="Addresses of the data service: host:port (port 0: any) or unix:/path.",
    )
    admin: Address | None = Field(
        default=None,
        description="Address of the admin service for cachectl; a Unix socket is best.",
    )
    http: TcpAddress | None = Field(
        default=None,
        description="Address of /metrics and the probes (/healthz, /startupz, /readyz).",
    )


class LimitSettings(StrictModel):
    """Bounds of single requests; beyond them a call is refused with a clear status."""

    max_batch_keys: int = Field(default=16384, ge=1, le=1 << 20, description="Keys of one call.")
    max_message_size: Size = Field(
        default=64 << 20, ge=4 << 10, le=1 << 30, description="Bytes of one gRPC message."
    )
    max_value_size: Size = Field(
        default=_VALUE_BYTES_MAX,
        ge=0,
        le=_VALUE_BYTES_MAX,
        description="Bytes of one value, at most 8MiB.",
    )
    max_reply_size: Size = Field(
        default=64 << 20,
        ge=4 << 10,
        le=1 << 30,
        description="Bytes of one reply; cells that do not fit come back as THROTTLED.",
    )
    max_pending_batches: int = Field(
        default=4096, ge=1, le=1 << 20, description="Reads that may wait for NVM or a store."
    )

    @model_validator(mode="after")
    def _messages_carry_values(self) -> "LimitSettings":
        for name in ("max_message_size", "max_reply_size"):
            if getattr(self, name) < self.max_value_size:
                raise ValueError(
                    f"{name} ({format_size(getattr(self, name))}) cannot carry a value of "
                    f"max_value_size ({format_size(self.max_value_size)})"
                )
        return self


class MemorySettings(StrictModel):
    """The DRAM tier."""

    size: Size = Field(
        ge=1 << 20,
        description="Bytes never exceeded: arena, index, tables and ghosts together.",
    )
    expected_item_size: Size = Field(
        default=256,
        ge=1,
        le=_VALUE_BYTES_MAX,
        description="Key and value together; sizes the index.",
    )
    segment_size: SizeOrAuto = Field(
        default=0,
        description="Bytes of one arena segment; auto: from the smallest domain, at most 1MiB.",
    )
    huge_pages: Literal["try", "off"] = Field(
        default="try", description="Use huge pages where the kernel offers them."
    )
    instances: CountOrAuto = Field(
        default=0,
        ge=0,
        le=_INSTANCES_MAX,
        description="Engine instances that the node is split over; auto: as few as "
        "max_instance_bytes allows.",
    )
    max_instance_bytes: Size = Field(
        default=256 << 30,
        ge=1 << 20,
        description="Bytes of size that one instance takes at most, where instances is auto.",
    )

    @property
    def instance_count(self) -> int:
        """Over how many instances the node is split."""
        return self.instances or max(1, -(-self.size // self.max_instance_bytes))

    @model_validator(mode="after")
    def _instances_are_few(self) -> "MemorySettings":
        if self.instance_count > _INSTANCES_MAX:
            raise ValueError(
                f"{format_size(self.size)} in parts of at most "
                f"{format_size(self.max_instance_bytes)} makes {self.instance_count} instances; "
                f"a node has at most {_INSTANCES_MAX}: raise max_instance_bytes"
            )
        return self

    @field_validator("segment_size")
    @classmethod
    def _segment_fits(cls, size: int) -> int:
        power_of_two = size & (size - 1) == 0
        if size and not (power_of_two and _SEGMENT_BYTES_MIN <= size <= _SEGMENT_BYTES_MAX):
            raise ValueError(
                f"{format_size(size)}: a segment is auto or a power of two from 16KiB to 1MiB"
            )
        return size


def _no_memory() -> MemorySettings:
    """Of a root; that nobody else goes without is for `config_sharded` to say."""
    return MemorySettings.model_construct(size=0)


class NvmDeviceSettings(StrictModel):
    """One file or raw block device of the NVM tier."""

    path: str = Field(
        min_length=1,
        max_length=4096,
        description="A file, which is made where there is none, or a raw block device.",
    )
    size: Size | None = Field(
        default=None,
        ge=_NVM_DEVICE_BYTES_MIN,
        description="Bytes; may be left out for a block device: all of it.",
    )


class NvmSettings(StrictModel):
    """The NVM tier: below DRAM, on files or block devices."""

    devices: tuple[NvmDeviceSettings, ...] = Field(
        min_length=1,
        max_length=_NVM_DEVICES_MAX,
        description="One or several; regions are striped over them.",
    )
    region_size: SizeOrAuto = Field(
        default=0,
        description="Bytes that are written and reused in one piece; auto: from the smallest "
        "budget, at most 16MiB.",
    )
    io: Literal["auto", "io_uring", "threads"] = Field(
        default="auto",
        description="How devices are read; auto: io_uring where the kernel allows it.",
    )
    direct: Literal["try", "off"] = Field(
        default="try", description="Pass by the page cache where the file system can."
    )
    queue_depth: int = Field(
        default=128, ge=1, le=4096, description="Reads that a device works on at a time."
    )
    io_threads: int = Field(
        default=64, ge=1, le=256, description="Threads of the pool where io_uring is not used."
    )
    coalesce_gap: Size = Field(
        default=4096,
        le=_COALESCE_GAP_MAX,
        description="Records of one batch that lie so near become one read.",
    )
    queued_reads: int = Field(
        default=65536,
        ge=1,
        le=_UINT32_MAX,
        description="Reads that may wait; beyond it cells are THROTTLED.",
    )
    read_memory: Size = Field(
        default=16 << 20,
        ge=_READ_MEMORY_MIN,
        description="Bytes of buffers for the reads of one device, part of memory.size.",
    )
    write_buffers: int = Field(
        default=2,
        ge=1,
        le=64,
        description="Regions that may be on their way to a device, beyond one open a namespace.",
    )
    write_rate: Size = Field(
        default=0, description="Bytes a second that may be written, for endurance; 0: no limit."
    )
    errors_max: int = Field(
        default=16,
        ge=1,
        le=_UINT32_MAX,
        description="Errors of late that put a device out of service.",
    )
    probe_interval: Duration = Field(
        default=5.0, gt=0, description="How often a device out of service is tried again."
    )

    @field_validator("region_size")
    @classmethod
    def _region_fits(cls, size: int) -> int:
        power_of_two = size & (size - 1) == 0
        if size and not (power_of_two and _REGION_BYTES_MIN <= size <= _REGION_BYTES_MAX):
            raise ValueError(
                f"{format_size(size)}: a region is auto or a power of two from 64KiB to 16MiB"
            )
        return size


class NvmShareSettings(StrictModel):
    """A namespace's part of the NVM tier."""

    budget: NvmBudgetField = Field(
        description="Bytes: a size, or a share of all devices such as 50%."
    )
    admission: Literal["all", "frequency", "reject_first"] = Field(
        default="all", description="Which items evicted from DRAM are worth a write."
    )
    admission_frequency: int = Field(
        default=2,
        ge=1,
        le=_ASKED_MAX,
        description="With admission: frequency, asked at least so often of late.",
    )
    promotion: Literal["second_hit", "always", "never"] = Field(
        default="second_hit", description="Which items come back to DRAM when they are read."
    )


class SpeculativeSettings(StrictModel):
    """Lookups that ask the store, too, when a read of NVM is late; the first answer wins."""

    after: LatenessField = Field(
        default=Lateness(quantile=0.99),
        description="When a read is late: a quantile of recent reads (p99), or a time (2ms).",
    )
    budget: Share = Field(
        default=0.05,
        gt=0,
        description="Of the namespace's keys asked, in any second, at most so many.",
    )


class PersistSettings(StrictModel):
    """What outlives the process, so that a restart does not begin with an empty cache."""

    enabled: bool = Field(default=True, description="One key turns all of it off.")
    dir: str = Field(
        default="/dev/shm",
        description="Any mount of tmpfs or hugetlbfs; it holds as much as memory.size.",
    )
    name: str = Field(
        default="feature-cache", description="Of the files there; each daemon needs its own."
    )
    on_shutdown: Literal["keep", "spill"] = Field(
        default="keep",
        description="spill: an orderly stop moves DRAM's items to NVM, for a reboot.",
    )
    shutdown_limit: Duration = Field(
        default=20.0,
        ge=_SHUTDOWN_SECONDS_MIN,
        le=_SHUTDOWN_SECONDS_MAX,
        description="How long an orderly stop may write, after drain_timeout.",
    )
    durability: DurabilityField = Field(
        default=Durability(), description="What NVM holds after power loss."
    )
    journal: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="File of the invalidation log; none: beside the first NVM device.",
    )
    on_clock_doubt: Literal["expire", "keep"] = Field(
        default="expire", description="Items with a TTL after a reboot into an earlier time of day."
    )
    serve_while_recovering: bool = Field(
        default=False, description="Answer reads with misses until the recovery has ended."
    )

    @field_validator("dir")
    @classmethod
    def _dir_is_absolute(cls, path: str) -> str:
        if not path.startswith("/"):
            raise ValueError(f"{path!r} must be an absolute path, such as /dev/shm")
        return path

    @field_validator("name")
    @classmethod
    def _name_is_plain(cls, name: str) -> str:
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is no plain file name; use 1 to 64 letters, digits, '_', '-' and '.', "
                "the last not at the beginning"
            )
        return name


class DomainSettings(StrictModel):
    """One eviction domain: a pool with its own TTL, byte budget and policy."""

    budget: BudgetField = Field(description="Bytes: a size, or a share of the arena such as 40%.")
    ttl: Duration = Field(
        default=0.0,
        le=_TTL_SECONDS_MAX,
        description="Time to live of its items; 0: they do not expire.",
    )
    ttl_jitter: Share = Field(
        default=0.1,
        le=_SHARE_OF_TTL_MAX,
        description="A TTL is shortened by up to this share, so that items expire spread out.",
    )
    policy: Literal["s3fifo", "lru", "fifo", "tinylfu"] = Field(
        default="s3fifo", description="How the victims of eviction are chosen."
    )
    refresh_ahead: Share = Field(
        default=0.0,
        le=_SHARE_OF_TTL_MAX,
        description="Hot keys are fetched again in this last share of their TTL; 0: never.",
    )

    @model_validator(mode="after")
    def _refresh_needs_ttl(self) -> "DomainSettings":
        if self.refresh_ahead and not self.ttl:
            raise ValueError("refresh_ahead has no effect without a ttl")
        return self


class RuleSettings(StrictModel):
    """Which domain a fetched value enters when neither caller nor store hints one."""

    domain: Name = Field(description="The domain that matching keys enter.")
    prefix: str = Field(default="", description="Keys that start with this text.", max_length=1024)
    asked_at_least: int = Field(
        default=0,
        ge=0,
        le=_ASKED_MAX,
        description="Keys asked at least so often of late, at most 15.",
    )

    @model_validator(mode="after")
    def _has_a_condition(self) -> "RuleSettings":
        if not self.prefix and not self.asked_at_least:
            raise ValueError(
                "a rule needs prefix or asked_at_least; for all keys set default_domain instead"
            )
        return self


class NamespaceSettings(StrictModel):
    """One key space and its eviction domains."""

    domains: dict[Name, DomainSettings] = Field(
        default_factory=dict,
        min_length=1,
        max_length=DOMAINS_MAX,
        description="Its eviction domains, by name; a root has none.",
    )
    default_domain: Name | None = Field(
        default=None,
        description="Where values go when nothing else says so; may be left out if only one.",
    )
    store: str | None = Field(
        default=None, description="Where misses are fetched; none: they are not."
    )
    negative_ttl: Duration = Field(
        default=0.0,
        le=_TTL_SECONDS_MAX,
        description="How long a store's not-found answer is remembered; 0: not at all.",
    )
    fetch_timeout: Duration = Field(
        default=1.0, gt=0, description="How long a read without a deadline waits."
    )
    rules: tuple[RuleSettings, ...] = Field(default=(), max_length=256)
    nvm: NvmShareSettings | None = Field(
        default=None, description="Its part of the NVM tier; none: evicted items are dropped."
    )
    speculative: SpeculativeSettings | None = Field(
        default=None, description="Ask the store when a read of NVM is late; none: wait for it."
    )

    @property
    def entry_domain(self) -> str:
        """The default domain, or the only one; "" on a root, which has none."""
        return self.default_domain or next(iter(self.domains), "")


class StoreSettings(StrictModel):
    """A feature store and the guard around it. `options` belong to the store's type."""

    type: str = Field(description="lmdb, redis or module:Class.")
    options: dict[str, Any] = Field(default_factory=dict)
    guard: GuardOptions = GuardOptions.model_validate({})
    max_batch_keys: int = Field(
        default=2000, ge=1, le=1 << 20, description="Keys of one get_many call."
    )
    queue_keys: int = Field(
        default=1_000_000, ge=1, description="Misses that may wait; beyond it cells are THROTTLED."
    )


class RefreshSettings(StrictModel):
    """The budget of refresh-ahead."""

    keys_per_second: int = Field(default=1000, ge=0, description="0 turns refresh-ahead off.")


class LogSettings(StrictModel):
    """What is logged to stderr, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class Config(StrictModel):
    """All settings of one daemon."""

    topology: Literal["colocated", "separate", "sharded"] = Field(
        default="colocated",
        description="colocated: a cache on the ranker's host; separate: cache nodes of their own; "
        "sharded: a root or a leaf of a cluster.",
    )
    listen: ListenSettings
    insecure: bool = Field(
        default=False,
        description="Allow to listen beyond loopback although nothing is encrypted yet.",
    )
    limits: LimitSettings = LimitSettings()
    memory: MemorySettings = Field(
        default_factory=_no_memory, description="The DRAM tier; only a root has none."
    )
    nvm: NvmSettings | None = Field(
        default=None, description="The NVM tier; none: what DRAM evicts is dropped."
    )
    persist: PersistSettings | None = Field(
        default=None, description="What outlives the process; none: nothing."
    )
    namespaces: dict[Name, NamespaceSettings] = Field(min_length=1, max_length=_NAMESPACES_MAX)
    stores: dict[Name, StoreSettings] = Field(default_factory=dict, max_length=64)
    refresh: RefreshSettings = RefreshSettings()
    sharding: ShardingSettings | None = Field(
        default=None, description="The place in a cluster; with topology: sharded."
    )
    warmup: WarmupSettings | None = Field(
        default=None, description="How nodes record traffic and new ones are filled; none: cold."
    )
    drain_timeout: Duration = Field(
        default=30.0, ge=0, description="How long a stop waits for requests that were accepted."
    )
    log: LogSettings = LogSettings()

    @property
    def is_root(self) -> bool:
        """Whether the node keeps no values but asks leaves."""
        return self.sharding is not None and self.sharding.role == "root"

    @property
    def warms(self) -> bool:
        """Whether the node has something to be filled from before it serves."""
        warmup = self.warmup
        if warmup is None or self.is_root or warmup.plan == "none":
            return False
        replays = warmup.snapshots is not None and warmup.plan != "peer_copy"
        copies = bool(warmup.peers or self.sharding) and warmup.plan != "replay"
        return replays or copies

    @property
    def persistence(self) -> PersistSettings | None:
        """The persist section where it is there and not turned off."""
        return self.persist if self.persist and self.persist.enabled else None
