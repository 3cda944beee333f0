// What came from a peer enters the cache here, if it holds together and nobody wrote meanwhile.

#include <algorithm>

#include "feature_cache/engine.hpp"
#include "feature_cache/peer_copy.hpp"

namespace fc {
namespace {

constexpr std::size_t kInstallItems = 1024;  // at a time

// The items of one namespace that wait to be installed together.
struct Group {
  NamespaceIndex ns = kNoNamespace;
  std::vector<PutItem> items;
  std::vector<Token> tokens;
};

void install(Engine& engine, Group& group, PeerCopyCounts& counts) {
  if (group.items.empty()) return;
  std::vector<InstallStatus> statuses(group.items.size());
  engine.install(group.ns, group.items, group.tokens, statuses);
  for (const InstallStatus status : statuses) {
    switch (status) {
      case InstallStatus::Installed:
        ++counts.installed;
        break;
      case InstallStatus::TokenVoid:
        ++counts.not_installed_void;
        break;
      case InstallStatus::Rejected:
        ++counts.rejected;
        break;
    }
  }
  group.items.clear();
  group.tokens.clear();
}

// Whether the lists are of one length, and what they speak of is as long as what came.
bool holds_together(const CopiedItems& copied, std::size_t domains) {
  const std::size_t count = copied.domains.size();
  if (copied.key_lengths.size() != count || copied.value_lengths.size() != count ||
      copied.ttl_ms.size() != count) {
    return false;
  }
  std::uint64_t bytes = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint32_t key = copied.key_lengths[i];
    const std::uint32_t value = copied.value_lengths[i];
    if (key == 0 || key > kMaxKeyBytes || value > kMaxValueBytes || copied.domains[i] >= domains) {
      return false;
    }
    bytes += std::uint64_t{key} + value;
  }
  return bytes == copied.items.size();
}

}  // namespace

bool install_copied(Engine& engine, const TokenSnapshot& tokens,
                    std::span<const CopiedDomain> domains, const CopiedItems& copied,
                    PeerCopyCounts& counts) {
  if (!holds_together(copied, domains.size())) return false;
  std::vector<Group> groups;  // few: one a namespace
  const char* at = copied.items.data();
  for (std::size_t i = 0; i < copied.domains.size(); ++i) {
    PutItem item;
    item.key = {at, copied.key_lengths[i]};
    at += copied.key_lengths[i];
    item.value = {at, copied.value_lengths[i]};
    at += copied.value_lengths[i];
    item.ttl_ms = copied.ttl_ms[i];
    item.exact_ttl = item.ttl_ms != 0;
    const CopiedDomain& to = domains[copied.domains[i]];
    if (to.ns == kNoNamespace || to.domain == kNoDomain) {
      ++counts.rejected;
      continue;
    }
    item.domain = to.domain;
    auto group = std::find_if(groups.begin(), groups.end(),
                              [&](const Group& each) { return each.ns == to.ns; });
    if (group == groups.end()) group = groups.insert(groups.end(), Group{to.ns, {}, {}});
    group->items.push_back(item);
    group->tokens.push_back(tokens.token(to.ns, item.key));
    if (group->items.size() == kInstallItems) install(engine, *group, counts);
  }
  for (Group& group : groups) install(engine, group, counts);
  counts.items += copied.domains.size();
  counts.bytes += copied.items.size();
  return true;
}

}  // namespace fc
