// The reads of one batch, between the NVM tier and who waits for them.
//
// What comes back as it should is passed on. Anything else (another key of that tag, a damaged or
// unreadable record, an expired one) is looked up again, without the entries that were tried: the
// key may lie elsewhere by now, or have another entry. What is found nowhere is a miss with a fresh
// token.
//
// Threads: the tier's, one a device; a lock keeps the calls to the reader apart. It keeps itself
// alive as long as a read holds it.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "memory/dram_tier.hpp"
#include "nvm/nvm_tier.hpp"

namespace fc {

class NvmRead final : public nvm::ReadWaiter, public std::enable_shared_from_this<NvmRead> {
 public:
  // What is worth to come up; takes a copy.
  using Promote = std::function<void(const nvm::ReadResult&)>;

  NvmRead(DramTier& dram, nvm::NvmTier& tier, Promote promote, std::shared_ptr<NvmReader> reader)
      : dram_(dram), tier_(tier), promote_(std::move(promote)), reader_(std::move(reader)) {}

  void done(std::span<const nvm::ReadResult> results) override;
  void late(std::span<const NvmCell> cells) override {
    const std::lock_guard lock(mutex_);
    reader_->late(cells);
  }
  bool wanted() const noexcept override { return reader_->wanted(); }

 private:
  // What was tried for a cell so far.
  struct Tried {
    std::uint32_t column;
    std::uint32_t position;
    std::vector<std::uint64_t> entries;
  };

  void look_again_locked(const nvm::ReadResult& result, std::vector<NvmAnswer>& answers,
                         std::vector<NvmCell>& retries);

  DramTier& dram_;
  nvm::NvmTier& tier_;
  const Promote promote_;
  const std::shared_ptr<NvmReader> reader_;

  std::mutex mutex_;
  std::vector<Tried> tried_;                    // guarded by mutex_; nearly always empty
  std::vector<std::unique_ptr<Buffer>> found_;  // values of answers under way; guarded by mutex_
};

}  // namespace fc
