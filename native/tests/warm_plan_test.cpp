// The plan of a warm-up: each key of many logs once, the most valuable first.

#include "feature_cache/warm_plan.hpp"

#include <set>

#include "core/hash.hpp"
#include "request_log/encoder.hpp"
#include "request_log/reader.hpp"
#include "support.hpp"

namespace fc::testing {
namespace {

using request_log::Description;
using request_log::Encoder;

using Bytes = std::vector<std::uint8_t>;
struct Column {
  std::uint32_t kind;
  std::vector<std::string> keys;
};

// Kinds: 0 pin, 1 pin with hint `brief`, 2 user, 3 other (which nobody knows), 4 hashed.
Bytes log_of(const std::vector<Column>& columns) {
  Description description;
  description.sample = 1;
  description.namespaces = {{"pin", KeyPrivacy::Plain},
                            {"user", KeyPrivacy::Plain},
                            {"other", KeyPrivacy::Plain},
                            {"local", KeyPrivacy::Plain}};
  description.kinds = {{0, ""}, {0, "brief"}, {1, ""}, {2, ""}, {3, ""}, {0, "gone"}};
  const Bytes text = request_log::encode(description);
  request_log::FileHeader header{};
  header.magic = request_log::kMagic;
  header.version = request_log::kVersion;
  header.description_bytes = static_cast<std::uint32_t>(text.size());
  header.window_ms = 1000;
  header.file_id = 9;
  header.checksum = header.sum(text.data());
  Bytes file;
  const auto append = [&](std::span<const std::uint8_t> bytes) {
    file.insert(file.end(), bytes.begin(), bytes.end());
  };
  append({reinterpret_cast<const std::uint8_t*>(&header), sizeof(header)});
  append(text);
  Encoder encoder(9, 1024);
  for (const Column& column : columns) {
    const std::vector<std::string_view> views(column.keys.begin(), column.keys.end());
    encoder.add(column.kind, true, views, [](std::string_view key) { return key; });
    if (encoder.full()) append(encoder.take(0));
  }
  if (!encoder.empty()) append(encoder.take(0));
  append(encoder.finish(0));
  return file;
}

class Plan : public ::testing::Test {
 protected:
  WarmPlan plan_{
      {{.name = "pin",
        .domains = {{"lasting", 0}, {"brief", 60'000}},
        .default_domain = 0,
        .first_domain = 10},
       {.name = "user", .domains = {{"all", 3'600'000}}, .first_domain = 12},
       {.name = "local", .domains = {{"all", 0}}, .first_domain = 13, .fetchable = false}},
      1000};

  WarmPlan::Added add(const std::vector<Column>& columns, double weight = 1) {
    WarmPlan::Added added;
    EXPECT_EQ(plan_.add(log_of(columns), weight, added), LogFault::None);
    return added;
  }
  std::vector<std::string> taken(std::size_t most = 1000) {
    std::vector<std::string> keys;
    for (const WarmKey& key : plan_.take(most)) {
      keys.push_back(std::to_string(key.ns) + ":" + std::string(key.key));
    }
    return keys;
  }
  static WarmPlan::Held holds(std::set<std::string> keys) {
    return [keys = std::move(keys)](std::span<const WarmKey> asked, std::span<std::uint8_t> held) {
      for (std::size_t i = 0; i < asked.size(); ++i) {
        held[i] = keys.contains(std::string(asked[i].key)) ? 1 : 0;
      }
    };
  }
};

using Keys = std::vector<std::string>;

TEST_F(Plan, HasEachKeyOnceTheMostFrequentFirst) {
  const WarmPlan::Added added = add({{0, {"a", "b", "b", "c"}}, {0, {"c", "b"}}});
  EXPECT_EQ(added.keys, 6U);
  EXPECT_EQ(added.new_keys, 3U);
  add({{0, {"c", "c"}}});
  plan_.order(0);
  EXPECT_EQ(taken(), (Keys{"0:c", "0:b", "0:a"}));
  EXPECT_EQ(taken(), Keys{});
  EXPECT_EQ(plan_.total_weight(), 8);
}

TEST_F(Plan, NewerLogsMayWeighMore) {
  add({{0, {"old", "old"}}}, 0.25);
  add({{0, {"new"}}}, 1.0);
  plan_.order(0);
  EXPECT_EQ(taken(), (Keys{"0:new", "0:old"}));
}

TEST_F(Plan, RealTimeDomainsComeLastAndLongerTtlsFirst) {
  add({{1, {"brief", "brief", "brief"}}, {2, {"hour"}}, {0, {"ever"}}});
  plan_.order(300'000);
  EXPECT_EQ(taken(), (Keys{"0:ever", "1:hour", "0:brief"}));
  plan_.order(0);
  EXPECT_EQ(taken(), (Keys{"0:brief", "0:ever", "1:hour"}));
}

TEST_F(Plan, SaysWhereAKeyGoesAndHowOftenItWasAsked) {
  add({{1, {"hinted"}}, {0, Keys(20, "often")}, {5, {"unknown hint"}}});
  plan_.order(0);
  const std::vector<WarmKey> keys = plan_.take(10);
  ASSERT_EQ(keys.size(), 3U);
  EXPECT_EQ(keys[0].key, "often");
  EXPECT_EQ(keys[0].domain, kNoDomain);
  EXPECT_EQ(keys[0].asked, 15);
  for (const WarmKey& key : keys) {
    if (key.key == "hinted") {
      EXPECT_EQ(key.domain, 11);
    }
    if (key.key == "unknown hint") {
      EXPECT_EQ(key.domain, kNoDomain);
    }
  }
}

TEST_F(Plan, TellsOneNamespaceFromAnother) {
  add({{0, {"k"}}, {2, {"k", "k"}}});
  plan_.order(0);
  EXPECT_EQ(taken(), (Keys{"1:k", "0:k"}));
}

TEST_F(Plan, CountsWhatIsNotForThisNode) {
  const WarmPlan::Added added = add({{3, {"x", "x"}}, {4, {"local"}}, {0, {"mine"}}});
  EXPECT_EQ(added.unknown_namespace, 2U);
  EXPECT_EQ(added.not_fetchable, 1U);
  EXPECT_EQ(plan_.keys(), 1U);
  EXPECT_EQ(plan_.total_weight(), 1);
}

TEST_F(Plan, KeepsItsShardsOnly) {
  constexpr std::uint32_t kShards = 8;
  Keys keys;
  for (int i = 0; i < 400; ++i) keys.push_back("key " + std::to_string(i));
  const std::uint32_t owned[] = {1, 5};
  plan_.own(kShards, owned);
  const WarmPlan::Added added = add({{0, keys}});
  EXPECT_EQ(added.not_owned + added.new_keys, 400U);
  plan_.order(0);
  for (const WarmKey& key : plan_.take(1000)) {
    const std::uint32_t shard = shard_of("pin", key.key, kShards);
    EXPECT_TRUE(shard == 1 || shard == 5) << shard;
  }
  EXPECT_NEAR(static_cast<double>(added.new_keys), 100, 35);
  const std::uint32_t beyond[] = {8};
  EXPECT_THROW(plan_.own(kShards, beyond), std::invalid_argument);
}

TEST_F(Plan, IsBounded) {
  Keys keys;
  for (int i = 0; i < 900; ++i) keys.push_back("key " + std::to_string(i));
  add({{0, keys}});
  const WarmPlan::Added added = add({{2, keys}});
  EXPECT_EQ(plan_.keys(), 1000U);
  EXPECT_EQ(added.over_limit, 800U);
  EXPECT_EQ(plan_.total_weight(), 1800) << "what is left out is traffic all the same";
}

TEST_F(Plan, DropsWhatIsThereAndWhatIsCopied) {
  add({{0, {"a", "b", "c"}}, {1, {"copied"}}});
  EXPECT_EQ(plan_.drop_held(holds({"b"})), 1U);
  EXPECT_EQ(plan_.drop_domain(0, 1), 1U);
  EXPECT_EQ(plan_.drop_domain(0, 1), 0U);
  plan_.order(0);
  EXPECT_EQ(plan_.keys(), 2U);
  EXPECT_EQ(taken(), (Keys{"0:a", "0:c"}));
  EXPECT_EQ(plan_.total_weight(), 4);
}

TEST_F(Plan, FailedKeysComeAgainTwiceAtTheEnd) {
  add({{0, {"a", "a", "b"}}});
  plan_.order(0);
  const std::vector<WarmKey> first = plan_.take(1);
  EXPECT_TRUE(plan_.again(first[0]));
  EXPECT_EQ(plan_.keys_left(), 2U);
  EXPECT_EQ(taken(), (Keys{"0:b", "0:a"}));
  EXPECT_TRUE(plan_.again(first[0]));
  EXPECT_EQ(taken(), Keys{"0:a"});
  EXPECT_FALSE(plan_.again(first[0]));
  EXPECT_FALSE(plan_.again({0, kNoDomain, "never seen"}));
}

TEST_F(Plan, PredictsTheShareOfTheTraffic) {
  EXPECT_EQ(plan_.held_share(holds({"a"}), 100), 0) << "nothing is known";
  add({{0, {"a", "a", "a", "b"}}});
  EXPECT_DOUBLE_EQ(plan_.held_share(holds({"a"}), 100), 0.75);
  EXPECT_DOUBLE_EQ(plan_.held_share(holds({}), 100), 0);
  EXPECT_DOUBLE_EQ(plan_.held_share(holds({"a", "b"}), 100), 1);
}

TEST_F(Plan, PredictsFromASampleByWeight) {
  std::vector<Column> columns;
  std::set<std::string> there;
  for (int i = 0; i < 900; ++i) {
    const std::string key = "key " + std::to_string(i);
    columns.push_back({0, Keys(static_cast<std::size_t>(i < 100 ? 9 : 1), key)});
    if (i < 100) there.insert(key);
  }
  add(columns);
  EXPECT_NEAR(plan_.held_share(holds(there), 200), 900.0 / 1700, 0.02);
}

TEST_F(Plan, ADamagedLogLeavesWhatStoodBeforeIt) {
  std::vector<Column> columns(100, Column{0, Keys(1000, "x")});
  Bytes file = log_of(columns);
  file.resize(file.size() - 150);  // into the last block of keys
  WarmPlan::Added added;
  EXPECT_EQ(plan_.add(file, 1, added), LogFault::Truncated);
  EXPECT_GT(added.keys, 0U);
  EXPECT_EQ(plan_.keys(), 1U);
}

}  // namespace
}  // namespace fc::testing
