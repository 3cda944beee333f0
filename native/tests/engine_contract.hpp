// The contract of fc::Engine: every engine passes these tests (INSTANTIATE_TEST_SUITE_P with a
// factory). They use nothing but the seam, so they say nothing of what is evicted when.
//
// Include in one source file an executable; the tests are defined here.
#pragma once

#include <functional>
#include <set>
#include <stdexcept>

#include "support.hpp"
#include "testing/manual_clock.hpp"

namespace fc::testing {

struct EngineFactory {
  friend void PrintTo(const EngineFactory& factory, std::ostream* to) { *to << factory.name; }

  std::string name;
  // Maintained by calls of maintain() alone.
  std::function<std::unique_ptr<Engine>(const EngineConfig&, const Clock&)> make;
};

class EngineContract : public ::testing::TestWithParam<EngineFactory> {
 protected:
  // Two namespaces; the first has a domain that expires and one that does not.
  static EngineConfig usual_config() {
    return engine_config(8 * kMiB,
                         {name_space("pin", {domain("lasting", 2 * kMiB),
                                             domain("brief", kMiB, PolicyKind::S3Fifo, 10'000)}),
                          name_space("user", {domain("all", kMiB)})});
  }
  void start(EngineConfig config) {
    engine_ = GetParam().make(config, clock_);
    pin_ = engine_->find_namespace("pin");
    user_ = engine_->find_namespace("user");
    lasting_ = engine_->find_domain(pin_, "lasting");
    brief_ = engine_->find_domain(pin_, "brief");
  }
  void SetUp() override { start(usual_config()); }

  CellStatus status_of(std::string_view key) { return get(*engine_, pin_, key).status; }
  std::string value_of(std::string_view key) {
    const Got got = get(*engine_, pin_, key);
    EXPECT_EQ(got.status, CellStatus::HitDram) << key;
    return got.value;
  }
  double used(const std::string& ns, const std::string& name) {
    return Counters::of(*engine_).domain("used_bytes", ns, name);
  }

  ManualClock clock_;
  std::unique_ptr<Engine> engine_;
  NamespaceIndex pin_ = kNoNamespace;
  NamespaceIndex user_ = kNoNamespace;
  DomainIndex lasting_ = kNoDomain;
  DomainIndex brief_ = kNoDomain;
};

TEST_P(EngineContract, FindsNamespacesAndDomainsByName) {
  EXPECT_NE(pin_, kNoNamespace);
  EXPECT_NE(user_, kNoNamespace);
  EXPECT_NE(pin_, user_);
  EXPECT_EQ(engine_->find_namespace("pi"), kNoNamespace);
  EXPECT_EQ(engine_->find_namespace(""), kNoNamespace);
  EXPECT_NE(lasting_, brief_);
  EXPECT_EQ(engine_->find_domain(pin_, "all"), kNoDomain);
  EXPECT_NE(engine_->find_domain(user_, "all"), kNoDomain);
}

TEST_P(EngineContract, PutOverwriteErase) {
  EXPECT_EQ(status_of("a"), CellStatus::Miss);
  EXPECT_EQ(put(*engine_, pin_, "a", "one"), WriteStatus::Stored);
  EXPECT_EQ(value_of("a"), "one");
  EXPECT_EQ(put(*engine_, pin_, "a", "another length"), WriteStatus::Stored);
  EXPECT_EQ(value_of("a"), "another length");
  EXPECT_EQ(erase(*engine_, pin_, "a"), WriteStatus::Stored);
  EXPECT_EQ(status_of("a"), CellStatus::Miss);
  EXPECT_EQ(erase(*engine_, pin_, "a"), WriteStatus::Stored) << "an absent key is gone, too";
  EXPECT_EQ(put(*engine_, pin_, "a", "again"), WriteStatus::Stored);
  EXPECT_EQ(value_of("a"), "again");
}

TEST_P(EngineContract, NamespacesAreKeySpacesOfTheirOwn) {
  put(*engine_, pin_, "k", "pin's");
  put(*engine_, user_, "k", "user's");
  EXPECT_EQ(get(*engine_, pin_, "k").value, "pin's");
  EXPECT_EQ(get(*engine_, user_, "k").value, "user's");
  erase(*engine_, pin_, "k");
  EXPECT_EQ(status_of("k"), CellStatus::Miss);
  EXPECT_EQ(get(*engine_, user_, "k").value, "user's");
}

TEST_P(EngineContract, KeysOfEveryLength) {
  std::vector<std::string> keys;
  for (std::size_t bytes = 1; bytes <= kMaxKeyBytes; bytes += bytes < 80 ? 1 : 59) {
    keys.push_back(patterned("key", bytes, bytes));
  }
  keys.push_back(patterned("key", 0, kMaxKeyBytes));
  keys.push_back(std::string(1, '\0'));
  keys.push_back(std::string(2, '\0'));
  for (const std::string& key : keys) {
    ASSERT_EQ(put(*engine_, pin_, key, patterned(key, 1, 20)), WriteStatus::Stored);
  }
  for (const std::string& key : keys) EXPECT_EQ(value_of(key), patterned(key, 1, 20));
}

TEST_P(EngineContract, KeysOutsideTheLimitsAreRejectedAndHarmNothing) {
  put(*engine_, pin_, "neighbour", "here");
  const std::string too_long(kMaxKeyBytes + 1, 'k');
  EXPECT_EQ(put(*engine_, pin_, "", "v"), WriteStatus::Rejected);
  EXPECT_EQ(put(*engine_, pin_, too_long, "v"), WriteStatus::Rejected);
  EXPECT_EQ(status_of(too_long), CellStatus::Miss);
  EXPECT_EQ(value_of("neighbour"), "here");
}

TEST_P(EngineContract, ValuesOfEverySize) {
  EngineConfig config = engine_config(
      64 * kMiB, {name_space("pin", {domain("lasting", 48 * kMiB), domain("brief", kMiB)})});
  start(config);
  const std::uint64_t segment = config.segment_bytes;
  std::vector<std::size_t> sizes{0, 1, 3, 4, 5, 63, 64, 65, 1000};
  for (std::size_t off = 0; off < 40; ++off) sizes.push_back(segment - off);
  for (std::size_t off = 0; off < 20; ++off) sizes.push_back(2 * segment - off);
  sizes.insert(sizes.end(), {segment + 1, segment + 1000, 3 * segment, kMiB, 8 * kMiB});
  for (const std::size_t size : sizes) {
    const std::string key = "k" + std::to_string(size);
    ASSERT_EQ(put(*engine_, pin_, key, patterned(key, 1, size)), WriteStatus::Stored) << size;
  }
  for (const std::size_t size : sizes) {
    const std::string key = "k" + std::to_string(size);
    const Got got = get(*engine_, pin_, key);
    ASSERT_EQ(got.status, CellStatus::HitDram) << size;
    ASSERT_TRUE(got.value == patterned(key, 1, size)) << "other bytes, of size " << size;
  }
  // Overwritten by another size: the memory of the old ones is theirs no more.
  for (const std::size_t size : sizes) {
    const std::string key = "k" + std::to_string(size);
    ASSERT_EQ(put(*engine_, pin_, key, patterned(key, 2, size / 2 + 1)), WriteStatus::Stored);
  }
  for (const std::size_t size : sizes) {
    const std::string key = "k" + std::to_string(size);
    ASSERT_TRUE(value_of(key) == patterned(key, 2, size / 2 + 1));
  }
}

TEST_P(EngineContract, ValueAboveItsDomainIsRejectedAndLeavesNoOlderOne) {
  put(*engine_, pin_, "k", "old", brief_);
  EXPECT_EQ(put(*engine_, pin_, "k", std::string(kMiB + 1, 'x'), brief_), WriteStatus::Rejected);
  EXPECT_EQ(status_of("k"), CellStatus::Miss);
  put(*engine_, pin_, "k", "new", brief_);
  EXPECT_EQ(value_of("k"), "new");
}

TEST_P(EngineContract, ValueAboveTheLimitIsRejectedAndLeavesNoOlderOne) {
  EngineConfig config = usual_config();
  config.max_value_bytes = 1000;
  start(config);
  EXPECT_EQ(put(*engine_, pin_, "k", std::string(1000, 'x')), WriteStatus::Stored);
  EXPECT_EQ(put(*engine_, pin_, "k", std::string(1001, 'x')), WriteStatus::Rejected);
  EXPECT_EQ(status_of("k"), CellStatus::Miss);
}

TEST_P(EngineContract, TimeToLiveOfTheDomainAndOfTheItem) {
  put(*engine_, pin_, "domain's", "v", brief_);
  put(*engine_, pin_, "shorter", "v", brief_, 2'000);
  put(*engine_, pin_, "longer", "v", brief_, 30'000);
  put(*engine_, pin_, "item's alone", "v", lasting_, 3'000);
  put(*engine_, pin_, "for ever", "v", lasting_);
  const auto present = [&] {
    std::set<std::string> keys;
    for (const char* key : {"domain's", "shorter", "longer", "item's alone", "for ever"}) {
      if (status_of(key) == CellStatus::HitDram) keys.insert(key);
    }
    return keys;
  };
  using Keys = std::set<std::string>;
  EXPECT_EQ(present(), (Keys{"domain's", "shorter", "longer", "item's alone", "for ever"}));
  clock_.advance(2'000 - 2 * ManualClock::kTickMs);
  EXPECT_TRUE(present().contains("shorter")) << "not before its time";
  clock_.advance(2 * ManualClock::kTickMs);
  EXPECT_EQ(present(), (Keys{"domain's", "longer", "item's alone", "for ever"}));
  clock_.advance(1'000);
  EXPECT_EQ(present(), (Keys{"domain's", "longer", "for ever"}));
  clock_.advance(7'000 - 2 * ManualClock::kTickMs);
  EXPECT_TRUE(present().contains("domain's"));
  clock_.advance(2 * ManualClock::kTickMs);
  EXPECT_EQ(present(), (Keys{"longer", "for ever"}));
  clock_.advance(20'000);
  EXPECT_EQ(present(), (Keys{"for ever"}));
  clock_.advance(std::uint64_t{400} * 24 * 3600 * 1000);
  engine_->maintain();
  EXPECT_EQ(present(), (Keys{"for ever"}));
}

TEST_P(EngineContract, ExpiredKeyIsAbsentAndCanBeWrittenAgain) {
  put(*engine_, pin_, "k", "old", brief_);
  clock_.advance(10'000);
  const Got got = get(*engine_, pin_, "k");
  ASSERT_EQ(got.status, CellStatus::Miss);
  EXPECT_EQ(install(*engine_, pin_, "k", "fetched", *got.token), InstallStatus::Installed);
  EXPECT_EQ(value_of("k"), "fetched");
}

TEST_P(EngineContract, JitterShortensAndSpreadsButNeverLengthens) {
  EngineConfig config = usual_config();
  config.namespaces[0].domains[1].ttl_jitter = 0.5;
  start(config);
  constexpr std::size_t kKeys = 400;
  std::vector<std::string> keys;
  for (std::size_t i = 0; i < kKeys; ++i) keys.push_back("k" + std::to_string(i));
  for (const std::string& key : keys) put(*engine_, pin_, key, "v", brief_);
  const auto present = [&] {
    std::size_t count = 0;
    for (const std::string& key : keys) count += status_of(key) == CellStatus::HitDram;
    return count;
  };
  clock_.advance(5'000 - 2 * ManualClock::kTickMs);
  EXPECT_EQ(present(), kKeys) << "shortened by more than the jitter";
  std::size_t before = kKeys;
  for (int step = 0; step < 5; ++step) {
    clock_.advance(1'000);
    const std::size_t now = present();
    EXPECT_LT(now, before - kKeys / 10) << "about a fifth expires in each fifth of the spread";
    EXPECT_GT(now + kKeys * 3 / 10, before);
    before = now;
  }
  clock_.advance(2 * ManualClock::kTickMs);
  EXPECT_EQ(present(), 0U) << "lengthened";
}

TEST_P(EngineContract, NegativeEntriesAnswerNotFoundForTheirTime) {
  EngineConfig config = usual_config();
  config.namespaces[0].negative_ttl_ms = 4'000;
  start(config);
  const Token token = *get(*engine_, pin_, "k").token;
  PutItem item;
  item.key = "k";
  item.negative = true;
  ASSERT_EQ(install(*engine_, pin_, item, token), InstallStatus::Installed);
  EXPECT_EQ(status_of("k"), CellStatus::NotFound);
  clock_.advance(4'000);
  EXPECT_EQ(status_of("k"), CellStatus::Miss) << "the negative TTL, not the domain's";
  ASSERT_EQ(install(*engine_, pin_, item, *get(*engine_, pin_, "k").token),
            InstallStatus::Installed);
  EXPECT_EQ(put(*engine_, pin_, "k", "now there"), WriteStatus::Stored);
  EXPECT_EQ(value_of("k"), "now there") << "a put clears it";
}

TEST_P(EngineContract, DomainIsTheHintThenTheFirstRuleThenTheDefault) {
  EngineConfig config = usual_config();
  config.namespaces[0].rules = {{"brief", "tmp:", 0}, {"lasting", "tmp:x", 0}};
  start(config);
  const auto items = [&](const std::string& name) {
    return Counters::of(*engine_).domain("items", "pin", name);
  };
  put(*engine_, pin_, "plain", "v");
  EXPECT_EQ(items("lasting"), 1) << "default";
  put(*engine_, pin_, "tmp:x", "v");
  EXPECT_EQ(items("brief"), 1) << "first rule that holds";
  put(*engine_, pin_, "tmp:y", "v", lasting_);
  EXPECT_EQ(items("lasting"), 2) << "the hint goes before rules";
  put(*engine_, pin_, "tm", "v");
  EXPECT_EQ(items("lasting"), 3) << "shorter than the prefix";
}

TEST_P(EngineContract, KeysOftenAskedAreRoutedApart) {
  EngineConfig config = usual_config();
  config.namespaces[0].default_domain = "brief";
  config.namespaces[0].rules = {{"lasting", "", 3}};
  start(config);
  const auto in_lasting = [&] { return Counters::of(*engine_).domain("items", "pin", "lasting"); };
  // Each arrival is one ask: the value was absent and had to be fetched.
  for (int ask = 1; ask <= 2; ++ask) {
    const Token token = *get(*engine_, pin_, "k").token;
    ASSERT_EQ(install(*engine_, pin_, "k", "v", token), InstallStatus::Installed);
    EXPECT_EQ(in_lasting(), 0) << "asked " << ask;
    erase(*engine_, pin_, "k");
  }
  install(*engine_, pin_, "k", "v", *get(*engine_, pin_, "k").token);
  EXPECT_EQ(in_lasting(), 1) << "asked three times";
}

TEST_P(EngineContract, OneValueAKeyAcrossDomains) {
  const auto items = [&](const std::string& name) {
    return Counters::of(*engine_).domain("items", "pin", name);
  };
  put(*engine_, pin_, "k", "in brief", brief_);
  put(*engine_, pin_, "k", "in lasting", lasting_);
  EXPECT_EQ(value_of("k"), "in lasting");
  EXPECT_EQ(items("brief"), 0);
  EXPECT_EQ(items("lasting"), 1);
  clock_.advance(10'000);
  EXPECT_EQ(value_of("k"), "in lasting") << "the superseded one's TTL is gone with it";
  put(*engine_, pin_, "k", "brief again", brief_);
  EXPECT_EQ(value_of("k"), "brief again");
  clock_.advance(10'000);
  EXPECT_EQ(status_of("k"), CellStatus::Miss) << "the older one must not show again";
}

TEST_P(EngineContract, FlushEmptiesOneNamespace) {
  for (int i = 0; i < 100; ++i) {
    put(*engine_, pin_, "k" + std::to_string(i), "v", i % 2 == 0 ? lasting_ : brief_);
    put(*engine_, user_, "k" + std::to_string(i), "u");
  }
  EXPECT_EQ(engine_->flush(pin_), 100U);
  for (int i = 0; i < 100; ++i) {
    EXPECT_EQ(status_of("k" + std::to_string(i)), CellStatus::Miss);
    EXPECT_EQ(get(*engine_, user_, "k" + std::to_string(i)).value, "u");
  }
  EXPECT_EQ(used("pin", "lasting"), 0) << "flush gives the memory back";
  EXPECT_EQ(used("pin", "brief"), 0);
  EXPECT_EQ(engine_->flush(pin_), 0U);
  put(*engine_, pin_, "k1", "new");
  EXPECT_EQ(value_of("k1"), "new");
}

TEST_P(EngineContract, TokenIsVoidedByPutEraseAndFlush) {
  const auto token = [&](std::string_view key) { return *get(*engine_, pin_, key).token; };
  const Token untouched = token("untouched");

  const Token before_put = token("put");
  EXPECT_TRUE(engine_->token_alive(pin_, "put", before_put));
  put(*engine_, pin_, "put", "newer");
  EXPECT_FALSE(engine_->token_alive(pin_, "put", before_put));
  EXPECT_EQ(install(*engine_, pin_, "put", "older", before_put), InstallStatus::TokenVoid);
  EXPECT_EQ(value_of("put"), "newer");

  const Token before_erase = token("erased");
  erase(*engine_, pin_, "erased");
  EXPECT_FALSE(engine_->token_alive(pin_, "erased", before_erase));
  EXPECT_EQ(install(*engine_, pin_, "erased", "older", before_erase), InstallStatus::TokenVoid);
  EXPECT_EQ(status_of("erased"), CellStatus::Miss);

  EXPECT_TRUE(engine_->token_alive(pin_, "untouched", untouched));
  EXPECT_EQ(install(*engine_, pin_, "untouched", "fetched", untouched), InstallStatus::Installed);
  EXPECT_EQ(value_of("untouched"), "fetched");

  const Token before_flush = token("flushed");
  const Token of_user = *get(*engine_, user_, "k").token;
  engine_->flush(pin_);
  EXPECT_FALSE(engine_->token_alive(pin_, "flushed", before_flush));
  EXPECT_EQ(install(*engine_, pin_, "flushed", "older", before_flush), InstallStatus::TokenVoid);
  EXPECT_EQ(status_of("flushed"), CellStatus::Miss);
  EXPECT_EQ(install(*engine_, user_, "k", "v", of_user), InstallStatus::Installed)
      << "another namespace's token lives on";
}

TEST_P(EngineContract, RejectedPutVoidsTokensAndRejectedInstallKeepsThem) {
  const std::string too_large(2 * kMiB, 'x');
  const Token token = *get(*engine_, pin_, "k").token;
  PutItem item;
  item.key = "k";
  item.value = too_large;
  item.domain = brief_;
  EXPECT_EQ(install(*engine_, pin_, item, token), InstallStatus::Rejected);
  EXPECT_TRUE(engine_->token_alive(pin_, "k", token));
  EXPECT_EQ(put(*engine_, pin_, item), WriteStatus::Rejected);
  EXPECT_EQ(install(*engine_, pin_, "k", "older", token), InstallStatus::TokenVoid);
}

TEST_P(EngineContract, InstallsOfOneTokenReplaceEachOther) {
  // Two fetches of one key may be under way (a live one, a speculative one): both answers are
  // as new as the other.
  const Token token = *get(*engine_, pin_, "k").token;
  EXPECT_EQ(install(*engine_, pin_, "k", "first", token), InstallStatus::Installed);
  EXPECT_EQ(install(*engine_, pin_, "k", "second", token), InstallStatus::Installed);
  EXPECT_EQ(value_of("k"), "second");
}

TEST_P(EngineContract, ReplyLimitThrottlesWhatDoesNotFit) {
  put(*engine_, pin_, "a", std::string(600, 'a'));
  put(*engine_, pin_, "b", std::string(600, 'b'));
  put(*engine_, pin_, "c", std::string(400, 'c'));
  put(*engine_, pin_, "empty", "");
  const auto got = get_all(*engine_, pin_, {"a", "b", "c", "none", "empty"}, 1000);
  EXPECT_EQ(got[0].status, CellStatus::HitDram);
  EXPECT_EQ(got[1].status, CellStatus::Throttled);
  EXPECT_EQ(got[2].value, std::string(400, 'c')) << "what still fits comes";
  EXPECT_EQ(got[3].status, CellStatus::Miss);
  EXPECT_EQ(got[4].status, CellStatus::HitDram);
}

TEST_P(EngineContract, ValuesAreAppendedToWhatTheBufferHolds) {
  put(*engine_, pin_, "k", "value");
  Buffer values;
  values.append("head", 4);
  const std::string_view key = "k";
  CellStatus status{};
  std::uint32_t length = 0;
  GetColumn column;
  column.ns = pin_;
  column.keys = {&key, 1};
  column.statuses = {&status, 1};
  column.lengths = {&length, 1};
  column.values = &values;
  engine_->get(column);
  EXPECT_EQ(status, CellStatus::HitDram);
  EXPECT_EQ(std::string_view(reinterpret_cast<const char*>(values.data()), values.size()),
            "headvalue");
}

TEST_P(EngineContract, LargeBatchesAndDuplicates) {
  constexpr std::size_t kKeys = 5'000;
  std::vector<std::string> keys;
  std::vector<std::string> values;
  for (std::size_t i = 0; i < kKeys; ++i) {
    keys.push_back("key " + std::to_string(i));
    values.push_back(patterned(keys.back(), 1, i % 90));
  }
  std::vector<PutItem> items(kKeys);
  for (std::size_t i = 0; i < kKeys; ++i) {
    items[i].key = keys[i];
    items[i].value = values[i];
  }
  std::vector<WriteStatus> written(kKeys);
  engine_->put(pin_, items, written);
  for (const WriteStatus status : written) ASSERT_EQ(status, WriteStatus::Stored);
  // Every key three times, absent ones between.
  std::vector<std::string_view> asked;
  for (int round = 0; round < 3; ++round) {
    for (std::size_t i = 0; i < kKeys; ++i) {
      asked.push_back(keys[(i * 7919) % kKeys]);
      if (i % 5 == 0) asked.push_back("absent");
    }
  }
  const auto got = get_all(*engine_, pin_, asked);
  for (std::size_t i = 0; i < asked.size(); ++i) {
    if (asked[i] == "absent") {
      ASSERT_EQ(got[i].status, CellStatus::Miss);
    } else {
      ASSERT_EQ(got[i].status, CellStatus::HitDram) << asked[i];
      const std::size_t number = std::stoul(std::string(asked[i].substr(4)));
      ASSERT_EQ(got[i].value, values[number]);
    }
  }
  EXPECT_TRUE(get_all(*engine_, pin_, {}).empty());
}

TEST_P(EngineContract, LastOfDuplicatesInAPutWins) {
  std::vector<PutItem> items(40);
  std::vector<std::string> values;
  for (std::size_t i = 0; i < items.size(); ++i) values.push_back("v" + std::to_string(i));
  for (std::size_t i = 0; i < items.size(); ++i) {
    items[i].key = i % 3 == 0 ? "thrice" : "else";
    items[i].value = values[i];
  }
  std::vector<WriteStatus> statuses(items.size());
  engine_->put(pin_, items, statuses);
  EXPECT_EQ(value_of("thrice"), "v39");
  EXPECT_EQ(value_of("else"), "v38");
  EXPECT_EQ(Counters::of(*engine_).domain("items", "pin", "lasting"), 2);
}

TEST_P(EngineContract, ResizeUpAndDownWhileDataIsThere) {
  const auto fill = [&](int count) {
    for (int i = 0; i < count; ++i) {
      put(*engine_, pin_, "k" + std::to_string(i), patterned("k" + std::to_string(i), 1, 400));
    }
  };
  const auto check = [&](int count) {
    int hits = 0;
    for (int i = 0; i < count; ++i) {
      const std::string key = "k" + std::to_string(i);
      const Got got = get(*engine_, pin_, key);
      if (got.status != CellStatus::HitDram) continue;
      EXPECT_EQ(got.value, patterned(key, 1, 400));
      ++hits;
    }
    return hits;
  };
  fill(3'000);
  EXPECT_EQ(check(3'000), 3'000);
  EXPECT_EQ(engine_->resize(lasting_, 512 * kKiB), 2 * kMiB) << "returns the old budget";
  EXPECT_LE(used("pin", "lasting"), 512 * kKiB);
  const int small = check(3'000);
  EXPECT_GT(small, 700);
  EXPECT_LT(small, 1'300);
  EXPECT_EQ(engine_->resize(lasting_, 3 * kMiB), 512 * kKiB);
  EXPECT_EQ(check(3'000), small) << "growing loses nothing";
  fill(5'000);
  EXPECT_EQ(check(5'000), 5'000);
  EXPECT_LE(used("pin", "lasting"), 3 * kMiB);
}

TEST_P(EngineContract, ResizeBeyondMemoryOrBelowTheLeastThrowsAndChangesNothing) {
  put(*engine_, pin_, "k", "v");
  EXPECT_THROW(engine_->resize(lasting_, 100 * kMiB), std::invalid_argument);
  EXPECT_THROW(engine_->resize(lasting_, 0), std::invalid_argument);
  EXPECT_EQ(Counters::of(*engine_).domain("budget_bytes", "pin", "lasting"), 2 * kMiB);
  EXPECT_EQ(value_of("k"), "v");
}

TEST_P(EngineContract, BudgetsHoldUnderAFlood) {
  for (int i = 0; i < 20'000; ++i) {
    const std::string key = "k" + std::to_string(i);
    put(*engine_, pin_, key, patterned(key, 1, 300), i % 3 == 0 ? brief_ : lasting_);
    if (i % 500 == 0) {
      const Counters counters = Counters::of(*engine_);
      ASSERT_LE(counters.domain("used_bytes", "pin", "lasting"), 2 * kMiB);
      ASSERT_LE(counters.domain("used_bytes", "pin", "brief"), 1 * kMiB);
    }
  }
  EXPECT_EQ(value_of("k19999"), patterned("k19999", 1, 300));
  EXPECT_GT(used("pin", "lasting"), kMiB) << "and are used";
}

TEST_P(EngineContract, QuietGetsAreNotCounted) {
  put(*engine_, pin_, "k", "v");
  get_all(*engine_, pin_, {"k", "absent"}, ~0ull, true);
  Counters counters = Counters::of(*engine_);
  EXPECT_EQ(counters.at("feature_cache_namespace_hits_total{namespace=pin}"), 0);
  EXPECT_EQ(counters.at("feature_cache_namespace_misses_total{namespace=pin}"), 0);
  get_all(*engine_, pin_, {"k", "absent", "absent too"});
  counters = Counters::of(*engine_);
  EXPECT_EQ(counters.at("feature_cache_namespace_hits_total{namespace=pin}"), 1);
  EXPECT_EQ(counters.at("feature_cache_namespace_misses_total{namespace=pin}"), 2);
  EXPECT_EQ(counters.domain("hits_total", "pin", "lasting"), 1);
}

TEST_P(EngineContract, HotKeysAskForARefreshBeforeTheyExpire) {
  EngineConfig config = usual_config();
  config.namespaces[0].domains[1].refresh_ahead = 0.2;
  start(config);
  put(*engine_, pin_, "hot", "v", brief_);
  put(*engine_, pin_, "cold", "v", brief_);
  for (int i = 0; i < 4; ++i) EXPECT_FALSE(get(*engine_, pin_, "hot").refresh) << "too early";
  clock_.advance(8'500);
  const Got got = get(*engine_, pin_, "hot");
  EXPECT_TRUE(got.refresh);
  EXPECT_FALSE(get(*engine_, pin_, "cold").refresh) << "nobody asked for it";
  ASSERT_TRUE(got.refresh_token.has_value());
  PutItem item;
  item.key = "hot";
  item.value = "refreshed";
  item.domain = brief_;
  EXPECT_EQ(install(*engine_, pin_, item, *got.refresh_token), InstallStatus::Installed);
  clock_.advance(5'000);
  EXPECT_EQ(value_of("hot"), "refreshed");
}

}  // namespace fc::testing
