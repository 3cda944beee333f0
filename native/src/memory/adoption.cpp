#include "memory/adoption.hpp"

#include <algorithm>
#include <atomic>
#include <mutex>

#include "core/parallel.hpp"
#include "core/sequence_point.hpp"

namespace fc {
namespace {

constexpr std::uint64_t kBucketsPerThreadLeast = 1u << 14;
constexpr std::uint64_t kSegmentsPerThreadLeast = 16;
constexpr std::uint32_t kRecordsAhead = 16;
constexpr std::size_t kStreamAhead = 2048;

}  // namespace

std::uint64_t clean_sum_of(const ArenaMemory& memory) noexcept {
  const ArenaHead& head = memory.head();
  const std::uint64_t rows = XXH3_64bits_withSeed(
      &head.namespaces, sizeof(head.namespaces) + sizeof(head.domains), head.header.memory_id);
  return XXH3_64bits_withSeed(memory.table(), memory.table_bytes(), rows);
}

Adoption::Adoption(Arena& arena, Index& index, std::span<const DomainIdentity> domains,
                   std::span<const std::uint64_t> seeds,
                   std::span<const std::uint16_t> incarnations, bool keep_below,
                   RecoveryProgress* progress)
    : arena_(arena),
      index_(index),
      domains_(domains),
      seeds_(seeds),
      keep_below_(keep_below),
      progress_(progress),
      ns_of_incarnation_(std::size_t{1} << 16, kNoNamespace),
      domain_of_row_(layout::kMaxDomains, kNoDomain),
      use_(arena.segment_count()),
      owner_(arena.segment_count(), kNoDomain),
      adopted_(domains.size()) {
  for (std::size_t n = 0; n < incarnations.size(); ++n) {
    if (incarnations[n] != 0) {
      ns_of_incarnation_[incarnations[n]] = static_cast<NamespaceIndex>(n);
    }
  }
}

void Adoption::run(bool check, StartReport& report) {
  ArenaHead& head = arena_.memory().head();
  const auto check_since = [&](const char* why) {
    check = true;
    if (report.memory_reason.empty()) report.memory_reason = why;
  };
  if (!check && head.header.clean_sum != clean_sum_of(arena_.memory())) {
    check_since("its tables are not as the orderly stop left them");
  }
  head.header.state.store(ArenaHeader::kServing, std::memory_order_seq_cst);
  FC_SEQUENCE_POINT("adopt:begun");
  index_.finish_moves();
  match_rows();
  if (!classify() && !check) check_since("domains were removed");
  Walked walked = walk_index([](Entry, std::uint64_t) { return false; });
  std::uint64_t dropped = walked.dropped;
  if (dropped != 0 && !check) check_since("entries of its index were damaged");
  if (check && count_records() != walked.kept) {
    // Some entries point at what is no record, or not theirs.
    walked =
        walk_index([&](Entry entry, std::uint64_t number) { return !is_right(entry, number); });
    dropped += walked.dropped;
    if (count_records() != walked.kept) dropped += drop_unwalkable();
  }
  FC_SEQUENCE_POINT("adopt:checked");
  settle(check);
  FC_SEQUENCE_POINT("adopt:domains");
  report.memory = check ? "checked" : "clean";
  report.memory_dropped = dropped;
  for (const AdoptedDomain& domain : adopted_) report.memory_items += domain.entries;
}

// Which of the head's rows is which domain; domains that are new here take free rows at the end,
// when no segment names them any more.
void Adoption::match_rows() {
  const auto& rows = arena_.memory().head().domains;
  for (std::size_t d = 0; d < domains_.size(); ++d) {
    for (std::size_t r = 0; r < rows.size(); ++r) {
      if (!domains_[d].is(rows[r])) continue;
      domain_of_row_[r] = static_cast<DomainIndex>(d);
      break;
    }
  }
}

// Says what each segment is good for; false when some were of a domain that is gone, or damaged.
bool Adoption::classify() {
  bool good = true;
  for (std::uint32_t s = 0; s < arena_.segment_count(); ++s) {
    const SegmentMeta& row = arena_.meta(s);
    const SegmentState state = row.state.load(std::memory_order_relaxed);
    if (state != SegmentState::Open && state != SegmentState::Sealed) {
      good = good && state <= SegmentState::Limbo;
      continue;
    }
    if (row.used.load(std::memory_order_relaxed) == 0) continue;
    if (!is_whole(s)) {
      good = false;
      continue;
    }
    owner_[s] = domain_of_row_[row.domain_row];
    if (row.large == 0) {
      use_[s] = Use::Records;
    } else if (!claim_large(s)) {
      good = false;
    }
  }
  return good;
}

bool Adoption::is_whole(std::uint32_t segment) const noexcept {
  const SegmentMeta& row = arena_.meta(segment);
  const std::uint32_t used = row.used.load(std::memory_order_relaxed);
  const bool continued = row.next != SegmentMeta::kNoSegment;
  return row.queue < kQueueCount && row.domain_row < layout::kMaxDomains &&
         domain_of_row_[row.domain_row] != kNoDomain && used <= arena_.segment_bytes() &&
         used % layout::kRecordAlignment == 0 && row.large <= 1 && continued == (row.large == 1) &&
         (row.large == 0 || row.state.load(std::memory_order_relaxed) == SegmentState::Sealed);
}

// The further segments of a large record; false when they are not what its size says.
bool Adoption::claim_large(std::uint32_t head) {
  const SegmentMeta& row = arena_.meta(head);
  const RecordHeader& record = *arena_.record(arena_.location(head, 0));
  const std::size_t size = arena_.segment_bytes();
  if (!record.large() || record.record_bytes() <= size) return false;
  std::vector<std::uint32_t> further;
  std::uint32_t next = row.next;
  for (std::size_t covered = size; covered < record.record_bytes(); covered += size) {
    if (next >= arena_.segment_count() || use_[next] != Use::None) return false;
    const SegmentMeta& more = arena_.meta(next);
    if (more.state.load(std::memory_order_relaxed) != SegmentState::Continuation ||
        more.domain_row != row.domain_row || more.queue >= kQueueCount ||
        std::find(further.begin(), further.end(), next) != further.end()) {
      return false;
    }
    further.push_back(next);
    next = more.next;
  }
  if (next != SegmentMeta::kNoSegment) return false;
  use_[head] = Use::Large;
  for (const std::uint32_t segment : further) {
    use_[segment] = Use::Further;
    owner_[segment] = owner_[head];
  }
  return true;
}

// Takes the entries out that do not point at records, or that `goes` does not want; counts both.
template <class Goes>
Adoption::Walked Adoption::walk_index(Goes&& goes) {
  std::atomic<std::uint64_t> kept{0};
  std::atomic<std::uint64_t> dropped{0};
  in_parallel(index_.bucket_count(), kBucketsPerThreadLeast,
              [&](std::uint64_t begin, std::uint64_t end) {
                Walked mine;
                for (std::uint64_t number = begin; number < end; ++number) {
                  for (Slot& slot : index_.bucket(number).slots) {
                    const Entry entry(slot.load(std::memory_order_relaxed));
                    if (entry.empty()) continue;
                    if (entry.on_nvm()) {
                      if (!keep_below_ || entry.lines() == 0) {
                        slot.store(0, std::memory_order_relaxed);
                      }
                      continue;
                    }
                    if (!points_well(entry) || goes(entry, number)) {
                      slot.store(0, std::memory_order_relaxed);
                      ++mine.dropped;
                    } else {
                      ++mine.kept;
                    }
                  }
                }
                kept.fetch_add(mine.kept, std::memory_order_relaxed);
                dropped.fetch_add(mine.dropped, std::memory_order_relaxed);
              });
  return {kept.load(), dropped.load()};
}

// Makes the counts up anew, from each record that the index holds where its key belongs; returns
// how many these are. By segment, not by entry: the records of a segment are read in a row.
std::uint64_t Adoption::count_records() {
  std::mutex mutex;
  std::uint64_t found = 0;
  for (AdoptedDomain& domain : adopted_)
    domain.entries = domain.live_bytes = domain.payload_bytes = 0;
  if (progress_ != nullptr) progress_->begin("memory", arena_.segment_count());
  in_parallel(arena_.segment_count(), kSegmentsPerThreadLeast,
              [&](std::uint64_t begin, std::uint64_t end) {
                std::vector<AdoptedDomain> counts(domains_.size());
                for (std::uint64_t s = begin; s < end; ++s) {
                  count_segment(static_cast<std::uint32_t>(s), counts);
                  if (progress_ != nullptr) progress_->add(1);
                }
                const std::lock_guard lock(mutex);
                for (std::size_t d = 0; d < counts.size(); ++d) {
                  adopted_[d].entries += counts[d].entries;
                  adopted_[d].live_bytes += counts[d].live_bytes;
                  adopted_[d].payload_bytes += counts[d].payload_bytes;
                  found += counts[d].entries;
                }
              });
  return found;
}

void Adoption::count_segment(std::uint32_t segment, std::span<AdoptedDomain> counts) {
  SegmentMeta& row = arena_.meta(segment);
  row.live_bytes.store(0, std::memory_order_relaxed);
  if (use_[segment] != Use::Records && use_[segment] != Use::Large) return;
  struct Seen {
    std::uint32_t offset;
    Place place;
  };
  std::array<Seen, kRecordsAhead> ahead;
  AdoptedDomain& of = counts[owner_[segment]];
  const NamespaceIndex ns = domains_[owner_[segment]].ns;
  std::uint32_t scanned = 0;
  std::uint32_t judged = 0;
  std::uint32_t live = 0;
  std::uint32_t offset = 0;
  std::uint32_t end = row.used.load(std::memory_order_relaxed);
  while (judged < scanned || offset < end) {
    if (offset < end && scanned - judged < kRecordsAhead) {
      const RecordHeader& record = *arena_.record(arena_.location(segment, offset));
      if (!is_headed(record, segment, offset)) {
        end = offset;  // damaged: nothing says where the next record would be
        continue;
      }
      // The processor's own prefetching ends with each page.
      for (std::size_t line = 0; line < record.record_bytes(); line += Entry::kCacheLine) {
        __builtin_prefetch(reinterpret_cast<const std::byte*>(&record) + kStreamAhead + line);
      }
      if (ns_of_incarnation_[record.incarnation] == ns) {
        const Place place = index_.place_of(hash_key(seeds_[ns], record.key()).low);
        index_.prefetch(place.home);
        index_.prefetch(place.partner);
        ahead[scanned++ % kRecordsAhead] = {offset, place};
      }
      offset = record.large() ? end : offset + static_cast<std::uint32_t>(record.record_bytes());
      continue;
    }
    const Seen& seen = ahead[judged++ % kRecordsAhead];
    const std::uint64_t location = arena_.location(segment, seen.offset);
    if (!is_indexed(seen.place, location)) continue;
    const RecordHeader& record = *arena_.record(location);
    live += static_cast<std::uint32_t>(record.record_bytes());
    ++of.entries;
    of.live_bytes += record.record_bytes();
    of.payload_bytes += record.payload_bytes();
  }
  row.live_bytes.store(live, std::memory_order_relaxed);
}

// Segments whose records cannot be walked to the end hold entries that no walk finds: they go, as
// a segment that is emptied must have none left.
std::uint64_t Adoption::drop_unwalkable() {
  const Walked walked = walk_index([&](Entry entry, std::uint64_t) {
    const std::uint32_t segment = arena_.segment_of(entry.location());
    const SegmentMeta& row = arena_.meta(segment);
    std::uint32_t offset = 0;
    const std::uint32_t end = row.used.load(std::memory_order_relaxed);
    const std::uint64_t wanted =
        (entry.location() - arena_.location(segment, 0)) * layout::kRecordAlignment;
    while (offset < end && offset < wanted) {
      const RecordHeader& record = *arena_.record(arena_.location(segment, offset));
      if (!is_headed(record, segment, offset)) return true;
      offset += static_cast<std::uint32_t>(record.record_bytes());
    }
    return offset != wanted;
  });
  (void)count_records();
  return walked.dropped;
}

bool Adoption::is_indexed(const Place& place, std::uint64_t location) const noexcept {
  for (const std::uint64_t number : {place.home, place.partner}) {
    for (const Slot& slot : index_.bucket(number).slots) {
      const Entry entry(slot.load(std::memory_order_relaxed));
      if (entry.tag() == place.tag && !entry.on_nvm() && entry.lines() != 0 &&
          entry.location() == location) {
        return true;
      }
    }
  }
  return false;
}

// Into a part of a segment that holds records.
bool Adoption::points_well(Entry entry) const noexcept {
  if (entry.lines() == 0) return false;
  const std::uint64_t segment = arena_.segment_of(entry.location());
  if (segment >= use_.size()) return false;
  const auto s = static_cast<std::uint32_t>(segment);
  const std::uint64_t offset =
      (entry.location() - arena_.location(s, 0)) * layout::kRecordAlignment;
  switch (use_[s]) {
    case Use::Records:
      return offset + sizeof(RecordHeader) <= arena_.meta(s).used.load(std::memory_order_relaxed);
    case Use::Large:
      return offset == 0;
    case Use::None:
    case Use::Further:
      break;
  }
  return false;
}

// A header that can be one, and ends where its segment's records do at the latest.
bool Adoption::is_headed(const RecordHeader& record, std::uint32_t segment,
                         std::uint64_t offset) const noexcept {
  if (record.key_bytes == 0 || record.key_bytes > kMaxKeyBytes) return false;
  if (use_[segment] == Use::Large) return record.large() && offset == 0;
  return !record.large() && offset + record.record_bytes() <=
                                arena_.meta(segment).used.load(std::memory_order_relaxed);
}

// At a record of a namespace that is there, whose key belongs into this bucket.
bool Adoption::is_right(Entry entry, std::uint64_t bucket) const noexcept {
  const RecordHeader& record = *arena_.record(entry.location());
  const std::uint32_t segment = arena_.segment_of(entry.location());
  const std::uint64_t offset =
      (entry.location() - arena_.location(segment, 0)) * layout::kRecordAlignment;
  if (!is_headed(record, segment, offset)) return false;
  const NamespaceIndex ns = ns_of_incarnation_[record.incarnation];
  if (ns == kNoNamespace || domains_[owner_[segment]].ns != ns) return false;
  const Place place = index_.place_of(hash_key(seeds_[ns], record.key()).low);
  return place.tag == entry.tag() && (place.home == bucket || place.partner == bucket);
}

// The rows are made to say what the walk found, and what is free is free.
void Adoption::settle(bool counted) {
  free_rows();
  auto& rows = arena_.memory().head().domains;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const DomainIndex index = domain_of_row_[r];
    if (index == kNoDomain) {
      rows[r].ns_seed = 0;  // nothing names it any more
      continue;
    }
    AdoptedDomain& domain = adopted_[index];
    domain.row = static_cast<std::uint16_t>(r);
    if (counted) continue;
    domain.entries = rows[r].entries;
    domain.live_bytes = rows[r].live_bytes;
    domain.payload_bytes = rows[r].payload_bytes;
  }
  std::size_t free = 0;
  for (std::size_t d = 0; d < domains_.size(); ++d) {
    if (domains_[d].is(rows[adopted_[d].row])) continue;
    while (rows[free].ns_seed != 0) ++free;
    DomainRow& row = rows[free];
    row.hint_offset = 0;
    row.hint_bytes = 0;
    row.filled_once.store(0, std::memory_order_relaxed);
    row.name_hash = domains_[d].name_hash;
    row.ns_seed = domains_[d].ns_seed;
    adopted_[d].row = static_cast<std::uint16_t>(free);
  }
  queue_up();
}

void Adoption::free_rows() {
  for (std::uint32_t s = 0; s < arena_.segment_count(); ++s) {
    SegmentMeta& row = arena_.meta(s);
    row.writers.store(0, std::memory_order_relaxed);
    const bool holds = use_[s] == Use::Records || use_[s] == Use::Large;
    if (!holds || row.live_bytes.load(std::memory_order_relaxed) != 0) continue;
    for (std::uint32_t next = s; next != SegmentMeta::kNoSegment; next = arena_.meta(next).next) {
      use_[next] = Use::None;
    }
  }
  for (std::uint32_t s = 0; s < arena_.segment_count(); ++s) {
    SegmentMeta& row = arena_.meta(s);
    if (use_[s] != Use::None) {
      arena_.set_domain(s, owner_[s], row.domain_row);
      continue;
    }
    row.state.store(SegmentState::Free, std::memory_order_release);
    row.large = 0;
    row.sequence = 0;
    row.live_bytes.store(0, std::memory_order_relaxed);
  }
  arena_.adopt_free();
}

void Adoption::queue_up() {
  for (std::uint32_t s = 0; s < arena_.segment_count(); ++s) {
    if (use_[s] == Use::None) continue;
    const SegmentMeta& row = arena_.meta(s);
    AdoptedDomain& domain = adopted_[owner_[s]];
    ++domain.segments[row.queue];
    if (use_[s] == Use::Further) continue;
    const bool open = row.state.load(std::memory_order_relaxed) == SegmentState::Open;
    (open ? domain.open : domain.sealed)[row.queue].push_back(s);
    domain.next_sequence = std::max(domain.next_sequence, row.sequence + 1);
  }
  for (AdoptedDomain& domain : adopted_) {
    for (auto& sealed : domain.sealed) {
      std::sort(sealed.begin(), sealed.end(), [&](std::uint32_t a, std::uint32_t b) {
        return arena_.meta(a).sequence < arena_.meta(b).sequence;
      });
    }
  }
}

}  // namespace fc
