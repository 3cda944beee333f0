// What an eviction policy decides. The memory room owns the queues of segments; a policy only says
// which queue a new item enters, which queue gives its oldest segment, and what becomes of each
// live item of that segment. One file a policy; tests/eviction_policy_test.cpp is the contract.
//
// Threads: all methods but `prefetch` and `memory_bytes` are called under the domain's lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "feature_cache/config.hpp"

namespace fc {

enum class Queue : std::uint8_t { Small = 0, Main = 1 };
inline constexpr std::size_t kQueueCount = 2;

struct QueueSizes {
  std::uint32_t small_segments;
  std::uint32_t main_segments;
  std::uint32_t budget_segments;
};

// A live item of the segment that is being evicted.
struct Candidate {
  std::uint64_t hash;  // low half of the key's hash
  unsigned frequency;  // hits since it was last judged, 0..7
  Queue queue;
};

struct Verdict {
  bool keep;  // move on to `queue`, else the item goes
  Queue queue;
  unsigned frequency;  // what a kept item starts with there
};

class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;

  // The queue that a new item enters.
  virtual Queue admit(std::uint64_t hash) noexcept = 0;
  // Brings what admit() or judge() will read closer.
  virtual void prefetch(std::uint64_t hash) const noexcept = 0;
  // The queue whose oldest segment goes next; the owner takes the other one when it is empty.
  virtual Queue victim(const QueueSizes& sizes) const noexcept = 0;
  virtual Verdict judge(const Candidate& candidate) noexcept = 0;
  virtual void clear() noexcept = 0;
  virtual std::size_t memory_bytes() const noexcept = 0;

  // `items`: how many the domain is expected to hold. `hints`: memory for what it remembers, of
  // hint_bytes(), zeroes or what a policy of that kind and size left there; else it takes its own.
  static std::unique_ptr<EvictionPolicy> make(PolicyKind kind, std::uint64_t items,
                                              std::span<std::byte> hints = {});
  static std::size_t hint_bytes(PolicyKind kind, std::uint64_t items) noexcept;
};

}  // namespace fc
