// What the tests of devices share: a directory that goes away, aligned blocks, waiting for many
// requests, and child processes whose kernel refuses things.
#pragma once

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "nvm/device.hpp"

namespace fc::testing {

inline constexpr std::uint64_t kForever = std::numeric_limits<std::uint64_t>::max();
inline constexpr std::uint64_t kMillisecond = 1'000'000;
inline constexpr std::uint32_t kBlock = kBlockBytes;

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string pattern = std::filesystem::temp_directory_path() / "fc-device-XXXXXX";
    if (mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp " + pattern);
    path_ = pattern;
    // A child that has become another user goes in.
    if (chmod(path_.c_str(), 0755) != 0) throw std::runtime_error("chmod " + pattern);
  }
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;

  std::string file(const std::string& name = "device") const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

// Aligned bytes, all the same or by a seed.
class AlignedBytes {
 public:
  explicit AlignedBytes(std::size_t bytes, std::uint8_t fill = 0)
      : bytes_(bytes), data_(static_cast<std::byte*>(std::aligned_alloc(kBlockBytes, bytes))) {
    std::fill_n(data_.get(), bytes, std::byte{fill});
  }

  std::byte* data() const { return data_.get(); }
  std::uint32_t size() const { return static_cast<std::uint32_t>(bytes_); }
  std::byte& operator[](std::size_t at) const { return data_.get()[at]; }
  bool operator==(const AlignedBytes& other) const {
    return std::equal(data(), data() + bytes_, other.data(), other.data() + other.bytes_);
  }
  void fill_random(std::uint64_t seed) const {
    for (std::size_t i = 0; i < bytes_; ++i) {
      if (i % 8 == 0) seed = seed * 6364136223846793005ull + 1442695040888963407ull;
      data_.get()[i] = static_cast<std::byte>(seed >> (8 * (i % 8)));
    }
  }
  bool all(std::uint8_t value, std::size_t from, std::size_t to) const {
    return std::all_of(data() + from, data() + to,
                       [value](std::byte b) { return b == std::byte{value}; });
  }

 private:
  struct Free {
    void operator()(std::byte* bytes) const { std::free(bytes); }
  };
  std::size_t bytes_;
  std::unique_ptr<std::byte, Free> data_;
};

inline IoRequest request(IoRequest::Kind kind, std::uint64_t offset, const AlignedBytes& bytes) {
  IoRequest made;
  made.kind = kind;
  made.offset = offset;
  made.data = bytes.data();
  made.bytes = bytes.size();
  return made;
}
inline IoRequest read_of(std::uint64_t offset, const AlignedBytes& bytes) {
  return request(IoRequest::Kind::Read, offset, bytes);
}
inline IoRequest write_of(std::uint64_t offset, const AlignedBytes& bytes) {
  return request(IoRequest::Kind::Write, offset, bytes);
}
inline IoRequest sync_of() {
  IoRequest made;
  made.kind = IoRequest::Kind::Sync;
  return made;
}

inline void submit(IoQueue& queue, std::vector<IoRequest>& requests) {
  std::vector<IoRequest*> pointers;
  for (IoRequest& each : requests) pointers.push_back(&each);
  queue.submit(pointers);
}
inline void submit(IoQueue& queue, IoRequest& request) {
  IoRequest* pointer = &request;
  queue.submit({&pointer, 1});
}

// Waits for `count` requests; in the order in which they ended.
inline std::vector<IoRequest*> wait_for(IoQueue& queue, std::size_t count) {
  std::vector<IoRequest*> ended(count);
  std::size_t done = 0;
  while (done < count) done += queue.wait(std::span(ended).subspan(done), kForever);
  return ended;
}

// Runs `work` in a child process and returns what it returned, or how the child died.
std::string in_child(const std::function<std::string()>& work);

struct RefusedArgument {
  unsigned position = 0;  // from 0
  std::uint32_t value = 0;
};
// From now on the kernel answers `call` with `error` in this process, as a container's filter does;
// with an argument, only calls that have it.
void refuse(long call, int error, std::optional<RefusedArgument> argument = std::nullopt);

// The message with which opening fails; empty when it does not.
std::string open_error(const std::string& path, std::uint64_t bytes,
                       const DeviceOptions& options = {});

}  // namespace fc::testing
