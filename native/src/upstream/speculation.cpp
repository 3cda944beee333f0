#include "upstream/speculation.hpp"

#include <algorithm>

namespace fc {

template <class Ring>
std::uint64_t SpeculationBudget::sum(const Ring& ring, std::uint64_t slot,
                                     std::uint64_t before) noexcept {
  std::uint64_t total = 0;
  for (const auto& place : ring) {
    const std::uint64_t word = place;
    if (slot_of(word) <= slot && slot_of(word) + before >= slot) total += count_of(word);
  }
  return total;
}

std::size_t SpeculationBudget::take(std::uint64_t now_ns, std::size_t wanted) noexcept {
  const std::lock_guard lock(mutex_);
  // Never back in time: who read the clock earlier than another launcher spends from its second.
  newest_slot_ = std::max(newest_slot_, now_ns / kSlotNs);
  const std::uint64_t slot = newest_slot_;
  const std::uint64_t spent = sum(launched_, slot, kSlotsPerSecond);
  const auto allowed = static_cast<std::uint64_t>(
      share_ * static_cast<double>(sum(asked_, slot, kSlotsPerSecond - 1)));
  const std::size_t taken = std::min<std::uint64_t>(wanted, allowed - std::min(allowed, spent));
  if (taken == 0) return 0;
  std::uint64_t& place = launched_[slot % kSlots];
  place = slot_of(place) == slot ? place + taken : pack(slot, taken);
  return taken;
}

void Speculation::visit(CounterVisitor& visitor, std::string_view ns) const {
  const Label labels[] = {{"namespace", ns}};
  visitor.counter("feature_cache_speculative_launched_total",
                  "Fetches of single keys that a late NVM read started.", labels, launched.get());
  visitor.counter("feature_cache_speculative_won_by_store_total",
                  "Cells whose NVM read was late and that the store answered first.", labels,
                  won_by_store.get());
  visitor.counter("feature_cache_speculative_won_by_nvm_total",
                  "Cells whose NVM read was late and still came before the store.", labels,
                  won_by_nvm.get());
  visitor.counter("feature_cache_speculative_denied_total",
                  "Cells whose NVM read was late and that the budget kept from asking the store.",
                  labels, denied.get());
}

}  // namespace fc
