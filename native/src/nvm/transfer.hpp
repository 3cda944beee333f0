// How both kinds of queue carry on with a request until all of it is moved.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdint>

#include "nvm/device.hpp"

namespace fc {

// What is left of one request. Threads: one at a time.
class Transfer {
 public:
  // How often one request is tried again at once when the kernel says "not now"; then it ends with
  // that error.
  static constexpr std::uint32_t kRetriesMax = 1000;

  Transfer() = default;
  explicit Transfer(IoRequest* request) : request_(request) {}

  IoRequest* request() const noexcept { return request_; }
  IoRequest::Kind kind() const noexcept { return request_->kind; }
  std::uint64_t offset() const noexcept { return request_->offset + done_; }
  std::byte* data() const noexcept { return request_->data + done_; }
  std::uint32_t bytes() const noexcept { return request_->bytes - done_; }

  // Takes what a system call returned (bytes, or -errno). True: there is more to do, start the
  // rest. False: the request has ended and has its result.
  bool goes_on(std::int64_t outcome) noexcept {
    if (outcome == -EAGAIN || outcome == -EINTR) {
      if (++retries_ <= kRetriesMax) return true;
    }
    if (outcome < 0) return end(outcome);
    if (request_->kind == IoRequest::Kind::Sync) return end(request_->bytes);
    const std::uint32_t moved = done_ + static_cast<std::uint32_t>(outcome);
    // Direct I/O goes on at a block's boundary only. No whole block more means that the file ends
    // here: somebody cut it.
    const std::uint32_t whole = moved - moved % static_cast<std::uint32_t>(kBlockBytes);
    if (moved >= request_->bytes || whole <= done_) return end(moved);
    done_ = whole;
    return true;
  }

 private:
  bool end(std::int64_t result) noexcept {
    request_->result = result;
    return false;
  }

  IoRequest* request_ = nullptr;
  std::uint32_t done_ = 0;
  std::uint32_t retries_ = 0;
};

}  // namespace fc
