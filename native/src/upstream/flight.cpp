#include "upstream/flight.hpp"

#include <iterator>

namespace fc {

FlightTable::Joined FlightTable::join(NamespaceIndex ns, std::string_view key, std::uint64_t hash,
                                      Token token, FetchPriority priority, const Waiter* waiter,
                                      FlightRef& flight) {
  Shard& shard = shard_of(hash);
  const std::lock_guard lock(shard.mutex);
  const auto found = shard.flights.find(KeyOf{ns, key, hash});
  if (found != shard.flights.end()) {
    if (found->second->token == token) {
      flight = found->second;
      if (waiter != nullptr) flight->waiters.push_back(*waiter);
      joined.add();
      return Joined::Existing;
    }
    // Older than a write that this get has seen: its waiters still get its answer, nobody joins.
    shard.flights.erase(found);
  }
  flight = std::make_shared<Flight>();
  flight->ns = ns;
  flight->key.assign(key);
  flight->hash = hash;
  flight->token = token;
  flight->priority = priority;
  flight->line = priority;
  if (waiter != nullptr) flight->waiters.push_back(*waiter);
  shard.flights.emplace(KeyOf{ns, flight->key, hash}, flight);
  started.add();
  return Joined::Started;
}

FlightRef FlightTable::join_existing(NamespaceIndex ns, std::string_view key, std::uint64_t hash,
                                     Token token, const Waiter& waiter) {
  Shard& shard = shard_of(hash);
  const std::lock_guard lock(shard.mutex);
  const auto found = shard.flights.find(KeyOf{ns, key, hash});
  if (found == shard.flights.end() || found->second->token != token) return nullptr;
  found->second->waiters.push_back(waiter);
  joined.add();
  return found->second;
}

void FlightTable::take_waiters(const FlightRef& flight, std::vector<Waiter>& waiters) {
  Shard& shard = shard_of(flight->hash);
  const std::lock_guard lock(shard.mutex);
  if (flight->ended) return;
  std::move(flight->waiters.begin(), flight->waiters.end(), std::back_inserter(waiters));
  flight->waiters.clear();
}

bool FlightTable::end(const FlightRef& flight, std::vector<Waiter>& waiters) {
  Shard& shard = shard_of(flight->hash);
  const std::lock_guard lock(shard.mutex);
  if (flight->ended) return false;
  flight->ended = true;
  ended_.fetch_add(1, std::memory_order_seq_cst);
  const auto found = shard.flights.find(KeyOf{flight->ns, flight->key, flight->hash});
  if (found != shard.flights.end() && found->second == flight) shard.flights.erase(found);
  std::move(flight->waiters.begin(), flight->waiters.end(), std::back_inserter(waiters));
  flight->waiters.clear();
  return true;
}

std::size_t FlightTable::size() const noexcept {
  std::size_t sum = 0;
  for (const Shard& shard : shards_) {
    const std::lock_guard lock(shard.mutex);
    sum += shard.flights.size();
  }
  return sum;
}

}  // namespace fc
