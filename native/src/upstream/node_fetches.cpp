// The half of the node that asks stores: flights that start, are joined, and bring their answers.

#include <algorithm>
#include <iterator>

#include "core/hash.hpp"
#include "core/sequence_point.hpp"
#include "upstream/cache_node.hpp"

namespace fc {
namespace {

CellStatus status_of(const FetchedValue& value) noexcept {
  switch (value.kind) {
    case FetchedValue::Kind::Found:
      return CellStatus::Fetched;
    case FetchedValue::Kind::NotFound:
      return CellStatus::NotFound;
    case FetchedValue::Kind::Garbled:
      break;
  }
  return CellStatus::Error;
}

}  // namespace

void CacheNode::ask_stores(const std::shared_ptr<PendingGet>& get,
                           const std::vector<DomainIndex>& hints,
                           const std::vector<std::vector<Absent>>& absent,
                           std::uint64_t ended_before, FetchPriority priority) {
  std::vector<std::pair<StoreQueue*, std::vector<FlightRef>>> by_store;
  for (std::size_t c = 0; c < absent.size(); ++c) {
    if (absent[c].empty()) continue;
    const NamespaceIndex ns = get->columns[c].ns;
    NamespaceLink& link = *namespaces_[ns];
    std::vector<FlightRef> started;
    started.reserve(absent[c].size());
    for (const Absent& cell : absent[c]) {
      const std::string_view key = get->request.columns[c].keys[cell.position];
      const Waiter waiter{get, static_cast<std::uint32_t>(c), cell.position};
      FlightRef flight;
      if (flights_.join(ns, key, hash_key(link.seed, key).low, cell.token, priority, &waiter,
                        flight) == FlightTable::Joined::Started) {
        flight->domain_hint = hints[c];
        if (!get->columns[c].asked.empty()) flight->asked = get->columns[c].asked[cell.position];
        started.push_back(std::move(flight));
      } else if (flight->priority > priority) {
        link.store->raise(flight, priority);
      }
    }
    FC_SEQUENCE_POINT("node:flights_started");
    if (flights_.ended() != ended_before) drop_already_cached(ns, started);
    // All columns of a store go to it together: one call may answer several namespaces.
    const auto found = std::find_if(by_store.begin(), by_store.end(),
                                    [&](const auto& entry) { return entry.first == link.store; });
    if (found == by_store.end()) {
      by_store.emplace_back(link.store, std::move(started));
    } else {
      std::move(started.begin(), started.end(), std::back_inserter(found->second));
    }
  }
  for (auto& [store, flights] : by_store) {
    store->push(flights);
    for (const FlightRef& refused : flights) end_flight(refused, CellStatus::Throttled, {});
  }
}

// Ends the flights whose key has come into the cache since it was found absent.
void CacheNode::drop_already_cached(NamespaceIndex ns, std::vector<FlightRef>& flights) {
  if (flights.empty()) return;
  std::vector<std::string_view> keys;
  keys.reserve(flights.size());
  for (const FlightRef& flight : flights) keys.push_back(flight->key);
  std::vector<CellStatus> statuses(keys.size());
  std::vector<std::uint32_t> lengths(keys.size());
  auto values = std::make_shared<Buffer>();
  GetColumn again;
  again.ns = ns;
  again.keys = keys;
  again.statuses = statuses;
  again.lengths = lengths;
  again.values = values.get();
  again.max_value_bytes = config_.max_reply_bytes;
  again.quiet = true;
  engine_->get(again);
  std::uint64_t at = 0;
  std::size_t kept = 0;
  for (std::size_t i = 0; i < flights.size(); ++i) {
    if (statuses[i] == CellStatus::HitDram || statuses[i] == CellStatus::HitNvm ||
        statuses[i] == CellStatus::NotFound) {
      end_flight(flights[i], statuses[i], {values, at, lengths[i]});
      at += lengths[i];
    } else {
      flights[kept++] = std::move(flights[i]);
    }
  }
  flights.resize(kept);
}

bool CacheNode::take_refresh_budget() {
  const std::lock_guard lock(refresh_mutex_);
  const std::uint64_t now = monotonic_ns();
  const auto rate = static_cast<double>(config_.refresh_keys_per_second);
  refresh_tokens_ =
      std::min(rate, refresh_tokens_ + rate * static_cast<double>(now - refresh_filled_ns_) * 1e-9);
  refresh_filled_ns_ = now;
  if (refresh_tokens_ < 1.0) return false;
  refresh_tokens_ -= 1.0;
  return true;
}

void CacheNode::refresh_ahead(NamespaceIndex ns, const std::vector<std::string_view>& keys,
                              const std::vector<Absent>& hot) {
  NamespaceLink& link = *namespaces_[ns];
  std::vector<FlightRef> started;
  for (const Absent& cell : hot) {
    if (!take_refresh_budget()) {
      refreshes_denied_.add();
      continue;
    }
    const std::string_view key = keys[cell.position];
    FlightRef flight;
    if (flights_.join(ns, key, hash_key(link.seed, key).low, cell.token, FetchPriority::Background,
                      nullptr, flight) == FlightTable::Joined::Started) {
      refreshes_.add();
      started.push_back(std::move(flight));
    }
  }
  if (started.empty()) return;
  link.store->push(started);
  for (const FlightRef& refused : started) end_flight(refused, CellStatus::Throttled, {});
}

// ---- answers of the stores
// -----------------------------------------------------------------------

void CacheNode::deliver(std::vector<FlightRef>& flights, FetchAnswer* answer, CellStatus status) {
  if (answer == nullptr) {
    for (const FlightRef& flight : flights) end_flight(flight, status, {});
    return;
  }
  const auto bytes = std::make_shared<const Buffer>(std::move(answer->bytes));
  const auto answer_all = [&](const std::vector<Waiter>& waiters, const FetchedValue& value) {
    for (const Waiter& waiter : waiters) {
      waiter.get->answer(waiter.column, waiter.position, status_of(value),
                         value.kind == FetchedValue::Kind::Found
                             ? SharedValue{bytes, value.offset, value.size}
                             : SharedValue{});
    }
  };
  // Who waits is answered first. The flights end after their values are in the cache: until then
  // a get joins them, from then on it finds the value.
  std::vector<Waiter> waiters;
  for (std::size_t i = 0; i < flights.size(); ++i) {
    waiters.clear();
    flights_.take_waiters(flights[i], waiters);
    answer_all(waiters, answer->values[i]);
  }
  FC_SEQUENCE_POINT("node:answered");
  for (std::size_t begin = 0; begin < flights.size();) {
    std::size_t end = begin + 1;
    while (end < flights.size() && flights[end]->ns == flights[begin]->ns) ++end;
    install(flights, begin, end, *answer, *bytes);
    begin = end;
  }
  FC_SEQUENCE_POINT("node:installed");
  for (std::size_t i = 0; i < flights.size(); ++i) {
    waiters.clear();
    flights_.end(flights[i], waiters);
    answer_all(waiters, answer->values[i]);
  }
}

void CacheNode::install(const std::vector<FlightRef>& flights, std::size_t begin, std::size_t end,
                        const FetchAnswer& answer, const Buffer& bytes) {
  const NamespaceIndex ns = flights[begin]->ns;
  const NamespaceLink& link = *namespaces_[ns];
  std::vector<PutItem> items;
  std::vector<Token> tokens;
  items.reserve(end - begin);
  tokens.reserve(end - begin);
  for (std::size_t i = begin; i < end; ++i) {
    const FetchedValue& value = answer.values[i];
    if (value.kind == FetchedValue::Kind::Garbled) continue;
    const bool negative = value.kind == FetchedValue::Kind::NotFound;
    if (negative && !link.negative_cached) continue;
    PutItem item;
    item.key = flights[i]->key;
    if (value.size != 0) {
      item.value = {reinterpret_cast<const char*>(bytes.data()) + value.offset, value.size};
    }
    item.ttl_ms = negative ? 0 : value.ttl_ms;
    item.negative = negative;
    item.asked = flights[i]->asked;
    // The caller's hint, the store's, then the namespace's rules (by kNoDomain).
    item.domain = flights[i]->domain_hint;
    if (item.domain == kNoDomain && !value.domain_hint.empty()) {
      item.domain = engine_->find_domain(ns, value.domain_hint);
    }
    items.push_back(item);
    tokens.push_back(flights[i]->token);
  }
  std::vector<InstallStatus> statuses(items.size());
  engine_->install(ns, items, tokens, statuses);
  for (const InstallStatus status : statuses) {
    if (status == InstallStatus::TokenVoid) install_void_.add();
    if (status == InstallStatus::Rejected) install_rejected_.add();
  }
}

void CacheNode::end_flight(const FlightRef& flight, CellStatus status, const SharedValue& value) {
  std::vector<Waiter> waiters;
  if (!flights_.end(flight, waiters)) return;
  for (const Waiter& waiter : waiters) {
    waiter.get->answer(waiter.column, waiter.position, status, value);
  }
}

}  // namespace fc
