#include "nvm/journal_reader.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

namespace fc::nvm {
namespace {

constexpr std::size_t kBufferBytes = std::size_t{64} << 10;
constexpr std::size_t kSearchBytes = std::size_t{1} << 20;
constexpr std::size_t kBlockAlignment = 8;  // all sizes are multiples of it

}  // namespace

// False: the file ends before, or it cannot be read, which unreadable_ says. Blocks of one entry
// are the rule where every write is synced: they come from the buffer.
bool JournalReader::read_at(std::uint64_t offset, void* to, std::size_t bytes) {
  if (bytes > kBufferBytes) return fill(offset, static_cast<std::byte*>(to), bytes) == bytes;
  if (offset < buffer_at_ || offset + bytes > buffer_at_ + buffered_) {
    buffer_.resize(kBufferBytes);
    buffer_at_ = offset;
    buffered_ = fill(offset, buffer_.data(), buffer_.size());
    if (unreadable_ || bytes > buffered_) return false;
  }
  std::memcpy(to, buffer_.data() + (offset - buffer_at_), bytes);
  return true;
}

// How many bytes there were.
std::size_t JournalReader::fill(std::uint64_t offset, std::byte* to, std::size_t bytes) {
  std::size_t done = 0;
  while (done < bytes) {
    const ssize_t got =
        pread(descriptor_, to + done, bytes - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      unreadable_ = true;
      why_ = "it cannot be read: " + std::generic_category().message(errno);
    }
    if (got <= 0) break;
    done += static_cast<std::size_t>(got);
  }
  return done;
}

std::string JournalReader::begin(std::uint64_t set_id) {
  JournalHeader header{};
  if (!read_at(0, &header, sizeof(header))) return unreadable_ ? why_ : "it is too short";
  if (header.magic != kJournalMagic) return "it is no log of invalid records";
  if (header.version != kJournalVersion) {
    return "it is of format version " + std::to_string(header.version) + ", this is version " +
           std::to_string(kJournalVersion);
  }
  if (header.checksum != header.sum()) return "its header is damaged";
  if (header.set_id != set_id) return "it is of other devices";
  seed_ = header.seed();
  entries_.reserve(JournalBlockHeader::kEntriesMax);
  return {};
}

// Reads the entries of the block at `offset`; false: they are not what its checksum says.
bool JournalReader::take(std::uint64_t offset, std::uint64_t end,
                         const JournalBlockHeader& header) {
  if (!header.plausible() || header.bytes() > end - offset) return false;
  entries_.resize(header.entries);
  return read_at(offset + sizeof(header), entries_.data(), header.bytes() - sizeof(header)) &&
         header.checksum == header.sum(seed_, entries_.data());
}

JournalReader::Next JournalReader::damaged(const std::string& why) {
  if (!unreadable_) why_ = "it is damaged at byte " + std::to_string(at_) + ": " + why;
  entries_.clear();
  return Next::Damaged;
}

JournalReader::Next JournalReader::next(std::uint64_t end) {
  JournalBlockHeader header{};
  entries_.clear();
  if (at_ >= end) return Next::End;
  const bool whole = end - at_ >= sizeof(header) && read_at(at_, &header, sizeof(header)) &&
                     take(at_, end, header);
  if (unreadable_) return damaged({});
  if (!whole) {
    const bool later = any_later(end);
    if (later || unreadable_) return damaged("whole blocks follow one that is not");
    entries_.clear();
    return Next::End;
  }
  if (header.sequence != sequence_) return damaged("a block is missing");
  if (!std::all_of(entries_.begin(), entries_.end(), [](const auto& e) { return e.known(); })) {
    return damaged("an entry is of an unknown kind");
  }
  at_ += header.bytes();
  ++sequence_;
  return Next::Block;
}

// Whether a block behind the one that is not whole is. A crash leaves none such: that one was never
// synced, and the next is written after that.
bool JournalReader::any_later(std::uint64_t end) {
  std::vector<std::byte> window(kSearchBytes);
  // No more blocks than this can lie there.
  const std::uint64_t sequence_max = sequence_ + (end - at_) / sizeof(JournalBlockHeader);
  for (std::uint64_t from = at_ + kBlockAlignment; from + sizeof(JournalBlockHeader) <= end;) {
    const std::size_t bytes = std::min<std::uint64_t>(window.size(), end - from);
    if (!read_at(from, window.data(), bytes)) return false;
    std::size_t at = 0;
    for (; at + sizeof(JournalBlockHeader) <= bytes; at += kBlockAlignment) {
      JournalBlockHeader header{};
      std::memcpy(&header, window.data() + at, sizeof(header));
      if (header.plausible() && header.sequence > sequence_ && header.sequence <= sequence_max &&
          take(from + at, end, header)) {
        return true;
      }
      if (unreadable_) return false;
    }
    from += at;
  }
  return false;
}

}  // namespace fc::nvm
