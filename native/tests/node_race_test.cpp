// Where fetches meet writes, each other, the background and the node's end.

#include "node_support.hpp"

namespace fc::testing {
namespace {

TEST_F(NodeTest, PutDuringAFlightWins) {
  auto answer = ask("k");
  const auto batch = take();
  put("k", "newer");
  complete(*batch, {found("older")});
  EXPECT_EQ(answer.get().only(), cell(CellStatus::Fetched, "older")) << "asked before the put";
  EXPECT_EQ(cached("k"), cell(CellStatus::HitDram, "newer"));
  EXPECT_EQ(counter("feature_cache_install_void_total"), 1);
}

TEST_F(NodeTest, LateNotFoundLosesToo) {
  auto answer = ask("k");
  const auto batch = take();
  put("k", "newer");
  complete(*batch, {{FetchedValue::Kind::NotFound, {}}});
  answer.get();
  EXPECT_EQ(cached("k"), cell(CellStatus::HitDram, "newer"));
}

TEST_F(NodeTest, GetAfterADeleteDoesNotJoinTheOlderFlight) {
  auto before = ask("k");
  const auto older = take();
  erase("k");
  auto after = ask("k");
  const auto newer = take();
  ASSERT_NE(newer, nullptr) << "it joined the flight of before";
  complete(*older, {found("stale")});
  EXPECT_EQ(before.get().only(), cell(CellStatus::Fetched, "stale"));
  EXPECT_FALSE(ready(after));
  EXPECT_EQ(cached("k"), cell(CellStatus::Miss));
  complete(*newer, {found("fresh")});
  EXPECT_EQ(after.get().only(), cell(CellStatus::Fetched, "fresh"));
  EXPECT_EQ(cached("k"), cell(CellStatus::HitDram, "fresh"));
}

TEST_F(NodeTest, GetAfterAFlushDoesNotJoinTheOlderFlight) {
  auto before = ask("k");
  const auto older = take();
  node_->engine().flush(node_->engine().find_namespace("pin"));
  auto after = ask("k");
  const auto newer = take();
  ASSERT_NE(newer, nullptr);
  complete(*newer, {found("fresh")});
  complete(*older, {found("stale")});
  EXPECT_EQ(before.get().only(), cell(CellStatus::Fetched, "stale"));
  EXPECT_EQ(after.get().only(), cell(CellStatus::Fetched, "fresh"));
  EXPECT_EQ(cached("k"), cell(CellStatus::HitDram, "fresh"));
}

class NodeSequences : public NodeTest {
 protected:
  ~NodeSequences() override {
    // Threads that a failed test left at a point must be gone before the node is.
    points_.reset();
    for (std::future<void>& thread : threads_) thread.wait();
  }
  template <class Call>
  void in_thread(Call call) {
    threads_.push_back(std::async(std::launch::async, std::move(call)));
  }
  std::optional<SequencePoints> points_{std::in_place};
  std::vector<std::future<void>> threads_;
};

// A flight ends between a get's lookup and its join: the get finds the value, it does not fetch.
TEST_F(NodeSequences, GetThatMissedBeforeAFlightEndedDoesNotFetchAgain) {
  auto first = ask("k");
  const auto batch = take();
  points_->block("node:looked_up");
  std::future<Answer> second;
  in_thread([&] { second = ask("k"); });
  ASSERT_TRUE(points_->wait_blocked("node:looked_up"));
  complete(*batch, {found("v")});
  EXPECT_EQ(first.get().only(), cell(CellStatus::Fetched, "v"));
  points_->release("node:looked_up");
  threads_.back().wait();
  EXPECT_EQ(second.get().only(), cell(CellStatus::HitDram, "v"));
  EXPECT_EQ(take(0), nullptr);
  EXPECT_EQ(counter("feature_cache_fetch_keys_total"), 1);
}

// A put comes after a get has missed and before its flight is queued.
TEST_F(NodeSequences, PutBeforeTheFlightIsQueuedWins) {
  points_->block("node:flights_started");
  std::future<Answer> answer;
  in_thread([&] { answer = ask("k"); });
  ASSERT_TRUE(points_->wait_blocked("node:flights_started"));
  put("k", "newer");
  points_->release("node:flights_started");
  threads_.back().wait();
  complete(*take(), {found("older")});
  EXPECT_TRUE(carries_value(answer.get().only().status));
  EXPECT_EQ(cached("k"), cell(CellStatus::HitDram, "newer"));
}

// The value is in the cache, its flight has not ended: a delete now, and nobody sees the value.
TEST_F(NodeSequences, DeleteBetweenInstallAndTheFlightsEndHolds) {
  auto first = ask("k");
  const auto batch = take();
  points_->block("node:installed");
  in_thread([&] { complete(*batch, {found("stale")}); });
  ASSERT_TRUE(points_->wait_blocked("node:installed"));
  erase("k");
  EXPECT_EQ(cached("k"), cell(CellStatus::Miss));
  auto second = ask("k");
  points_->release("node:installed");
  threads_.back().wait();
  EXPECT_EQ(first.get().only(), cell(CellStatus::Fetched, "stale"));
  const auto fresh = take();
  ASSERT_NE(fresh, nullptr) << "the get after the delete joined the flight of before";
  complete(*fresh, {found("fresh")});
  EXPECT_EQ(second.get().only(), cell(CellStatus::Fetched, "fresh"));
  EXPECT_EQ(cached("k"), cell(CellStatus::HitDram, "fresh"));
}

// A get that comes between the value's entry and the flight's end is answered.
TEST_F(NodeSequences, GetsBetweenInstallAndTheFlightsEndAreAnswered) {
  auto first = ask("k");
  const auto batch = take();
  points_->block("node:installed");
  in_thread([&] { complete(*batch, {found("v")}); });
  ASSERT_TRUE(points_->wait_blocked("node:installed"));
  EXPECT_EQ(ask("k").get().only(), cell(CellStatus::HitDram, "v"));
  points_->release("node:installed");
  threads_.back().wait();
  EXPECT_EQ(first.get().only(), cell(CellStatus::Fetched, "v"));
}

// ---- refresh ahead
// --------------------------------------------------------------------------------

class NodeRefresh : public NodeTest {
 protected:
  void SetUp() override {
    NodeConfig config = usual_config();
    config.engine.namespaces[0].domains[0].ttl_ms = 60'000;
    config.engine.namespaces[0].domains[0].refresh_ahead = 0.9;
    config.refresh_keys_per_second = 3;
    start(config);
    std::this_thread::sleep_for(milliseconds(50));  // a budget starts empty or full; see below
  }
  // An item in the last nine tenths of its time from the start, hit often enough to be hot.
  void heat(const std::string& key) {
    PutItem item;
    item.key = key;
    item.value = "old";
    item.ttl_ms = 20'000;
    Engine& engine = node_->engine();
    const NamespaceIndex pin = engine.find_namespace("pin");
    ASSERT_EQ(testing::put(engine, pin, item), WriteStatus::Stored);
    for (int i = 0; i < 4; ++i) testing::get(engine, pin, key);
  }
};

TEST_F(NodeRefresh, HotKeysAreFetchedInTheBackgroundWithinTheBudget) {
  std::vector<std::string> keys;
  for (int i = 0; i < 10; ++i) keys.push_back("hot" + std::to_string(i));
  for (const std::string& key : keys) heat(key);
  const Answer got = ask(Ask{.columns = {{"pin", keys}}}).get();
  for (const Cell& one : got.columns[0]) EXPECT_EQ(one, cell(CellStatus::HitDram, "old"));
  auto live = ask("live");
  const auto first = take();
  ASSERT_NE(first, nullptr);
  EXPECT_EQ(keys_of(*first), (std::vector<std::string>{"pin:live"})) << "who waits goes first";
  complete(*first, {found("L")});
  EXPECT_EQ(live.get().only(), cell(CellStatus::Fetched, "L"));
  const auto refresh = take();
  ASSERT_NE(refresh, nullptr);
  EXPECT_EQ(refresh->priority(), FetchPriority::Background);
  EXPECT_GE(refresh->key_count(), 1U);
  EXPECT_LE(refresh->key_count(), 4U) << "three a second";
  const std::string key = keys_of(*refresh)[0].substr(4);
  const std::string overwritten = keys_of(*refresh).back().substr(4);
  if (overwritten != key) put(overwritten, "newer");
  complete(*refresh, std::vector<Given>(refresh->key_count(), found("refreshed")));
  EXPECT_EQ(cached(key), cell(CellStatus::HitDram, "refreshed"));
  if (overwritten != key) {
    EXPECT_EQ(cached(overwritten), cell(CellStatus::HitDram, "newer")) << "a late result lost";
  }
  EXPECT_GE(counter("feature_cache_refreshes_denied_total"), 6);
}

// ---- the end
// --------------------------------------------------------------------------------------

TEST_F(NodeTest, StopAnswersWhatWaitsAndWakesTheFetchLoops) {
  put("here", "v");
  auto out = ask(Ask{.columns = {{"pin", {"here", "out"}}}});
  const auto batch = take();
  auto queued = ask("queued");
  std::shared_ptr<FetchBatch> woken = batch;
  std::thread loop([&] {
    take(20'000);  // what is queued, or nothing once stopped
    woken = take(20'000);
  });
  const auto started = steady_clock::now();
  node_->stop();
  loop.join();
  EXPECT_LT(steady_clock::now() - started, milliseconds(10'000));
  EXPECT_EQ(woken, nullptr);
  EXPECT_EQ(out.get().columns[0],
            (std::vector<Cell>{cell(CellStatus::HitDram, "v"), cell(CellStatus::TimedOut)}));
  EXPECT_FALSE(carries_value(queued.get().only().status));
  EXPECT_EQ(ask("k").get().call.code, CallStatus::Unavailable);
  complete(*batch, {found("too late")});
  node_->stop();
}

TEST_F(NodeTest, NodeEndsWhileGetsWaitAndBatchesAreOut) {
  auto waiting = ask("k");
  auto batch = take();
  node_.reset();
  EXPECT_EQ(waiting.get().only(), cell(CellStatus::TimedOut));
  complete(*batch, {found("too late")});
  batch.reset();
}

// ---- all at once
// ----------------------------------------------------------------------------------

// A store whose values have versions; a writer that changes the store, then the cache. Whoever asks
// after an acknowledged write sees that version or a newer one, from wherever it comes.
TEST_F(NodeTest, GetsAfterAnAcknowledgedWriteNeverSeeAnOlderValue) {
  constexpr std::size_t kKeys = 40;
  NodeConfig config = usual_config();
  config.stores[0].max_batch_keys = 7;
  start(config);
  std::array<std::atomic<std::uint64_t>, kKeys> store{};
  std::array<std::atomic<std::uint64_t>, kKeys> acknowledged{};
  std::atomic<bool> done{false};
  std::atomic<std::uint64_t> fetched{0};
  std::atomic<std::uint64_t> hits{0};
  const std::uint64_t seed = seed_of(32);
  std::vector<std::thread> loops;
  for (int loop = 0; loop < 2; ++loop) {
    loops.emplace_back([&] {
      while (!done.load()) {
        const auto batch = take(20);
        if (batch == nullptr) continue;
        std::vector<Given> given;
        for (const FetchBatch::Group& group : batch->groups()) {
          for (const std::string_view key : group.keys) {
            given.push_back(found(std::to_string(store[std::stoul(std::string(key))].load())));
          }
        }
        std::this_thread::yield();
        complete(*batch, given);
      }
    });
  }
  std::thread writer([&] {
    std::mt19937_64 random(seed);
    for (std::size_t round = 0; round < scaled(20'000); ++round) {
      const std::size_t number = random() % kKeys;
      const std::uint64_t version = store[number].load() + 1;
      store[number].store(version);
      if (random() % 3 == 0) {
        put(std::to_string(number), std::to_string(version));
      } else {
        erase(std::to_string(number));
      }
      acknowledged[number].store(version);
      if (random() % 4 == 0) std::this_thread::yield();
    }
    done.store(true);
  });
  std::vector<std::thread> readers;
  for (std::uint64_t reader = 0; reader < 2; ++reader) {
    readers.emplace_back([&, reader] {
      std::mt19937_64 random(seed + 1 + reader);
      while (!done.load()) {
        std::vector<std::string> keys;
        std::vector<std::uint64_t> least;
        for (int i = 0; i < 5; ++i) {
          const std::size_t number = random() % kKeys;
          keys.push_back(std::to_string(number));
          least.push_back(acknowledged[number].load());
        }
        const Answer got = ask(Ask{.columns = {{"pin", keys}}}).get();
        for (std::size_t i = 0; i < keys.size(); ++i) {
          const Cell& one = got.columns.at(0).at(i);
          if (!carries_value(one.status)) {
            ASSERT_TRUE(done.load())
                << "only the end leaves a cell without a value: " << static_cast<int>(one.status);
            continue;
          }
          (one.status == CellStatus::Fetched ? fetched : hits).fetch_add(1);
          ASSERT_GE(std::stoull(one.value), least[i]) << "key " << keys[i];
        }
      }
    });
  }
  writer.join();
  for (std::thread& loop : loops) loop.join();
  node_->stop();  // answers the readers whose batches nobody takes any more
  for (std::thread& reader : readers) reader.join();
  EXPECT_GT(fetched.load(), 200U);
  EXPECT_GT(hits.load(), 200U);
}

}  // namespace
}  // namespace fc::testing
