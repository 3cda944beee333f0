// Reads a log's file block by block, in bounded memory, whatever the bytes in it are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "nvm/journal_format.hpp"

namespace fc::nvm {

// Threads: one. The descriptor is the caller's and stays open.
class JournalReader {
 public:
  enum class Next : std::uint8_t {
    Block,
    End,      // of all that was ever made durable; a torn block may follow
    Damaged,  // here, and whole blocks follow; or the file cannot be read
  };

  explicit JournalReader(int descriptor) : descriptor_(descriptor) {}

  // Takes the header. Empty, or why the log may not be trusted.
  std::string begin(std::uint64_t set_id);
  // Takes the next block; the file ends at `end`.
  Next next(std::uint64_t end);

  // Of the last block.
  std::span<const JournalEntry> entries() const noexcept { return entries_; }
  const std::string& why() const noexcept { return why_; }

 private:
  bool read_at(std::uint64_t offset, void* to, std::size_t bytes);
  std::size_t fill(std::uint64_t offset, std::byte* to, std::size_t bytes);
  bool take(std::uint64_t offset, std::uint64_t end, const JournalBlockHeader& header);
  bool any_later(std::uint64_t end);
  Next damaged(const std::string& why);

  const int descriptor_;
  std::uint64_t seed_ = 0;
  std::uint64_t at_ = sizeof(JournalHeader);
  std::uint64_t sequence_ = 1;  // of the next block
  std::vector<JournalEntry> entries_;
  // What was read ahead; bytes of a log never change once they are written.
  std::vector<std::byte> buffer_;
  std::uint64_t buffer_at_ = 0;
  std::size_t buffered_ = 0;
  bool unreadable_ = false;
  std::string why_;
};

}  // namespace fc::nvm
