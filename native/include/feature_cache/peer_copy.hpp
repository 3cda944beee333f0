// Copies items of a warm node's memory into this node's engine.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "feature_cache/node.hpp"

namespace fc {

class Engine;

struct PeerCopyConfig {
  std::string address;
  CopyWanted wanted;
  std::uint64_t bytes_per_second = 0;  // that this node takes at most; 0: what the peer gives
  std::uint64_t cursor = 0;            // where an earlier copy came to
};

struct PeerCopyCounts {
  std::uint64_t cursor = 0;  // where the next copy would go on
  std::uint64_t items = 0;   // that came
  std::uint64_t bytes = 0;   // of their keys and values
  std::uint64_t installed = 0;
  std::uint64_t not_installed_void = 0;  // written here since
  std::uint64_t rejected = 0;            // no room, or of no domain here
};

// Values come under the tokens that their keys had before the peer was asked: what was written here
// since stays. Where a copy goes on after a break, tokens are taken anew before the peer is asked.
//
// Threads: run() one at a time; counts() and stop() from any.
class PeerCopy {
 public:
  virtual ~PeerCopy() = default;
  // Copies for at most so long; `done`: the end was reached. May be called again, also after a
  // failure: it goes on behind what came last.
  virtual CallStatus run(double seconds, bool& done) = 0;
  // Lets run() return soon, and every later one at once.
  virtual void stop() = 0;
  virtual PeerCopyCounts counts() const = 0;
};

// `engine` must outlive it.
std::unique_ptr<PeerCopy> make_peer_copy(Engine& engine, PeerCopyConfig config);

// What a node has to be copied.
CallStatus describe_peer(const std::string& address, double timeout_seconds,
                         std::vector<ItemTotals>& totals);

// Items of one chunk as they came, whose bytes may be anybody's. Views are into `items`.
struct CopiedItems {
  std::span<const std::uint32_t> domains;
  std::span<const std::uint32_t> key_lengths;
  std::span<const std::uint32_t> value_lengths;
  std::span<const std::uint32_t> ttl_ms;
  std::string_view items;
};

// Installs them, those that hold together; false, and nothing is installed, when the lists do not.
// `domains`: what the numbers in a chunk stand for; `ns` kNoNamespace: nothing here.
struct CopiedDomain {
  NamespaceIndex ns = kNoNamespace;
  DomainIndex domain = kNoDomain;
};
class TokenSnapshot;
[[nodiscard]] bool install_copied(Engine& engine, const TokenSnapshot& tokens,
                                  std::span<const CopiedDomain> domains, const CopiedItems& copied,
                                  PeerCopyCounts& counts);

}  // namespace fc
