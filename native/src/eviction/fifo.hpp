// FIFO and CLOCK: one queue; CLOCK ("lru") gives an item that was hit another round.
#pragma once

#include "eviction/policy.hpp"

namespace fc {

class FifoPolicy : public EvictionPolicy {
 public:
  Queue admit(std::uint64_t) noexcept override { return Queue::Main; }
  void prefetch(std::uint64_t) const noexcept override {}
  Queue victim(const QueueSizes&) const noexcept override { return Queue::Main; }
  Verdict judge(const Candidate&) noexcept override { return {false, Queue::Main, 0}; }
  void clear() noexcept override {}
  std::size_t memory_bytes() const noexcept override { return 0; }
};

// LRU approximated by reinsertion: a hit since the last round is what recency means here.
class LruPolicy final : public FifoPolicy {
 public:
  Verdict judge(const Candidate& candidate) noexcept override {
    return {candidate.frequency > 0, Queue::Main, 0};
  }
};

}  // namespace fc
