// The request path of a node without gRPC: single flight, deadlines, what a store may answer and
// what becomes of it. The test is the fetch loop: it takes batches and answers them.
#include "feature_cache/node.hpp"

#include <atomic>
#include <chrono>
#include <future>
#include <map>
#include <thread>

#include "client/request.hpp"
#include "feature_cache/reply.hpp"
#include "support.hpp"
#include "testing/sequence_point.hpp"

namespace fc::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

struct Cell {
  CellStatus status = CellStatus::Unspecified;
  std::string value;
  friend bool operator==(const Cell&, const Cell&) = default;
  friend void PrintTo(const Cell& cell, std::ostream* to) {
    *to << static_cast<int>(cell.status) << " '" << cell.value.substr(0, 40) << "'";
  }
};
Cell cell(CellStatus status, std::string value = {}) {
  return {status, std::move(value)};
}

struct Answer {
  CallStatus call;
  std::vector<std::vector<Cell>> columns;
  std::uint64_t request_id = 0;
  milliseconds took{0};
  const Cell& only() const { return columns.at(0).at(0); }
};

struct Ask {
  std::vector<std::pair<std::string, std::vector<std::string>>> columns;
  std::uint64_t timeout_ms = 20'000;
  bool cache_only = false;
  std::string domain{};
};

template <class Request>
RequestBytes encoded(const Request& request) {
  auto bytes = std::make_shared<std::vector<std::uint8_t>>(request.size());
  request.write(bytes->data());
  return {*bytes, bytes};
}

client::KeyColumn column_of(std::string_view ns, const std::vector<std::string>& keys,
                            std::string_view domain = {}) {
  client::KeyColumn column{.name_space = ns, .domain = domain, .ids = {}, .keys = {}};
  column.keys.parts.assign(keys.begin(), keys.end());
  return column;
}

Answer parsed(CallStatus call, const std::vector<Buffer>& pieces) {
  Answer answer;
  answer.call = std::move(call);
  if (!answer.call.ok()) return answer;
  std::vector<Reply::Piece> views;
  for (const Buffer& piece : pieces) views.emplace_back(piece.data(), piece.size());
  Reply reply;
  EXPECT_EQ(Reply::gather(views, reply), ReplyFault::None);
  answer.request_id = reply.request_id();
  for (std::size_t c = 0; c < reply.columns(); ++c) {
    const Reply::Column& column = reply.column(c);
    std::vector<Cell> cells;
    std::size_t at = 0;
    for (std::size_t i = 0; i < column.statuses.size(); ++i) {
      const auto status = static_cast<CellStatus>(column.statuses[i]);
      EXPECT_TRUE(carries_value(status) || column.value_lengths[i] == 0);
      cells.push_back(
          cell(status, std::string(reinterpret_cast<const char*>(column.values.data()) + at,
                                   column.value_lengths[i])));
      at += column.value_lengths[i];
    }
    answer.columns.push_back(std::move(cells));
  }
  return answer;
}

class NodeTest : public ::testing::Test {
 protected:
  static NodeConfig usual_config() {
    NodeConfig config;
    config.engine = engine_config(
        8 * kMiB,
        {name_space("pin",
                    {domain("lasting", kMiB), domain("brief", kMiB, PolicyKind::S3Fifo, 60'000)}),
         name_space("user", {domain("all", kMiB)}), name_space("local", {domain("all", kMiB)})});
    config.engine.namespaces[0].store = "store";
    config.engine.namespaces[1].store = "store";
    config.engine.namespaces[0].negative_ttl_ms = 60'000;
    StoreConfig store;
    store.name = "store";
    store.timeout_ms = 10'000;
    config.stores.push_back(store);
    return config;
  }
  void start(const NodeConfig& config) { node_ = make_node(config); }
  void SetUp() override { start(usual_config()); }

  // Sends a BatchGet; the future is ready when `done` was called (once, or this throws).
  std::future<Answer> ask(const Ask& what) {
    client::GetRequest request;
    request.request_id = 77;
    request.cache_only = what.cache_only;
    for (const auto& [ns, keys] : what.columns) {
      request.columns.push_back(column_of(ns, keys, what.domain));
    }
    auto promise = std::make_shared<std::promise<Answer>>();
    const auto started = steady_clock::now();
    node_->batch_get(encoded(request), what.timeout_ms,
                     [promise, started](CallStatus call, std::vector<Buffer> pieces) {
                       Answer answer = parsed(std::move(call), pieces);
                       answer.took =
                           std::chrono::duration_cast<milliseconds>(steady_clock::now() - started);
                       promise->set_value(std::move(answer));
                     });
    return promise->get_future();
  }
  std::future<Answer> ask(const std::string& key, std::uint64_t timeout_ms = 20'000) {
    return ask(Ask{.columns = {{"pin", {key}}}, .timeout_ms = timeout_ms});
  }
  static bool ready(const std::future<Answer>& answer) {
    return answer.wait_for(milliseconds(0)) == std::future_status::ready;
  }
  // What a call that cannot wait says.
  Cell cached(const std::string& key, const std::string& ns = "pin") {
    return ask(Ask{.columns = {{ns, {key}}}, .cache_only = true}).get().only();
  }
  CallStatus put(const std::string& key, const std::string& value, const std::string& domain = {}) {
    const std::vector<std::string> keys{key};
    client::PutRequest request;
    request.columns.push_back({.keys = column_of("pin", keys, domain), .values = {}, .ttl_ms = {}});
    request.columns[0].values.parts = {value};
    std::vector<Buffer> reply;
    return node_->batch_put(encoded(request), reply);
  }
  CallStatus erase(const std::string& key) {
    const std::vector<std::string> keys{key};
    client::DeleteRequest request;
    request.columns.push_back(column_of("pin", keys));
    std::vector<Buffer> reply;
    return node_->batch_delete(encoded(request), reply);
  }
  std::shared_ptr<FetchBatch> take(std::uint64_t wait_ms = 10'000) {
    return node_->take_fetch("store", wait_ms);
  }
  static std::vector<std::string> keys_of(const FetchBatch& batch) {
    std::vector<std::string> keys;
    for (const FetchBatch::Group& group : batch.groups()) {
      for (const std::string_view key : group.keys) {
        keys.push_back(std::string(group.ns) + ":" + std::string(key));
      }
    }
    EXPECT_EQ(keys.size(), batch.key_count());
    return keys;
  }
  struct Given {
    FetchedValue::Kind kind = FetchedValue::Kind::Found;
    std::string value;
    std::string_view domain{};
    std::uint64_t ttl_ms = 0;
  };
  static void complete(FetchBatch& batch, const std::vector<Given>& given) {
    FetchAnswer answer;
    for (const Given& one : given) {
      FetchedValue value;
      value.kind = one.kind;
      value.offset = answer.bytes.size();
      value.size = static_cast<std::uint32_t>(one.value.size());
      value.domain_hint = one.domain;
      value.ttl_ms = one.ttl_ms;
      answer.bytes.append(one.value.data(), one.value.size());
      answer.values.push_back(value);
    }
    batch.complete(std::move(answer));
  }
  static Given found(std::string value) { return {FetchedValue::Kind::Found, std::move(value)}; }
  double counter(std::string_view name) { return Counters::of(*node_).sum(name); }

  std::unique_ptr<Node> node_;
};

// ---- reading through
// ------------------------------------------------------------------------------

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
    std::vector<Buffer> reply;
    static_cast<void>(node_->batch_put({*bytes, bytes}, reply));
    static_cast<void>(node_->batch_delete({*bytes, bytes}, reply));
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
  std::vector<Buffer> reply;
  EXPECT_EQ(node_->batch_put(encoded(request), reply).code, CallStatus::NotFound);
  EXPECT_EQ(cached("k"), cell(CellStatus::Miss));
}

// ---- late results lose
// ----------------------------------------------------------------------------

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
