// A device in memory: its bytes can be looked at, changed and kept as they were at some moment.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "nvm/device.hpp"

namespace fc::testing {

// Threads: as NvmDevice; data() is for when no queue is at work, or within written().
class MemoryDevice final : public NvmDevice {
 public:
  MemoryDevice(std::string path, std::size_t bytes) : path_(std::move(path)), data_(bytes) {}
  std::unique_ptr<IoQueue> make_queue(std::uint32_t) override {
    return std::make_unique<Queue>(*this);
  }
  const std::string& path() const noexcept override { return path_; }
  std::uint64_t bytes() const noexcept override { return data_.size(); }
  const char* io() const noexcept override { return "memory"; }
  bool direct() const noexcept override { return false; }
  const std::string& fallback() const noexcept override { return fallback_; }

  std::vector<std::byte>& data() { return data_; }
  // Called after every write, by its thread.
  std::function<void(const IoRequest&)> written;

 private:
  struct Queue final : IoQueue {
    explicit Queue(MemoryDevice& of) : device(of) {}
    void submit(std::span<IoRequest* const> requests) override {
      for (IoRequest* request : requests) {
        device.carry_out(*request);
        const std::lock_guard lock(mutex);
        ended.push_back(request);
      }
      wake();
    }
    std::size_t wait(std::span<IoRequest*> out, std::uint64_t timeout_ns) override {
      std::unique_lock lock(mutex);
      const auto ready = [this] { return woken || !ended.empty(); };
      if (timeout_ns == ~std::uint64_t{0}) {
        changed.wait(lock, ready);
      } else {
        changed.wait_for(lock, std::chrono::nanoseconds(timeout_ns), ready);
      }
      woken = false;
      std::size_t count = 0;
      for (; count < out.size() && !ended.empty(); ++count, ended.pop_front()) {
        out[count] = ended.front();
      }
      return count;
    }
    void wake() noexcept override {
      {
        const std::lock_guard lock(mutex);
        woken = true;
      }
      changed.notify_one();
    }
    MemoryDevice& device;
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<IoRequest*> ended;  // guarded by mutex
    bool woken = false;            // guarded by mutex
  };
  void carry_out(IoRequest& request) {
    const std::lock_guard lock(mutex_);
    request.result = request.bytes;
    if (request.kind == IoRequest::Kind::Sync) return;
    std::byte* at = data_.data() + request.offset;
    if (request.kind == IoRequest::Kind::Read) {
      std::memcpy(request.data, at, request.bytes);
      return;
    }
    std::memcpy(at, request.data, request.bytes);
    if (written) written(request);
  }

  const std::string path_;
  const std::string fallback_;
  std::mutex mutex_;
  std::vector<std::byte> data_;  // guarded by mutex_ while it has queues
};

}  // namespace fc::testing
