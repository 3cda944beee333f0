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

#include "core/clock.hpp"

namespace fc::bench {

// A file that is read past the page cache. Threads: one at a time.
class DirectFile {
 public:
  static constexpr std::size_t kBlock = 4096;

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

class BareUring {
 public:
  // Reads of `area` bytes from `begin` on, `depth` of them under way.
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

  // Reads a second; of them `two_blocks` (a share) are of two.
  double run(double seconds, double two_blocks = 0) {
    two_blocks_ = two_blocks;
    const std::uint64_t start = monotonic_ns();
    const std::uint64_t end = start + static_cast<std::uint64_t>(seconds * 1e9);
    std::uint64_t done = 0;
    unsigned under_way = 0;
    for (; under_way < depth_; ++under_way) prepare(under_way);
    std::uint64_t stopped = 0;
    while (under_way != 0) {
      check(io_uring_submit_and_wait(&ring_, 1));
      const bool going = monotonic_ns() < end;
      io_uring_cqe* entry = nullptr;
      unsigned head = 0;
      unsigned seen = 0;
      io_uring_for_each_cqe(&ring_, head, entry) {
        check(entry->res);
        ++seen;
        if (going) {
          prepare(static_cast<unsigned>(entry->user_data));
        } else {
          --under_way;
        }
      }
      io_uring_cq_advance(&ring_, seen);
      if (stopped != 0) continue;
      done += seen;
      if (!going) stopped = monotonic_ns();
    }
    return static_cast<double>(done) * 1e9 / static_cast<double>(stopped - start);
  }

 private:
  static void check(int outcome) {
    if (outcome < 0) throw std::system_error(-outcome, std::generic_category(), "io_uring");
  }
  void prepare(unsigned slot) {
    io_uring_sqe* entry = io_uring_get_sqe(&ring_);
    std::uniform_int_distribution<std::uint64_t> block(0, last_block_);
    std::uniform_real_distribution<double> share(0.0, 1.0);
    const unsigned count = two_blocks_ != 0 && share(random_) < two_blocks_ ? 2 : 1;
    io_uring_prep_read(entry, file_.descriptor(), blocks_.get() + slot * 2 * DirectFile::kBlock,
                       count * DirectFile::kBlock, begin_ + block(random_) * DirectFile::kBlock);
    io_uring_sqe_set_data64(entry, slot);
  }

  const DirectFile& file_;
  const unsigned depth_;
  const std::uint64_t begin_;
  const std::uint64_t last_block_;
  const AlignedBlocks blocks_;
  std::mt19937_64 random_{1};
  double two_blocks_ = 0;
  io_uring ring_{};
};

}  // namespace fc::bench
