#include "feature_cache/warm_plan.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "core/check.hpp"
#include "core/hash.hpp"
#include "request_log/reader.hpp"

namespace fc {
namespace {

constexpr std::size_t kKeyChunkBytes = std::size_t{1} << 20;
constexpr std::size_t kHeldBatch = 4096;
constexpr unsigned kAgainMax = 2;
constexpr unsigned kAskedMax = 15;
constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();
constexpr std::uint32_t kFirstSlots = 1u << 16;  // of the table; a power of two

// What a place of a file's dictionary stands for: an entry, or why it is none.
enum Skipped : std::uint32_t {
  kUnknownNamespace = kNone,
  kNotFetchable = kNone - 1,
  kHashed = kNone - 2,
  kNotOwned = kNone - 3,
  kOverLimit = kNone - 4,
  kFirstSkipped = kOverLimit,
};

}  // namespace

struct WarmPlan::State {
  struct Entry {
    const char* key;
    float weight;
    std::uint16_t key_bytes;
    std::uint16_t ns;
    std::uint16_t domain;  // of the namespace's; where the value will go, as far as is known
    std::uint16_t times;   // in the logs, saturating
    std::uint8_t hinted;   // the domain was hinted
    std::uint8_t dropped;
    std::uint8_t again;

    std::string_view view() const noexcept { return {key, key_bytes}; }
  };

  std::vector<Namespace> namespaces;
  std::vector<std::uint64_t> seeds;
  std::uint64_t max_keys;
  std::uint32_t shard_count = 0;
  std::vector<bool> owned;  // by shard; empty: all

  std::vector<Entry> entries;
  std::vector<std::uint32_t> table;  // entry numbers by hash; kNone: free
  std::vector<std::unique_ptr<char[]>> chunks;
  std::size_t chunk_left = 0;
  char* chunk_at = nullptr;
  double total_weight = 0;

  std::vector<std::uint32_t> order;
  std::size_t next = 0;
  std::vector<std::uint32_t> back;  // again()
  std::size_t next_back = 0;
  std::uint64_t dropped = 0;

  std::uint32_t* slot_of(std::uint64_t hash, std::uint16_t ns, std::string_view key) noexcept {
    const std::size_t mask = table.size() - 1;
    for (std::size_t at = hash & mask;; at = (at + 1) & mask) {
      const std::uint32_t number = table[at];
      if (number == kNone) return &table[at];
      const Entry& entry = entries[number];
      if (entry.ns == ns && entry.view() == key) return &table[at];
    }
  }
  void grow() {
    std::vector<std::uint32_t> larger(table.size() * 2, kNone);
    const std::size_t mask = larger.size() - 1;
    for (std::uint32_t number = 0; number < entries.size(); ++number) {
      std::size_t at = hash_key(seeds[entries[number].ns], entries[number].view()).low & mask;
      while (larger[at] != kNone) at = (at + 1) & mask;
      larger[at] = number;
    }
    table = std::move(larger);
  }
  const char* keep(std::string_view key) {
    if (chunk_left < key.size()) {
      chunks.push_back(std::make_unique<char[]>(kKeyChunkBytes));
      chunk_at = chunks.back().get();
      chunk_left = kKeyChunkBytes;
    }
    char* const at = chunk_at;
    std::memcpy(at, key.data(), key.size());
    chunk_at += key.size();
    chunk_left -= key.size();
    return at;
  }
  std::uint32_t enter(std::uint16_t ns, std::uint16_t domain, bool hinted, std::string_view key,
                      Added& added) {
    const KeyHash hash = hash_key(seeds[ns], key);
    if (!owned.empty() && !owned[shard_of(hash.high, shard_count)]) return kNotOwned;
    std::uint32_t* slot = slot_of(hash.low, ns, key);
    if (*slot != kNone) return *slot;
    if (entries.size() >= max_keys) return kOverLimit;
    const auto number = static_cast<std::uint32_t>(entries.size());
    entries.push_back(
        {keep(key), 0, static_cast<std::uint16_t>(key.size()), ns, domain, 0, hinted, 0, 0});
    *slot = number;
    ++added.new_keys;
    if (entries.size() * 2 > table.size()) grow();
    return number;
  }
  WarmKey warm_key(const Entry& entry) const noexcept {
    const Namespace& ns = namespaces[entry.ns];
    return {
        entry.ns,
        entry.hinted != 0 ? static_cast<DomainIndex>(ns.first_domain + entry.domain) : kNoDomain,
        entry.view(), static_cast<std::uint8_t>(std::clamp<unsigned>(entry.times, 1, kAskedMax))};
  }
  bool left(std::uint32_t number) const noexcept { return entries[number].dropped == 0; }
};

WarmPlan::WarmPlan(std::vector<Namespace> namespaces, std::uint64_t max_keys)
    : state_(std::make_unique<State>()) {
  State& state = *state_;
  state.namespaces = std::move(namespaces);
  for (const Namespace& ns : state.namespaces) state.seeds.push_back(namespace_seed(ns.name));
  state.max_keys = std::min<std::uint64_t>(max_keys, kFirstSkipped);
  state.table.assign(kFirstSlots, kNone);
}

WarmPlan::~WarmPlan() = default;

void WarmPlan::own(std::uint32_t shard_count, std::span<const std::uint32_t> shards) {
  std::vector<bool> owned(shard_count);
  for (const std::uint32_t shard : shards) {
    if (shard >= shard_count) {
      throw std::invalid_argument("shard " + std::to_string(shard) + " of " +
                                  std::to_string(shard_count));
    }
    owned[shard] = true;
  }
  state_->shard_count = shard_count;
  state_->owned = std::move(owned);
}

LogFault WarmPlan::add(std::span<const std::uint8_t> file, double weight, Added& added) {
  State& state = *state_;
  request_log::Reader reader;
  if (const LogFault fault = reader.open(file); fault != LogFault::None) return fault;
  // What each kind of the file is here.
  struct Here {
    std::uint32_t skipped = 0;  // else a Skipped
    std::uint16_t ns = 0;
    std::uint16_t domain = 0;
    bool hinted = false;
  };
  std::vector<Here> kinds;
  for (const request_log::Kind& kind : reader.description().kinds) {
    const auto& logged = reader.description().namespaces[kind.ns];
    Here& here = kinds.emplace_back();
    const auto found = std::find_if(state.namespaces.begin(), state.namespaces.end(),
                                    [&](const Namespace& ns) { return ns.name == logged.name; });
    if (found == state.namespaces.end()) {
      here.skipped = kUnknownNamespace;
    } else if (logged.privacy == KeyPrivacy::Hashed) {
      here.skipped = kHashed;
    } else if (!found->fetchable) {
      here.skipped = kNotFetchable;
    }
    if (here.skipped != 0) continue;
    here.ns = static_cast<std::uint16_t>(found - state.namespaces.begin());
    here.domain = static_cast<std::uint16_t>(found->default_domain);
    for (std::size_t d = 0; d < found->domains.size() && !kind.domain.empty(); ++d) {
      if (found->domains[d].name != kind.domain) continue;
      here.domain = static_cast<std::uint16_t>(d);
      here.hinted = true;
    }
  }
  std::vector<std::uint32_t> dictionary;  // entry numbers, or Skipped
  request_log::Block block;
  for (;;) {
    bool more = false;
    if (const LogFault fault = reader.next(block, more); fault != LogFault::None) return fault;
    if (!more) break;
    if (block.new_dictionary) dictionary.clear();
    std::size_t next_key = 0;
    const std::uint32_t* place = block.places.data();
    for (const request_log::Block::Run& run : block.runs) {
      const Here& here = kinds[run.kind];
      for (std::uint32_t i = 0; i < run.keys; ++i, ++place) {
        if (*place == dictionary.size()) {
          const std::string_view key = block.new_keys[next_key++];
          dictionary.push_back(here.skipped != 0
                                   ? here.skipped
                                   : state.enter(here.ns, here.domain, here.hinted, key, added));
        }
        const std::uint32_t number = dictionary[*place];
        if (number >= kFirstSkipped) {
          switch (number) {
            case kUnknownNamespace:
              ++added.unknown_namespace;
              break;
            case kNotFetchable:
              ++added.not_fetchable;
              break;
            case kHashed:
              ++added.hashed;
              break;
            case kNotOwned:
              ++added.not_owned;
              break;
            default:
              ++added.over_limit;
              state.total_weight += weight;  // it is this node's traffic
          }
          continue;
        }
        State::Entry& entry = state.entries[number];
        entry.weight += static_cast<float>(weight);
        state.total_weight += weight;
        if (entry.times != std::numeric_limits<std::uint16_t>::max()) ++entry.times;
      }
    }
    added.keys += block.places.size();
  }
  return LogFault::None;
}

std::uint64_t WarmPlan::drop_domain(NamespaceIndex ns, std::uint32_t domain) {
  State& state = *state_;
  std::uint64_t count = 0;
  for (State::Entry& entry : state.entries) {
    if (entry.ns != ns || entry.domain != domain || entry.dropped != 0) continue;
    entry.dropped = 1;
    ++count;
  }
  state.dropped += count;
  return count;
}

std::uint64_t WarmPlan::drop_held(const Held& held) {
  State& state = *state_;
  std::vector<WarmKey> keys;
  std::vector<std::uint32_t> numbers;
  std::vector<std::uint8_t> flags;
  std::uint64_t count = 0;
  const auto probe = [&] {
    flags.assign(keys.size(), 0);
    held(keys, flags);
    for (std::size_t i = 0; i < keys.size(); ++i) {
      if (flags[i] == 0) continue;
      state.entries[numbers[i]].dropped = 1;
      ++count;
    }
    keys.clear();
    numbers.clear();
  };
  for (std::uint32_t number = 0; number < state.entries.size(); ++number) {
    if (!state.left(number)) continue;
    keys.push_back(state.warm_key(state.entries[number]));
    numbers.push_back(number);
    if (keys.size() == kHeldBatch) probe();
  }
  probe();
  state.dropped += count;
  return count;
}

void WarmPlan::order(std::uint64_t realtime_ttl_ms) {
  State& state = *state_;
  const auto ttl = [&](const State::Entry& entry) {
    const std::vector<Domain>& domains = state.namespaces[entry.ns].domains;
    const std::uint64_t ms = entry.domain < domains.size() ? domains[entry.domain].ttl_ms : 0;
    return ms == 0 ? std::numeric_limits<std::uint64_t>::max() : ms;
  };
  state.order.clear();
  state.next = 0;
  state.back.clear();
  state.next_back = 0;
  for (std::uint32_t number = 0; number < state.entries.size(); ++number) {
    if (state.left(number)) state.order.push_back(number);
  }
  std::stable_sort(state.order.begin(), state.order.end(), [&](std::uint32_t a, std::uint32_t b) {
    const State::Entry& first = state.entries[a];
    const State::Entry& second = state.entries[b];
    const std::uint64_t first_ttl = ttl(first);
    const std::uint64_t second_ttl = ttl(second);
    const bool first_late = first_ttl < realtime_ttl_ms;
    const bool second_late = second_ttl < realtime_ttl_ms;
    if (first_late != second_late) return second_late;
    if (first.weight != second.weight) return first.weight > second.weight;
    return first_ttl > second_ttl;
  });
}

std::vector<WarmKey> WarmPlan::take(std::size_t most) {
  State& state = *state_;
  std::vector<WarmKey> keys;
  keys.reserve(std::min(most, state.order.size() - state.next));
  while (keys.size() < most) {
    std::uint32_t number = kNone;
    if (state.next < state.order.size()) {
      number = state.order[state.next++];
    } else if (state.next_back < state.back.size()) {
      number = state.back[state.next_back++];
    } else {
      break;
    }
    if (state.left(number)) keys.push_back(state.warm_key(state.entries[number]));
  }
  return keys;
}

bool WarmPlan::again(const WarmKey& key) {
  State& state = *state_;
  if (key.ns >= state.namespaces.size()) return false;
  const std::uint64_t hash = hash_key(state.seeds[key.ns], key.key).low;
  const std::uint32_t number = *state.slot_of(hash, key.ns, key.key);
  if (number == kNone || state.entries[number].again == kAgainMax) return false;
  ++state.entries[number].again;
  state.back.push_back(number);
  return true;
}

std::uint64_t WarmPlan::keys() const noexcept {
  return state_->entries.size() - state_->dropped;
}

std::uint64_t WarmPlan::keys_left() const noexcept {
  return state_->order.size() - state_->next + state_->back.size() - state_->next_back;
}

double WarmPlan::total_weight() const noexcept {
  return state_->total_weight;
}

double WarmPlan::held_share(const Held& held, std::size_t sample) const {
  const State& state = *state_;
  if (state.total_weight <= 0 || sample == 0) return 0;
  double known_weight = 0;
  for (const State::Entry& entry : state.entries) known_weight += entry.weight;
  const bool all = state.entries.size() <= sample;
  // Steps through the weights: a key comes as often as a step falls into its weight.
  const double step = known_weight / static_cast<double>(sample);
  double at = step / 2;
  double passed = 0;
  double probed = 0;
  double found = 0;
  std::vector<WarmKey> keys;
  std::vector<double> weights;
  std::vector<std::uint8_t> flags;
  const auto probe = [&] {
    flags.assign(keys.size(), 0);
    held(keys, flags);
    for (std::size_t i = 0; i < keys.size(); ++i) {
      probed += weights[i];
      if (flags[i] != 0) found += weights[i];
    }
    keys.clear();
    weights.clear();
  };
  for (const State::Entry& entry : state.entries) {
    double weight = entry.weight;
    if (!all) {
      passed += entry.weight;
      weight = 0;
      for (; at < passed; at += step) weight += step;
      if (weight == 0) continue;
    }
    keys.push_back(state.warm_key(entry));
    weights.push_back(weight);
    if (keys.size() == kHeldBatch) probe();
  }
  probe();
  return probed > 0 ? found / probed * known_weight / state.total_weight : 0;
}

}  // namespace fc
