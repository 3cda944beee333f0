// Late reads: a node over a device that delays some reads, or all, and a store that answers after
// two milliseconds. The load is open: half of what the device can do, whatever the node does.

#include <cstdio>

#include "node_load.hpp"
#include "nvm/device.hpp"
#include "testing/fault_device.hpp"

namespace fc::bench {
namespace {

using testing::FaultDevice;
using testing::FaultRule;

constexpr std::uint64_t kStoreNs = 2'000'000;
constexpr std::uint64_t kDelayNs = 50'000'000;
constexpr double kDelayedShare = 0.02;
constexpr double kBudget = 0.05;
constexpr std::uint64_t kTimeoutMs = 1000;
constexpr std::uint64_t kOutageTimeoutMs = 200;
constexpr std::size_t kAsked = 400'000;  // keys that are drawn from
constexpr unsigned kClients = 16;
constexpr std::uint32_t kCalls = 16;  // of the store at once: nothing is to wait for its turn
constexpr double kBinNs = 1e8;        // of the brownout: its worst second begins at a tenth of one
constexpr std::size_t kBinsEachSecond = 10;

enum class Speculate { No, After2Ms, AfterP99 };

const char* const kNames[] = {"plain", "after_2_ms", "after_p99"};

// A node whose keys are on NVM and stay there, but for those that the store was asked for.
class LateNode {
 public:
  LateNode(const Options& options, Speculate speculate)
      : setup_{.path = options.folder + "/" + kNames[static_cast<int>(speculate)] + ".nvm",
               .memory_bytes = kMemory + nvm_bytes(options) / kIndexShare,
               .nvm_bytes = nvm_bytes(options),
               .region_bytes = kRegionBytes} {
    NodeConfig config;
    config.engine = tier_config(setup_);
    NamespaceConfig& ns = config.engine.namespaces.front();
    ns.store = "store";
    if (speculate != Speculate::No) {
      ns.speculative.enabled = true;
      ns.speculative.budget = kBudget;
      if (speculate == Speculate::After2Ms) ns.speculative.after_us = 2000;
    }
    StoreConfig store;
    store.name = "store";
    store.concurrency = kCalls;
    config.stores.push_back(store);
    device_ = std::make_shared<FaultDevice>(
        open_device(setup_.path, config.engine.nvm.devices[0].bytes, {}));
    node_ = make_node(config, {device_});
    Filler filler(node_->engine(), setup_);
    const std::uint64_t ids = static_cast<std::uint64_t>(
        kFilled * static_cast<double>(setup_.nvm_bytes) / (kKeyBytes + kValueBytes));
    filler.fill(0, ids);
    keys_ = filler.draw(ids, kAsked, true, 3);
    store_ = std::make_unique<SlowStore>(*node_, kStoreNs, kValueBytes);
  }
  ~LateNode() {
    device_->clear();
    node_->stop();
    store_.reset();
    node_.reset();
    device_.reset();
    std::remove(setup_.path.c_str());
  }
  LateNode(const LateNode&) = delete;
  LateNode& operator=(const LateNode&) = delete;

  Node& node() noexcept { return *node_; }
  FaultDevice& device() noexcept { return *device_; }
  SlowStore& store() noexcept { return *store_; }
  const std::vector<Key>& keys() const noexcept { return keys_; }
  Counters counters() const { return Counters::of(*node_); }

 private:
  // Of the file: nothing is evicted, whatever the store's answers push out of DRAM.
  static constexpr double kFilled = 0.75;
  static constexpr std::uint32_t kRegionBytes = 2 << 20;
  // Buffers, and little DRAM: what the store was asked for is to go down again.
  static constexpr std::uint64_t kMemory = 36 * kMiB;
  static constexpr std::uint64_t kIndexShare = 36;  // of the file

  static std::uint64_t nvm_bytes(const Options& options) {
    return std::min<std::uint64_t>(options.data_mib / 8, 512) * kMiB;
  }

  const TierSetup setup_;
  std::shared_ptr<FaultDevice> device_;
  std::unique_ptr<Node> node_;
  std::unique_ptr<SlowStore> store_;
  std::vector<Key> keys_;
};

// Cells of a run, by what became of them.
struct Cells {
  Cells(const Counters& before, const Counters& after) {
    const auto of = [&](const char* status) {
      const std::string name = std::string("feature_cache_cells_total{") + status + "}";
      return after[name] - before[name];
    };
    all = after["feature_cache_cells_total"] - before["feature_cache_cells_total"];
    nvm = of("HIT_NVM");
    speculative = of("SPECULATIVE");
    timed_out = of("TIMED_OUT");
    const auto speculation = [&](const char* what) {
      const std::string name = std::string("feature_cache_speculative_") + what + "_total";
      return after[name] - before[name];
    };
    launched = speculation("launched");
    denied = speculation("denied");
    won_by_nvm = speculation("won_by_nvm");
  }
  double all;
  double nvm;
  double speculative;
  double timed_out;
  double launched;
  double denied;
  double won_by_nvm;
};

// What half of the device's capacity is, in BatchGets a second.
double half_load(LateNode& node, double seconds) {
  NodeLoad load(node.node(), node.keys(), kTimeoutMs);
  load.capacity(kClients, seconds / 4);
  const double capacity = load.capacity(kClients, seconds);
  say("a BatchGet of %zu NVM keys: %.0f a second at most", NodeLoad::kKeys, capacity);
  return capacity / 2;
}

// ---- a few late reads
// ----------------------------------------------------------------------------

struct Latency {
  double p50 = 0;
  double p99 = 0;
  double launched_share = 0;
  double denied_share = 0;
  double won_by_nvm_share = 0;
  double nvm_share = 0;
};

Latency latency_of(LateNode& node, double per_second, double seconds) {
  NodeLoad load(node.node(), node.keys(), kTimeoutMs);
  const Counters before = node.counters();
  std::vector<double> took;
  for (const NodeLoad::Sample& sample : load.run(per_second, seconds)) {
    took.push_back(sample.latency_ms);
  }
  const Cells cells(before, node.counters());
  return {quantile(took, 0.5),          quantile(took, 0.99),
          cells.launched / cells.all,   cells.denied / cells.all,
          cells.won_by_nvm / cells.all, (cells.nvm + cells.speculative) / cells.all};
}

void run_slow_reads(const Options& options, LateNode& plain, LateNode& speculating,
                    double per_second) {
  // What the device is like by itself, just now.
  const Latency healthy = latency_of(plain, per_second, options.seconds);
  const FaultRule late = FaultRule::delay(kDelayNs).reads().rate(kDelayedShare);
  plain.device().add(late);
  speculating.device().add(late);
  std::vector<Latency> plain_rounds;
  for (unsigned round = 0; round < options.rounds; ++round) {
    Latency without;
    if (round % 2 == 0) without = latency_of(plain, per_second, options.seconds);
    const Latency with = latency_of(speculating, per_second, options.seconds);
    if (round % 2 != 0) without = latency_of(plain, per_second, options.seconds);
    plain_rounds.push_back(without);
    if (!options.wants("slow_reads_p99_ms")) continue;
    print_round("slow_reads_p99_ms", {{"value", with.p99},
                                      {"peer_value", without.p99},
                                      {"p50_ms", with.p50},
                                      {"peer_p50_ms", without.p50},
                                      {"p99_ms_without_delays", healthy.p99},
                                      {"launched_share", with.launched_share},
                                      {"denied_share", with.denied_share},
                                      {"won_by_nvm_share", with.won_by_nvm_share},
                                      {"nvm_share", with.nvm_share},
                                      {"batches_per_second", per_second}});
  }
  plain.device().clear();
  speculating.device().clear();
  if (!options.wants("slow_reads_p99_ms_plain")) return;
  for (const Latency& without : plain_rounds) {
    print_round("slow_reads_p99_ms_plain", {{"value", without.p99}, {"p50_ms", without.p50}});
  }
}

void run_healthy(const Options& options, LateNode& node, double per_second) {
  latency_of(node, per_second, options.seconds);  // the quantile is learnt
  for (unsigned round = 0; round < options.rounds; ++round) {
    const Latency latency = latency_of(node, per_second, options.seconds);
    print_round("healthy_launch_share", {{"value", latency.launched_share / latency.nvm_share},
                                         {"p50_ms", latency.p50},
                                         {"p99_ms", latency.p99},
                                         {"nvm_share", latency.nvm_share},
                                         {"batches_per_second", per_second}});
  }
}

// ---- a brownout
// ----------------------------------------------------------------------------------

// Keys that the store was asked over keys that the node was asked, in the worst second: one that
// begins at any tenth of a second.
double worst_second(const std::vector<SlowStore::Taken>& taken,
                    const std::vector<NodeLoad::Sample>& sent, std::uint64_t start_ns,
                    double seconds, double normal_share) {
  const auto bins = static_cast<std::size_t>(seconds * 1e9 / kBinNs);
  std::vector<double> asked(bins);
  std::vector<double> fetched(bins);
  const auto bin_of = [&](std::uint64_t at_ns) {
    return static_cast<std::size_t>(static_cast<double>(at_ns - start_ns) / kBinNs);
  };
  for (const NodeLoad::Sample& sample : sent) {
    if (bin_of(sample.sent_ns) < bins) asked[bin_of(sample.sent_ns)] += NodeLoad::kKeys;
  }
  for (const SlowStore::Taken& one : taken) {
    if (bin_of(one.at_ns) < bins) fetched[bin_of(one.at_ns)] += static_cast<double>(one.keys);
  }
  double worst = 0;
  for (std::size_t first = 0; first + kBinsEachSecond <= bins; ++first) {
    double keys = 0;
    double of = 0;
    for (std::size_t bin = first; bin < first + kBinsEachSecond; ++bin) {
      keys += fetched[bin];
      of += asked[bin];
    }
    if (of != 0) worst = std::max(worst, keys / of - normal_share);
  }
  return worst;
}

void run_brownout(const Options& options, LateNode& node, double per_second) {
  NodeLoad load(node.node(), node.keys(), kOutageTimeoutMs);
  node.store().take_log();
  // The normal load first: misses when the device is well.
  const std::size_t healthy = load.run(per_second, options.seconds).size();
  double fetched = 0;
  for (const SlowStore::Taken& taken : node.store().take_log()) {
    if (taken.priority == FetchPriority::Live) fetched += static_cast<double>(taken.keys);
  }
  const double normal_share = fetched / static_cast<double>(healthy * NodeLoad::kKeys);
  const Counters before = node.counters();
  node.device().add(FaultRule::delay(kDelayNs).reads());
  say("every read is late for %.0f s", options.outage_seconds);
  const std::uint64_t start = monotonic_ns();
  const std::vector<NodeLoad::Sample> sent = load.run(per_second, options.outage_seconds);
  const Cells cells(before, node.counters());
  node.device().clear();
  const std::vector<SlowStore::Taken> taken = node.store().take_log();
  double late = 0;
  double latest_ms = 0;
  double refused = 0;
  for (const NodeLoad::Sample& sample : sent) {
    late += sample.after_deadline_ms > 0;
    latest_ms = std::max(latest_ms, sample.after_deadline_ms);
    refused += sample.refused;
  }
  const auto replies = static_cast<double>(sent.size());
  print_round("brownout_extra_load",
              {{"value", worst_second(taken, sent, start, options.outage_seconds, normal_share)},
               {"normal_share", normal_share},
               {"late_replies", late},
               {"latest_ms", latest_ms},
               {"refused_share", refused / replies},
               {"timed_out_cells", cells.timed_out / cells.all},
               {"speculative_cells", cells.speculative / cells.all},
               {"batches_per_second", per_second}});
}

}  // namespace

void run_late_reads(const Options& options) {
  const bool slow = options.wants("slow_reads_p99_ms") || options.wants("slow_reads_p99_ms_plain");
  const bool healthy = options.wants("healthy_launch_share");
  const bool brownout = options.wants("brownout_extra_load");
  if (!slow && !healthy && !brownout) return;
  LateNode plain(options, Speculate::No);
  const double per_second = half_load(plain, options.seconds);
  if (slow || brownout) {
    LateNode speculating(options, Speculate::After2Ms);
    if (slow) run_slow_reads(options, plain, speculating, per_second);
    if (brownout) run_brownout(options, speculating, per_second);
  }
  if (healthy) {
    LateNode by_quantile(options, Speculate::AfterP99);
    run_healthy(options, by_quantile, per_second);
  }
}

}  // namespace fc::bench
