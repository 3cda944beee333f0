// One interleaving each: a thread is stopped at a named point while another does what must not
// break it. docs: "Rules that keep it right" in the architecture.
#include <future>
#include <thread>

#include "support.hpp"
#include "testing/manual_clock.hpp"
#include "testing/sequence_point.hpp"

namespace fc::testing {
namespace {

class Sequences : public ::testing::Test {
 protected:
  Sequences() {
    EngineConfig config = engine_config(
        8 * kMiB, {name_space("pin", {domain("lasting", kMiB, PolicyKind::Lru),
                                      domain("brief", 512 * kKiB, PolicyKind::Lru, 10'000)})});
    config.namespaces[0].domains[1].refresh_ahead = 0.5;
    engine_ = make_engine(config, clock_, false);
    ns_ = engine_->find_namespace("pin");
    brief_ = engine_->find_domain(ns_, "brief");
  }
  template <class Call>
  static std::future<void> in_thread(Call call) {
    return std::async(std::launch::async, std::move(call));
  }
  double evictions() { return Counters::of(*engine_).sum("feature_cache_domain_evictions_total"); }
  double kept() { return Counters::of(*engine_).sum("feature_cache_domain_kept_total"); }

  SequencePoints points_;  // first in, last out: threads of a failed test must not hang
  ManualClock clock_;
  std::unique_ptr<Engine> engine_;
  NamespaceIndex ns_ = kNoNamespace;
  DomainIndex brief_ = kNoDomain;
};

// ---- tokens
// ---------------------------------------------------------------------------------------

// A get that misses while a put is being published: whatever token it took, the put voids it.
TEST_F(Sequences, TokenTakenWhileAPutIsPublishedIsVoidAfterIt) {
  points_.block("write:publishing");
  auto putting = in_thread([&] { put(*engine_, ns_, "k", "newer"); });
  ASSERT_TRUE(points_.wait_blocked("write:publishing"));
  const Got got = get(*engine_, ns_, "k");
  points_.release("write:publishing");
  putting.get();
  ASSERT_EQ(got.status, CellStatus::Miss);
  EXPECT_FALSE(engine_->token_alive(ns_, "k", *got.token));
  EXPECT_EQ(install(*engine_, ns_, "k", "older", *got.token), InstallStatus::TokenVoid);
  EXPECT_EQ(get(*engine_, ns_, "k").value, "newer");
}

// The same of a refresh: the hit that asked for it is older than the put.
TEST_F(Sequences, RefreshAskedWhileAPutIsPublishedIsVoidAfterIt) {
  put(*engine_, ns_, "k", "old", brief_);
  for (int i = 0; i < 4; ++i) get(*engine_, ns_, "k");
  clock_.advance(6'000);
  points_.block("write:publishing");
  auto putting = in_thread([&] { put(*engine_, ns_, "k", "newer", brief_); });
  ASSERT_TRUE(points_.wait_blocked("write:publishing"));
  const Got got = get(*engine_, ns_, "k");
  points_.release("write:publishing");
  putting.get();
  ASSERT_EQ(got.value, "old");
  ASSERT_TRUE(got.refresh);
  EXPECT_EQ(install(*engine_, ns_, "k", "older", *got.refresh_token), InstallStatus::TokenVoid);
  EXPECT_EQ(get(*engine_, ns_, "k").value, "newer");
}

TEST_F(Sequences, TokenTakenWhileAKeyIsErasedIsVoidAfterIt) {
  points_.block("erase:removing");
  auto erasing = in_thread([&] { erase(*engine_, ns_, "k"); });
  ASSERT_TRUE(points_.wait_blocked("erase:removing"));
  const Got got = get(*engine_, ns_, "k");
  points_.release("erase:removing");
  erasing.get();
  ASSERT_EQ(got.status, CellStatus::Miss);
  EXPECT_EQ(install(*engine_, ns_, "k", "older", *got.token), InstallStatus::TokenVoid);
  EXPECT_EQ(get(*engine_, ns_, "k").status, CellStatus::Miss);
}

// A put comes between an install's copy and its publication: the late result loses.
TEST_F(Sequences, PutDuringAnInstallWins) {
  const Token token = *get(*engine_, ns_, "k").token;
  points_.block("write:filled");
  InstallStatus status{};
  auto installing = in_thread([&] { status = install(*engine_, ns_, "k", "older", token); });
  ASSERT_TRUE(points_.wait_blocked("write:filled"));
  put(*engine_, ns_, "k", "newer");
  points_.release("write:filled");
  installing.get();
  EXPECT_EQ(status, InstallStatus::TokenVoid);
  EXPECT_EQ(get(*engine_, ns_, "k").value, "newer");
}

TEST_F(Sequences, EraseDuringAnInstallWins) {
  const Token token = *get(*engine_, ns_, "k").token;
  points_.block("write:filled");
  InstallStatus status{};
  auto installing = in_thread([&] { status = install(*engine_, ns_, "k", "older", token); });
  ASSERT_TRUE(points_.wait_blocked("write:filled"));
  erase(*engine_, ns_, "k");
  points_.release("write:filled");
  installing.get();
  EXPECT_EQ(status, InstallStatus::TokenVoid);
  EXPECT_EQ(get(*engine_, ns_, "k").status, CellStatus::Miss);
}

// ---- flush
// ----------------------------------------------------------------------------------------

// A put that had filled its record when the flush hid all: nothing of it may show after the flush,
// and the flush must not wait for ever.
TEST_F(Sequences, PutThatWasFilledBeforeAFlushIsGoneAfterIt) {
  points_.block("write:filled");
  auto putting = in_thread(
      [&] { EXPECT_EQ(put(*engine_, ns_, "k", "before the flush"), WriteStatus::Stored); });
  ASSERT_TRUE(points_.wait_blocked("write:filled"));
  points_.block("flush:hidden");
  auto flushing = in_thread([&] { engine_->flush(ns_); });
  ASSERT_TRUE(points_.wait_blocked("flush:hidden"));
  points_.release("write:filled");
  putting.get();
  EXPECT_EQ(get(*engine_, ns_, "k").status, CellStatus::Miss);
  points_.release("flush:hidden");
  flushing.get();
  EXPECT_EQ(get(*engine_, ns_, "k").status, CellStatus::Miss);
  EXPECT_EQ(Counters::of(*engine_).sum("feature_cache_domain_items"), 0);
}

// A put that had hardly begun when the whole flush went by: it leaves nothing behind, not even an
// item that nobody can see.
TEST_F(Sequences, PutThatBeganBeforeAFlushLeavesNothing) {
  points_.block("write:begun");
  auto putting = in_thread([&] { put(*engine_, ns_, "k", "before the flush"); });
  ASSERT_TRUE(points_.wait_blocked("write:begun"));
  EXPECT_EQ(engine_->flush(ns_), 0U);
  points_.release("write:begun");
  putting.get();
  EXPECT_EQ(get(*engine_, ns_, "k").status, CellStatus::Miss);
  EXPECT_EQ(Counters::of(*engine_).sum("feature_cache_domain_items"), 0);
}

// An install in that place: its token is of the time before.
TEST_F(Sequences, InstallThatWasFilledBeforeAFlushLoses) {
  const Token token = *get(*engine_, ns_, "k").token;
  points_.block("write:filled");
  InstallStatus status{};
  auto installing = in_thread([&] { status = install(*engine_, ns_, "k", "older", token); });
  ASSERT_TRUE(points_.wait_blocked("write:filled"));
  points_.block("flush:hidden");
  auto flushing = in_thread([&] { engine_->flush(ns_); });
  ASSERT_TRUE(points_.wait_blocked("flush:hidden"));
  points_.release("write:filled");
  installing.get();
  EXPECT_EQ(status, InstallStatus::TokenVoid);
  points_.release("flush:hidden");
  flushing.get();
  EXPECT_EQ(get(*engine_, ns_, "k").status, CellStatus::Miss);
}

// Once the flush has hidden the old, a get misses, and what it fetches may be kept.
TEST_F(Sequences, AFlushHidesAllBeforeItTakesTheMemoryBack) {
  put(*engine_, ns_, "k", "old");
  points_.block("flush:hidden");
  auto flushing = in_thread([&] { EXPECT_EQ(engine_->flush(ns_), 1U); });
  ASSERT_TRUE(points_.wait_blocked("flush:hidden"));
  const Got got = get(*engine_, ns_, "k");
  points_.release("flush:hidden");
  flushing.get();
  ASSERT_EQ(got.status, CellStatus::Miss);
  EXPECT_EQ(install(*engine_, ns_, "k", "fetched", *got.token), InstallStatus::Installed);
}

// ---- eviction moves items
// ---------------------------------------------------------------------------

class MovingFirst : public Sequences {
 protected:
  // Starts a thread that writes until the item `first` is being moved; stops it there.
  void start_moving() {
    put(*engine_, ns_, "first", patterned("first", 1, 400));
    get(*engine_, ns_, "first");
    points_.block("domain:copied");
    writer_ = in_thread([&] {
      for (int i = 0; i < 4'000; ++i) {
        const std::string key = "k" + std::to_string(i);
        put(*engine_, ns_, key, patterned(key, 1, 400));
      }
    });
    ASSERT_TRUE(points_.wait_blocked("domain:copied"));
    EXPECT_EQ(get(*engine_, ns_, "first").value, patterned("first", 1, 400))
        << "a key that moves is never hidden";
  }
  void finish_moving() {
    points_.release("domain:copied");
    writer_.get();
  }
  void flush_and_expect_nothing() {
    engine_->flush(ns_);
    const Counters counters = Counters::of(*engine_);
    EXPECT_EQ(counters.sum("feature_cache_domain_items"), 0);
    EXPECT_EQ(counters.sum("feature_cache_domain_live_bytes"), 0);
    EXPECT_EQ(counters.sum("feature_cache_domain_payload_bytes"), 0);
  }
  std::future<void> writer_;
};

TEST_F(MovingFirst, IsThereBeforeAndAfter) {
  start_moving();
  points_.release("domain:copied");
  EXPECT_EQ(get(*engine_, ns_, "first").value, patterned("first", 1, 400));
  writer_.get();
  EXPECT_GT(kept(), 0);
  flush_and_expect_nothing();
}

TEST_F(MovingFirst, EraseWhileItIsCopiedIsNotUndone) {
  start_moving();
  erase(*engine_, ns_, "first");
  EXPECT_EQ(get(*engine_, ns_, "first").status, CellStatus::Miss);
  finish_moving();
  EXPECT_EQ(get(*engine_, ns_, "first").status, CellStatus::Miss);
  flush_and_expect_nothing();
}

TEST_F(MovingFirst, OverwriteInAnotherDomainWhileItIsCopiedIsNotUndone) {
  start_moving();
  put(*engine_, ns_, "first", "newer", brief_);  // the moving domain's lock is held: another one
  EXPECT_EQ(get(*engine_, ns_, "first").value, "newer");
  finish_moving();
  EXPECT_EQ(get(*engine_, ns_, "first").value, "newer");
  flush_and_expect_nothing();
}

// ---- readers and the memory they look at
// ------------------------------------------------------------

// A value of many segments is erased, its memory given back, while a reader is in its middle.
TEST_F(Sequences, LargeValueIsReadToItsEndWhileItIsErased) {
  const std::string value = patterned("large", 1, 300'000);
  put(*engine_, ns_, "large", value);
  points_.block("get:copying_large");
  Got got;
  auto reading = in_thread([&] { got = get(*engine_, ns_, "large"); });
  ASSERT_TRUE(points_.wait_blocked("get:copying_large"));
  erase(*engine_, ns_, "large");
  // Gives dead segments back, and asks for new ones.
  for (int i = 0; i < 500; ++i) {
    const std::string key = "k" + std::to_string(i);
    put(*engine_, ns_, key, patterned(key, 1, 1000));
  }
  points_.release("get:copying_large");
  reading.get();
  EXPECT_EQ(got.status, CellStatus::HitDram);
  EXPECT_TRUE(got.value == value);
  EXPECT_EQ(get(*engine_, ns_, "large").status, CellStatus::Miss);
}

TEST_F(Sequences, LargeValueIsReadToItsEndWhileItIsOverwrittenAndFlushed) {
  const std::string value = patterned("large", 1, 300'000);
  put(*engine_, ns_, "large", value);
  points_.block("get:copying_large");
  Got got;
  auto reading = in_thread([&] { got = get(*engine_, ns_, "large"); });
  ASSERT_TRUE(points_.wait_blocked("get:copying_large"));
  put(*engine_, ns_, "large", patterned("large", 2, 300'000));
  engine_->flush(ns_);
  put(*engine_, ns_, "large", patterned("large", 3, 300'000));
  points_.release("get:copying_large");
  reading.get();
  EXPECT_TRUE(got.value == value);
  EXPECT_TRUE(get(*engine_, ns_, "large").value == patterned("large", 3, 300'000));
}

}  // namespace
}  // namespace fc::testing
