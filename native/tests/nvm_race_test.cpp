// One interleaving each, between the tiers: a thread is stopped at a named point, or a cell is held
// between its lookup and its read, while something else happens to the key. An older value never
// comes back, and a present one never reads as a miss (nvm/region_writer.hpp lists the races).
#include "nvm_race_support.hpp"

namespace fc::testing {
namespace {

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
