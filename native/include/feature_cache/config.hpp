// What the data plane is built from. Python validates a whole file first; validate() here is the
// last line: it throws std::invalid_argument with a message that names the field.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fc {

enum class PolicyKind : std::uint8_t { S3Fifo, Lru, Fifo, TinyLfu };
PolicyKind parse_policy(const std::string& name);  // throws std::invalid_argument
const char* policy_name(PolicyKind kind) noexcept;

struct DomainConfig {
  std::string name;
  std::uint64_t budget_bytes = 0;
  PolicyKind policy = PolicyKind::S3Fifo;
  std::uint64_t ttl_ms = 0;    // 0: no expiry
  double ttl_jitter = 0.1;     // a TTL is shortened by up to this share, never lengthened
  double refresh_ahead = 0.0;  // hot keys are refreshed in this last share of their TTL
};

// Which evicted items are worth a write to NVM.
enum class AdmissionKind : std::uint8_t {
  All,
  Frequency,    // asked at least `admission_frequency` times of late (count-min)
  RejectFirst,  // evicted from DRAM before, not long ago
};
AdmissionKind parse_admission(const std::string& name);  // throws std::invalid_argument
const char* admission_name(AdmissionKind kind) noexcept;

// Which items come back to DRAM when they are read from NVM.
enum class PromotionKind : std::uint8_t { Always, SecondHit, Never };
PromotionKind parse_promotion(const std::string& name);  // throws std::invalid_argument
const char* promotion_name(PromotionKind kind) noexcept;

// How the device is read and written.
enum class IoKind : std::uint8_t {
  Auto,     // io_uring where the kernel allows it, else threads
  Uring,    // io_uring or no start
  Threads,  // a pool of threads with pread and pwrite
};
IoKind parse_io(const std::string& name);  // throws std::invalid_argument
const char* io_name(IoKind kind) noexcept;

// A namespace's part of the NVM tier.
struct NvmShareConfig {
  std::uint64_t budget_bytes = 0;  // 0: its evicted items are dropped
  AdmissionKind admission = AdmissionKind::All;
  std::uint32_t admission_frequency = 2;  // 1..15
  PromotionKind promotion = PromotionKind::SecondHit;
};

// When a read of the device counts as late, and how many late keys may ask the store.
struct SpeculativeConfig {
  bool enabled = false;
  std::uint64_t after_us = 0;    // since the device got the read; 0: a quantile of recent reads
  double after_quantile = 0.99;  // used when after_us is 0
  double budget = 0.05;          // of the namespace's keys asked, in any second
};

// All conditions given must hold.
struct RouteRule {
  std::string domain;
  std::string prefix;
  std::uint32_t asked_at_least = 0;
};

struct NamespaceConfig {
  std::string name;
  std::vector<DomainConfig> domains;
  std::string default_domain;
  std::vector<RouteRule> rules;
  std::string store;                      // empty: misses are not fetched
  std::uint64_t negative_ttl_ms = 0;      // 0: not-found answers are not cached
  std::uint64_t fetch_timeout_ms = 1000;  // how long a read without deadline waits
  NvmShareConfig nvm;
  SpeculativeConfig speculative;
};

// One file or block device of the NVM tier.
struct NvmDeviceConfig {
  std::string path;
  std::uint64_t bytes = 0;  // a file is made as large and never grows; 0: all of a block device
};

struct NvmConfig {
  std::vector<NvmDeviceConfig> devices;  // empty: no NVM tier; regions are striped over several
  std::uint32_t region_bytes = 0;        // 0: from the smallest namespace budget, at most 16 MiB
  IoKind io = IoKind::Auto;
  bool direct = true;                       // O_DIRECT where the file system has it
  std::uint32_t queue_depth = 128;          // reads that the device works on at most
  std::uint32_t io_threads = 64;            // of the thread pool
  std::uint32_t coalesce_gap_bytes = 4096;  // records so near become one read
  std::uint32_t queued_reads = 65536;       // records that may wait; beyond: THROTTLED
  std::uint64_t read_memory_bytes = std::uint64_t{16} << 20;  // of each device
  std::uint32_t write_buffers = 2;           // regions being written, beyond one open a namespace
  std::uint64_t write_bytes_per_second = 0;  // budget for the SSD's endurance; 0: none
  std::uint32_t errors_max = 16;             // of late; then the device is out of service
  std::uint64_t probe_interval_ms = 5000;    // how often a device that is out is tried again
};

// What NVM holds after the machine lost power (or the process died and the machine was rebooted
// before it came back): deletes, overwrites and flushes are in memory alone until an orderly stop.
enum class DurabilityKind : std::uint8_t {
  DropNvm,  // nothing: the tier starts empty
  Bounded,  // a log of what became invalid reaches the device within `durability_window_ms`
  Sync,     // ... before the write that made it so is acknowledged
};
DurabilityKind parse_durability(const std::string& name);  // throws std::invalid_argument
const char* durability_name(DurabilityKind kind) noexcept;

// What outlives the process.
struct PersistConfig {
  std::string dir;  // a directory on tmpfs or hugetlbfs; empty: nothing outlives the process
  std::string name = "feature-cache";  // of the files there
  DurabilityKind durability = DurabilityKind::DropNvm;
  std::uint64_t durability_window_ms = 100;
  std::string journal;  // file of that log; empty: the first device's path + ".journal"
  bool keep_on_clock_doubt = false;          // after a reboot into an earlier time of day
  bool spill_on_shutdown = false;            // an orderly stop moves DRAM's items to NVM
  std::uint64_t shutdown_limit_ms = 20'000;  // for what an orderly stop writes

  bool enabled() const noexcept { return !dir.empty(); }
};

// A node's whole, which make_engine() splits over its instances; or one instance's part of that.
struct EngineConfig {
  std::uint64_t memory_bytes = 0;           // arena, index, tables, ghosts and sketches together
  std::uint32_t segment_bytes = 0;          // 0: from the smallest domain, at most 1 MiB
  std::uint32_t expected_item_bytes = 256;  // key and value together; sizes the index
  bool huge_pages = true;
  std::uint64_t max_value_bytes = std::uint64_t{8} << 20;
  std::vector<NamespaceConfig> namespaces;
  NvmConfig nvm;
  PersistConfig persist;

  // Of a whole: over how many instances; 0: as few as max_instance_bytes allows.
  std::uint32_t instances = 0;
  std::uint64_t max_instance_bytes = std::uint64_t{256} << 30;
  // Of an instance's part: which one of how many it is. Keys that belong to another never reach it.
  std::uint32_t instance = 0;
  std::uint32_t instance_count = 1;
  // Of a leaf: the cluster's virtual shards, which may leave it and come back; 0: it is none.
  std::uint32_t shard_count = 0;
  std::int32_t numa_node = -1;  // whose memory and processors it prefers; -1: any

  // Over how many instances the whole is split.
  std::uint32_t instances_wanted() const noexcept;
  void validate() const;
};

struct StoreConfig {
  std::string name;
  std::uint32_t max_batch_keys = 2000;
  std::uint32_t concurrency = 4;
  std::uint64_t timeout_ms = 1000;
  std::uint64_t queue_keys = 1'000'000;
};

// A root: its upstream is the leaves of a sharded cluster. With memory, that is a hot tier, which
// holds a value for kHotTierTtlMs at most; without, it keeps nothing.
struct RootConfig {
  bool enabled = false;
  std::uint32_t threads = 2;  // that complete sub-requests
  std::uint32_t connections_per_leaf = 1;
  std::uint64_t leaf_timeout_ms =
      0;                             // of one sub-request; 0: what is left of the caller's deadline
  std::uint32_t attempts = 3;        // replicas that are asked for a key at most
  double retry_budget = 0.2;         // retried sub-requests: share of the first ones
  bool hedge = true;                 // ask another replica when one is late
  std::uint64_t hedge_after_us = 0;  // 0: a quantile of recent sub-requests
  double hedge_quantile = 0.99;      // used when hedge_after_us is 0
  double hedge_budget = 0.02;        // hedged sub-requests: share of the first ones
  double store_budget = 0.05;  // keys that no leaf answers and a store may: share of keys asked
};
inline constexpr std::uint64_t kHotTierTtlMs = 1000;

// A leaf: answers for the shards it owns only.
struct LeafConfig {
  bool enabled = false;
  std::uint64_t write_log_bytes = std::uint64_t{16} << 20;  // what a returning replica may ask for
};

// What is recorded: whole requests, or keys of which each is always or never recorded.
enum class SampleBy : std::uint8_t { Requests = 0, Keys = 1 };
SampleBy parse_sample_by(const std::string& name);  // throws std::invalid_argument
const char* sample_by_name(SampleBy by) noexcept;

// How the keys of a namespace stand in the request log.
enum class KeyPrivacy : std::uint8_t {
  Plain = 0,
  Hashed = 1,    // as a keyed hash: they can be counted, not replayed
  Excluded = 2,  // not at all
};
KeyPrivacy parse_privacy(const std::string& name);  // throws std::invalid_argument
const char* privacy_name(KeyPrivacy privacy) noexcept;

// The request log of a node, from which others warm up (docs/request_log.md).
struct RecordConfig {
  std::string dir;      // of the log alone; empty: nothing is recorded
  double sample = 0.1;  // share of the requests or of the keys
  SampleBy by = SampleBy::Requests;
  std::uint64_t window_ms = 600'000;  // a file holds [k * window, (k + 1) * window) of the day
  std::uint64_t max_bytes = std::uint64_t{1} << 30;     // of all files in dir
  std::uint64_t buffer_bytes = std::uint64_t{8} << 20;  // between requests and the writer
  std::uint32_t dictionary_keys = 1u << 20;  // distinct keys that a file tells apart at a time
  std::string host;                          // stands in the files
  struct Privacy {
    std::string ns;
    KeyPrivacy privacy = KeyPrivacy::Plain;
  };
  std::vector<Privacy> privacy;  // namespaces that are not named are Plain
  std::string hash_key;          // of Hashed namespaces; at least 16 bytes

  bool enabled() const noexcept { return !dir.empty(); }
};

struct NodeConfig {
  EngineConfig engine;
  RootConfig root;
  LeafConfig leaf;
  RecordConfig record;
  std::vector<StoreConfig> stores;
  std::uint32_t max_batch_keys = 16384;
  std::uint64_t max_reply_bytes = std::uint64_t{64} << 20;
  std::uint32_t max_pending_batches = 4096;
  std::uint32_t refresh_keys_per_second = 1000;

  void validate() const;
};

// The parts of a whole, one an instance, in order: of equal size and with the same namespaces and
// domains, their budgets divided to within a segment. Instance 0 keeps the names of files, instance
// i gets "-i" behind them. Of files as NVM devices every instance has one of its own; with block
// devices, or with `devices_whole`, device d goes to instance d modulo their number. Looks whether
// a device's path names a block device; otherwise pure arithmetic. Throws std::invalid_argument for
// what cannot be divided so.
std::vector<EngineConfig> split_instances(const EngineConfig& whole, bool devices_whole = false);

// How the memory of an engine is laid out; pure arithmetic, used before anything is reserved.
struct Geometry {
  std::uint32_t segment_bytes = 0;
  std::uint64_t bucket_count = 0;
  std::uint64_t nvm_slots = 0;         // of the index, for items on NVM
  std::uint32_t region_bytes = 0;      // 0: no NVM tier
  std::uint64_t nvm_memory_bytes = 0;  // write and read buffers, region table, sketches
  std::uint32_t segment_count = 0;     // of the arena, reserve included
  std::uint32_t reserve_segments = 0;  // in flight between eviction and reuse; no domain owns them
  std::uint64_t side_bytes = 0;        // tables, ghosts, sketches, locks

  std::uint64_t domain_bytes() const noexcept {
    return std::uint64_t{segment_count - reserve_segments} * segment_bytes;
  }
  // Of one instance. Throws std::invalid_argument when the memory is too small for the namespaces.
  static Geometry plan(const EngineConfig& config);
};

}  // namespace fc
