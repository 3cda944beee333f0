// One file of the request log while it is written, and the directory that holds all of them.
//
//   <start of the window, ms since 1970, 13 digits>-<16 hexadecimal digits>.fcrl
//
// has a window, or a part of one; with ".part" behind it, it is still written. Bytes are appended
// block by block, so a file that its writer left behind is whole up to its last whole block.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "request_log/reader.hpp"

namespace fc::request_log {

// The writing end of a file. Every call says by errno's value what went wrong; 0: nothing.
class LogFile {
 public:
  LogFile() = default;
  ~LogFile() { close(); }
  LogFile(const LogFile&) = delete;
  LogFile& operator=(const LogFile&) = delete;

  int create(const std::filesystem::path& dir, const FileHeader& header,
             std::span<const std::uint8_t> description);
  // All of it or nothing: what was written of it is cut off again.
  int append(std::span<const std::uint8_t> block);
  // Makes it durable and gives it its name; without a block in it, it goes.
  int finish();
  void close() noexcept;
  bool is_open() const noexcept { return fd_ >= 0; }
  std::uint64_t bytes() const noexcept { return bytes_; }

 private:
  int fd_ = -1;
  std::uint64_t bytes_ = 0;
  std::uint64_t head_bytes_ = 0;
  std::filesystem::path part_;
  std::filesystem::path final_;
};

// The directory of a recorder, which no other process may have. Throws std::system_error when it
// cannot be made, cannot be written to, or another process records there.
class LogDirectory {
 public:
  explicit LogDirectory(std::filesystem::path path);
  ~LogDirectory();
  LogDirectory(const LogDirectory&) = delete;
  LogDirectory& operator=(const LogDirectory&) = delete;

  const std::filesystem::path& path() const noexcept { return path_; }
  // Cuts files that an earlier process left behind to their last whole block and names them; one
  // without any goes. Returns how many were kept.
  unsigned adopt_left_over();
  // Removes the oldest finished files until all together have at most `bytes`, of which `open` are
  // taken by the file being written. Returns how many went; `fits`: whether that was enough.
  unsigned make_room(std::uint64_t bytes, std::uint64_t open, bool& fits);

 private:
  const std::filesystem::path path_;
  int lock_ = -1;
};

}  // namespace fc::request_log
