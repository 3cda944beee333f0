// The peer of random reads: nothing but io_uring. Keeps a number of reads of one block under way at
// random offsets of an area, replacing each as it ends; nobody looks at what was read. A share of
// the reads may be of two blocks, as those of records that lie across a boundary are.
#pragma once

#include <fcntl.h>
#include <liburing.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <system_error>
#include <vector>

#include "core/clock.hpp"

namespace fc::bench {

// A file that is read past the page cache. Threads: one at a time.
class DirectFile {
 public:
  static constexpr std::uint32_t kBlock = 4096;

  explicit DirectFile(const std::string& path)
      : descriptor_(open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC)) {
    if (descriptor_ < 0) throw std::system_error(errno, std::generic_category(), path);
  }
  ~DirectFile() { close(descriptor_); }
  DirectFile(const DirectFile&) = delete;
  DirectFile& operator=(const DirectFile&) = delete;

  int descriptor() const noexcept { return descriptor_; }
  void read(void* to, std::size_t bytes, std::uint64_t offset) const {
    if (pread(descriptor_, to, bytes, static_cast<off_t>(offset)) != static_cast<ssize_t>(bytes)) {
      throw std::system_error(errno, std::generic_category(), "pread");
    }
  }

 private:
  const int descriptor_;
};

struct FreeBlocks {
  void operator()(void* blocks) const noexcept { std::free(blocks); }
};
using AlignedBlocks = std::unique_ptr<char, FreeBlocks>;

inline AlignedBlocks aligned_blocks(std::size_t blocks) {
  return AlignedBlocks(
      static_cast<char*>(std::aligned_alloc(DirectFile::kBlock, blocks * DirectFile::kBlock)));
}

// What is read at once: whole blocks, two at most.
struct Place {
  std::uint64_t offset;
  std::uint32_t bytes;
};

class BareUring {
 public:
  // Random reads go to `area` bytes from `begin` on; `depth` are under way.
  BareUring(const DirectFile& file, unsigned depth, std::uint64_t begin, std::uint64_t area)
      : file_(file),
        depth_(depth),
        begin_(begin),
        last_block_(area / DirectFile::kBlock - 2),
        blocks_(aligned_blocks(2 * std::size_t{depth})) {
    check(io_uring_queue_init(depth, &ring_, 0));
  }
  ~BareUring() { io_uring_queue_exit(&ring_); }
  BareUring(const BareUring&) = delete;
  BareUring& operator=(const BareUring&) = delete;

  // Random reads a second; a share of them, `two_blocks`, are of two.
  double run(double seconds, double two_blocks = 0) {
    std::uniform_int_distribution<std::uint64_t> block(0, last_block_);
    std::uniform_real_distribution<double> share(0.0, 1.0);
    const std::uint64_t start = monotonic_ns();
    const std::uint64_t end = start + static_cast<std::uint64_t>(seconds * 1e9);
    std::uint64_t begun = 0;
    std::uint64_t stopped = 0;
    drive([&](Place& place) {
      const std::uint64_t now = monotonic_ns();
      if (now >= end) {
        stopped = stopped == 0 ? now : stopped;
        return false;
      }
      ++begun;
      const unsigned count = two_blocks != 0 && share(random_) < two_blocks ? 2 : 1;
      place = {begin_ + block(random_) * DirectFile::kBlock, count * DirectFile::kBlock};
      return true;
    });
    // Each but the first `depth` began when another had ended.
    return static_cast<double>(begun - depth_) * 1e9 / static_cast<double>(stopped - start);
  }
  // Nanoseconds until all of `places` were read.
  std::uint64_t read_all(const std::vector<Place>& places) {
    const std::uint64_t start = monotonic_ns();
    auto next = places.begin();
    drive([&](Place& place) {
      if (next == places.end()) return false;
      place = *next++;
      return true;
    });
    return monotonic_ns() - start;
  }

 private:
  static void check(int outcome) {
    if (outcome < 0) throw std::system_error(-outcome, std::generic_category(), "io_uring");
  }

  // Reads what `next` gives, until it gives nothing more and all has ended.
  template <class Next>
  void drive(Next&& next) {
    unsigned under_way = 0;
    const auto start = [&](std::uint64_t slot) {
      Place place{};
      if (!next(place)) return;
      ++under_way;
      io_uring_sqe* entry = io_uring_get_sqe(&ring_);
      io_uring_prep_read(entry, file_.descriptor(), blocks_.get() + slot * 2 * DirectFile::kBlock,
                         place.bytes, place.offset);
      io_uring_sqe_set_data64(entry, slot);
    };
    for (unsigned slot = 0; slot < depth_; ++slot) start(slot);
    while (under_way != 0) {
      check(io_uring_submit_and_wait(&ring_, 1));
      io_uring_cqe* entry = nullptr;
      unsigned head = 0;
      unsigned seen = 0;
      io_uring_for_each_cqe(&ring_, head, entry) {
        check(entry->res);
        ++seen;
        --under_way;
        start(entry->user_data);
      }
      io_uring_cq_advance(&ring_, seen);
    }
  }

  const DirectFile& file_;
  const unsigned depth_;
  const std::uint64_t begin_;
  const std::uint64_t last_block_;
  const AlignedBlocks blocks_;
  std::mt19937_64 random_{1};
  io_uring ring_{};
};

}  // namespace fc::bench
