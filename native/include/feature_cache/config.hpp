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
  std::uint64_t fetch_timeout_ms = 1000;  // how long a read without deadline waits for the store
};

struct EngineConfig {
  std::uint64_t memory_bytes = 0;           // arena, index, tables, ghosts and sketches together
  std::uint32_t segment_bytes = 0;          // 0: from the smallest domain, at most 1 MiB
  std::uint32_t expected_item_bytes = 256;  // key and value together; sizes the index
  bool huge_pages = true;
  std::uint64_t max_value_bytes = std::uint64_t{8} << 20;
  std::vector<NamespaceConfig> namespaces;

  void validate() const;
};

struct StoreConfig {
  std::string name;
  std::uint32_t max_batch_keys = 2000;
  std::uint32_t concurrency = 4;
  std::uint64_t timeout_ms = 1000;
  std::uint64_t queue_keys = 1'000'000;
};

struct NodeConfig {
  EngineConfig engine;
  std::vector<StoreConfig> stores;
  std::uint32_t max_batch_keys = 16384;
  std::uint64_t max_reply_bytes = std::uint64_t{64} << 20;
  std::uint32_t max_pending_batches = 4096;
  std::uint32_t refresh_keys_per_second = 1000;

  void validate() const;
};

// How the memory of an engine is laid out; pure arithmetic, used before anything is reserved.
struct Geometry {
  std::uint32_t segment_bytes = 0;
  std::uint64_t bucket_count = 0;
  std::uint32_t segment_count = 0;     // of the arena, reserve included
  std::uint32_t reserve_segments = 0;  // in flight between eviction and reuse; no domain owns them
  std::uint64_t side_bytes = 0;        // tables, ghosts, sketches, locks

  std::uint64_t domain_bytes() const noexcept {
    return std::uint64_t{segment_count - reserve_segments} * segment_bytes;
  }
  // Throws std::invalid_argument when the memory is too small for the namespaces.
  static Geometry plan(const EngineConfig& config);
};

}  // namespace fc
