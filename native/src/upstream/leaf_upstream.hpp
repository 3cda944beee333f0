// The upstream of a root: scatters what a batch lacks over the leaves and gathers their answers.
//
// Reads. Every absent key goes to one online replica of its shard, all keys of a leaf in one
// sub-request. A key whose leaf fails, says WRONG_SHARD or ERROR is asked of another replica; a
// sub-request that is late is asked again elsewhere (hedged); both within budgets. The first answer
// of a key counts. A key that no leaf answers goes to the store where there is one and its budget
// allows, else it is answered with what is known: WRONG_SHARD, ERROR or TIMED_OUT. So a leaf that
// is slow or gone never fails a batch, and the caller's deadline bounds it in any case.
//
// Writes go to all replicas of a shard, warming ones too: STORED when all took them, PARTIAL when
// some did. Leaves refuse writes by a map that is older than the last change of a shard's replicas;
// then the write waits a little for the newer map and goes again.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <unordered_set>
#include <vector>

#include "core/counter.hpp"
#include "core/latency.hpp"
#include "feature_cache/engine.hpp"
#include "upstream/deadlines.hpp"
#include "upstream/leaf_set.hpp"
#include "upstream/pending_get.hpp"
#include "upstream/speculation.hpp"
#include "wire/request.hpp"

namespace fc {

// A key that is to be asked of the leaves.
struct LeafCell {
  std::uint32_t column = 0;
  std::uint32_t position = 0;
  Token token;  // what its value may be installed under
};

class LeafUpstream {
 public:
  // What a leaf said of one cell of a batch, for the hot tier.
  struct Install {
    LeafCell cell;
    bool negative = false;
    std::string_view value;
  };
  using Installer = std::function<void(const PendingGet&, std::span<const Install>)>;
  // Asks the store for cells that no leaf answered; it answers each.
  using StoreFallback = std::function<void(std::span<const LeafCell>)>;

  // `seeds`: of the namespaces, by their index. `installer`: null where there is no hot tier.
  LeafUpstream(const RootConfig& config, std::vector<std::uint64_t> seeds,
               std::shared_ptr<LeafConnector> connector, Deadlines& timers, Installer installer);
  ~LeafUpstream();

  LeafSet& leaves() noexcept { return leaves_; }

  // Answers each of `cells`, perhaps before it returns. `deadline_ns`: when the batch is answered
  // at the latest. `fallback` is null where no store may be asked.
  void get(const std::shared_ptr<PendingGet>& get, const std::vector<LeafCell>& cells,
           std::uint64_t deadline_ns, StoreFallback fallback);

  // One status a key, in the shape of the request.
  using WriteDone = std::function<void(std::vector<std::vector<WriteStatus>>)>;
  void put(std::shared_ptr<const wire::PutRequest> request,
           const std::vector<NamespaceIndex>& namespaces, std::uint64_t deadline_ns,
           WriteDone done);
  void erase(std::shared_ptr<const wire::DeleteRequest> request,
             const std::vector<NamespaceIndex>& namespaces, std::uint64_t deadline_ns,
             WriteDone done);

  // Ends all calls; nothing of this runs any more afterwards, but what answers a new request.
  void stop();
  void visit(CounterVisitor& visitor) const;

 private:
  class Gather;
  class Write;

  std::uint64_t hedge_after_ns() const;
  // Writes that wait for a newer map are kept here, so that stop() can end them.
  bool keep(const std::shared_ptr<Write>& write);
  bool let_go(const std::shared_ptr<Write>& write);

  const RootConfig config_;
  const std::vector<std::uint64_t> seeds_;
  Deadlines& timers_;
  const Installer installer_;
  LeafSet leaves_;
  ShareBudget retries_;
  ShareBudget hedges_;
  SpeculationBudget store_budget_;
  mutable std::mutex latency_mutex_;
  RecentLatencies latencies_;  // guarded by latency_mutex_; of sub-requests for reads
  std::mutex waiting_mutex_;
  bool stopped_ = false;                                // guarded by waiting_mutex_
  std::unordered_set<std::shared_ptr<Write>> waiting_;  // guarded by waiting_mutex_

  Counter calls_;
  Counter retried_;
  Counter hedged_;
  Counter hedges_won_;  // cells
  Counter denied_;      // retries and hedges without a permit
  Counter wrong_shard_;
  Counter to_store_;
  Counter unanswered_;
  Counter writes_again_;
  LatencyHistogram call_seconds_;
};

}  // namespace fc
