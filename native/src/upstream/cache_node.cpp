#include "upstream/cache_node.hpp"

#include <algorithm>

#include "core/hash.hpp"
#include "core/sequence_point.hpp"
#include "upstream/nvm_reads.hpp"

namespace fc {
namespace {

// A reply leaves this much before the caller's deadline, so that it arrives in time.
constexpr std::uint64_t kReplyMarginNs = 4'000'000;
constexpr std::uint64_t kReplyMarginShare = 10;  // of the timeout, where that is less

constexpr const char* kStopping = "the node is stopping";

constexpr const char* kStatusNames[kCellStatusCount] = {
    "UNSPECIFIED", "HIT_DRAM",  "HIT_NVM",   "FETCHED",     "SPECULATIVE", "NOT_FOUND",
    "MISS",        "TIMED_OUT", "THROTTLED", "WRONG_SHARD", "ERROR"};

CallStatus invalid(std::string message) {
  return {CallStatus::InvalidArgument, std::move(message)};
}

// A root without a hot tier.
bool keeps_nothing(const NodeConfig& config) {
  return config.root.enabled && config.engine.memory_bytes == 0;
}

}  // namespace

CacheNode::CacheNode(const NodeConfig& config, std::vector<std::shared_ptr<NvmDevice>> devices,
                     RecoveryProgress* progress, std::shared_ptr<LeafConnector> leaves)
    : config_((config.validate(), config)),
      limits_{config.max_batch_keys, config.engine.max_value_bytes},
      leaf_(config.leaf.enabled ? std::make_unique<LeafShards>(config.leaf) : nullptr),
      engine_(keeps_nothing(config)
                  ? make_empty_engine(config.engine)
                  : make_engine(config.engine, clock_, true, std::move(devices), progress)) {
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
    if (ns.speculative.enabled) {
      link->speculation = std::make_unique<Speculation>(ns.speculative.budget);
    }
    namespaces_.push_back(std::move(link));
  }
  if (config_.record.enabled()) {
    recorder_ = std::make_unique<request_log::Recorder>(config_.record, config_.engine.namespaces);
  }
  deadlines_ = std::make_unique<Deadlines>([this] {
    for (const auto& store : stores_) store->expire(monotonic_ns());
  });
  if (!config.root.enabled) return;
  std::vector<std::uint64_t> seeds;
  for (const auto& link : namespaces_) seeds.push_back(link->seed);
  LeafUpstream::Installer installer;
  if (!keeps_nothing(config)) {
    installer = [this](const PendingGet& get, std::span<const LeafUpstream::Install> values) {
      install_from_leaves(get, values);
    };
  }
  leaves_ = std::make_unique<LeafUpstream>(config.root, std::move(seeds), std::move(leaves),
                                           *deadlines_, std::move(installer));
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
  if (leaves_ != nullptr) leaves_->stop();
  deadlines_->stop();
}

bool CacheNode::shutdown() {
  stop();
  std::call_once(shut_down_, [this] { shut_down_whole_ = engine_->shutdown(); });
  return shut_down_whole_;
}

CallStatus CacheNode::resolve(const wire::KeyColumn& column, NamespaceIndex& ns,
                              DomainIndex& domain) const {
  ns = engine_->find_namespace(column.ns);
  if (ns == kNoNamespace) {
    return {CallStatus::NotFound,
            "unknown namespace '" + std::string(column.ns.substr(0, 64)) + "'"};
  }
  domain = kNoDomain;
  // Which domains there are is for the leaves to say, where nothing is kept here.
  if (!column.domain.empty() && !keeps_nothing(config_)) {
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
    return refuse({CallStatus::Unavailable, kStopping});
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
  if (recorder_ != nullptr && recorder_->samples_request()) record(*get, hints);
  std::vector<std::vector<Absent>> absent(columns);
  std::vector<std::vector<Absent>> refresh(columns);
  std::vector<NvmCell> on_nvm;
  const std::uint64_t ended_before = flights_.ended();
  look_up(*get, absent, refresh, on_nvm);
  engine_seconds_.record_ns(monotonic_ns() - started);
  FC_SEQUENCE_POINT("node:looked_up");

  std::size_t waiting = on_nvm.size();
  for (const std::vector<Absent>& cells : absent) waiting += cells.size();
  if (waiting != 0) {
    if (CallStatus status = enter_pending(get); !status.ok()) {
      engine_->release(on_nvm);
      return refuse(std::move(status));
    }
    const std::uint64_t deadline =
        deadline_ns(started, timeout_ms != 0 ? timeout_ms : fetch_timeout_ms);
    // Every cell that waits is marked before the first can be answered.
    for (std::size_t c = 0; c < columns; ++c) {
      for (const Absent& cell : absent[c]) {
        get->columns[c].statuses[cell.position] = CellStatus::Unspecified;
      }
    }
    get->asks_store = waiting != on_nvm.size();
    if (!on_nvm.empty()) {
      get->expect_reads(on_nvm);
      engine_->read(std::move(on_nvm), std::make_shared<NvmReads>(*this, get, hints, ended_before));
    }
    if (leaves_ != nullptr) {
      ask_leaves(get, hints, absent, ended_before, deadline);
    } else {
      ask_stores(get, hints, absent, ended_before);
    }
    deadlines_->add(deadline, get);
  }
  for (std::size_t c = 0; c < columns; ++c) {
    if (!refresh[c].empty()) {
      refresh_ahead(get->columns[c].ns, get->request.columns[c].keys, refresh[c]);
    }
  }
  get->start(waiting);
}

void CacheNode::record(const PendingGet& get, const std::vector<DomainIndex>& hints) {
  std::vector<request_log::Recorder::Column> columns;
  columns.reserve(get.columns.size());
  for (std::size_t c = 0; c < get.columns.size(); ++c) {
    columns.push_back({get.columns[c].ns, hints[c], get.request.columns[c].keys});
  }
  recorder_->offer(columns);
}

std::uint64_t CacheNode::deadline_ns(std::uint64_t started_ns,
                                     std::uint64_t wait_ms) const noexcept {
  const std::uint64_t wait_ns = wait_ms * 1'000'000;
  return started_ns + wait_ns - std::min(kReplyMarginNs, wait_ns / kReplyMarginShare);
}

// Counts a get among those that wait, or says why it may not.
CallStatus CacheNode::enter_pending(const std::shared_ptr<PendingGet>& get) {
  if (pending_.fetch_add(1, std::memory_order_relaxed) >= config_.max_pending_batches) {
    pending_.fetch_sub(1, std::memory_order_relaxed);
    return {CallStatus::ResourceExhausted,
            "more than " + std::to_string(config_.max_pending_batches) +
                " batches wait for NVM or the store (limits.max_pending_batches)"};
  }
  const std::lock_guard lock(pending_mutex_);
  // Under the lock: stop() ends those that it finds here, nobody would end one that came later.
  if (stopped_.load()) {
    pending_.fetch_sub(1, std::memory_order_relaxed);
    return {CallStatus::Unavailable, kStopping};
  }
  get->counted_pending = true;
  pending_gets_.emplace(get.get(), get);
  return {};
}

void CacheNode::look_up(PendingGet& get, std::vector<std::vector<Absent>>& absent,
                        std::vector<std::vector<Absent>>& refresh, std::vector<NvmCell>& on_nvm) {
  std::uint64_t left = config_.max_reply_bytes;
  std::shared_ptr<const LeafShards::View> owned;
  if (leaf_ != nullptr) {
    owned = leaf_->view();
    get.map_version = owned->version;
  }
  for (std::size_t c = 0; c < get.columns.size(); ++c) {
    const std::vector<std::string_view>& keys = get.request.columns[c].keys;
    PendingGet::Column& column = get.columns[c];
    column.statuses.resize(keys.size());
    column.lengths.resize(keys.size());
    NamespaceLink& link = *namespaces_[column.ns];
    // The leaves are asked for what they have cached, too.
    column.fetchable = leaves_ != nullptr || (link.store != nullptr && !get.request.cache_only);
    if (link.speculation != nullptr) link.speculation->budget.asked(get.started_ns, keys.size());
    GetColumn lookup;
    lookup.ns = column.ns;
    lookup.keys = keys;
    lookup.statuses = column.statuses;
    lookup.lengths = column.lengths;
    lookup.values = &column.values;
    lookup.max_value_bytes = left;
    lookup.nvm = &on_nvm;
    if (column.fetchable) {
      lookup.absent = &absent[c];
      if (leaves_ == nullptr) lookup.refresh = &refresh[c];
    }
    const std::size_t first = on_nvm.size();
    if (owned == nullptr) {
      engine_->get(lookup);
    } else {
      look_up_owned(lookup, *owned, link.seed);
    }
    for (std::size_t i = first; i < on_nvm.size(); ++i) {
      on_nvm[i].column = static_cast<std::uint32_t>(c);
    }
    left -= column.values.size();
  }
}

// Of a leaf: what it does not own is WRONG_SHARD, the rest is looked up.
void CacheNode::look_up_owned(GetColumn& lookup, const LeafShards::View& owned,
                              std::uint64_t seed) {
  std::vector<std::uint32_t> here;
  here.reserve(lookup.keys.size());
  for (std::uint32_t i = 0; i < lookup.keys.size(); ++i) {
    if (owned.reads(hash_key(seed, lookup.keys[i]).high)) here.push_back(i);
  }
  if (here.size() == lookup.keys.size()) return engine_->get(lookup);
  leaf_->wrong_shard.add(lookup.keys.size() - here.size());
  std::vector<std::string_view> keys;
  std::vector<CellStatus> statuses(here.size());
  std::vector<std::uint32_t> lengths(here.size());
  for (const std::uint32_t i : here) keys.push_back(lookup.keys[i]);
  const std::size_t first_nvm = lookup.nvm->size();
  GetColumn part = lookup;
  part.keys = keys;
  part.statuses = statuses;
  part.lengths = lengths;
  engine_->get(part);
  std::fill(lookup.statuses.begin(), lookup.statuses.end(), CellStatus::WrongShard);
  std::fill(lookup.lengths.begin(), lookup.lengths.end(), 0);
  for (std::size_t i = 0; i < here.size(); ++i) {
    lookup.statuses[here[i]] = statuses[i];
    lookup.lengths[here[i]] = lengths[i];
  }
  // Positions count all keys of the column again, and so do views of them that outlive this call.
  if (lookup.absent != nullptr) {
    for (Absent& cell : *lookup.absent) cell.position = here[cell.position];
  }
  if (lookup.refresh != nullptr) {
    for (Absent& cell : *lookup.refresh) cell.position = here[cell.position];
  }
  for (std::size_t i = first_nvm; i < lookup.nvm->size(); ++i) {
    NvmCell& cell = (*lookup.nvm)[i];
    cell.position = here[cell.position];
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
    if (link.speculation != nullptr) {
      if (column.won_by_store != 0) link.speculation->won_by_store.add(column.won_by_store);
      if (column.won_by_nvm != 0) link.speculation->won_by_nvm.add(column.won_by_nvm);
    }
  }
  const std::uint64_t spent = monotonic_ns() - get.started_ns;
  get_seconds_.record_ns(spent);
  if (get.counted_pending) {
    (get.asks_store ? fetch_seconds_ : nvm_seconds_).record_ns(spent);
    leave_pending(get);
  }
}

void CacheNode::leave_pending(const PendingGet& get) {
  pending_.fetch_sub(1, std::memory_order_relaxed);
  const std::lock_guard lock(pending_mutex_);
  pending_gets_.erase(const_cast<PendingGet*>(&get));
}

std::shared_ptr<FetchBatch> CacheNode::take_fetch(std::string_view store, std::uint64_t wait_ms) {
  const auto found = by_name_.find(std::string(store));
  return found == by_name_.end() ? nullptr : found->second->take(wait_ms);
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
  for (const auto& link : namespaces_) {
    for (std::size_t s = 1; s < kCellStatusCount; ++s) {
      if (link->warmed[s].get() == 0) continue;
      const Label labels[] = {{"namespace", link->name}, {"status", kStatusNames[s]}};
      visitor.counter("feature_cache_warmed_keys_total",
                      "Keys that warm-ups asked for, by what became of them.", labels,
                      link->warmed[s].get());
    }
    if (link->speculation != nullptr) link->speculation->visit(visitor, link->name);
  }
  for (const auto& store : stores_) store->visit(visitor);
  if (recorder_ != nullptr) recorder_->visit(visitor);
  if (leaf_ != nullptr) leaf_->visit(visitor);
  if (leaves_ != nullptr) leaves_->visit(visitor);
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
  visitor.gauge("feature_cache_pending_batches", "BatchGets that wait for NVM or a store.", {},
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
  stage("batch_get_with_nvm", nvm_seconds_);
  stage("batch_get_with_fetch", fetch_seconds_);
  stage("batch_put", put_seconds_);
}

std::unique_ptr<Node> make_node(const NodeConfig& config,
                                std::vector<std::shared_ptr<NvmDevice>> devices,
                                RecoveryProgress* progress, std::shared_ptr<LeafConnector> leaves) {
  return std::make_unique<CacheNode>(config, std::move(devices), progress, std::move(leaves));
}

}  // namespace fc
