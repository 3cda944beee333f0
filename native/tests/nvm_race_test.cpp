// One interleaving each, between the tiers: a thread is stopped at a named point, or a cell is held
// between its lookup and its read, while something else happens to the key. An older value never
// comes back, and a present one never reads as a miss (nvm/region_writer.hpp lists the races).
#include <future>

#include "nvm_support.hpp"
#include "testing/sequence_point.hpp"

namespace fc::testing {
namespace {

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

// ---- on the way down
// -----------------------------------------------------------------------------

// The copy is below, the entry still points to DRAM.
TEST_F(NvmRaces, PutDuringADemotionWins) {
  put(*engine_, ns_, "k", "old");
  points_.block("domain:demoting");
  auto evicting = in_thread([&] { push([&] { return pushed_ > 1000; }); });
  ASSERT_TRUE(points_.wait_blocked("domain:demoting"));
  EXPECT_EQ(value_of("k"), "old");
  put(*engine_, ns_, "k", "new", other_);
  points_.release("domain:demoting");
  evicting.get();
  EXPECT_EQ(value_of("k"), "new");
  push([&] { return pushed_ > 3000; });
  EXPECT_EQ(value_of("k"), "new");
}

TEST_F(NvmRaces, EraseDuringADemotionWins) {
  put(*engine_, ns_, "k", "old");
  points_.block("domain:demoting");
  auto evicting = in_thread([&] { push([&] { return pushed_ > 1000; }); });
  ASSERT_TRUE(points_.wait_blocked("domain:demoting"));
  erase(*engine_, ns_, "k");
  points_.release("domain:demoting");
  evicting.get();
  EXPECT_EQ(get(*engine_, ns_, "k").status, CellStatus::Miss);
}

TEST_F(NvmRaces, FlushDuringADemotionLeavesNothing) {
  put(*engine_, ns_, "k", "old");
  points_.block("domain:demoting");
  auto evicting = in_thread([&] {
    for (int i = 0; i < 600; ++i) put(*engine_, ns_, filler(i), std::string(284, 'x'));
  });
  ASSERT_TRUE(points_.wait_blocked("domain:demoting"));
  points_.block("flush:hidden");
  auto flushing = in_thread([&] { engine_->flush(ns_); });
  ASSERT_TRUE(points_.wait_blocked("flush:hidden"));
  EXPECT_EQ(get(*engine_, ns_, "k").status, CellStatus::Miss);
  points_.release("domain:demoting");
  points_.release("flush:hidden");
  evicting.get();
  flushing.get();
  EXPECT_EQ(get(*engine_, ns_, "k").status, CellStatus::Miss);
  engine_->flush(ns_);
  ASSERT_TRUE(settled());
  EXPECT_EQ(counter("feature_cache_namespace_nvm_items"), 0);
  EXPECT_EQ(counter("feature_cache_namespace_nvm_used_bytes"), 0);
}

// Buffer, device, and the moment between them: the key is there all the time.
TEST_F(NvmRaces, NoMissWhileARegionIsHandedOver) {
  put(*engine_, ns_, "k", "here");
  points_.block("nvm:region_full");
  points_.block("nvm:header_written");
  points_.block("nvm:region_written");
  auto pushing = in_thread([&] {
    for (int i = 0; i < 900; ++i) put(*engine_, ns_, filler(i), std::string(284, 'x'));
  });
  for (const char* point : {"nvm:region_full", "nvm:header_written", "nvm:region_written"}) {
    ASSERT_TRUE(points_.wait_blocked(point)) << point;
    const Got got = get(*engine_, ns_, "k");
    EXPECT_EQ(got.status, CellStatus::HitNvm) << point;
    EXPECT_EQ(got.value, "here");
    EXPECT_FALSE(on_device("k")) << "it is read from the buffer until the write is done";
    points_.release(point);
  }
  pushing.get();
  ASSERT_TRUE(settled());
  EXPECT_TRUE(on_device("k"));
  EXPECT_EQ(value_of("k"), "here");
}

// A key that is overwritten and erased while its region waits to be written is not in the list.
TEST_F(NvmRaces, WritesWhileARegionIsWrittenWin) {
  put(*engine_, ns_, "a", "old");
  put(*engine_, ns_, "b", "old");
  points_.block("nvm:header_written");
  auto pushing = in_thread([&] {
    for (int i = 0; i < 900; ++i) put(*engine_, ns_, filler(i), std::string(284, 'x'));
  });
  ASSERT_TRUE(points_.wait_blocked("nvm:header_written"));
  put(*engine_, ns_, "a", "new", other_);
  erase(*engine_, ns_, "b");
  points_.release("nvm:header_written");
  pushing.get();
  ASSERT_TRUE(settled());
  EXPECT_EQ(value_of("a"), "new");
  EXPECT_EQ(get(*engine_, ns_, "b").status, CellStatus::Miss);
}

// ---- reads
// ---------------------------------------------------------------------------------------

TEST_F(NvmRaces, PutDuringAReadWins) {
  bring_to_device("k", "old");
  Held held = hold({"k"});
  ASSERT_EQ(held.cells.size(), 1U);
  put(*engine_, ns_, "k", "new");
  const auto answers = read(held);
  ASSERT_TRUE(answers->wait(1));
  engine_->maintain();  // what was read is not promoted over the newer value
  EXPECT_EQ(value_of("k"), "new");
  EXPECT_EQ(counter("feature_cache_namespace_nvm_promoted_total"), 0);
}

TEST_F(NvmRaces, EraseDuringAReadWins) {
  bring_to_device("k", "old");
  Held held = hold({"k"});
  erase(*engine_, ns_, "k");
  const auto answers = read(held);
  ASSERT_TRUE(answers->wait(1));
  engine_->maintain();
  EXPECT_EQ(get(*engine_, ns_, "k").status, CellStatus::Miss);
}

TEST_F(NvmRaces, FlushDuringAReadWins) {
  bring_to_device("k", "old");
  Held held = hold({"k"});
  engine_->flush(ns_);
  const auto answers = read(held);
  ASSERT_TRUE(answers->wait(1));
  engine_->maintain();
  EXPECT_EQ(get(*engine_, ns_, "k").status, CellStatus::Miss);
  ASSERT_TRUE(settled());
  EXPECT_EQ(counter("feature_cache_namespace_nvm_used_bytes"), 0);
}

// The store's value came in first, under the token that the lookup took.
TEST_F(NvmRaces, InstallDuringAReadWins) {
  bring_to_device("k", "old");
  Held held = hold({"k"});
  EXPECT_EQ(install(*engine_, ns_, "k", "fetched", held.cells[0].token), InstallStatus::Installed);
  const auto answers = read(held);
  ASSERT_TRUE(answers->wait(1));
  engine_->maintain();
  EXPECT_EQ(value_of("k"), "fetched");
}

TEST_F(NvmRaces, AnInstallWhoseTokenAPutVoidedDuringAReadLoses) {
  bring_to_device("k", "old");
  Held held = hold({"k"});
  put(*engine_, ns_, "k", "new");
  EXPECT_EQ(install(*engine_, ns_, "k", "fetched", held.cells[0].token), InstallStatus::TokenVoid);
  const auto answers = read(held);
  ASSERT_TRUE(answers->wait(1));
  EXPECT_EQ(value_of("k"), "new");
}

// The region of a held cell is emptied and would be used again: the pin keeps what was promised.
TEST_F(NvmRaces, ARegionIsNotUsedAgainWhileARecordOfItIsToBeRead) {
  bring_to_device("k", "promised");
  Held held = hold({"k"});
  ASSERT_EQ(held.cells.size(), 1U);
  // Several times all that the namespace may have.
  const std::size_t from = pushed_;
  push([&] { return pushed_ > from + 20'000; });
  EXPECT_TRUE(eventually([&] { return regions("emptying") == 1; })) << "the pinned one";
  const double demoted = counter("feature_cache_namespace_nvm_demoted_total");
  SCOPED_TRACE("one slow read must not stop all demotions");
  push([&] { return counter("feature_cache_namespace_nvm_demoted_total") > demoted + 3'000; });
  const auto answers = read(held);
  ASSERT_TRUE(answers->wait(1));
  EXPECT_EQ(answers->at(0).status, CellStatus::HitNvm);
  EXPECT_EQ(answers->at(0).value, "promised");
  EXPECT_TRUE(settled()) << "it is free again";
}

// ---- reinsertion
// ---------------------------------------------------------------------------------

class NvmReinsertion : public NvmRaces {
 protected:
  void SetUp() override {
    EngineConfig config = usual_config(folder_.file("nvm"));
    config.namespaces[0].nvm.promotion = PromotionKind::Never;
    start(config);
    bring_to_device("k", "old");
    get(*engine_, ns_, "k");  // hit: worth keeping
    points_.block("nvm:reinserting");
    pushing_ = in_thread([this] {
      // The writer needs its time; it stops at the point, and this with it.
      eventually([this] {
        for (int i = 0; i < 200; ++i) {
          put(*engine_, ns_, filler(pushed_++), std::string(284, 'x'));
        }
        return points_.reached("nvm:reinserting") != 0;
      });
    });
    ASSERT_TRUE(points_.wait_blocked("nvm:reinserting"));
  }
  void go_on() {
    points_.release("nvm:reinserting");
    pushing_.get();
    ASSERT_TRUE(settled());
  }
  std::future<void> pushing_;
};

TEST_F(NvmReinsertion, KeepsWhatWasHit) {
  EXPECT_EQ(value_of("k"), "old") << "found during the move, too";
  go_on();
  EXPECT_EQ(counter("feature_cache_namespace_nvm_reinserted_total"), 1);
  EXPECT_EQ(value_of("k"), "old");
}

TEST_F(NvmReinsertion, PutDuringAReinsertionWins) {
  put(*engine_, ns_, "k", "new", other_);
  go_on();
  EXPECT_EQ(value_of("k"), "new");
}

TEST_F(NvmReinsertion, EraseDuringAReinsertionWins) {
  erase(*engine_, ns_, "k");
  go_on();
  EXPECT_EQ(get(*engine_, ns_, "k").status, CellStatus::Miss);
}

TEST_F(NvmReinsertion, FlushDuringAReinsertionWins) {
  engine_->flush(ns_);
  go_on();
  EXPECT_EQ(get(*engine_, ns_, "k").status, CellStatus::Miss);
  engine_->flush(ns_);
  ASSERT_TRUE(settled());
  EXPECT_EQ(counter("feature_cache_namespace_nvm_items"), 0);
}

// A cell that was looked up before the move is read from the old place.
TEST_F(NvmReinsertion, AReadFromBeforeTheMoveFindsTheRecord) {
  Held held = hold({"k"});
  ASSERT_EQ(held.cells.size(), 1U);
  points_.release("nvm:reinserting");
  pushing_.get();
  EXPECT_TRUE(eventually([&] { return regions("emptying") == 1; })) << "the held one's";
  const auto answers = read(held);
  ASSERT_TRUE(answers->wait(1));
  EXPECT_EQ(answers->at(0).value, "old");
  EXPECT_TRUE(settled());
}

// ---- on the way up
// -------------------------------------------------------------------------------

class NvmPromotion : public NvmRaces {
 protected:
  void SetUp() override {
    NvmRaces::SetUp();
    bring_to_device("k", "old");
    ASSERT_TRUE(settled());  // nothing comes up while the device has its hands full
    EXPECT_EQ(get(*engine_, ns_, "k").status, CellStatus::HitNvm);
    points_.block("promote:filled");
    // A read's answer comes before its promotion is asked for.
    promoting_ = in_thread([this] {
      eventually([this] {
        engine_->maintain();
        return points_.reached("promote:filled") != 0;
      });
    });
    ASSERT_TRUE(points_.wait_blocked("promote:filled"));
  }
  void go_on() {
    points_.release("promote:filled");
    promoting_.get();
  }
  std::future<void> promoting_;
};

TEST_F(NvmPromotion, NothingInBetween) {
  EXPECT_EQ(value_of("k"), "old");
  go_on();
  EXPECT_EQ(get(*engine_, ns_, "k").status, CellStatus::HitDram);
  EXPECT_EQ(value_of("k"), "old");
}

TEST_F(NvmPromotion, PutDuringAPromotionWins) {
  put(*engine_, ns_, "k", "new", other_);
  go_on();
  EXPECT_EQ(value_of("k"), "new");
}

TEST_F(NvmPromotion, EraseDuringAPromotionWins) {
  erase(*engine_, ns_, "k");
  go_on();
  EXPECT_EQ(get(*engine_, ns_, "k").status, CellStatus::Miss);
}

TEST_F(NvmPromotion, FlushDuringAPromotionWins) {
  points_.block("flush:hidden");
  auto flushing = in_thread([&] { engine_->flush(ns_); });
  ASSERT_TRUE(points_.wait_blocked("flush:hidden"));
  go_on();
  EXPECT_EQ(get(*engine_, ns_, "k").status, CellStatus::Miss);
  points_.release("flush:hidden");
  flushing.get();
  EXPECT_EQ(get(*engine_, ns_, "k").status, CellStatus::Miss);
  EXPECT_EQ(counter("feature_cache_domain_items"), 0);
}

// ---- the queue of reads
// --------------------------------------------------------------------------

class NvmReads : public NvmRaces {
 protected:
  void SetUp() override {
    EngineConfig config = usual_config(folder_.file("nvm"));
    config.namespaces[0].nvm.promotion = PromotionKind::Never;
    config.namespaces[0].store = "store";
    config.namespaces[0].speculative = {.enabled = true, .after_us = 5'000};
    config.nvm.queue_depth = 4;
    config.nvm.coalesce_gap_bytes = 0;
    config.nvm.queued_reads = 600;
    start(config);
    push([&] { return pushed_ >= 4000; });
    ASSERT_TRUE(settled());
  }
  // Every 15th filler: no two in one block, so each is a read of its own.
  Held apart(std::size_t count, std::size_t from = 0) {
    std::vector<std::string> keys;
    for (std::size_t i = 0; i < count; ++i) keys.push_back(filler(from + 15 * i));
    Held held = hold(keys);
    EXPECT_EQ(held.cells.size(), count);
    return held;
  }
};

TEST_F(NvmReads, ASmallBatchDoesNotWaitForAHugeOne) {
  fault_->add(FaultRule::delay(2'000'000).reads());
  Held huge = apart(200);
  Held small = apart(2, 7);
  const auto first = read(huge);
  ASSERT_TRUE(first->wait(8));
  const auto second = read(small);
  ASSERT_TRUE(second->wait(2));
  EXPECT_LT(first->count(), 60U) << "the small batch had its turns between those of the huge one";
  ASSERT_TRUE(first->wait(200));
}

TEST_F(NvmReads, OneRecordIsReadOnceForAllThatWaitForIt) {
  const int stall = fault_->add(FaultRule::stall().reads());
  const double before = counter("feature_cache_nvm_device_reads_total");
  std::vector<Held> held;
  std::vector<std::shared_ptr<Answers>> answers;
  for (int i = 0; i < 5; ++i) held.push_back(apart(3));
  for (Held& one : held) answers.push_back(read(one));
  EXPECT_TRUE(eventually([&] { return counter("feature_cache_nvm_reads_shared_total") == 12; }));
  fault_->remove(stall);
  for (std::size_t i = 0; i < answers.size(); ++i) {
    ASSERT_TRUE(answers[i]->wait(3));
    EXPECT_EQ(answers[i]->at(2).value, patterned(filler(30), 1, 284));
  }
  EXPECT_EQ(counter("feature_cache_nvm_device_reads_total") - before, 3);
}

TEST_F(NvmReads, MoreThanTheQueueHoldsIsThrottled) {
  const int stall = fault_->add(FaultRule::stall().reads());
  std::vector<std::string> keys;
  for (std::size_t i = 0; i < 1500; ++i) keys.push_back(filler(i));
  Held held = hold(keys);
  ASSERT_EQ(held.cells.size(), 1500U);
  const auto answers = read(held);
  ASSERT_TRUE(answers->wait(900));
  fault_->remove(stall);
  ASSERT_TRUE(answers->wait(1500));
  std::size_t throttled = 0;
  for (std::uint32_t i = 0; i < 1500; ++i) {
    const Answers::One one = answers->at(i);
    if (one.status == CellStatus::Throttled) ++throttled;
    if (one.status == CellStatus::HitNvm) {
      EXPECT_EQ(one.value, patterned(filler(i), 1, 284));
    }
  }
  EXPECT_EQ(throttled, 900U);
  EXPECT_EQ(counter("feature_cache_nvm_reads_refused_total"), 900);
  EXPECT_TRUE(eventually([&] { return counter("feature_cache_nvm_cells_queued") == 0; }));
}

TEST_F(NvmReads, WhatNobodyWantsIsNotRead) {
  const int stall = fault_->add(FaultRule::stall().reads());
  Held held = apart(50);
  const auto answers = read(held);
  EXPECT_TRUE(eventually([&] { return counter("feature_cache_nvm_reads_in_flight") == 4; }));
  const double reads = counter("feature_cache_nvm_device_reads_total");
  answers->leave();
  fault_->remove(stall);
  ASSERT_TRUE(answers->wait(50)) << "every cell is answered all the same";
  EXPECT_LE(counter("feature_cache_nvm_device_reads_total") - reads, 8);
  EXPECT_GE(counter("feature_cache_nvm_reads_abandoned_total"), 42);
  EXPECT_TRUE(settled());
}

TEST_F(NvmReads, LateReadsAreNamedOnceAndAnsweredAllTheSame) {
  const int stall = fault_->add(FaultRule::stall().reads());
  Held held = apart(8);
  const auto answers = read(held);
  EXPECT_TRUE(eventually([&] { return answers->late_ones().size() >= 4; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(answers->late_ones().size(), 4U)
      << "four are with the device; what waits for its turn is not late";
  fault_->remove(stall);
  ASSERT_TRUE(answers->wait(8));
  for (std::uint32_t i = 0; i < 8; ++i) EXPECT_EQ(answers->at(i).status, CellStatus::HitNvm);
}

TEST_F(NvmReads, AnEngineThatEndsAnswersWhatWaits) {
  fault_->add(FaultRule::delay(30'000'000).reads());
  Held held = apart(40);
  const auto answers = read(held);
  ASSERT_TRUE(eventually([&] { return counter("feature_cache_nvm_reads_in_flight") == 4; }));
  engine_.reset();
  EXPECT_EQ(answers->count(), 40U);
}

}  // namespace
}  // namespace fc::testing
