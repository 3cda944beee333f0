// Memory for what a policy remembers of keys: given to it, so that it may outlive the process, or
// its own. Whatever it holds is a hint: nothing there can make a policy more than wrong.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <vector>

namespace fc {

template <class Block>
class HintArray {
  static_assert(std::is_trivially_copyable_v<Block>);

 public:
  // `given` is used as it is when it is large enough.
  HintArray(std::size_t count, std::span<std::byte> given) : count_(count) {
    if (given.size() >= count * sizeof(Block)) {
      data_ = reinterpret_cast<Block*>(given.data());
    } else {
      own_.resize(count);
      data_ = own_.data();
    }
  }
  HintArray(const HintArray&) = delete;
  HintArray& operator=(const HintArray&) = delete;

  Block& operator[](std::size_t at) noexcept { return data_[at]; }
  const Block& operator[](std::size_t at) const noexcept { return data_[at]; }
  std::size_t size() const noexcept { return count_; }
  std::size_t bytes() const noexcept { return count_ * sizeof(Block); }
  std::span<Block> all() noexcept { return {data_, count_}; }
  void clear() noexcept { std::fill_n(data_, count_, Block{}); }

 private:
  const std::size_t count_;
  std::vector<Block> own_;
  Block* data_;
};

}  // namespace fc
