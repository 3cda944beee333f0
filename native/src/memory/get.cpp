// The batched lookup: software-pipelined, without locks.
//
// Each key passes four stages, some keys apart, so that the cache misses of many keys overlap:
//   1. hash it, prefetch its home bucket
//   2. probe the home bucket; prefetch the record found there, or else the partner bucket
//   3. if need be probe the partner bucket and prefetch the record found there
//   4. compare the whole key, copy the value
// What the pipeline did not find is looked up again with the index's certain find(): that confirms
// a miss against entries that moved meanwhile, after the miss took its token.
//
// An epoch covers kChunk keys at most, so that a huge batch does not keep memory from its writers.

#include <algorithm>
#include <array>

#include "memory/dram_tier.hpp"

namespace fc {
namespace {

constexpr std::size_t kChunk = 256;
constexpr std::size_t kHomeAhead = 24;     // stage 1 runs this far ahead of stage 4
constexpr std::size_t kProbeAhead = 12;    // stage 2
constexpr std::size_t kPartnerAhead = 6;   // stage 3
constexpr std::size_t kRing = 32;
constexpr unsigned kHotFrequency = 2;    // hits that make a key worth a refresh
constexpr unsigned kPrefetchLines = 10;    // beyond that the hardware has recognised the stream
static_assert(kRing > kHomeAhead && (kRing & (kRing - 1)) == 0);

struct InFlight {
  std::uint64_t hash;
  std::uint64_t home;
  std::uint64_t partner;
  Slot* slot;   // null: nothing found yet
  Entry entry;
};

inline Slot* first_candidate(Bucket& bucket, std::uint16_t tag, Entry* entry) noexcept {
  const std::uint32_t mask = Index::candidates(bucket, tag);
  if (mask == 0) return nullptr;
  Slot& slot = Index::first_of(bucket, mask);
  *entry = Entry(slot.load(std::memory_order_acquire));
  return entry->empty() || entry->tag() != tag ? nullptr : &slot;
}

inline void prefetch_record(const std::byte* at, unsigned lines) noexcept {
  const unsigned end = std::min(lines + 1, kPrefetchLines);  // one more: records are not aligned
  for (unsigned i = 0; i < end; ++i) __builtin_prefetch(at + i * Entry::kCacheLine);
}

}  // namespace

// What a batch counts; added to the shared counters once, at its end.
struct DramTier::GetTally {
  explicit GetTally(const Namespace& of)
      : ns(&of), first_domain(of.first_domain), domain_hits(of.domain_count) {}
  const Namespace* ns;
  std::uint16_t incarnation = 0;
  DomainIndex first_domain;
  std::vector<std::uint32_t> domain_hits;
  // Hits whose frequency rises when the chunk is done: a locked instruction amid the pipeline would
  // wait for the loads that it keeps in flight.
  struct Touched {
    Slot* slot;
    Entry seen;
  };
  std::array<Touched, kChunk> touched;
  std::size_t touched_count = 0;
  std::uint64_t hits = 0;
  std::uint64_t misses = 0;
  std::uint64_t negative_hits = 0;
  std::uint64_t value_bytes = 0;
};

void DramTier::get(GetColumn& column) {
  Namespace& ns = *namespaces_[column.ns];
  GetTally tally(ns);
  const Tick tick = now();
  for (std::size_t begin = 0; begin < column.keys.size(); begin += kChunk) {
    const EpochGuard epoch(epochs_);
    tally.incarnation = ns.incarnation.load(std::memory_order_acquire);
    get_chunk(column, begin, std::min(begin + kChunk, column.keys.size()), tick, tally);
    for (std::size_t i = 0; i < tally.touched_count; ++i) {
      Index::touch(*tally.touched[i].slot, tally.touched[i].seen);
    }
    tally.touched_count = 0;
  }
  if (column.quiet) return;
  for (std::size_t i = 0; i < tally.domain_hits.size(); ++i) {
    if (tally.domain_hits[i] != 0) domains_[ns.first_domain + i]->hits.add(tally.domain_hits[i]);
  }
  if (tally.hits != 0) ns.hits.add(tally.hits);
  if (tally.misses != 0) ns.misses.add(tally.misses);
  if (tally.negative_hits != 0) ns.negative_hits.add(tally.negative_hits);
}

// Answers one key from its record; false when the record has expired.
inline bool DramTier::serve(GetColumn& column, std::size_t position, const RecordHeader& record,
                            Entry entry, Slot& slot, Tick tick, std::uint64_t hash,
                            GetTally& tally) {
  if (record.expired(tick)) return false;
  if (entry.frequency() < Entry::kMaxFrequency) {
    tally.touched[tally.touched_count++] = {&slot, entry};
  }
  const DomainIndex domain = arena_.domain_of(arena_.segment_of(entry.location()));
  if (record.negative()) {
    column.statuses[position] = CellStatus::NotFound;
    column.lengths[position] = 0;
    ++tally.negative_hits;
    return true;
  }
  const std::uint32_t bytes = record.value_bytes();
  if (tally.value_bytes + bytes > column.max_value_bytes) {
    column.statuses[position] = CellStatus::Throttled;
    column.lengths[position] = 0;
    return true;
  }
  tally.value_bytes += bytes;
  std::uint8_t* to = column.values->reserve(bytes);
  if (!record.large()) [[likely]] {
    std::memcpy(to, record.value_data(), bytes);
  } else {
    copy_value(record, entry.location(), to);
  }
  column.values->commit(bytes);
  column.statuses[position] = CellStatus::HitDram;
  column.lengths[position] = bytes;
  ++tally.hits;
  ++tally.domain_hits[domain - tally.first_domain];
  if (column.refresh != nullptr && record.expiry != kNever &&
      record.expiry - tick < domains_[domain]->refresh_ticks() &&
      entry.frequency() >= kHotFrequency) [[unlikely]] {
    column.refresh->push_back(
        {static_cast<std::uint32_t>(position),
         Token{write_version(hash).load(std::memory_order_acquire), tally.incarnation}});
  }
  return true;
}

// The value of a record that goes on in further segments.
void DramTier::copy_value(const RecordHeader& record, std::uint64_t location,
                          std::uint8_t* to) noexcept {
  std::uint32_t segment = arena_.segment_of(location);
  const std::size_t head = sizeof(RecordHeader) + record.key_bytes;
  std::size_t left = record.value_bytes();
  std::size_t offset = head;
  while (left != 0) {
    const std::size_t here = std::min(left, arena_.segment_bytes() - offset);
    std::memcpy(to, arena_.data(segment) + offset, here);
    to += here;
    left -= here;
    offset = 0;
    segment = arena_.meta(segment).next;
  }
}

void DramTier::get_chunk(GetColumn& column, std::size_t begin, std::size_t end, Tick tick,
                         GetTally& tally) {
  std::array<InFlight, kRing> ring;
  const Namespace& ns = *tally.ns;
  const std::size_t steps = end - begin + kHomeAhead;
  for (std::size_t step = 0; step < steps; ++step) {
    if (const std::size_t i = begin + step; i < end) {
      InFlight& key = ring[i % kRing];
      key.hash = hash_key(ns.seed, column.keys[i]).low;
      key.home = index_.home_of(key.hash);
      index_.prefetch(key.home);
    }
    if (const std::size_t i = begin + step - (kHomeAhead - kProbeAhead);
        step >= kHomeAhead - kProbeAhead && i < end) {
      InFlight& key = ring[i % kRing];
      const std::uint16_t tag = Index::tag_of(key.hash);
      key.slot = first_candidate(index_.bucket(key.home), tag, &key.entry);
      if (key.slot != nullptr) {
        prefetch_record(arena_.address(key.entry.location()), key.entry.lines());
      } else {
        key.partner = index_.partner_of(key.home, tag);
        index_.prefetch(key.partner);
      }
    }
    if (const std::size_t i = begin + step - (kHomeAhead - kPartnerAhead);
        step >= kHomeAhead - kPartnerAhead && i < end) {
      InFlight& key = ring[i % kRing];
      if (key.slot == nullptr) {
        key.slot = first_candidate(index_.bucket(key.partner), Index::tag_of(key.hash), &key.entry);
        if (key.slot != nullptr) {
          prefetch_record(arena_.address(key.entry.location()), key.entry.lines());
        }
      }
    }
    if (step < kHomeAhead) continue;
    const std::size_t i = begin + step - kHomeAhead;
    const InFlight& key = ring[i % kRing];
    if (key.slot != nullptr) {
      const RecordHeader& record = *arena_.record(key.entry.location());
      if (record.holds(column.keys[i], tally.incarnation) &&
          serve(column, i, record, key.entry, *key.slot, tick, key.hash, tally)) [[likely]] {
        continue;
      }
    }
    // The token first: a write after it voids it, a write before it is seen by the find.
    const Token token{write_version(key.hash).load(std::memory_order_acquire), tally.incarnation};
    const bool present =
        index_.find(index_.place_of(key.hash), [&](Entry entry, Slot& slot) {
          const RecordHeader& record = *arena_.record(entry.location());
          return record.holds(column.keys[i], tally.incarnation) &&
                 serve(column, i, record, entry, slot, tick, key.hash, tally);
        });
    if (!present) {
      column.statuses[i] = CellStatus::Miss;
      column.lengths[i] = 0;
      ++tally.misses;
      if (column.absent != nullptr) {
        column.absent->push_back({static_cast<std::uint32_t>(i), token});
      }
    }
  }
}

}  // namespace fc
