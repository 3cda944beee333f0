// Misses on their way to a feature store, and the answers on their way back.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "feature_cache/buffer.hpp"
#include "feature_cache/types.hpp"

namespace fc {

// Replay: of a warm-up.
enum class FetchPriority : std::uint8_t { Live = 0, Speculative = 1, Background = 2, Replay = 3 };
inline constexpr std::size_t kFetchPriorities = 4;

// The store's answer for one key.
struct FetchedValue {
  enum class Kind : std::uint8_t { Found, NotFound, Garbled };
  Kind kind = Kind::Garbled;
  std::uint64_t offset = 0;  // into the answer's bytes
  std::uint32_t size = 0;
  std::string_view domain_hint;  // lives until complete() returns
  std::uint64_t ttl_ms = 0;
};

// The answers of one batch: one entry a key, in the order of the batch's groups.
struct FetchAnswer {
  std::vector<FetchedValue> values;
  Buffer bytes;
};

// Deduplicated misses that one call to a store answers. Ended once, by complete() or fail();
// dropped without either, it fails. May be ended after its timeout: then the answer is too late and
// changes nothing.
class FetchBatch {
 public:
  struct Group {
    std::string_view ns;
    std::vector<std::string_view> keys;
  };

  virtual ~FetchBatch() = default;
  virtual const std::vector<Group>& groups() const noexcept = 0;
  virtual std::size_t key_count() const noexcept = 0;
  virtual FetchPriority priority() const noexcept = 0;
  virtual double seconds_left() const noexcept = 0;
  virtual void complete(FetchAnswer answer) = 0;
  // Answers every key with `status`: Error, Throttled or TimedOut.
  virtual void fail(CellStatus status) = 0;
};

}  // namespace fc
