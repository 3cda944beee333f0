#include "upstream/leaf_upstream.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include "client/request.hpp"
#include "core/clock.hpp"
#include "core/hash.hpp"
#include "core/sequence_point.hpp"

namespace fc {
namespace {

constexpr std::uint64_t kHedgeSoonestNs = 500'000;
constexpr std::uint64_t kHedgeUnknownNs = 20'000'000;  // before there is a quantile
constexpr std::uint32_t kRetriesInHand = 200;
constexpr std::uint32_t kHedgesInHand = 5;
constexpr int kReroutes = 2;
// No sub-request is started when less is left: its answer would come too late.
constexpr std::uint64_t kLeastNs = 200'000;

// Whether a leaf is there and says that the request itself is wrong: it names a domain, say, that
// leaves do not have.
bool is_refusal(const CallStatus& status) noexcept {
  return status.code == CallStatus::InvalidArgument || status.code == CallStatus::NotFound;
}

bool is_answer(CellStatus status) noexcept {
  return status != CellStatus::Unspecified && status != CellStatus::WrongShard &&
         status != CellStatus::Error && static_cast<std::size_t>(status) < kCellStatusCount;
}

}  // namespace

// ---- one batch
// -----------------------------------------------------------------------------------

class LeafUpstream::Gather final : public Timed, public std::enable_shared_from_this<Gather> {
 public:
  // `reroutes`: how often keys may go again by a newer map.
  Gather(LeafUpstream& upstream, std::shared_ptr<PendingGet> get,
         const std::vector<LeafCell>& cells, std::uint64_t deadline_ns, StoreFallback fallback,
         int reroutes)
      : upstream_(upstream),
        get_(std::move(get)),
        routed_(upstream.leaves_.map()),
        deadline_ns_(deadline_ns),
        fallback_(std::move(fallback)),
        reroutes_(reroutes) {
    cells_.reserve(cells.size());
    const std::uint32_t shards = routed_->map.shard_count();
    for (const LeafCell& cell : cells) {
      const std::uint64_t seed = upstream_.seeds_[get_->columns[cell.column].ns];
      const std::string_view key = get_->request.columns[cell.column].keys[cell.position];
      cells_.push_back({cell, shards == 0 ? 0 : shard_of(hash_key(seed, key).high, shards)});
    }
  }

  void start() {
    std::vector<std::uint32_t> all(cells_.size());
    for (std::uint32_t i = 0; i < all.size(); ++i) all[i] = i;
    send(all, Why::First);
    if (upstream_.config_.hedge) {
      upstream_.timers_.add(monotonic_ns() + upstream_.hedge_after_ns(), weak_from_this());
    }
  }

  // Sub-requests that are late by now are asked of other leaves.
  void due() override {
    if (get_->ended()) return;
    const std::uint64_t now = monotonic_ns();
    const std::uint64_t late_before = now - upstream_.hedge_after_ns();
    std::vector<std::uint32_t> late;
    {
      const std::lock_guard lock(mutex_);
      for (const std::shared_ptr<Call>& call : calls_) {
        if (call->ended || call->hedged || call->sent_ns > late_before) continue;
        call->hedged = true;
        for (const std::uint32_t i : call->cells) {
          if (!cells_[i].answered && cells_[i].asked_of == 1) late.push_back(i);
        }
      }
    }
    if (!late.empty()) send(late, Why::Hedge);
  }

 private:
  enum class Why : std::uint8_t { First, Retry, Hedge };
  static constexpr std::size_t kTriesMost = 8;

  struct Cell {
    LeafCell at;
    std::uint32_t shard = 0;
    bool answered = false;
    std::uint8_t tries = 0;
    std::uint8_t asked_of = 0;  // leaves that have not answered yet
    CellStatus failure = CellStatus::TimedOut;
    std::array<std::uint32_t, kTriesMost> tried{};
    std::span<const std::uint32_t> tried_leaves() const noexcept { return {tried.data(), tries}; }
  };
  // One sub-request.
  struct Call {
    std::uint32_t leaf = 0;
    bool hedge = false;
    bool ended = false;   // guarded by mutex_
    bool hedged = false;  // guarded by mutex_
    std::uint64_t sent_ns = 0;
    std::vector<std::uint32_t> cells;  // rising, so by column and position
  };

  // Asks leaves for `cells`, each of one that it was not asked of; what cannot be asked and has
  // nobody to wait for is settled without.
  void send(const std::vector<std::uint32_t>& cells, Why why) {
    const std::uint64_t now = monotonic_ns();
    std::vector<std::shared_ptr<Call>> calls;
    std::vector<std::uint32_t> unasked;
    const bool time_left = now + kLeastNs < deadline_ns_ && !get_->ended();
    const std::uint32_t tries_most =
        std::min<std::uint32_t>(upstream_.config_.attempts, kTriesMost);
    {
      const std::lock_guard lock(mutex_);
      ReplicaChooser chooser(*routed_, now);
      std::vector<Call*> by_leaf(routed_->leaves.size());
      for (const std::uint32_t i : cells) {
        Cell& cell = cells_[i];
        if (cell.answered) continue;
        std::uint32_t leaf = ReplicaChooser::kNone;
        if (time_left && routed_->map.shard_count() != 0 && cell.tries < tries_most) {
          leaf = chooser.choose(cell.shard, cell.tried_leaves());
        }
        if (leaf != ReplicaChooser::kNone && by_leaf[leaf] == nullptr && !permit(why)) {
          leaf = ReplicaChooser::kNone;
        }
        if (leaf == ReplicaChooser::kNone) {
          if (cell.asked_of == 0) unasked.push_back(i);
          continue;
        }
        if (by_leaf[leaf] == nullptr) {
          calls.push_back(std::make_shared<Call>());
          calls.back()->leaf = leaf;
          calls.back()->hedge = why == Why::Hedge;
          calls.back()->sent_ns = now;
          by_leaf[leaf] = calls.back().get();
        }
        by_leaf[leaf]->cells.push_back(i);
        cell.tried[cell.tries++] = leaf;
        ++cell.asked_of;
      }
      calls_.insert(calls_.end(), calls.begin(), calls.end());
    }
    for (const std::shared_ptr<Call>& call : calls) dispatch(call, now);
    if (!unasked.empty()) give_up(unasked);
  }

  bool permit(Why why) {
    bool given = true;
    switch (why) {
      case Why::First:
        upstream_.retries_.earn();
        upstream_.hedges_.earn();
        return true;
      case Why::Retry:
        given = upstream_.retries_.take();
        if (given) upstream_.retried_.add();
        break;
      case Why::Hedge:
        given = upstream_.hedges_.take();
        if (given) upstream_.hedged_.add();
        break;
    }
    if (!given) upstream_.denied_.add();
    return given;
  }

  void dispatch(const std::shared_ptr<Call>& call, std::uint64_t now) {
    Leaf& leaf = *routed_->leaves[call->leaf];
    leaf.asked(call->cells.size());
    upstream_.calls_.add();
    std::uint64_t timeout = deadline_ns_ - now;
    if (upstream_.config_.leaf_timeout_ms != 0) {
      timeout = std::min(timeout, upstream_.config_.leaf_timeout_ms * 1'000'000);
    }
    leaf.link().get(encode(*call), timeout,
                    [self = shared_from_this(), call](const CallStatus& status, Reply reply) {
                      self->ended(call, status, std::move(reply));
                    });
  }

  // The sub-request: a column for each that has cells in it.
  Buffer encode(const Call& call) const {
    client::GetRequest request;
    request.cache_only = get_->request.cache_only;
    std::vector<std::vector<std::uint64_t>> ids;  // what the columns point into
    ids.reserve(get_->columns.size());
    for (std::size_t begin = 0; begin < call.cells.size();) {
      const std::uint32_t column = cells_[call.cells[begin]].at.column;
      const wire::KeyColumn& from = get_->request.columns[column];
      std::size_t end = begin;
      bool all_ids = true;
      for (; end < call.cells.size() && cells_[call.cells[end]].at.column == column; ++end) {
        all_ids = all_ids && from.keys[cells_[call.cells[end]].at.position].size() == 8;
      }
      client::KeyColumn to{.name_space = from.ns, .domain = from.domain, .ids = {}, .keys = {}};
      if (all_ids) {
        std::vector<std::uint64_t>& packed = ids.emplace_back(end - begin);
        for (std::size_t i = begin; i < end; ++i) {
          std::memcpy(&packed[i - begin], from.keys[cells_[call.cells[i]].at.position].data(), 8);
        }
        to.ids = packed;
      } else {
        to.keys.parts.reserve(end - begin);
        for (std::size_t i = begin; i < end; ++i) {
          to.keys.parts.push_back(from.keys[cells_[call.cells[i]].at.position]);
        }
      }
      request.columns.push_back(std::move(to));
      begin = end;
    }
    return client::encode(request);
  }

  void ended(const std::shared_ptr<Call>& call, const CallStatus& status, Reply reply) {
    const std::uint64_t now = monotonic_ns();
    const bool whole = status.ok() && has_shape(reply, *call);
    const bool refused = is_refusal(status);
    routed_->leaves[call->leaf]->answered(call->cells.size(), now, !whole && !refused);
    if (whole) {
      const std::lock_guard lock(upstream_.latency_mutex_);
      upstream_.latencies_.record(now - call->sent_ns);
    }
    upstream_.call_seconds_.record_ns(now - call->sent_ns);
    upstream_.leaves_.told(reply.map_version());
    std::vector<PendingGet::CellAnswer> answers;
    std::vector<Install> installs;
    std::vector<std::uint32_t> again;
    const auto kept = std::make_shared<const Reply>(std::move(reply));
    {
      const std::lock_guard lock(mutex_);
      call->ended = true;
      if (whole) {
        take(*call, *kept, answers, installs, again);
      } else {
        for (const std::uint32_t i : call->cells) {
          if (cells_[i].answered) continue;
          cells_[i].failure = refused ? CellStatus::Error : CellStatus::TimedOut;
          if (--cells_[i].asked_of == 0) again.push_back(i);
        }
      }
    }
    // Before the answer: a get that comes after it finds the values.
    if (!installs.empty()) upstream_.installer_(*get_, installs);
    FC_SEQUENCE_POINT("leaf:gathered");
    if (!answers.empty()) get_->answer(answers, kept);
    if (!again.empty()) send(again, Why::Retry);
  }

  bool has_shape(const Reply& reply, const Call& call) const {
    std::size_t column = 0;
    for (std::size_t begin = 0; begin < call.cells.size(); ++column) {
      std::size_t end = begin;
      const std::uint32_t of = cells_[call.cells[begin]].at.column;
      while (end < call.cells.size() && cells_[call.cells[end]].at.column == of) ++end;
      if (column >= reply.columns() || reply.column(column).statuses.size() != end - begin) {
        return false;
      }
      begin = end;
    }
    return column == reply.columns();
  }

  // Takes a whole reply apart; under mutex_.
  void take(const Call& call, const Reply& reply, std::vector<PendingGet::CellAnswer>& answers,
            std::vector<Install>& installs, std::vector<std::uint32_t>& again) {
    answers.reserve(call.cells.size());
    std::size_t column = 0;
    std::size_t in_column = 0;
    const std::uint8_t* value = reply.column(0).values.data();
    for (const std::uint32_t i : call.cells) {
      while (in_column == reply.column(column).statuses.size()) {
        in_column = 0;
        value = reply.column(++column).values.data();
      }
      const Reply::Column& from = reply.column(column);
      const auto status = static_cast<CellStatus>(from.statuses[in_column]);
      const std::uint32_t size = from.value_lengths[in_column];
      ++in_column;
      const std::uint8_t* const data = value;
      value += size;
      Cell& cell = cells_[i];
      if (cell.answered) continue;
      --cell.asked_of;
      if (!is_answer(status)) {
        cell.failure = status == CellStatus::WrongShard ? status : CellStatus::Error;
        if (status == CellStatus::WrongShard) upstream_.wrong_shard_.add();
        if (cell.asked_of == 0) again.push_back(i);
        continue;
      }
      cell.answered = true;
      if (call.hedge) upstream_.hedges_won_.add();
      answers.push_back({cell.at.column, cell.at.position, status, data, size});
      if (upstream_.installer_ == nullptr) continue;
      if (carries_value(status)) {
        installs.push_back({cell.at, false, {reinterpret_cast<const char*>(data), size}});
      } else if (status == CellStatus::NotFound) {
        installs.push_back({cell.at, true, {}});
      }
    }
  }

  // Settles cells that no leaf is asked for any more.
  void give_up(const std::vector<std::uint32_t>& cells) {
    std::vector<LeafCell> to_store;
    std::vector<LeafCell> moved;
    std::vector<PendingGet::CellAnswer> answers;
    const bool newer_map =
        reroutes_ > 0 && upstream_.leaves_.map()->map.version > routed_->map.version;
    std::size_t permits = 0;
    if (fallback_ != nullptr && !get_->ended()) {
      permits = upstream_.store_budget_.take(monotonic_ns(), cells.size());
    }
    {
      const std::lock_guard lock(mutex_);
      for (const std::uint32_t i : cells) {
        Cell& cell = cells_[i];
        if (cell.answered || cell.asked_of != 0) continue;
        cell.answered = true;
        if (newer_map && cell.failure == CellStatus::WrongShard) {
          moved.push_back(cell.at);
        } else if (to_store.size() < permits) {
          to_store.push_back(cell.at);
        } else {
          answers.push_back({cell.at.column, cell.at.position, cell.failure, nullptr, 0});
        }
      }
    }
    upstream_.to_store_.add(to_store.size());
    upstream_.unanswered_.add(answers.size());
    if (!answers.empty()) get_->answer(answers, nullptr);
    if (!to_store.empty()) fallback_(to_store);
    if (!moved.empty()) {
      std::make_shared<Gather>(upstream_, get_, moved, deadline_ns_, fallback_, reroutes_ - 1)
          ->start();
    }
  }

  LeafUpstream& upstream_;
  const std::shared_ptr<PendingGet> get_;
  const std::shared_ptr<const RoutedMap> routed_;
  const std::uint64_t deadline_ns_;
  const StoreFallback fallback_;
  const int reroutes_;
  std::mutex mutex_;
  std::vector<Cell> cells_;                   // but for places and shards, guarded by mutex_
  std::vector<std::shared_ptr<Call>> calls_;  // guarded by mutex_
};

// ---- the upstream
// --------------------------------------------------------------------------------

LeafUpstream::LeafUpstream(const RootConfig& config, std::vector<std::uint64_t> seeds,
                           std::shared_ptr<LeafConnector> connector, Deadlines& timers,
                           Installer installer)
    : config_(config),
      seeds_(std::move(seeds)),
      timers_(timers),
      installer_(std::move(installer)),
      leaves_(std::move(connector)),
      retries_(config.retry_budget, kRetriesInHand),
      hedges_(config.hedge_budget, kHedgesInHand),
      store_budget_(config.store_budget) {}

std::uint64_t LeafUpstream::hedge_after_ns() const {
  if (config_.hedge_after_us != 0) return config_.hedge_after_us * 1000;
  const std::lock_guard lock(latency_mutex_);
  return std::max(latencies_.quantile(config_.hedge_quantile, kHedgeUnknownNs), kHedgeSoonestNs);
}

void LeafUpstream::get(const std::shared_ptr<PendingGet>& get, const std::vector<LeafCell>& cells,
                       std::uint64_t deadline_ns, StoreFallback fallback) {
  store_budget_.asked(get->started_ns, cells.size());
  std::make_shared<Gather>(*this, get, cells, deadline_ns, std::move(fallback), kReroutes)->start();
}

void LeafUpstream::visit(CounterVisitor& visitor) const {
  leaves_.visit(visitor);
  const auto counter = [&](const char* name, const char* help, const Counter& value) {
    visitor.counter(name, help, {}, value.get());
  };
  counter("feature_cache_root_calls_total", "Sub-requests for reads.", calls_);
  counter("feature_cache_root_retries_total", "Sub-requests for keys that another leaf failed.",
          retried_);
  counter("feature_cache_root_hedges_total", "Sub-requests for keys that another leaf is late for.",
          hedged_);
  counter("feature_cache_root_hedged_cells_won_total", "Cells that a hedge answered first.",
          hedges_won_);
  counter("feature_cache_root_denied_total", "Retries and hedges that their budget denied.",
          denied_);
  counter("feature_cache_root_wrong_shard_cells_total", "Cells that a leaf said are not its.",
          wrong_shard_);
  counter("feature_cache_root_store_cells_total", "Cells that no leaf answered and a store did.",
          to_store_);
  counter("feature_cache_root_unanswered_cells_total", "Cells that nobody answered.", unanswered_);
  counter("feature_cache_root_writes_again_total", "Writes that went again by a newer map.",
          writes_again_);
  call_seconds_.visit(visitor, "feature_cache_root_call_seconds", "Time of a sub-request.", {});
}

}  // namespace fc
