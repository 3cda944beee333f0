#include "feature_cache/buffer.hpp"

#include <array>
#include <bit>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace fc {
namespace {

// Free storage by power of two. Bounded: what does not fit goes back to the allocator.
class StoragePool {
 public:
  static constexpr unsigned kSmallestShift = 12;
  static constexpr unsigned kLargestShift = 22;
  static constexpr std::size_t kPooledBytesPerSize = std::size_t{8} << 20;

  std::uint8_t* take(std::size_t capacity) {
    if (const unsigned shift = shift_of(capacity); shift <= kLargestShift) {
      Shelf& shelf = shelves_[shift - kSmallestShift];
      const std::lock_guard lock(shelf.mutex);
      if (!shelf.free.empty()) {
        std::uint8_t* storage = shelf.free.back();
        shelf.free.pop_back();
        return storage;
      }
    }
    auto* storage = static_cast<std::uint8_t*>(std::malloc(capacity));
    if (storage == nullptr) throw std::bad_alloc();
    return storage;
  }

  void give(std::uint8_t* storage, std::size_t capacity) noexcept {
    if (const unsigned shift = shift_of(capacity); shift <= kLargestShift) {
      Shelf& shelf = shelves_[shift - kSmallestShift];
      const std::lock_guard lock(shelf.mutex);
      if ((shelf.free.size() + 1) << shift <= kPooledBytesPerSize) {
        try {
          shelf.free.push_back(storage);
          return;
        } catch (const std::bad_alloc&) {
        }
      }
    }
    std::free(storage);
  }

 private:
  static unsigned shift_of(std::size_t capacity) noexcept {
    return static_cast<unsigned>(std::bit_width(capacity - 1));
  }
  struct Shelf {
    std::mutex mutex;
    std::vector<std::uint8_t*> free;
  };
  std::array<Shelf, kLargestShift - kSmallestShift + 1> shelves_;
};

StoragePool& pool() {
  static auto* instance = new StoragePool();  // never destroyed: buffers may outlive main()
  return *instance;
}

}  // namespace

void Buffer::grow_to(std::size_t capacity) {
  capacity = std::bit_ceil(capacity < (std::size_t{1} << StoragePool::kSmallestShift)
                               ? std::size_t{1} << StoragePool::kSmallestShift
                               : capacity);
  if (capacity <= capacity_) return;
  std::uint8_t* grown = pool().take(capacity);
  if (size_ != 0) std::memcpy(grown, data_, size_);
  if (data_ != nullptr) pool().give(data_, capacity_);
  data_ = grown;
  capacity_ = capacity;
}

void Buffer::release() noexcept {
  if (data_ != nullptr) pool().give(data_, capacity_);
  data_ = nullptr;
}

}  // namespace fc
