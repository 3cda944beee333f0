// The engine seam: batch-level calls that any engine must answer the same way.
//
// tests/engine_contract.hpp is the contract; the bundled engine and any other pass it. All methods
// are thread-safe. None calls back into the caller but read(): from threads of the
// engine's own, and at once for cells that its queue has no room for.
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
#include "feature_cache/recovery.hpp"
#include "feature_cache/types.hpp"

namespace fc {

// A key that was absent (or wants a refresh): its place in the batch and what a fetch may install.
struct Absent {
  std::uint32_t position;
  Token token;
};

// A cell whose key may lie on NVM, as a lookup found it. Handed to Engine::read() once, or given
// back by Engine::release(): until then it keeps its region from being reused.
struct NvmCell {
  std::string_view key;  // must live until the read has ended
  std::uint64_t hash = 0;
  std::uint64_t entry = 0;  // the index entry's word
  NamespaceIndex ns = kNoNamespace;
  Token token;                 // what a fetch of the key may install
  std::uint16_t instance = 0;  // whose `entry` it is, of a node of several
  std::uint32_t column = 0;    // the caller's numbers, handed back as they are
  std::uint32_t position = 0;
};

// What became of an NVM cell.
struct NvmAnswer {
  NvmCell cell;                          // of Miss: `cell.token` is a token for a fetch
  CellStatus status = CellStatus::Miss;  // HitNvm, HitDram (it moved), NotFound, Miss or Throttled
  std::span<const std::uint8_t> value;   // valid during the call only
};

// Who waits for NVM cells. Called from the engine's threads, or within read() for what its queue
// refuses, a few cells at a time, each answered exactly once; calls for one reader do not overlap
// with one another. Must not block.
class NvmReader {
 public:
  virtual ~NvmReader() = default;
  virtual void answer(std::span<const NvmAnswer> answers) = 0;
  // Cells whose read is late on the device (SpeculativeConfig); each is named once, and still
  // answered when its read ends.
  virtual void late(std::span<const NvmCell> cells) = 0;
  // Whether anybody still wants the answers; asked before a read is handed to the device.
  virtual bool wanted() const noexcept = 0;
};

// One column of a lookup. The caller owns all of it; arrays have keys.size() entries.
struct GetColumn {
  NamespaceIndex ns = kNoNamespace;
  std::span<const std::string_view> keys;
  // Out: HitDram, HitNvm, NotFound, Miss, Throttled (reply limit); Unspecified: in `nvm`.
  std::span<CellStatus> statuses;
  std::span<std::uint32_t> lengths;        // out: bytes of each value, 0 where there is none
  Buffer* values = nullptr;                // out: values are appended in key order
  std::uint64_t max_value_bytes = ~0ull;   // of this column; what does not fit is Throttled
  bool quiet = false;                      // not counted as asked: a second look of one request
  std::vector<Absent>* absent = nullptr;   // out, may be null
  std::vector<Absent>* refresh = nullptr;  // out, may be null: hits that are hot and near expiry
  // Out: cells to be read from NVM. Null: a call that is not quiet reads them itself and waits; a
  // quiet one answers them Miss.
  std::vector<NvmCell>* nvm = nullptr;
};

struct PutItem {
  std::string_view key;
  std::string_view value;
  std::uint64_t ttl_ms = 0;        // 0: the domain's
  DomainIndex domain = kNoDomain;  // kNoDomain: the namespace's rules, then its default
  bool negative = false;           // the store said that there is no value
  // How often the key is known to have been asked, this time included: rules that count see it, and
  // eviction takes the value for one that was hit so often. A warm-up knows it from elsewhere.
  std::uint8_t asked = 1;
  bool exact_ttl = false;  // `ttl_ms` is what is left of a life that was shortened already
};

// Which tokens all keys had at one moment: what was read elsewhere after it may be installed under
// them, and loses against every write that was made here since.
class TokenSnapshot {
 public:
  virtual ~TokenSnapshot() = default;
  virtual Token token(NamespaceIndex ns, std::string_view key) const noexcept = 0;
};

// Which items a scan is for.
struct ScanFilter {
  static constexpr std::uint32_t kNone = ~std::uint32_t{0};
  // By DomainIndex: the number that stands for the domain in the batch, or kNone.
  std::vector<std::uint32_t> domains;
  std::uint32_t shard_count = 0;
  std::vector<bool> shards;  // by shard; empty: all
};

// Items as a scan found them, one entry in each list; the order is the index's.
struct ScanBatch {
  std::vector<std::uint32_t> domains;  // the filter's numbers
  std::vector<std::uint32_t> key_lengths;
  std::vector<std::uint32_t> value_lengths;
  std::vector<std::uint32_t> ttl_ms;  // left to live, at least 1; 0: it does not expire
  Buffer bytes;                       // key and value, item after item

  std::size_t items() const noexcept { return domains.size(); }
};
inline constexpr std::uint64_t kScanEnd = ~std::uint64_t{0};

// What an earlier process left of a leaf's shards.
struct KeptShards {
  std::uint32_t shard_count = 0;
  std::vector<std::uint32_t> shards;  // rising; held when it ended, their items are all there still
  std::uint64_t away_ms =
      0;  // since it was alive last, at the least: writes of that time are missing
};

class Engine {
 public:
  virtual ~Engine() = default;

  // kNoNamespace / kNoDomain when there is none of that name.
  virtual NamespaceIndex find_namespace(std::string_view name) const noexcept = 0;
  virtual DomainIndex find_domain(NamespaceIndex ns, std::string_view name) const noexcept = 0;

  virtual void get(GetColumn& column) = 0;
  // Reads cells from NVM, all of a batch at once; `reader` hears of each. Returns at once.
  virtual void read(std::vector<NvmCell> cells, std::shared_ptr<NvmReader> reader) = 0;
  // Gives cells back that will not be read.
  virtual void release(std::span<const NvmCell> cells) = 0;
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

  virtual std::shared_ptr<const TokenSnapshot> tokens() const = 0;
  // Adds items that are in DRAM now to `batch`, from `cursor` (0: the beginning) on, until it has
  // about `bytes` of them; returns the cursor to go on with, kScanEnd after the last. What does not
  // change meanwhile is found, but for the rare item that is moved behind the scan's back; negative
  // answers and what has expired are left out, and so is what lies on NVM.
  virtual std::uint64_t scan(std::uint64_t cursor, const ScanFilter& filter, std::size_t bytes,
                             ScanBatch& batch) = 0;

  // Drops all items of a namespace and voids its tokens; returns how many items went.
  virtual std::uint64_t flush(NamespaceIndex ns) = 0;
  // Of a leaf: hides every item of these shards that was written before, and voids the tokens that
  // were taken before, since others may have written to them meanwhile. A get that starts after it
  // finds none of them, a write that starts after it is seen. Throws std::invalid_argument for
  // another number of shards than EngineConfig's, and for a shard beyond it.
  virtual void drop_shards(std::uint32_t shard_count, std::span<const std::uint32_t> shards) = 0;
  // Of a leaf: the shards that it answers for from now on, as of writes that it has all of. What is
  // no longer among them is dropped. A process that comes after this one finds the items of these
  // alone, and how long nobody was there for them: so hold what kept_shards() says only when the
  // writes of that time are made up for, or it was dropped. Throws as drop_shards().
  virtual void hold_shards(std::uint32_t shard_count, std::span<const std::uint32_t> shards) = 0;
  // As this start found it; items of all other shards were hidden by it.
  virtual KeptShards kept_shards() const = 0;
  // Changes a domain's budget while serving; returns the old one. Throws std::invalid_argument
  // when there is no room for it.
  virtual std::uint64_t resize(DomainIndex domain, std::uint64_t budget_bytes) = 0;
  // Time-driven work: expiry, sealing. Called by the engine's own thread; tests call it by hand.
  virtual void maintain() = 0;
  virtual void visit(CounterVisitor& visitor) const = 0;

  virtual const StartReport& start_report() const noexcept = 0;
  // The orderly end: writes what shall outlive the process, within PersistConfig's limit, and marks
  // it as whole. No call may run meanwhile or come after but the destructor. An engine that ends
  // without it is found by the next start as after a kill. False: not all was written.
  virtual bool shutdown() = 0;
};

class Clock;
class NvmDevice;

// The bundled engine. `clock` must outlive it. With `background`, a thread of its own maintains it.
// `devices`: used instead of opening config.nvm.devices, one each; for tests and drills. Throws
// std::invalid_argument for a config that does not fit, std::bad_alloc for no memory,
// std::system_error for a device or a directory that cannot be used, or that another process uses.
// `progress` is kept up to date meanwhile; it may be null.
std::unique_ptr<Engine> make_engine(const EngineConfig& config, const Clock& clock,
                                    bool background = true,
                                    std::vector<std::shared_ptr<NvmDevice>> devices = {},
                                    RecoveryProgress* progress = nullptr);

// Keeps nothing, and knows the names: of a root without a hot tier.
std::unique_ptr<Engine> make_empty_engine(const EngineConfig& config);

}  // namespace fc
