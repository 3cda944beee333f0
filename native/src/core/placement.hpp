// Which instance of a node a key lives on.
//
// The rule is that of jump consistent hashing (Lamping and Veach, "A Fast, Minimal Memory,
// Consistent Hash Algorithm", 2014) in its plain form: a key starts on instance 0, and when the
// i-th further instance joins, it moves there with probability 1 / (i + 1), as a random sequence
// that is the key's own says. So a node that goes from n to n + 1 instances moves one key in n + 1,
// all of them to the new one, and a node that goes back has every key where it was.
//
// The paper's second form jumps over the instances that do not take the key: fewer steps, but a
// division and a branch that nobody can predict in each. Nodes have few instances; here a step is
// a multiplication, and the steps of neighbouring keys overlap.
//
// What a node has on disk and in shared memory hangs on this function: it never changes.
#pragma once

#include <array>
#include <cstdint>

#include "core/layout.hpp"

namespace fc {

namespace placement {

// The instance that joins as number i takes a key whose draw lies below thresholds[i].
inline constexpr std::array<std::uint64_t, layout::kMaxInstances> kThresholds = [] {
  std::array<std::uint64_t, layout::kMaxInstances> thresholds{};
  for (std::uint64_t i = 0; i < thresholds.size(); ++i) {
    thresholds[i] = (std::uint64_t{1} << 32) / (i + 1);
  }
  return thresholds;
}();

}  // namespace placement

// `high`: the high half of the key's published hash, of which the lower 32 bits count. At most
// layout::kMaxInstances.
inline std::uint32_t instance_of(std::uint64_t high, std::uint32_t instances) noexcept {
  std::uint64_t state = (high & 0xFFFFFFFFu) * 0x9E3779B97F4A7C15ull;
  state ^= state >> 32;
  std::uint32_t chosen = 0;
  for (std::uint32_t i = 1; i < instances; ++i) {
    state = state * 2862933555777941757ull + 1;  // the paper's generator
    chosen = (state >> 32) < placement::kThresholds[i] ? i : chosen;
  }
  return chosen;
}

}  // namespace fc
