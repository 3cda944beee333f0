// The request path of a node without gRPC: single flight, deadlines, what a store may answer and
// what becomes of it. The test is the fetch loop: it takes batches and answers them.

#include "node_support.hpp"

namespace fc::testing {
namespace {

TEST_F(NodeTest, FetchesWhatIsAbsentOnceAndKeepsIt) {
  put("cached", "from DRAM");
  auto answer = ask(Ask{.columns = {{"pin", {"a", "cached", "b"}}, {"user", {"u"}}}});
  const auto batch = take();
  ASSERT_NE(batch, nullptr);
  EXPECT_EQ(keys_of(*batch), (std::vector<std::string>{"pin:a", "pin:b", "user:u"}))
      << "one call may answer several namespaces";
  EXPECT_EQ(batch->priority(), FetchPriority::Live);
  EXPECT_GT(batch->seconds_left(), 1.0);
  EXPECT_FALSE(ready(answer));
  complete(*batch, {found("A"), found(""), found("U")});
  const Answer got = answer.get();
  EXPECT_EQ(got.request_id, 77U);
  EXPECT_EQ(got.columns[0],
            (std::vector<Cell>{cell(CellStatus::Fetched, "A"),
                               cell(CellStatus::HitDram, "from DRAM"), cell(CellStatus::Fetched)}));
  EXPECT_EQ(got.columns[1], (std::vector<Cell>{cell(CellStatus::Fetched, "U")}));
  EXPECT_EQ(cached("a"), cell(CellStatus::HitDram, "A"));
  EXPECT_EQ(cached("b"), cell(CellStatus::HitDram));
  EXPECT_EQ(cached("u", "user"), cell(CellStatus::HitDram, "U"));
}

TEST_F(NodeTest, DoesNotAskWithoutAStoreOrPermission) {
  EXPECT_EQ(ask(Ask{.columns = {{"local", {"k"}}}}).get().only(), cell(CellStatus::Miss));
  EXPECT_EQ(cached("k"), cell(CellStatus::Miss));
  EXPECT_EQ(take(0), nullptr);
}

TEST_F(NodeTest, EmptyRequestsAreAnswered) {
  EXPECT_TRUE(ask(Ask{}).get().columns.empty());
  EXPECT_TRUE(ask(Ask{.columns = {{"pin", {}}}}).get().columns.at(0).empty());
}

TEST_F(NodeTest, ConcurrentMissesOfAKeyCauseOneFetch) {
  constexpr std::size_t kThreads = 8;
  std::vector<std::future<Answer>> answers(kThreads);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] { answers[i] = ask("k"); });
  }
  for (std::thread& thread : threads) thread.join();
  auto twice = ask(Ask{.columns = {{"pin", {"k", "k"}}, {"pin", {"k"}}}});
  const auto batch = take();
  ASSERT_NE(batch, nullptr);
  EXPECT_EQ(keys_of(*batch), (std::vector<std::string>{"pin:k"}));
  complete(*batch, {found("once")});
  for (std::future<Answer>& answer : answers) {
    EXPECT_EQ(answer.get().only(), cell(CellStatus::Fetched, "once"));
  }
  const Answer both = twice.get();
  EXPECT_EQ(both.columns[0], (std::vector<Cell>(2, cell(CellStatus::Fetched, "once"))));
  EXPECT_EQ(both.columns[1], (std::vector<Cell>(1, cell(CellStatus::Fetched, "once"))));
  EXPECT_EQ(counter("feature_cache_fetch_keys_total"), 1);
  EXPECT_EQ(counter("feature_cache_flights"), 0);
  EXPECT_EQ(take(0), nullptr);
}

TEST_F(NodeTest, SplitsBatchesAtTheStoresLimit) {
  NodeConfig config = usual_config();
  config.stores[0].max_batch_keys = 3;
  config.stores[0].concurrency = 2;
  start(config);
  auto answer = ask(Ask{.columns = {{"pin", {"a", "b", "c", "d", "e", "f", "g"}}}});
  auto first = take();
  const auto second = take();
  ASSERT_EQ(first->key_count(), 3U);
  ASSERT_EQ(second->key_count(), 3U);
  EXPECT_EQ(take(0), nullptr) << "the store's concurrency is used up";
  complete(*first, std::vector<Given>(3, found("1")));
  const auto third = take();
  ASSERT_NE(third, nullptr) << "an answered call gives its slot back, whoever keeps the batch";
  EXPECT_EQ(third->key_count(), 1U);
  complete(*third, {found("3")});
  EXPECT_FALSE(ready(answer));
  complete(*second, std::vector<Given>(3, found("2")));
  const Answer got = answer.get();
  for (const Cell& one : got.columns[0]) EXPECT_EQ(one.status, CellStatus::Fetched);
}

// ---- what a store may answer
// ----------------------------------------------------------------------

TEST_F(NodeTest, NotFoundIsCachedForItsTimeWhereConfigured) {
  NodeConfig config = usual_config();
  config.engine.namespaces[0].negative_ttl_ms = 300;
  config.engine.namespaces[0].domains[0].ttl_jitter = 0;
  start(config);
  const Given none{FetchedValue::Kind::NotFound, {}};
  auto answer = ask(Ask{.columns = {{"pin", {"k"}}, {"user", {"k"}}}});
  complete(*take(), {none, none});
  EXPECT_EQ(answer.get().columns[1][0], cell(CellStatus::NotFound));
  EXPECT_EQ(cached("k"), cell(CellStatus::NotFound));
  EXPECT_EQ(cached("k", "user"), cell(CellStatus::Miss)) << "no negative TTL: not cached";
  Cell later = cached("k");
  for (int i = 0; i < 200 && later.status == CellStatus::NotFound; ++i) {
    std::this_thread::sleep_for(milliseconds(10));
    later = cached("k");
  }
  EXPECT_EQ(later, cell(CellStatus::Miss)) << "its time is over";
  put("k", "now there");
  EXPECT_EQ(cached("k"), cell(CellStatus::HitDram, "now there"));
}

TEST_F(NodeTest, GarbledMissingOrDroppedAnswersAreErrorsAndNotCached) {
  auto garbled = ask(Ask{.columns = {{"pin", {"a", "b", "c"}}}});
  complete(*take(), {found("A"), {FetchedValue::Kind::Garbled, {}}});
  EXPECT_EQ(garbled.get().columns[0],
            (std::vector<Cell>{cell(CellStatus::Fetched, "A"), cell(CellStatus::Error),
                               cell(CellStatus::Error)}));
  EXPECT_EQ(cached("b"), cell(CellStatus::Miss)) << "an error is no 'not found'";
  EXPECT_EQ(cached("c"), cell(CellStatus::Miss));

  auto dropped = ask("d");
  take().reset();
  EXPECT_EQ(dropped.get().only(), cell(CellStatus::Error));

  auto throttled = ask("e");
  take()->fail(CellStatus::Throttled);
  EXPECT_EQ(throttled.get().only(), cell(CellStatus::Throttled));

  auto excess = ask("f");
  complete(*take(), {found("F"), found("for nobody")});
  EXPECT_EQ(excess.get().only(), cell(CellStatus::Fetched, "F"));
}

TEST_F(NodeTest, AnswersThatPointOutsideTheirBytesAreErrors) {
  auto answer = ask(Ask{.columns = {{"pin", {"a", "b", "c"}}}});
  FetchAnswer wrong;
  wrong.bytes.append("0123456789", 10);
  wrong.values.resize(3);
  for (FetchedValue& value : wrong.values) value.kind = FetchedValue::Kind::Found;
  wrong.values[0].size = 10;
  wrong.values[1].offset = 5;
  wrong.values[1].size = 6;
  wrong.values[2].offset = ~0ull;
  wrong.values[2].size = 1;
  take()->complete(std::move(wrong));
  EXPECT_EQ(answer.get().columns[0],
            (std::vector<Cell>{cell(CellStatus::Fetched, "0123456789"), cell(CellStatus::Error),
                               cell(CellStatus::Error)}));
}

TEST_F(NodeTest, ValueTooLargeForItsDomainIsServedButNotKept) {
  auto answer = ask("k");
  const std::string large = patterned("k", 1, 2 * kMiB);
  complete(*take(), {found(large)});
  EXPECT_TRUE(answer.get().only().value == large);
  EXPECT_EQ(cached("k"), cell(CellStatus::Miss));
  EXPECT_EQ(counter("feature_cache_install_rejected_total"), 1);
}

TEST_F(NodeTest, DomainIsTheCallersHintThenTheStoresThenTheDefault) {
  const auto items = [&](const std::string& name) {
    return Counters::of(*node_).domain("items", "pin", name);
  };
  auto plain = ask("plain");
  complete(*take(), {found("v")});
  plain.get();
  EXPECT_EQ(items("lasting"), 1);
  auto stores = ask("stores");
  complete(*take(), {{FetchedValue::Kind::Found, "v", "brief"}});
  stores.get();
  EXPECT_EQ(items("brief"), 1);
  auto callers = ask(Ask{.columns = {{"pin", {"callers"}}}, .domain = "lasting"});
  complete(*take(), {{FetchedValue::Kind::Found, "v", "brief"}});
  callers.get();
  EXPECT_EQ(items("lasting"), 2);
  auto unknown = ask("unknown");
  complete(*take(), {{FetchedValue::Kind::Found, "v", "no such domain"}});
  unknown.get();
  EXPECT_EQ(items("lasting"), 3);
}

TEST_F(NodeTest, StoresTimeToLiveHolds) {
  auto answer = ask("k");
  complete(*take(), {{FetchedValue::Kind::Found, "v", "brief", 200}});
  answer.get();
  Cell later = cached("k");
  EXPECT_EQ(later, cell(CellStatus::HitDram, "v"));
  for (int i = 0; i < 200 && later.status == CellStatus::HitDram; ++i) {
    std::this_thread::sleep_for(milliseconds(10));
    later = cached("k");
  }
  EXPECT_EQ(later, cell(CellStatus::Miss));
}

// ---- deadlines and limits
// -------------------------------------------------------------------------

TEST_F(NodeTest, AtTheDeadlineTheReplyComesAndSaysWhatIsMissing) {
  put("here", "v");
  const Answer got = ask(Ask{.columns = {{"pin", {"here", "late"}}}, .timeout_ms = 120}).get();
  EXPECT_EQ(got.columns[0],
            (std::vector<Cell>{cell(CellStatus::HitDram, "v"), cell(CellStatus::TimedOut)}));
  EXPECT_GE(got.took, milliseconds(100));
  EXPECT_LT(got.took, milliseconds(1'000)) << "the machine may be busy, but not that busy";
  // The flight outlives its waiter: what it brings is kept, and who comes later joins it.
  auto joined = ask("late");
  const auto batch = take();
  EXPECT_EQ(keys_of(*batch), (std::vector<std::string>{"pin:late"}));
  complete(*batch, {found("kept")});
  EXPECT_EQ(joined.get().only(), cell(CellStatus::Fetched, "kept"));
  EXPECT_EQ(cached("late"), cell(CellStatus::HitDram, "kept"));
  EXPECT_EQ(counter("feature_cache_fetch_keys_total"), 1);
}

TEST_F(NodeTest, WithoutADeadlineTheNamespacesTimeoutHolds) {
  NodeConfig config = usual_config();
  config.engine.namespaces[0].fetch_timeout_ms = 100;
  start(config);
  const Answer got = ask("k", 0).get();
  EXPECT_EQ(got.only(), cell(CellStatus::TimedOut));
  EXPECT_LT(got.took, milliseconds(1'000));
}

TEST_F(NodeTest, HungCallIsAbandonedAtItsTimeoutAndKeepsItsSlot) {
  NodeConfig config = usual_config();
  config.stores[0].timeout_ms = 100;
  config.stores[0].concurrency = 1;
  start(config);
  auto answer = ask("k");
  auto hung = take();
  ASSERT_NE(hung, nullptr);
  const Answer got = answer.get();
  EXPECT_EQ(got.only(), cell(CellStatus::TimedOut));
  EXPECT_LT(got.took, milliseconds(2'000)) << "not the caller's 20 s";
  EXPECT_EQ(hung->seconds_left(), 0.0);
  auto again = ask("k", 5'000);
  EXPECT_EQ(take(50), nullptr) << "a hung store is not piled up on";
  complete(*hung, {found("too late")});
  EXPECT_EQ(cached("k"), cell(CellStatus::Miss)) << "a late answer changes nothing";
  const auto batch = take();
  ASSERT_NE(batch, nullptr) << "the call came back: its slot is free";
  complete(*batch, {found("in time")});
  EXPECT_EQ(again.get().only(), cell(CellStatus::Fetched, "in time"));
  EXPECT_EQ(counter("feature_cache_fetch_abandoned_total"), 1);
  EXPECT_EQ(counter("feature_cache_fetch_late_total"), 1);
}

TEST_F(NodeTest, MissesBeyondTheStoresQueueAreThrottled) {
  NodeConfig config = usual_config();
  config.stores[0].queue_keys = 2;
  start(config);
  auto answer = ask(Ask{.columns = {{"pin", {"a", "b", "c", "d"}}}});
  auto refused = ask("e");
  EXPECT_EQ(refused.get().only(), cell(CellStatus::Throttled));
  complete(*take(), {found("A"), found("B")});
  EXPECT_EQ(answer.get().columns[0],
            (std::vector<Cell>{cell(CellStatus::Fetched, "A"), cell(CellStatus::Fetched, "B"),
                               cell(CellStatus::Throttled), cell(CellStatus::Throttled)}));
  auto later = ask("e");
  complete(*take(), {found("E")});
  EXPECT_EQ(later.get().only(), cell(CellStatus::Fetched, "E"));
}

TEST_F(NodeTest, BatchesBeyondThePendingLimitAreRefused) {
  NodeConfig config = usual_config();
  config.max_pending_batches = 1;
  start(config);
  put("here", "v");
  auto first = ask("a");
  const Answer second = ask("b").get();
  EXPECT_EQ(second.call.code, CallStatus::ResourceExhausted);
  EXPECT_NE(second.call.message.find("limits.max_pending_batches"), std::string::npos);
  EXPECT_EQ(ask("here").get().only(), cell(CellStatus::HitDram, "v")) << "hits wait for nothing";
  complete(*take(), {found("A")});
  EXPECT_EQ(first.get().only(), cell(CellStatus::Fetched, "A"));
  auto third = ask("b");
  complete(*take(), {found("B")});
  EXPECT_EQ(third.get().only(), cell(CellStatus::Fetched, "B"));
}

TEST_F(NodeTest, ReplyLimitThrottlesCachedAndFetchedAlike) {
  NodeConfig config = usual_config();
  config.max_reply_bytes = 1'000;
  start(config);
  put("cached", std::string(600, 'c'));
  put("too much", std::string(600, 't'));
  auto answer = ask(Ask{.columns = {{"pin", {"f1", "cached", "too much", "f2", "f3"}}}});
  complete(*take(), {found(std::string(300, '1')), found(std::string(600, '2')),
                     found(std::string(100, '3'))});
  EXPECT_EQ(answer.get().columns[0],
            (std::vector<Cell>{cell(CellStatus::Fetched, std::string(300, '1')),
                               cell(CellStatus::HitDram, std::string(600, 'c')),
                               cell(CellStatus::Throttled), cell(CellStatus::Throttled),
                               cell(CellStatus::Fetched, std::string(100, '3'))}));
  EXPECT_EQ(cached("f2"), cell(CellStatus::HitDram, std::string(600, '2'))) << "kept all the same";
}

// ---- bad requests
// ---------------------------------------------------------------------------------

TEST_F(NodeTest, RefusesUnknownNamesAndGarbageWithoutHarm) {
  put("k", "v");
  const Answer unknown = ask(Ask{.columns = {{"pin", {"a"}}, {"nope", {"a"}}}}).get();
  EXPECT_EQ(unknown.call.code, CallStatus::NotFound);
  EXPECT_EQ(unknown.call.message, "unknown namespace 'nope'");
  const Answer no_domain = ask(Ask{.columns = {{"pin", {"a"}}}, .domain = "nope"}).get();
  EXPECT_EQ(no_domain.call.code, CallStatus::NotFound);
  EXPECT_EQ(no_domain.call.message, "namespace 'pin' has no domain 'nope'");
  EXPECT_EQ(put("k", "w", "nope").code, CallStatus::NotFound);

  std::mt19937_64 random(seed_of(31));
  for (int i = 0; i < 500; ++i) {
    auto bytes = std::make_shared<std::vector<std::uint8_t>>(random() % 60);
    for (std::uint8_t& byte : *bytes) byte = static_cast<std::uint8_t>(random());
    int answers = 0;
    node_->batch_get({*bytes, bytes}, 1, [&](CallStatus, std::vector<Buffer>) { ++answers; });
    EXPECT_EQ(answers, 1);
    write(*node_, &Node::batch_put, {*bytes, bytes});
    write(*node_, &Node::batch_delete, {*bytes, bytes});
  }
  NodeConfig config = usual_config();
  EXPECT_EQ(take(0), nullptr);
  EXPECT_EQ(cached("k"), cell(CellStatus::HitDram, "v"));
  EXPECT_GT(counter("feature_cache_requests_refused_total"), 100);
}

// One bad column: nothing of the request is done.
TEST_F(NodeTest, PutOfSeveralColumnsIsCheckedBeforeAnyIsWritten) {
  const std::vector<std::string> keys{"k"};
  client::PutRequest request;
  for (const char* ns : {"pin", "nope"}) {
    request.columns.push_back({.keys = column_of(ns, keys), .values = {}, .ttl_ms = {}});
    request.columns.back().values.parts = {"v"};
  }
  EXPECT_EQ(write(*node_, &Node::batch_put, encoded(request)).call.code, CallStatus::NotFound);
  EXPECT_EQ(cached("k"), cell(CellStatus::Miss));
}

// ---- late results lose
// ----------------------------------------------------------------------------

}  // namespace
}  // namespace fc::testing
