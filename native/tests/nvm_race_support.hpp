// What the tests of interleavings between the tiers share: cells that are held between their lookup
// and their read, and an engine that is stopped at named points.
#pragma once

#include <future>

#include "nvm_support.hpp"
#include "testing/sequence_point.hpp"

namespace fc::testing {

// Cells of one batch, held by the test until it reads them.
struct Held {
  std::vector<std::string> keys;
  std::vector<std::string_view> views;
  std::vector<CellStatus> statuses;
  std::vector<NvmCell> cells;
};

// What became of the cells of a read.
class Answers final : public NvmReader {
 public:
  struct One {
    CellStatus status;
    std::string value;
    Token token;
  };
  void answer(std::span<const NvmAnswer> answers) override {
    const std::lock_guard lock(mutex_);
    for (const NvmAnswer& answer : answers) {
      EXPECT_FALSE(by_position_.contains(answer.cell.position)) << "answered twice";
      by_position_[answer.cell.position] = {
          answer.status,
          std::string(reinterpret_cast<const char*>(answer.value.data()), answer.value.size()),
          answer.cell.token};
    }
  }
  void late(std::span<const NvmCell> cells) override {
    const std::lock_guard lock(mutex_);
    for (const NvmCell& cell : cells) {
      EXPECT_FALSE(by_position_.contains(cell.position)) << "late, but answered";
      late_.push_back(cell.position);
    }
  }
  bool wanted() const noexcept override { return wanted_.load(); }

  std::size_t count() {
    const std::lock_guard lock(mutex_);
    return by_position_.size();
  }
  bool wait(std::size_t cells) {
    return eventually([&] { return count() >= cells; });
  }
  One at(std::uint32_t position) {
    const std::lock_guard lock(mutex_);
    return by_position_.at(position);
  }
  std::vector<std::uint32_t> late_ones() {
    const std::lock_guard lock(mutex_);
    return late_;
  }
  void leave() { wanted_ = false; }

 private:
  std::mutex mutex_;
  std::map<std::uint32_t, One> by_position_;  // guarded by mutex_
  std::vector<std::uint32_t> late_;           // guarded by mutex_
  std::atomic<bool> wanted_{true};
};

class NvmRaces : public ::testing::Test {
 protected:
  static EngineConfig usual_config(const std::string& path) {
    EngineConfig config = engine_config(
        24 * kMiB, {with_nvm(name_space("pin", {domain("lasting", 128 * kKiB, PolicyKind::Fifo),
                                                domain("other", 128 * kKiB, PolicyKind::Fifo)}),
                             40, PromotionKind::Always)});
    config.expected_item_bytes = 300;
    config.nvm = nvm_config(path, 48);
    config.nvm.errors_max = 1'000'000;
    return config;
  }
  void start(EngineConfig config) {
    engine_.reset();
    fault_.reset();
    fault_ = std::make_shared<FaultDevice>(
        open_device(config.nvm.devices[0].path, config.nvm.devices[0].bytes, {}));
    engine_ = make_engine(config, clock_, false, {fault_});
    ns_ = engine_->find_namespace("pin");
    other_ = engine_->find_domain(ns_, "other");
  }
  void SetUp() override { start(usual_config(folder_.file("nvm"))); }

  template <class Call>
  static std::future<void> in_thread(Call call) {
    return std::async(std::launch::async, std::move(call));
  }
  double counter(std::string_view name) { return Counters::of(*engine_).sum(name); }
  double regions(const char* state) {
    return Counters::of(*engine_).at("feature_cache_nvm_device_regions{device=" + fault_->path() +
                                     ",state=" + state + "}");
  }
  bool settled() {
    return eventually([&] { return regions("writing") + regions("emptying") == 0; });
  }
  static std::string filler(std::size_t i) { return "filler " + std::to_string(i); }
  // Pushes out of DRAM what was put before; `until` says when it is enough.
  void push(const std::function<bool()>& until) {
    for (int i = 0; i < 40'000 && !until(); ++i) {
      put(*engine_, ns_, filler(pushed_), patterned(filler(pushed_), 1, 284));
      ++pushed_;
      if (pushed_ % 200 == 0) {
        ASSERT_TRUE(eventually([&] { return regions("writing") == 0; }));
      }
    }
    ASSERT_TRUE(until());
  }
  // Looks up without reading. Cells must be read or given back.
  Held hold(const std::vector<std::string>& keys) {
    Held held;
    held.keys = keys;
    held.views.assign(held.keys.begin(), held.keys.end());
    held.statuses.resize(keys.size());
    std::vector<std::uint32_t> lengths(keys.size());
    Buffer values;
    GetColumn column;
    column.ns = ns_;
    column.keys = held.views;
    column.statuses = held.statuses;
    column.lengths = lengths;
    column.values = &values;
    column.nvm = &held.cells;
    engine_->get(column);
    return held;
  }
  bool on_device(const std::string& key) {
    const Held held = hold({key});
    engine_->release(held.cells);
    return held.cells.size() == 1;
  }
  std::shared_ptr<Answers> read(Held& held) {
    auto answers = std::make_shared<Answers>();
    engine_->read(held.cells, answers);
    return answers;
  }
  void bring_to_device(const std::string& key, const std::string& value) {
    put(*engine_, ns_, key, value);
    push([&] { return on_device(key); });
  }
  std::string value_of(std::string_view key) {
    const Got got = get(*engine_, ns_, key);
    EXPECT_TRUE(carries_value(got.status)) << key << " is missing";
    return got.value;
  }

  SequencePoints points_;  // first in, last out: threads of a failed test must not hang
  Folder folder_;
  ManualClock clock_;
  std::shared_ptr<FaultDevice> fault_;
  std::unique_ptr<Engine> engine_;
  NamespaceIndex ns_ = kNoNamespace;
  DomainIndex other_ = kNoDomain;
  std::size_t pushed_ = 0;
};

}  // namespace fc::testing
