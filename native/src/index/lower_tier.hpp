// What lies below DRAM, as the DRAM tier and the index see it. The NVM tier implements it; without
// one there is none. The memory room and the nvm room know this, and not each other.
//
// A record that leaves DRAM is copied down first, then its index entry is swung from the one place
// to the other by a single store: at every moment a reader finds it in one of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "core/clock.hpp"
#include "core/moved_keys.hpp"
#include "feature_cache/types.hpp"
#include "index/entry.hpp"

namespace fc {

// A record that DRAM is about to evict.
struct DemotedRecord {
  NamespaceIndex ns = kNoNamespace;
  std::uint16_t incarnation = 0;
  unsigned domain = 0;     // its number within the namespace
  std::uint64_t hash = 0;  // the low half of the key's
  std::uint64_t high = 0;
  std::string_view key;
  std::span<const std::span<const std::uint8_t>> value;  // in pieces
  std::uint32_t value_bytes = 0;
  Tick expiry = kNever;
  unsigned frequency = 0;  // hits since DRAM last judged it
};

// A copy below that no entry points at yet. Whoever demoted calls published() once.
struct Demotion {
  Entry entry;  // empty: not taken
  std::uint32_t region = 0;
  bool busy = false;  // not taken for want of a write buffer: there may be one soon
  bool taken() const noexcept { return !entry.empty(); }
};

// A record of the tier below that lies in memory, valid within the reader's epoch.
struct LowerRecord {
  std::string_view key;
  const std::uint8_t* value = nullptr;
  std::uint32_t value_bytes = 0;
  Tick expiry = kNever;
};

class LowerTier {
 public:
  enum class Where : std::uint8_t {
    Gone,    // of a flushed namespace, or of a device that is out of service
    Memory,  // in a region that is not written yet
    Device,  // pinned for the caller, until unpin()
  };

  virtual ~LowerTier() = default;

  // Never waits for a device. The caller holds no epoch and no bucket.
  virtual Demotion demote(const DemotedRecord& record) = 0;
  // Says whether the demotion's entry was put into the index; for the holder of the key's PairLock
  // when it was, so that nobody can forget() it first.
  virtual void published(const Demotion& demotion, bool indexed) noexcept = 0;
  // An entry was taken out of the index; for the holder of its PairLock. `by_tag`: unread, since a
  // key of its tag was written.
  virtual void forget(Entry entry, bool by_tag) noexcept = 0;
  // Before writes that may have taken entries out are acknowledged; waits where what they made
  // invalid must be known to the device first. The caller holds no epoch and no lock.
  virtual void settle_writes() = 0;
  // For a reader within the epoch in which it loaded the entry.
  virtual Where locate(Entry entry, std::uint16_t incarnation, LowerRecord& record) noexcept = 0;
  virtual void unpin(Entry entry) noexcept = 0;
  // A number that differs for whatever else may ever lie at the entry's place.
  virtual std::uint64_t generation(Entry entry) const noexcept = 0;
  // Under which what lies at the entry's place was opened. For a reader within the epoch in which
  // it loaded the entry, or the holder of its PairLock.
  virtual Stamp stamp(Entry entry) const noexcept = 0;
  // Whether an item of `ns` may take this entry's slot in a full pair of buckets.
  virtual bool yields(Entry entry, NamespaceIndex ns) const noexcept = 0;
  // The namespace has a new incarnation: all that it has here is given back, in time. Returns how
  // many items that are.
  virtual std::uint64_t flush(NamespaceIndex ns) = 0;
  virtual bool uses_incarnation(std::uint16_t incarnation) const noexcept = 0;
};

}  // namespace fc
