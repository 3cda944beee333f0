// The peer of the engine benchmark: the plain map one would write for the job.
//
// Flat open addressing with linear probing, keys and values inline, load at most one half, the same
// hash and the same page size as the engine; no eviction, no expiry, no threads, no batching.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <string_view>

#include "core/hash.hpp"
#include "load.hpp"

namespace fc::bench {

class PlainMap {
 public:
  PlainMap(std::uint64_t items, std::size_t value_bytes)
      : value_bytes_(value_bytes),
        slot_bytes_((8 + kKeyBytes + value_bytes + 7) & ~std::size_t{7}),
        slots_(items * 2) {
    bytes_ = slots_ * slot_bytes_ + kHugePage;
    mapping_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping_ == MAP_FAILED) throw std::bad_alloc();
    const auto base =
        (reinterpret_cast<std::uint64_t>(mapping_) + kHugePage - 1) & ~(kHugePage - 1);
    data_ = reinterpret_cast<std::uint8_t*>(base);
    (void)madvise(data_, bytes_ - kHugePage, MADV_HUGEPAGE);
  }
  ~PlainMap() { munmap(mapping_, bytes_); }
  PlainMap(const PlainMap&) = delete;
  PlainMap& operator=(const PlainMap&) = delete;

  void put(std::string_view key, const void* value) noexcept {
    std::uint8_t* slot = find(key);
    const std::uint64_t used = 1;
    std::memcpy(slot, &used, 8);
    std::memcpy(slot + 8, key.data(), kKeyBytes);
    std::memcpy(slot + 8 + kKeyBytes, value, value_bytes_);
  }
  bool get(std::string_view key, void* value) noexcept {
    const std::uint8_t* slot = find(key);
    if (!used(slot)) return false;
    std::memcpy(value, slot + 8 + kKeyBytes, value_bytes_);
    return true;
  }

 private:
  static constexpr std::uint64_t kHugePage = std::uint64_t{2} << 20;

  static bool used(const std::uint8_t* slot) noexcept {
    std::uint64_t word;
    std::memcpy(&word, slot, 8);
    return word != 0;
  }
  std::uint8_t* find(std::string_view key) noexcept {
    std::uint64_t i = scale(hash_key(0, key).low, slots_);
    for (;; i = i + 1 == slots_ ? 0 : i + 1) {
      std::uint8_t* slot = data_ + i * slot_bytes_;
      if (!used(slot) || std::memcmp(slot + 8, key.data(), kKeyBytes) == 0) return slot;
    }
  }

  const std::size_t value_bytes_;
  const std::size_t slot_bytes_;
  const std::uint64_t slots_;
  std::uint64_t bytes_ = 0;
  void* mapping_ = nullptr;
  std::uint8_t* data_ = nullptr;
};

}  // namespace fc::bench
