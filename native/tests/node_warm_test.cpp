// What a warm-up asks of a node: its keys come last, enter like any fetched value, and count apart.

#include "feature_cache/engine.hpp"
#include "node_nvm_support.hpp"

namespace fc::testing {
namespace {

using Statuses = std::vector<CellStatus>;

std::vector<WarmKey> keys_to_warm(Node& node, const std::vector<std::string>& keys,
                                  const std::string& ns = "pin", const std::string& domain = {}) {
  std::vector<WarmKey> warm;
  const NamespaceIndex number = node.engine().find_namespace(ns);
  for (const std::string& key : keys) {
    warm.push_back(
        {number, domain.empty() ? kNoDomain : node.engine().find_domain(number, domain), key});
  }
  return warm;
}

std::future<Statuses> warm(Node& node, const std::vector<WarmKey>& keys,
                           std::uint64_t timeout_ms = 20'000) {
  // The keys must outlive their callers, as a plan does.
  auto owned = std::make_shared<std::vector<std::string>>();
  owned->reserve(keys.size());
  std::vector<WarmKey> moved = keys;
  for (WarmKey& key : moved) key.key = owned->emplace_back(key.key);
  const auto promise = std::make_shared<std::promise<Statuses>>();
  node.warm(std::move(moved), owned, timeout_ms, [promise](std::span<const CellStatus> statuses) {
    promise->set_value({statuses.begin(), statuses.end()});
  });
  return promise->get_future();
}

class NodeWarm : public NodeTest {
 protected:
  std::future<Statuses> warm_keys(const std::vector<std::string>& keys,
                                  std::uint64_t timeout_ms = 20'000) {
    return warm(*node_, keys_to_warm(*node_, keys), timeout_ms);
  }
  std::vector<int> held(const std::vector<std::string>& keys, const std::string& ns = "pin") {
    std::vector<std::uint8_t> held(keys.size(), 7);
    node_->held(keys_to_warm(*node_, keys, ns), held);
    return {held.begin(), held.end()};
  }
};

TEST_F(NodeWarm, FetchesWhatIsAbsent) {
  put("b", "held");
  auto done = warm_keys({"a", "b", "c", "d"});
  const auto batch = take();
  EXPECT_EQ(batch->priority(), FetchPriority::Replay);
  EXPECT_EQ(keys_of(*batch), (std::vector<std::string>{"pin:a", "pin:c", "pin:d"}));
  complete(*batch,
           {found("A"), {FetchedValue::Kind::NotFound, {}}, {FetchedValue::Kind::Garbled, {}}});
  EXPECT_EQ(done.get(), (Statuses{CellStatus::Fetched, CellStatus::HitDram, CellStatus::NotFound,
                                  CellStatus::Error}));
  EXPECT_EQ(held({"a", "b", "c", "d", "e"}), (std::vector<int>{1, 1, 1, 0, 0}));
  EXPECT_EQ(cached("a"), cell(CellStatus::HitDram, "A"));
  EXPECT_EQ(cached("b"), cell(CellStatus::HitDram, "held"));
  EXPECT_EQ(cached("c"), cell(CellStatus::NotFound));
  EXPECT_EQ(counter("feature_cache_warmed_keys_total"), 4);
}

TEST_F(NodeWarm, IsNotCountedAsTraffic) {
  put("held", "1");
  const double before = counter("feature_cache_namespace_hits_total") +
                        counter("feature_cache_namespace_misses_total") +
                        counter("feature_cache_cells_total");
  auto done = warm_keys({"a", "held"});
  complete(*take(), {found("A")});
  done.get();
  held({"a", "held", "b"});
  EXPECT_EQ(counter("feature_cache_namespace_hits_total") +
                counter("feature_cache_namespace_misses_total") +
                counter("feature_cache_cells_total"),
            before);
}

TEST_F(NodeWarm, AnswersAtOnceWhereNothingIsToBeFetched) {
  put("a", "1");
  EXPECT_EQ(warm_keys({"a"}).get(), Statuses{CellStatus::HitDram});
  EXPECT_EQ(warm_keys({}).get(), Statuses{});
  EXPECT_EQ(warm(*node_, keys_to_warm(*node_, {"a"}, "local")).get(), Statuses{CellStatus::Miss})
      << "a namespace without a store";
  EXPECT_EQ(take(0), nullptr);
}

TEST_F(NodeWarm, MixesNamespacesAndDomains) {
  std::vector<WarmKey> keys = keys_to_warm(*node_, {"a", "b"}, "pin", "brief");
  const std::vector<std::string> others{"u", "p"};
  keys.insert(keys.begin() + 1, keys_to_warm(*node_, {others[0]}, "user")[0]);
  keys.push_back(keys_to_warm(*node_, {others[1]}, "pin", "lasting")[0]);
  // The views of the temporaries above are gone: name them anew, in the same order.
  const std::vector<std::string> names{"a", "u", "b", "p"};
  for (std::size_t i = 0; i < keys.size(); ++i) keys[i].key = names[i];
  auto done = warm(*node_, keys);
  const auto batch = take();
  EXPECT_EQ(keys_of(*batch), (std::vector<std::string>{"pin:a", "pin:b", "pin:p", "user:u"}));
  complete(*batch, {found("A"), found("B"), {FetchedValue::Kind::NotFound, {}}, found("U")});
  EXPECT_EQ(done.get(), (Statuses{CellStatus::Fetched, CellStatus::Fetched, CellStatus::Fetched,
                                  CellStatus::NotFound}));
  EXPECT_EQ(Counters::of(*node_).at("feature_cache_domain_items{namespace=pin,domain=brief}"), 2);
}

TEST_F(NodeWarm, ComesAfterEverythingElse) {
  auto warmed = warm_keys({"w1", "w2"});
  auto asked = ask("live");
  const auto live = take();
  EXPECT_EQ(live->priority(), FetchPriority::Live);
  EXPECT_EQ(keys_of(*live), std::vector<std::string>{"pin:live"});
  complete(*live, {found("1")});
  asked.get();
  complete(*take(), {found("1"), found("2")});
  warmed.get();
}

TEST_F(NodeWarm, AGetMakesItsKeyLive) {
  auto warmed = warm_keys({"w1", "w2"});
  auto asked = ask("w2");
  const auto live = take();
  EXPECT_EQ(live->priority(), FetchPriority::Live);
  EXPECT_EQ(keys_of(*live), std::vector<std::string>{"pin:w2"});
  complete(*live, {found("2")});
  EXPECT_EQ(asked.get().only(), cell(CellStatus::Fetched, "2"));
  complete(*take(), {found("1")});
  EXPECT_EQ(warmed.get(), (Statuses{CellStatus::Fetched, CellStatus::Fetched}));
}

TEST_F(NodeWarm, JoinsTheFetchOfAGet) {
  auto asked = ask("k");
  auto warmed = warm_keys({"k"});
  const auto batch = take();
  EXPECT_EQ(batch->priority(), FetchPriority::Live);
  EXPECT_EQ(take(0), nullptr);
  complete(*batch, {found("1")});
  EXPECT_EQ(warmed.get(), Statuses{CellStatus::Fetched});
  asked.get();
}

TEST_F(NodeWarm, LeavesHalfOfTheStoreToOthers) {
  NodeConfig config = usual_config();
  config.stores[0].concurrency = 4;
  config.stores[0].max_batch_keys = 1;
  start(config);
  auto warmed = warm_keys({"w1", "w2", "w3"});
  const auto first = take();
  const auto second = take();
  ASSERT_NE(second, nullptr);
  EXPECT_EQ(take(0), nullptr) << "a third call of the warm-up";
  auto asked = ask("live");
  const auto live = take();
  ASSERT_NE(live, nullptr);
  EXPECT_EQ(live->priority(), FetchPriority::Live);
  EXPECT_EQ(take(0), nullptr);
  complete(*first, {found("1")});
  const auto third = take();
  ASSERT_NE(third, nullptr) << "its turn has come";
  for (const auto& batch : {second, third, live}) complete(*batch, {found("1")});
  EXPECT_EQ(warmed.get(), (Statuses(3, CellStatus::Fetched)));
  asked.get();
}

TEST_F(NodeWarm, OneCallAtATimeIsAllowedWithAConcurrencyOfOne) {
  NodeConfig config = usual_config();
  config.stores[0].concurrency = 1;
  start(config);
  auto warmed = warm_keys({"w"});
  complete(*take(), {found("1")});
  EXPECT_EQ(warmed.get(), Statuses{CellStatus::Fetched});
}

TEST_F(NodeWarm, AWriteMeanwhileWins) {
  auto warmed = warm_keys({"put", "deleted"});
  const auto batch = take();
  put("put", "newer");
  erase("deleted");
  complete(*batch, {found("older"), found("older")});
  warmed.get();
  EXPECT_EQ(cached("put"), cell(CellStatus::HitDram, "newer"));
  EXPECT_EQ(cached("deleted"), cell(CellStatus::Miss));
  EXPECT_EQ(held({"put", "deleted"}), (std::vector<int>{1, 0}));
}

TEST_F(NodeWarm, EndsAtItsDeadlineAndTheAnswerStillEnters) {
  auto warmed = warm_keys({"k"}, 50);
  const auto batch = take();
  EXPECT_EQ(warmed.get(), Statuses{CellStatus::TimedOut});
  complete(*batch, {found("late")});
  EXPECT_EQ(cached("k"), cell(CellStatus::HitDram, "late"));
}

TEST_F(NodeWarm, EndsWithTheNode) {
  auto warmed = warm_keys({"k"});
  node_->stop();
  EXPECT_EQ(warmed.get(), Statuses{CellStatus::TimedOut});
  EXPECT_EQ(warm_keys({"k"}).get(), Statuses{CellStatus::Throttled});
}

TEST_F(NodeWarm, IsRefusedByAFullQueueKeyByKey) {
  NodeConfig config = usual_config();
  config.stores[0].queue_keys = 2;
  start(config);
  auto warmed = warm_keys({"a", "b", "c"});
  complete(*take(), {found("1"), found("2")});
  EXPECT_EQ(warmed.get(),
            (Statuses{CellStatus::Fetched, CellStatus::Fetched, CellStatus::Throttled}));
}

TEST_F(NodeWarm, ValuesBeyondAReplysLimitCountAsHeld) {
  NodeConfig config = usual_config();
  config.max_reply_bytes = 4096;
  start(config);
  std::vector<std::string> keys;
  for (int i = 0; i < 20; ++i) {
    keys.push_back("key " + std::to_string(i));
    put(keys.back(), std::string(500, 'v'));
  }
  EXPECT_EQ(warm_keys(keys).get(), Statuses(20, CellStatus::HitDram));
  EXPECT_EQ(held(keys), std::vector<int>(20, 1));
}

TEST_F(NodeWarm, ALeafWarmsItsOwnShardsOnly) {
  constexpr std::uint32_t kShards = 8;
  NodeConfig config = usual_config();
  config.leaf.enabled = true;
  config.engine.shard_count = kShards;
  start(config);
  std::vector<std::string> mine;
  std::vector<std::string> others;
  for (int i = 0; mine.size() < 3 || others.size() < 3; ++i) {
    const std::string key = "key " + std::to_string(i);
    (shard_of("pin", key, kShards) == 2 ? mine : others).push_back(key);
  }
  node_->set_owned({1, kShards, {2}, {}, {}});
  auto done = warm_keys({mine[0], others[0], mine[1]});
  const auto batch = take();
  EXPECT_EQ(keys_of(*batch), (std::vector<std::string>{"pin:" + mine[0], "pin:" + mine[1]}));
  complete(*batch, {found("1"), found("2")});
  EXPECT_EQ(done.get(),
            (Statuses{CellStatus::Fetched, CellStatus::WrongShard, CellStatus::Fetched}));
}

TEST_F(NodeWarm, RulesAndEvictionSeeHowOftenAKeyWasAsked) {
  NodeConfig config = usual_config();
  config.engine.namespaces[0].default_domain = "brief";
  config.engine.namespaces[0].rules = {{.domain = "lasting", .prefix = {}, .asked_at_least = 3}};
  start(config);
  std::vector<WarmKey> keys = keys_to_warm(*node_, {"hot", "cold"});
  const std::vector<std::string> names{"hot", "cold"};
  for (std::size_t i = 0; i < keys.size(); ++i) keys[i].key = names[i];
  keys[0].asked = 9;
  auto done = warm(*node_, keys);
  complete(*take(), {found("1"), found("2")});
  done.get();
  const Counters counters = Counters::of(*node_);
  EXPECT_EQ(counters.at("feature_cache_domain_items{namespace=pin,domain=lasting}"), 1);
  EXPECT_EQ(counters.at("feature_cache_domain_items{namespace=pin,domain=brief}"), 1);
}

TEST_F(NodeWarm, WhatWasAskedOftenOutlivesWhatWasNot) {
  // Ten hot keys come first, then far more than fits of keys that were asked once.
  std::vector<std::string> hot;
  for (int i = 0; i < 10; ++i) hot.push_back("hot " + std::to_string(i));
  const auto fetch = [&](const std::vector<std::string>& names, std::uint8_t asked) {
    std::vector<WarmKey> keys = keys_to_warm(*node_, names, "pin", "lasting");
    for (std::size_t i = 0; i < keys.size(); ++i) keys[i].key = names[i];
    for (WarmKey& key : keys) key.asked = asked;
    auto done = warm(*node_, keys);
    complete(*take(), std::vector<Given>(names.size(), found(std::string(1000, 'v'))));
    done.get();
  };
  fetch(hot, 8);
  for (int round = 0; round < 30; ++round) {
    std::vector<std::string> names;
    for (int i = 0; i < 100; ++i) {
      names.push_back("once " + std::to_string(round) + " " + std::to_string(i));
    }
    fetch(names, 1);
  }
  ASSERT_GT(counter("feature_cache_domain_evictions_total"), 500);
  EXPECT_EQ(held(hot), std::vector<int>(10, 1));
}

class NodeWarmNvm : public NodeNvmTest {};

TEST_F(NodeWarmNvm, TakesWhatLiesOnNvmAsHeldAndReadsNothing) {
  put_down("pin", {"k"});
  const std::uint64_t reads = device_reads();
  std::vector<std::uint8_t> held(2);
  node_->held(keys_to_warm(*node_, {"k", "absent"}), held);
  EXPECT_EQ(held, (std::vector<std::uint8_t>{1, 0}));
  EXPECT_EQ(warm(*node_, keys_to_warm(*node_, {"k"})).get(), Statuses{CellStatus::HitNvm});
  EXPECT_EQ(device_reads(), reads);
  EXPECT_EQ(ask("k").get().only(), on_ssd("k"));
}

}  // namespace
}  // namespace fc::testing
