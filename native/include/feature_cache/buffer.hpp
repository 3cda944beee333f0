// A growable byte buffer whose storage is recycled.
//
// Replies are some hundred kilobytes; allocating that anew for each costs page faults. Buffers take
// their storage from a bounded process-wide pool and give it back when they end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

namespace fc {

class Buffer {
 public:
  Buffer() noexcept = default;
  explicit Buffer(std::size_t capacity) { grow_to(capacity); }
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        size_(std::exchange(other.size_, 0)),
        capacity_(std::exchange(other.capacity_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    if (this != &other) {
      release();
      data_ = std::exchange(other.data_, nullptr);
      size_ = std::exchange(other.size_, 0);
      capacity_ = std::exchange(other.capacity_, 0);
    }
    return *this;
  }
  Buffer(const Buffer&) = delete;  // a silent copy of a reply would cost more than the lookup
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  std::uint8_t* data() noexcept { return data_; }
  const std::uint8_t* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }
  std::size_t capacity() const noexcept { return capacity_; }
  bool empty() const noexcept { return size_ == 0; }
  void clear() noexcept { size_ = 0; }

  // Makes room for `bytes` more and returns where they go; commit() makes them part of the buffer.
  std::uint8_t* reserve(std::size_t bytes) {
    if (capacity_ - size_ < bytes) grow_to(size_ + bytes);
    return data_ + size_;
  }
  void commit(std::size_t bytes) noexcept { size_ += bytes; }
  void resize_down(std::size_t size) noexcept { size_ = size; }
  void append(const void* from, std::size_t bytes) {
    if (bytes == 0) return;
    std::memcpy(reserve(bytes), from, bytes);
    size_ += bytes;
  }

 private:
  void grow_to(std::size_t capacity);  // throws std::bad_alloc
  void release() noexcept;

  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t capacity_ = 0;
};

}  // namespace fc
