// W-TinyLFU (Einziger et al.) over segments: a window of 1 % for what is new; an item leaves it for
// the main queue only when the sketch knows it better than what main lately let go.
//
// Readers never touch the sketch: an arrival counts once, and the hits that an item collected in
// its index entry are added when its segment is judged.
#pragma once

#include "eviction/policy.hpp"
#include "eviction/sketch.hpp"

namespace fc {

class TinyLfuPolicy final : public EvictionPolicy {
 public:
  explicit TinyLfuPolicy(std::uint64_t items, std::span<std::byte> hints = {})
      : sketch_(items, hints) {}
  static std::size_t hint_bytes(std::uint64_t items) noexcept {
    return FrequencySketch::bytes_for(items);
  }

  Queue admit(std::uint64_t hash) noexcept override {
    sketch_.add(hash);
    return Queue::Small;
  }
  void prefetch(std::uint64_t hash) const noexcept override { sketch_.prefetch(hash); }
  Queue victim(const QueueSizes& sizes) const noexcept override {
    return sizes.small_segments * kWindowShare >= sizes.budget_segments ? Queue::Small
                                                                        : Queue::Main;
  }
  Verdict judge(const Candidate& candidate) noexcept override {
    if (candidate.frequency > 0) sketch_.add(candidate.hash, candidate.frequency);
    const auto known = static_cast<double>(sketch_.estimate(candidate.hash));
    if (candidate.queue == Queue::Small) {
      return {known > victim_frequency_, Queue::Main, 0};
    }
    if (candidate.frequency > 0) return {true, Queue::Main, candidate.frequency - 1};
    victim_frequency_ += (known - victim_frequency_) / kVictimWindow;
    return {false, Queue::Main, 0};
  }
  void clear() noexcept override {
    sketch_.clear();
    victim_frequency_ = 0;
  }
  std::size_t memory_bytes() const noexcept override { return sketch_.memory_bytes(); }

 private:
  static constexpr std::uint32_t kWindowShare = 100;
  static constexpr double kVictimWindow = 1024;  // victims over which their frequency is averaged

  FrequencySketch sketch_;
  double victim_frequency_ = 0;
};

}  // namespace fc
