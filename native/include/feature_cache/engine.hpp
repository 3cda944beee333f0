// The engine seam: batch-level calls that any engine must answer the same way.
//
// tests/engine_contract.hpp is the contract; the bundled engine and any other pass it. All methods
// are thread-safe. No method calls back into the caller.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "feature_cache/buffer.hpp"
#include "feature_cache/config.hpp"
#include "feature_cache/counters.hpp"
#include "feature_cache/types.hpp"

namespace fc {

// A key that was absent (or wants a refresh): its place in the batch and what a fetch may install.
struct Absent {
  std::uint32_t position;
  Token token;
};

// One column of a lookup. The caller owns all of it; arrays have keys.size() entries.
struct GetColumn {
  NamespaceIndex ns = kNoNamespace;
  std::span<const std::string_view> keys;
  std::span<CellStatus> statuses;          // out: HitDram, NotFound, Miss, Throttled (reply limit)
  std::span<std::uint32_t> lengths;        // out: bytes of each value, 0 where there is none
  Buffer* values = nullptr;                // out: values are appended in key order
  std::uint64_t max_value_bytes = ~0ull;   // of this column; what does not fit is Throttled
  bool quiet = false;                      // not counted as asked: a second look of one request
  std::vector<Absent>* absent = nullptr;   // out, may be null
  std::vector<Absent>* refresh = nullptr;  // out, may be null: hits that are hot and near expiry
};

struct PutItem {
  std::string_view key;
  std::string_view value;
  std::uint64_t ttl_ms = 0;        // 0: the domain's
  DomainIndex domain = kNoDomain;  // kNoDomain: the namespace's rules, then its default
  bool negative = false;           // the store said that there is no value
};

class Engine {
 public:
  virtual ~Engine() = default;

  // kNoNamespace / kNoDomain when there is none of that name.
  virtual NamespaceIndex find_namespace(std::string_view name) const noexcept = 0;
  virtual DomainIndex find_domain(NamespaceIndex ns, std::string_view name) const noexcept = 0;

  virtual void get(GetColumn& column) = 0;
  // One status an item: Stored or Rejected. A rejected put leaves no older value behind.
  virtual void put(NamespaceIndex ns, std::span<const PutItem> items,
                   std::span<WriteStatus> statuses) = 0;
  virtual void erase(NamespaceIndex ns, std::span<const std::string_view> keys,
                     std::span<WriteStatus> statuses) = 0;
  // Installs fetched values, each only while its token lives.
  virtual void install(NamespaceIndex ns, std::span<const PutItem> items,
                       std::span<const Token> tokens, std::span<InstallStatus> statuses) = 0;
  // Whether a result fetched under `token` could still be installed.
  virtual bool token_alive(NamespaceIndex ns, std::string_view key, Token token) const noexcept = 0;

  // Drops all items of a namespace and voids its tokens; returns how many items went.
  virtual std::uint64_t flush(NamespaceIndex ns) = 0;
  // Changes a domain's budget while serving; returns the old one. Throws std::invalid_argument
  // when there is no room for it.
  virtual std::uint64_t resize(DomainIndex domain, std::uint64_t budget_bytes) = 0;
  // Time-driven work: expiry, sealing. Called by the engine's own thread; tests call it by hand.
  virtual void maintain() = 0;
  virtual void visit(CounterVisitor& visitor) const = 0;
};

class Clock;

// The bundled engine. `clock` must outlive it. With `background`, a thread of its own maintains it.
std::unique_ptr<Engine> make_engine(const EngineConfig& config, const Clock& clock,
                                    bool background = true);

}  // namespace fc
