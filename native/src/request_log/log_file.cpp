#include "request_log/log_file.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <system_error>

#include "core/sequence_point.hpp"

namespace fc::request_log {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSuffix = ".fcrl";
constexpr const char* kPart = ".part";
constexpr const char* kLock = "lock";
constexpr std::uintmax_t kAdoptedBytesMax = std::uintmax_t{4} << 30;

bool ends_with(const fs::path& path, std::string_view suffix) {
  return path.filename().string().ends_with(suffix);
}

int write_all(int fd, const std::uint8_t* data, std::size_t bytes) noexcept {
  while (bytes != 0) {
    const ssize_t written = ::write(fd, data, bytes);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return written < 0 ? errno : ENOSPC;
    data += written;
    bytes -= static_cast<std::size_t>(written);
  }
  return 0;
}

[[noreturn]] void fail(int error, const std::string& what) {
  throw std::system_error(error, std::generic_category(), what);
}

std::vector<std::uint8_t> read_whole(const fs::path& path) {
  std::vector<std::uint8_t> bytes;
  std::error_code error;
  const std::uintmax_t size = fs::file_size(path, error);
  if (error || size > kAdoptedBytesMax) return bytes;
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return bytes;
  bytes.resize(size);
  std::size_t filled = 0;
  while (filled < bytes.size()) {
    const ssize_t got = ::read(fd, bytes.data() + filled, bytes.size() - filled);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    filled += static_cast<std::size_t>(got);
  }
  ::close(fd);
  bytes.resize(filled);
  return bytes;
}

}  // namespace

int LogFile::create(const fs::path& dir, const FileHeader& header,
                    std::span<const std::uint8_t> description) {
  close();
  char name[64];
  std::snprintf(name, sizeof(name), "%013llu-%016llx%s",
                static_cast<unsigned long long>(header.window_start_ms),
                static_cast<unsigned long long>(header.file_id), kSuffix);
  final_ = dir / name;
  part_ = final_;
  part_ += kPart;
  fd_ = ::open(part_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd_ < 0) return errno;
  int error = write_all(fd_, reinterpret_cast<const std::uint8_t*>(&header), sizeof(header));
  if (error == 0) error = write_all(fd_, description.data(), description.size());
  if (error != 0) {
    ::unlink(part_.c_str());
    close();
    return error;
  }
  head_bytes_ = bytes_ = sizeof(header) + description.size();
  return 0;
}

int LogFile::append(std::span<const std::uint8_t> block) {
  const int error = write_all(fd_, block.data(), block.size());
  FC_SEQUENCE_POINT("request_log:appended");
  if (error == 0) {
    bytes_ += block.size();
    return 0;
  }
  if (::ftruncate(fd_, static_cast<off_t>(bytes_)) != 0 ||
      ::lseek(fd_, static_cast<off_t>(bytes_), SEEK_SET) < 0) {
    close();  // half a block at its end: what comes behind it could not be read
  }
  return error;
}

int LogFile::finish() {
  if (fd_ < 0) return 0;
  int error = 0;
  if (bytes_ == head_bytes_) {
    if (::unlink(part_.c_str()) != 0) error = errno;
  } else {
    if (::fdatasync(fd_) != 0) error = errno;
    FC_SEQUENCE_POINT("request_log:finishing");
    if (::rename(part_.c_str(), final_.c_str()) != 0) error = errno;
  }
  close();
  return error;
}

void LogFile::close() noexcept {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
  bytes_ = head_bytes_ = 0;
}

LogDirectory::LogDirectory(fs::path path) : path_(std::move(path)) {
  std::error_code made;
  fs::create_directories(path_, made);
  if (made) fail(made.value(), "cannot make the directory of the request log " + path_.string());
  const std::string lock = path_ / kLock;
  lock_ = ::open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (lock_ < 0) {
    fail(errno, "cannot record requests in " + path_.string() +
                    ": make the directory writable for this user");
  }
  if (::flock(lock_, LOCK_EX | LOCK_NB) != 0) {
    const int error = errno;
    ::close(lock_);
    fail(error, "another process records requests in " + path_.string() +
                    ": give each daemon a warmup.record.dir of its own");
  }
}

LogDirectory::~LogDirectory() {
  ::close(lock_);
}

unsigned LogDirectory::adopt_left_over() {
  unsigned kept = 0;
  std::vector<fs::path> parts;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(path_, error)) {
    if (ends_with(entry.path(), std::string(kSuffix) + kPart)) parts.push_back(entry.path());
  }
  Reader reader;
  Block block;
  for (const fs::path& part : parts) {
    const std::vector<std::uint8_t> bytes = read_whole(part);
    bool more = reader.open(bytes) == LogFault::None;
    std::size_t blocks = 0;
    while (more && reader.next(block, more) == LogFault::None && more) ++blocks;
    fs::path whole = part;
    whole.replace_extension();  // ".part"
    if (blocks == 0 || ::truncate(part.c_str(), static_cast<off_t>(reader.good_bytes())) != 0 ||
        ::rename(part.c_str(), whole.c_str()) != 0) {
      fs::remove(part, error);
      continue;
    }
    ++kept;
  }
  return kept;
}

unsigned LogDirectory::make_room(std::uint64_t bytes, std::uint64_t open, bool& fits) {
  struct Finished {
    fs::path path;
    std::uint64_t bytes;
  };
  std::vector<Finished> files;
  std::uint64_t sum = open;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(path_, error)) {
    if (!ends_with(entry.path(), kSuffix)) continue;
    std::error_code gone;  // somebody may have uploaded and removed it meanwhile
    const std::uint64_t size = entry.file_size(gone);
    if (gone) continue;
    sum += size;
    files.push_back({entry.path(), size});
  }
  // By name: the oldest window first.
  std::sort(files.begin(), files.end(),
            [](const Finished& a, const Finished& b) { return a.path < b.path; });
  unsigned removed = 0;
  for (const Finished& file : files) {
    if (sum <= bytes) break;
    std::error_code failed;
    if (fs::remove(file.path, failed) && !failed) ++removed;
    sum -= file.bytes;
  }
  fits = sum <= bytes;
  return removed;
}

}  // namespace fc::request_log
