// The contract of scans and token snapshots: what a copy from another node needs of any engine.
#pragma once

#include <map>

#include "engine_contract.hpp"
#include "feature_cache/peer_copy.hpp"

namespace fc::testing {

class CopyContract : public EngineContract {
 protected:
  struct Item {
    std::string value;
    std::uint32_t ttl_ms = 0;
    std::uint32_t domain = 0;
    friend bool operator==(const Item&, const Item&) = default;
    friend void PrintTo(const Item& item, std::ostream* to) {
      *to << item.domain << " '" << item.value.substr(0, 20) << "' " << item.ttl_ms << " ms";
    }
  };
  using Items = std::map<std::string, Item>;

  // Domain 0: pin/lasting, 1: pin/brief, 2: user/all.
  ScanFilter everything() const {
    ScanFilter filter;
    filter.domains.resize(std::max({lasting_, brief_, all()}) + 1u, ScanFilter::kNone);
    filter.domains[lasting_] = 0;
    filter.domains[brief_] = 1;
    filter.domains[all()] = 2;
    return filter;
  }
  DomainIndex all() const { return engine_->find_domain(user_, "all"); }
  Items scanned(const ScanFilter& filter, std::size_t bytes = 4096) {
    Items items;
    std::uint64_t cursor = 0;
    while (cursor != kScanEnd) {
      ScanBatch batch;
      cursor = engine_->scan(cursor, filter, bytes, batch);
      const char* at = reinterpret_cast<const char*>(batch.bytes.data());
      for (std::size_t i = 0; i < batch.items(); ++i) {
        const std::string key(at, batch.key_lengths[i]);
        at += batch.key_lengths[i];
        items[key] = {std::string(at, batch.value_lengths[i]), batch.ttl_ms[i], batch.domains[i]};
        at += batch.value_lengths[i];
      }
      EXPECT_EQ(at, reinterpret_cast<const char*>(batch.bytes.data()) + batch.bytes.size());
    }
    return items;
  }
  void put_into(NamespaceIndex ns, DomainIndex domain, const std::string& key,
                const std::string& value) {
    PutItem item{.key = key, .value = value};
    item.domain = domain;
    ASSERT_EQ(testing::put(*engine_, ns, item), WriteStatus::Stored);
  }
  // Installs one value as a copy from a peer does.
  PeerCopyCounts copy_in(const TokenSnapshot& tokens, const std::string& key,
                         const std::string& value, std::uint32_t ttl_ms = 0) {
    const CopiedDomain domains[] = {{pin_, lasting_}, {pin_, brief_}, {user_, all()}};
    const std::uint32_t number[] = {ttl_ms != 0 ? 1u : 0u};
    const std::uint32_t key_length[] = {static_cast<std::uint32_t>(key.size())};
    const std::uint32_t value_length[] = {static_cast<std::uint32_t>(value.size())};
    const std::uint32_t ttl[] = {ttl_ms};
    const std::string items = key + value;
    PeerCopyCounts counts;
    EXPECT_TRUE(install_copied(*engine_, tokens, domains,
                               {number, key_length, value_length, ttl, items}, counts));
    return counts;
  }
};

TEST_P(CopyContract, AScanFindsAllThatIsThere) {
  Items expected;
  for (int i = 0; i < 2000; ++i) {
    const std::string key = "key " + std::to_string(i);
    const std::string value = patterned(key, 1, static_cast<std::size_t>(i % 300));
    if (i % 3 == 2) {
      put_into(user_, all(), key, value);
    } else {
      put_into(pin_, i % 3 == 0 ? lasting_ : brief_, key, value);
    }
    expected[key] = {value, 0, static_cast<std::uint32_t>(i % 3)};
  }
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{4096}, std::size_t{64} << 20}) {
    Items found = scanned(everything(), bytes);
    for (auto& [key, item] : found) {
      if (item.domain == 1) {
        EXPECT_GE(item.ttl_ms, 8'900U) << "jitter takes a tenth at most";
        EXPECT_LE(item.ttl_ms, 10'000U);
        item.ttl_ms = 0;
      }
    }
    EXPECT_EQ(found, expected);
  }
}

TEST_P(CopyContract, AScanLeavesOutWhatIsNotWantedAndWhatIsNoMore) {
  put_into(pin_, lasting_, "stays", "1");
  put_into(pin_, brief_, "expires", "2");
  put_into(pin_, lasting_, "deleted", "3");
  put_into(user_, all(), "elsewhere", "4");
  put_into(user_, all(), "flushed", "5");
  PutItem negative{.key = "negative", .value = {}};
  negative.negative = true;
  testing::put(*engine_, pin_, negative);
  testing::erase(*engine_, pin_, "deleted");
  clock_.advance(20'000);
  ScanFilter filter = everything();
  filter.domains[all()] = ScanFilter::kNone;
  EXPECT_EQ(scanned(filter), (Items{{"stays", {"1", 0, 0}}}));
  engine_->flush(user_);
  EXPECT_EQ(scanned(everything()), (Items{{"stays", {"1", 0, 0}}}));
}

TEST_P(CopyContract, AScanGivesAnOverwrittenKeyOnceAsItIsNow) {
  put_into(pin_, lasting_, "k", "old");
  put_into(pin_, brief_, "k", "new");
  const Items found = scanned(everything());
  ASSERT_EQ(found.size(), 1U);
  EXPECT_EQ(found.at("k").value, "new");
}

TEST_P(CopyContract, AScanOfShardsGivesTheirsOnly) {
  for (int i = 0; i < 300; ++i) put_into(pin_, lasting_, "key " + std::to_string(i), "v");
  ScanFilter filter = everything();
  filter.shard_count = 8;
  filter.shards.resize(8);
  filter.shards[3] = filter.shards[4] = true;
  std::size_t found = 0;
  for (const auto& [key, item] : scanned(filter)) {
    const std::uint32_t shard = shard_of("pin", key, 8);
    EXPECT_TRUE(shard == 3 || shard == 4) << shard;
    ++found;
  }
  EXPECT_NEAR(static_cast<double>(found), 75, 30);
}

TEST_P(CopyContract, ACopyEntersWhereNobodyWrote) {
  const auto tokens = engine_->tokens();
  EXPECT_EQ(copy_in(*tokens, "k", "copied").installed, 1U);
  EXPECT_EQ(value_of("k"), "copied");
}

TEST_P(CopyContract, ACopyKeepsWhatIsLeftOfItsLife) {
  const auto tokens = engine_->tokens();
  copy_in(*tokens, "k", "copied", 5'000);
  clock_.advance(4'900);
  EXPECT_EQ(value_of("k"), "copied") << "no part of it is taken off again";
  clock_.advance(200);
  EXPECT_EQ(status_of("k"), CellStatus::Miss);
}

TEST_P(CopyContract, AWriteSinceTheSnapshotWins) {
  put_into(pin_, lasting_, "kept", "before");
  const auto tokens = engine_->tokens();
  put_into(pin_, lasting_, "put", "newer");
  put_into(pin_, lasting_, "deleted", "soon gone");
  testing::erase(*engine_, pin_, "deleted");
  testing::erase(*engine_, pin_, "never there");
  for (const char* key : {"put", "deleted", "never there"}) {
    EXPECT_EQ(copy_in(*tokens, key, "older").not_installed_void, 1U) << key;
  }
  EXPECT_EQ(value_of("put"), "newer");
  EXPECT_EQ(status_of("deleted"), CellStatus::Miss);
  EXPECT_EQ(status_of("never there"), CellStatus::Miss);
}

TEST_P(CopyContract, AFlushSinceTheSnapshotWins) {
  const auto tokens = engine_->tokens();
  engine_->flush(pin_);
  EXPECT_EQ(copy_in(*tokens, "k", "older").not_installed_void, 1U);
  EXPECT_EQ(status_of("k"), CellStatus::Miss);
  EXPECT_EQ(copy_in(*engine_->tokens(), "k", "after it").installed, 1U);
}

TEST_P(CopyContract, AShardThatWasDroppedStaysEmpty) {
  EngineConfig config = usual_config();
  config.shard_count = 4;
  start(config);
  const auto tokens = engine_->tokens();
  const std::uint32_t shards[] = {0, 1, 2, 3};
  engine_->drop_shards(4, shards);
  EXPECT_EQ(copy_in(*tokens, "k", "older").not_installed_void, 1U);
  EXPECT_EQ(status_of("k"), CellStatus::Miss);
  put_into(pin_, lasting_, "dropped", "1");
  engine_->drop_shards(4, shards);
  EXPECT_TRUE(scanned(everything()).empty());
}

TEST_P(CopyContract, AFetchSinceTheSnapshotMayBeReplacedByTheCopy) {
  // Both are of the store or of a peer: neither is a write, and none is older than a write.
  const auto tokens = engine_->tokens();
  testing::install(*engine_, pin_, "k", "fetched", engine_->tokens()->token(pin_, "k"));
  EXPECT_EQ(copy_in(*tokens, "k", "copied").installed, 1U);
}

TEST_P(CopyContract, WhatContradictsItselfIsRefusedAsAWhole) {
  const auto tokens = engine_->tokens();
  const CopiedDomain domains[] = {{pin_, lasting_}, {}};
  const std::uint32_t zero[] = {0};
  const std::uint32_t one[] = {1};
  const std::uint32_t two[] = {2};
  const std::uint32_t huge[] = {~0u};
  const std::uint32_t several[] = {0, 0};
  PeerCopyCounts counts;
  const auto takes = [&](const CopiedItems& items) {
    return install_copied(*engine_, *tokens, domains, items, counts);
  };
  EXPECT_FALSE(takes({zero, one, one, zero, "k"})) << "too short";
  EXPECT_FALSE(takes({zero, one, one, zero, "kvx"})) << "too long";
  EXPECT_FALSE(takes({zero, zero, two, zero, "kv"})) << "no key";
  EXPECT_FALSE(takes({zero, huge, two, zero, "kv"}));
  EXPECT_FALSE(takes({zero, one, huge, zero, "kv"}));
  EXPECT_FALSE(takes({two, one, one, zero, "kv"})) << "a domain that was not asked for";
  EXPECT_FALSE(takes({several, one, one, zero, "kv"}));
  EXPECT_FALSE(takes({zero, one, one, {}, "kv"}));
  EXPECT_EQ(counts.items, 0U);
  EXPECT_TRUE(takes({one, one, one, zero, "kv"})) << "of a domain that is not there";
  EXPECT_EQ(counts.rejected, 1U);
  EXPECT_TRUE(takes({zero, one, one, zero, "kv"}));
  EXPECT_TRUE(takes({}));
  EXPECT_EQ(value_of("k"), "v");
}

}  // namespace fc::testing
