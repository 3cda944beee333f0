#include "upstream/cache_node.hpp"

#include <algorithm>
#include <iterator>

#include "core/hash.hpp"
#include "core/sequence_point.hpp"

namespace fc {
namespace {

// A reply leaves this much before the caller's deadline, so that it arrives in time.
constexpr std::uint64_t kReplyMarginNs = 4'000'000;
constexpr std::uint64_t kReplyMarginShare = 10;  // of the timeout, where that is less

constexpr const char* kStatusNames[kCellStatusCount] = {
    "UNSPECIFIED", "HIT_DRAM",  "HIT_NVM",   "FETCHED",     "SPECULATIVE", "NOT_FOUND",
    "MISS",        "TIMED_OUT", "THROTTLED", "WRONG_SHARD", "ERROR"};

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

CallStatus invalid(std::string message) {
  return {CallStatus::InvalidArgument, std::move(message)};
}

}  // namespace

CacheNode::CacheNode(const NodeConfig& config)
    : config_((config.validate(), config)),
      limits_{config.max_batch_keys, config.engine.max_value_bytes},
      engine_(make_engine(config.engine, clock_)) {
  for (const StoreConfig& store : config_.stores) {
    stores_.push_back(std::make_shared<StoreQueue>(
        store, [this](NamespaceIndex ns) { return std::string_view(namespaces_[ns]->name); },
        [this](std::vector<FlightRef>& flights, FetchAnswer* answer, CellStatus status) {
          deliver(flights, answer, status);
        }));
    by_name_.emplace(store.name, stores_.back().get());
  }
  for (const NamespaceConfig& ns : config_.engine.namespaces) {
    auto link = std::make_unique<NamespaceLink>();
    link->name = ns.name;
    link->seed = namespace_seed(ns.name);
    link->store = ns.store.empty() ? nullptr : by_name_.at(ns.store);
    link->negative_cached = ns.negative_ttl_ms != 0;
    link->fetch_timeout_ms = ns.fetch_timeout_ms;
    namespaces_.push_back(std::move(link));
  }
  deadlines_ = std::make_unique<Deadlines>([this] {
    for (const auto& store : stores_) store->expire(monotonic_ns());
  });
}

CacheNode::~CacheNode() {
  stop();
}

void CacheNode::stop() {
  if (stopped_.exchange(true)) return;
  for (const auto& store : stores_) store->stop();
  std::vector<std::shared_ptr<PendingGet>> waiting;
  {
    const std::lock_guard lock(pending_mutex_);
    for (const auto& [raw, weak] : pending_gets_) {
      if (std::shared_ptr<PendingGet> get = weak.lock()) waiting.push_back(std::move(get));
    }
  }
  for (const auto& get : waiting) get->expire();
  deadlines_->stop();
}

CallStatus CacheNode::resolve(const wire::KeyColumn& column, NamespaceIndex& ns,
                              DomainIndex& domain) const {
  ns = engine_->find_namespace(column.ns);
  if (ns == kNoNamespace) {
    return {CallStatus::NotFound,
            "unknown namespace '" + std::string(column.ns.substr(0, 64)) + "'"};
  }
  domain = kNoDomain;
  if (!column.domain.empty()) {
    domain = engine_->find_domain(ns, column.domain);
    if (domain == kNoDomain) {
      return {CallStatus::NotFound, "namespace '" + std::string(column.ns) + "' has no domain '" +
                                        std::string(column.domain.substr(0, 64)) + "'"};
    }
  }
  return {};
}

// ---- reads
// ---------------------------------------------------------------------------------------

void CacheNode::batch_get(RequestBytes bytes, std::uint64_t timeout_ms, ReplyDone done) {
  const std::uint64_t started = monotonic_ns();
  requests_get_.add();
  const auto get = std::make_shared<PendingGet>(
      std::move(bytes), config_.max_reply_bytes, [this](const PendingGet& ended) { count(ended); },
      std::move(done));
  get->started_ns = started;
  const auto refuse = [&](CallStatus status) {
    refused_.add();
    get->refuse(std::move(status));
  };
  if (std::string error = wire::decode(get->bytes().bytes, limits_, get->request); !error.empty()) {
    return refuse(invalid(std::move(error)));
  }
  if (stopped_.load(std::memory_order_relaxed)) {
    return refuse({CallStatus::Unavailable, "the node is stopping"});
  }
  const std::size_t columns = get->request.columns.size();
  std::vector<DomainIndex> hints(columns, kNoDomain);
  get->columns.resize(columns);
  std::uint64_t fetch_timeout_ms = 0;
  for (std::size_t c = 0; c < columns; ++c) {
    PendingGet::Column& column = get->columns[c];
    CallStatus status = resolve(get->request.columns[c], column.ns, hints[c]);
    if (!status.ok()) return refuse(std::move(status));
    fetch_timeout_ms = std::max(fetch_timeout_ms, namespaces_[column.ns]->fetch_timeout_ms);
  }
  std::vector<std::vector<Absent>> absent(columns);
  std::vector<std::vector<Absent>> refresh(columns);
  const std::uint64_t ended_before = flights_.ended();
  look_up(*get, absent, refresh);
  engine_seconds_.record_ns(monotonic_ns() - started);
  FC_SEQUENCE_POINT("node:looked_up");

  std::size_t waiting = 0;
  if (!get->request.cache_only) {
    bool fetchable = false;
    for (std::size_t c = 0; c < columns; ++c) {
      fetchable |= !absent[c].empty() && namespaces_[get->columns[c].ns]->store != nullptr;
    }
    if (fetchable) {
      if (pending_.fetch_add(1, std::memory_order_relaxed) >= config_.max_pending_batches) {
        pending_.fetch_sub(1, std::memory_order_relaxed);
        return refuse({CallStatus::ResourceExhausted,
                       "more than " + std::to_string(config_.max_pending_batches) +
                           " batches wait for the store (limits.max_pending_batches)"});
      }
      get->counted_pending = true;
      {
        const std::lock_guard lock(pending_mutex_);
        pending_gets_.emplace(get.get(), get);
      }
      const std::uint64_t wait_ns = (timeout_ms != 0 ? timeout_ms : fetch_timeout_ms) * 1'000'000;
      const std::uint64_t margin = std::min(kReplyMarginNs, wait_ns / kReplyMarginShare);
      waiting = ask_stores(get, hints, absent, ended_before);
      if (waiting != 0) deadlines_->add(started + wait_ns - margin, get);
    }
  }
  for (std::size_t c = 0; c < columns; ++c) {
    if (!refresh[c].empty()) {
      refresh_ahead(get->columns[c].ns, get->request.columns[c].keys, refresh[c]);
    }
  }
  get->start(waiting);
}

void CacheNode::look_up(PendingGet& get, std::vector<std::vector<Absent>>& absent,
                        std::vector<std::vector<Absent>>& refresh) {
  std::uint64_t left = config_.max_reply_bytes;
  for (std::size_t c = 0; c < get.columns.size(); ++c) {
    const std::vector<std::string_view>& keys = get.request.columns[c].keys;
    PendingGet::Column& column = get.columns[c];
    column.statuses.resize(keys.size());
    column.lengths.resize(keys.size());
    const bool has_store = namespaces_[column.ns]->store != nullptr;
    GetColumn lookup;
    lookup.ns = column.ns;
    lookup.keys = keys;
    lookup.statuses = column.statuses;
    lookup.lengths = column.lengths;
    lookup.values = &column.values;
    lookup.max_value_bytes = left;
    if (has_store && !get.request.cache_only) {
      lookup.absent = &absent[c];
      lookup.refresh = &refresh[c];
    }
    engine_->get(lookup);
    left -= column.values.size();
  }
}

std::size_t CacheNode::ask_stores(const std::shared_ptr<PendingGet>& get,
                                  const std::vector<DomainIndex>& hints,
                                  const std::vector<std::vector<Absent>>& absent,
                                  std::uint64_t ended_before) {
  std::size_t waiting = 0;
  // Every cell that waits is marked before the first flight can answer one.
  for (std::size_t c = 0; c < absent.size(); ++c) {
    for (const Absent& cell : absent[c]) {
      get->columns[c].statuses[cell.position] = CellStatus::Unspecified;
    }
    waiting += absent[c].size();
  }
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
      if (flights_.join(ns, key, hash_key(link.seed, key).low, cell.token, &waiter, flight) ==
          FlightTable::Joined::Started) {
        flight->domain_hint = hints[c];
        started.push_back(std::move(flight));
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
    store->push(FetchPriority::Live, flights);
    for (const FlightRef& refused : flights) end_flight(refused, CellStatus::Throttled, {});
  }
  return waiting;
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
    if (flights_.join(ns, key, hash_key(link.seed, key).low, cell.token, nullptr, flight) ==
        FlightTable::Joined::Started) {
      flight->priority = FetchPriority::Background;
      refreshes_.add();
      started.push_back(std::move(flight));
    }
  }
  if (started.empty()) return;
  link.store->push(FetchPriority::Background, started);
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

void CacheNode::count(const PendingGet& get) {
  for (const PendingGet::Column& column : get.columns) {
    std::array<std::uint64_t, kCellStatusCount> cells{};
    for (const CellStatus status : column.statuses) ++cells[static_cast<std::size_t>(status)];
    NamespaceLink& link = *namespaces_[column.ns];
    for (std::size_t s = 0; s < kCellStatusCount; ++s) {
      if (cells[s] != 0) link.cells[s].add(cells[s]);
    }
  }
  const std::uint64_t spent = monotonic_ns() - get.started_ns;
  get_seconds_.record_ns(spent);
  if (get.counted_pending) {
    wait_seconds_.record_ns(spent);
    pending_.fetch_sub(1, std::memory_order_relaxed);
    const std::lock_guard lock(pending_mutex_);
    pending_gets_.erase(const_cast<PendingGet*>(&get));
  }
}

std::shared_ptr<FetchBatch> CacheNode::take_fetch(std::string_view store, std::uint64_t wait_ms) {
  const auto found = by_name_.find(std::string(store));
  return found == by_name_.end() ? nullptr : found->second->take(wait_ms);
}

// ---- writes
// --------------------------------------------------------------------------------------

CallStatus CacheNode::batch_put(RequestBytes bytes, std::vector<Buffer>& reply) {
  const std::uint64_t started = monotonic_ns();
  requests_put_.add();
  wire::PutRequest request;
  std::string error = wire::decode(bytes.bytes, limits_, request);
  if (!error.empty()) {
    refused_.add();
    return invalid(std::move(error));
  }
  // The whole request is checked before any of it is done.
  std::vector<std::pair<NamespaceIndex, DomainIndex>> targets(request.columns.size());
  for (std::size_t c = 0; c < request.columns.size(); ++c) {
    CallStatus status = resolve(request.columns[c].keys, targets[c].first, targets[c].second);
    if (!status.ok()) {
      refused_.add();
      return status;
    }
  }
  std::vector<std::vector<WriteStatus>> statuses(request.columns.size());
  std::vector<PutItem> items;
  for (std::size_t c = 0; c < request.columns.size(); ++c) {
    const wire::PutColumn& column = request.columns[c];
    const std::size_t count = column.keys.keys.size();
    items.assign(count, {});
    statuses[c].resize(count);
    for (std::size_t i = 0; i < count; ++i) {
      items[i].key = column.keys.keys[i];
      items[i].value = column.values[i];
      items[i].domain = targets[c].second;
      if (!column.ttl_ms.empty())
        items[i].ttl_ms = column.ttl_ms[column.ttl_ms.size() == 1 ? 0 : i];
    }
    engine_->put(targets[c].first, items, statuses[c]);
  }
  reply = wire::encode_write_reply(statuses);
  put_seconds_.record_ns(monotonic_ns() - started);
  return {};
}

CallStatus CacheNode::batch_delete(RequestBytes bytes, std::vector<Buffer>& reply) {
  requests_delete_.add();
  wire::DeleteRequest request;
  std::string error = wire::decode(bytes.bytes, limits_, request);
  if (!error.empty()) {
    refused_.add();
    return invalid(std::move(error));
  }
  std::vector<NamespaceIndex> targets(request.columns.size());
  for (std::size_t c = 0; c < request.columns.size(); ++c) {
    DomainIndex ignored = kNoDomain;  // a key has one value in its namespace, wherever it lies
    CallStatus status = resolve(request.columns[c], targets[c], ignored);
    if (!status.ok()) {
      refused_.add();
      return status;
    }
  }
  std::vector<std::vector<WriteStatus>> statuses(request.columns.size());
  for (std::size_t c = 0; c < request.columns.size(); ++c) {
    statuses[c].resize(request.columns[c].keys.size());
    engine_->erase(targets[c], request.columns[c].keys, statuses[c]);
  }
  reply = wire::encode_write_reply(statuses);
  return {};
}

// ---- counters
// ------------------------------------------------------------------------------------

void CacheNode::visit(CounterVisitor& visitor) const {
  engine_->visit(visitor);
  for (const auto& link : namespaces_) {
    for (std::size_t s = 1; s < kCellStatusCount; ++s) {
      const Label labels[] = {{"namespace", link->name}, {"status", kStatusNames[s]}};
      visitor.counter("feature_cache_cells_total", "Cells of replies, by what became of them.",
                      labels, link->cells[s].get());
    }
  }
  for (const auto& store : stores_) store->visit(visitor);
  const auto requests = [&](const char* method, const Counter& counter) {
    const Label labels[] = {{"method", method}};
    visitor.counter("feature_cache_requests_total", "Calls, by method.", labels, counter.get());
  };
  requests("BatchGet", requests_get_);
  requests("BatchPut", requests_put_);
  requests("BatchDelete", requests_delete_);
  visitor.counter("feature_cache_requests_refused_total",
                  "Calls that were malformed or over a limit.", {}, refused_.get());
  visitor.counter("feature_cache_flights_started_total",
                  "Fetches of single keys that were started.", {}, flights_.started.get());
  visitor.counter("feature_cache_flights_joined_total", "Misses that joined a fetch under way.", {},
                  flights_.joined.get());
  visitor.gauge("feature_cache_flights", "Fetches of single keys under way.", {},
                static_cast<double>(flights_.size()));
  visitor.gauge("feature_cache_pending_batches", "BatchGets that wait for a store.", {},
                pending_.load(std::memory_order_relaxed));
  visitor.counter("feature_cache_refreshes_total", "Hot keys refreshed before they expired.", {},
                  refreshes_.get());
  visitor.counter("feature_cache_refreshes_denied_total", "Refreshes that the budget denied.", {},
                  refreshes_denied_.get());
  visitor.counter("feature_cache_install_void_total",
                  "Fetched values not kept: a write came in between.", {}, install_void_.get());
  visitor.counter("feature_cache_install_rejected_total", "Fetched values that found no room.", {},
                  install_rejected_.get());
  const auto stage = [&](const char* name, const LatencyHistogram& histogram) {
    const Label labels[] = {{"stage", name}};
    histogram.visit(visitor, "feature_cache_stage_seconds", "Time in a stage of a call.", labels);
  };
  stage("batch_get", get_seconds_);
  stage("engine_get", engine_seconds_);
  stage("batch_get_with_fetch", wait_seconds_);
  stage("batch_put", put_seconds_);
}

std::unique_ptr<Node> make_node(const NodeConfig& config) {
  return std::make_unique<CacheNode>(config);
}

}  // namespace fc
