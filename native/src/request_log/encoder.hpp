// Turns requests into blocks of the request log.
//
// A key is looked up in a dictionary of all keys since it began: a known one costs the exponent of
// its place, which zstd's entropy coder shrinks to what popularity leaves of it, and the bits
// behind the exponent as they are. Keys that are asked for often come early, so their places are
// small: that is within some hundredths of the entropy of the stream, at a few ns a key.
//
// The dictionary tells keys apart by 64 bits of a hash (ids by themselves). Should two keys share
// them, one is logged for the other: a warm-up fetches a key that nobody asked for, no more.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "request_log/format.hpp"

typedef struct ZSTD_CCtx_s ZSTD_CCtx;

namespace fc::request_log {

class Encoder {
 public:
  static constexpr std::size_t kAddKeysMax = 1024;

  // `dictionary_keys`: distinct keys that are told apart; beyond, a new dictionary begins.
  Encoder(std::uint64_t file_id, std::uint32_t dictionary_keys);
  ~Encoder();
  Encoder(const Encoder&) = delete;
  Encoder& operator=(const Encoder&) = delete;

  // Adds a column of a request, or a part of one: keys of one kind (a namespace and a domain hint),
  // at most kAddKeysMax of them, and only while it is not full. `alias(key)`: what stands in the
  // log for a new key.
  template <class Alias>
  void add(std::uint32_t kind, bool begins_request, std::span<const std::string_view> keys,
           Alias&& alias);
  // Whether the block is to be taken before more is added.
  bool full() const noexcept {
    return keys_ + kAddKeysMax > kBlockKeysMax ||
           key_bytes_.size() + kAddKeysMax * kMaxKeyBytes > kBlockKeyBytesMax;
  }
  bool empty() const noexcept { return keys_ == 0; }

  // The block of what was added, and an empty one begins. `dropped`: keys lost so far, for the
  // totals. The bytes are valid until the next call.
  std::span<const std::uint8_t> take(std::uint64_t dropped);
  // The block that ends the file.
  std::span<const std::uint8_t> finish(std::uint64_t dropped);
  // The block that was taken last was not written: the next one begins a dictionary. Totals go
  // back to before it.
  void lost();

  std::uint64_t total_keys() const noexcept { return total_keys_; }
  std::uint64_t distinct_keys() const noexcept { return distinct_keys_; }

 private:
  struct Slot {
    std::uint64_t hash;
    std::uint32_t place;       // from 1
    std::uint32_t dictionary;  // which one it is of; others are free
  };
  struct Lookup {
    std::uint64_t hash;
    Slot* slot;
  };

  static std::uint64_t hash_of(std::uint32_t kind, std::string_view key) noexcept;
  void prefetch(std::uint64_t hash) const noexcept {
    __builtin_prefetch(&slots_[scale(hash, slots_.size())], 1);
  }
  Slot& slot_of(std::uint64_t hash) noexcept;
  void begin_dictionary() noexcept;
  void put_known(std::uint32_t place);
  void put_new(std::string_view key);
  std::span<const std::uint8_t> encode(std::uint32_t flags, std::uint64_t dropped);

  static constexpr std::size_t kGroup = 32;

  const std::uint64_t file_id_;
  const std::uint32_t dictionary_keys_;
  std::vector<Slot> slots_;  // open addressing, at most half full
  std::uint32_t dictionary_ = 1;
  std::uint32_t places_ = 0;
  bool fresh_dictionary_ = true;  // the block being filled begins one

  std::uint32_t keys_ = 0;
  std::uint32_t requests_ = 0;
  std::vector<std::uint8_t> runs_;
  std::vector<std::uint8_t> symbols_;
  std::vector<std::uint8_t> bits_;
  std::uint64_t bit_buffer_ = 0;
  unsigned bit_count_ = 0;
  std::vector<std::uint8_t> lengths_;
  std::vector<std::uint8_t> key_bytes_;
  std::uint32_t new_keys_ = 0;
  std::size_t key_length_ = 0;  // of all new ones so far
  bool one_length_ = true;

  std::uint32_t sequence_ = 0;
  std::uint64_t total_requests_ = 0;
  std::uint64_t total_keys_ = 0;
  std::uint64_t distinct_keys_ = 0;
  struct {
    std::uint32_t keys = 0;
    std::uint32_t requests = 0;
    std::uint32_t new_keys = 0;
  } last_;  // block
  std::vector<std::uint8_t> transposed_;
  std::vector<std::uint8_t> block_;
  ZSTD_CCtx* const compressor_;
};

template <class Alias>
void Encoder::add(std::uint32_t kind, bool begins_request, std::span<const std::string_view> keys,
                  Alias&& alias) {
  if (keys.empty()) return;
  put_number(runs_, std::uint64_t{kind} << 1 | (begins_request ? 1 : 0));
  put_number(runs_, keys.size());
  if (begins_request) ++requests_;
  std::uint64_t hashes[kGroup];
  for (std::size_t first = 0; first < keys.size(); first += kGroup) {
    const std::size_t count = std::min(kGroup, keys.size() - first);
    for (std::size_t i = 0; i < count; ++i) {
      hashes[i] = hash_of(kind, keys[first + i]);
      prefetch(hashes[i]);
    }
    for (std::size_t i = 0; i < count; ++i) {
      Slot& slot = slot_of(hashes[i]);
      if (slot.dictionary == dictionary_) {
        put_known(slot.place);
        continue;
      }
      slot = {hashes[i], ++places_, dictionary_};
      put_new(alias(keys[first + i]));
    }
  }
  keys_ += static_cast<std::uint32_t>(keys.size());
}

}  // namespace fc::request_log
