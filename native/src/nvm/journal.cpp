#include "nvm/journal.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <random>
#include <system_error>

#include "core/check.hpp"
#include "core/sequence_point.hpp"
#include "nvm/journal_reader.hpp"
#include "persist/descriptor.hpp"

namespace fc::nvm {
namespace {

using Clock = std::chrono::steady_clock;

// Of a log that is rewritten: so much is synced at a time, that the last sync does not take long.
constexpr std::uint64_t kRewriteSyncBytes = std::uint64_t{8} << 20;
// A log is rewritten when it is so many times what mattered the last time.
constexpr std::uint64_t kRewriteGrowth = 4;
// Longer windows make no sense, and the clock's arithmetic cannot overflow.
constexpr std::uint64_t kWindowMsMax = 3'600'000;

std::string cause(int error) {
  return std::generic_category().message(error);
}

[[noreturn]] void refuse(int error, const std::string& path, const std::string& what) {
  throw std::system_error(error, std::generic_category(), "NVM journal " + path + ": " + what);
}

std::string advice(int error) {
  switch (error) {
    case ENOENT:
      return "its directory does not exist; make it, or set persist.journal";
    case ENOTDIR:
      return "a part of the path is no directory; correct persist.journal";
    case EACCES:
    case EPERM:
      return "the daemon's user may not write there; change the directory's owner or mode, or set "
             "persist.journal";
    case EROFS:
      return "the file system is mounted read-only; set persist.journal";
    case ENOSPC:
    case EDQUOT:
      return "no room left to make it; free some, or set persist.journal";
    default:
      return "it cannot be made";
  }
}

int open_to_read(const std::string& path) {
  return open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NOCTTY | O_NONBLOCK);
}

// A path that was mistyped must not cost somebody his file.
void check_replaceable(const std::string& path) {
  const Descriptor there(open_to_read(path));
  if (there.get() < 0 && errno == ENOENT) return;
  if (there.get() < 0) {
    const int error = errno;
    refuse(
        error, path,
        error == ELOOP ? "it is a symbolic link, which is not followed; remove it" : advice(error));
  }
  struct stat status {};
  std::uint64_t magic = 0;
  if (fstat(there.get(), &status) != 0) refuse(errno, path, "its state cannot be read");
  if (!S_ISREG(status.st_mode)) refuse(ENODEV, path, "it is no plain file; set persist.journal");
  if (status.st_uid != geteuid()) {
    refuse(EPERM, path,
           "it is the file of user " + std::to_string(status.st_uid) +
               "; run the daemon as that user, remove it, or set persist.journal");
  }
  if (status.st_size == 0) return;
  if (pread(there.get(), &magic, sizeof(magic), 0) != sizeof(magic) || magic != kJournalMagic) {
    refuse(EEXIST, path,
           "it is a file of something else, or damaged; remove it, or set persist.journal");
  }
}

// 0, or why not.
int sync_directory(const std::string& path) {
  const Descriptor folder(open(directory_of(path).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  return folder.get() >= 0 && fsync(folder.get()) == 0 ? 0 : errno;
}

}  // namespace

// A log that is being written, first under a name of its own: whatever happens until it is
// installed, the log before stays whole.
class Journal::File {
 public:
  // Null: `error` says why.
  static std::unique_ptr<File> make(const std::string& path, std::uint64_t set_id, int& error) {
    const std::string name = path + ".new";
    (void)unlink(name.c_str());  // of a process that died while it made one
    const int descriptor =
        open(name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW | O_NOCTTY, 0600);
    error = errno;
    if (descriptor < 0) return nullptr;
    std::unique_ptr<File> file(new File(path, descriptor));
    JournalHeader header{};
    std::random_device random;
    header.magic = kJournalMagic;
    header.version = kJournalVersion;
    header.set_id = set_id;
    header.log_id = std::uint64_t{random()} << 32 | random();
    header.checksum = header.sum();
    file->seed_ = header.seed();
    error = file->write(&header, sizeof(header));
    if (error != 0) return nullptr;
    return file;
  }
  ~File() {
    if (!installed_) (void)unlink((path_ + ".new").c_str());
  }

  // All return 0, or why not.
  int write(std::span<const JournalEntry> entries) {
    for (; !entries.empty(); entries = entries.subspan(std::min(entries.size(), kMax))) {
      const auto block = entries.first(std::min(entries.size(), kMax));
      JournalBlockHeader header{};
      header.entries = static_cast<std::uint32_t>(block.size());
      header.sequence = sequence_;
      header.checksum = header.sum(seed_, block.data());
      // In one piece: two writes would be two chances to be torn, and twice the way to the kernel.
      buffer_.resize(header.bytes());
      std::memcpy(buffer_.data(), &header, sizeof(header));
      std::memcpy(buffer_.data() + sizeof(header), block.data(), block.size_bytes());
      if (const int error = write(buffer_.data(), buffer_.size()); error != 0) return error;
      ++sequence_;
    }
    return 0;
  }
  int sync() const { return fdatasync(descriptor_.get()) == 0 ? 0 : errno; }
  int install() {
    if (fsync(descriptor_.get()) != 0) return errno;
    FC_SEQUENCE_POINT("journal:install");
    if (rename((path_ + ".new").c_str(), path_.c_str()) != 0) return errno;
    installed_ = true;
    FC_SEQUENCE_POINT("journal:renamed");
    return sync_directory(path_);
  }

  bool installed() const noexcept { return installed_; }
  int descriptor() const noexcept { return descriptor_.get(); }
  std::uint64_t bytes() const noexcept { return bytes_; }

 private:
  static constexpr std::size_t kMax = JournalBlockHeader::kEntriesMax;

  File(std::string path, int descriptor) : path_(std::move(path)), descriptor_(descriptor) {}

  int write(const void* from, std::size_t bytes) {
    const auto* place = static_cast<const std::byte*>(from);
    while (bytes > 0) {
      const ssize_t done = pwrite(descriptor_.get(), place, bytes, static_cast<off_t>(bytes_));
      if (done < 0 && errno == EINTR) continue;
      if (done <= 0) return done < 0 ? errno : EIO;
      place += done;
      bytes_ += static_cast<std::uint64_t>(done);
      bytes -= static_cast<std::size_t>(done);
    }
    return 0;
  }

  const std::string path_;
  const Descriptor descriptor_;
  std::uint64_t seed_ = 0;
  std::uint64_t bytes_ = 0;
  std::uint64_t sequence_ = 1;
  std::vector<std::byte> buffer_;
  bool installed_ = false;
};

std::unique_ptr<Journal> Journal::start(const std::string& path, std::uint64_t set_id,
                                        const JournalOptions& options, StillMatters still_matters,
                                        std::span<const JournalEntry> carried) {
  FC_CHECK(options.mode != DurabilityKind::DropNvm);
  check_replaceable(path);
  std::unique_ptr<Journal> journal(new Journal(path, set_id, options, std::move(still_matters)));
  int error = 0;
  journal->file_ = File::make(path, set_id, error);
  if (journal->file_ != nullptr) error = journal->file_->write(carried);
  if (error == 0) error = journal->file_->install();
  if (error != 0) refuse(error, path, advice(error));
  journal->bytes_.store(journal->file_->bytes(), std::memory_order_relaxed);
  journal->rewrite_at_ = std::max(options.compact_bytes, kRewriteGrowth * journal->file_->bytes());
  // Signals are for the daemon's own threads.
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &before);
  try {
    journal->thread_ = std::thread([self = journal.get()] { self->run(); });
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return journal;
}

bool Journal::scan(const std::string& path, std::uint64_t set_id, std::string* why,
                   const std::function<void(std::span<const JournalEntry>)>& each) {
  const auto refused = [why](const std::string& reason) {
    if (why != nullptr) *why = reason;
    return false;
  };
  const Descriptor file(open_to_read(path));
  if (file.get() < 0) {
    return refused(errno == ENOENT ? "there is none" : "it cannot be opened: " + cause(errno));
  }
  struct stat status {};
  if (fstat(file.get(), &status) != 0 || !S_ISREG(status.st_mode)) {
    return refused("it is no plain file");
  }
  if (status.st_uid != geteuid()) return refused("it is another user's");
  JournalReader reader(file.get());
  if (const std::string reason = reader.begin(set_id); !reason.empty()) return refused(reason);
  const auto end = static_cast<std::uint64_t>(status.st_size);
  for (;;) {
    switch (reader.next(end)) {
      case JournalReader::Next::Block:
        each(reader.entries());
        break;
      case JournalReader::Next::End:
        return true;
      case JournalReader::Next::Damaged:
        return refused(reader.why());
    }
  }
}

std::optional<std::vector<JournalEntry>> Journal::read(const std::string& path,
                                                       std::uint64_t set_id, std::string* why) {
  std::vector<JournalEntry> all;
  const auto add = [&all](std::span<const JournalEntry> block) {
    all.insert(all.end(), block.begin(), block.end());
  };
  if (!scan(path, set_id, why, add)) return std::nullopt;
  return all;
}

Journal::Journal(const std::string& path, std::uint64_t set_id, const JournalOptions& options,
                 StillMatters still_matters)
    : path_(path), set_id_(set_id), options_(options), still_matters_(std::move(still_matters)) {
  batch_.reserve(kPendingMax);
  pending_.reserve(kPendingMax);
}

Journal::~Journal() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    wake_.notify_one();
  }
  thread_.join();
}

std::uint64_t Journal::append(const JournalEntry& entry) noexcept {
  FC_DCHECK(entry.known());
  std::uint64_t position = 0;
  bool wake = false;
  bool overflow = false;
  {
    const std::lock_guard lock(pending_lock_);
    position = tail_.load(std::memory_order_relaxed) + 1;
    tail_.store(position, std::memory_order_release);
    if (failed_.load(std::memory_order_relaxed)) return position;
    if (pending_.size() == kPendingMax) {
      overflow = true;
      // Here, not later: nothing behind the entry that is lost may be taken, or it would be
      // declared durable with all before it.
      failed_.store(true, std::memory_order_release);
    } else {
      if (pending_.empty()) oldest_ = Clock::now();
      pending_.push_back(entry);
      pending_end_ = position;
      wake = !awake_ || pending_.size() == JournalBlockHeader::kEntriesMax;
      awake_ = true;
    }
  }
  if (overflow) fail("more than " + std::to_string(kPendingMax) + " entries wait to be written");
  if (wake) {
    const std::lock_guard lock(mutex_);
    wake_.notify_one();
  }
  return position;
}

bool Journal::wait_durable(std::uint64_t position) {
  if (durable_position() >= position) return true;
  FC_CHECK(position <= tail());  // else it would wait for ever
  std::unique_lock lock(mutex_);
  if (position > urgent_) {
    urgent_ = position;
    wake_.notify_one();
  }
  changed_.wait(lock, [&] { return durable_position() >= position || failed(); });
  return durable_position() >= position;
}

std::string Journal::reason() const {
  const std::lock_guard lock(mutex_);
  return reason_;
}

void Journal::fail(const std::string& why) noexcept {
  const std::lock_guard lock(mutex_);
  if (reason_.empty()) reason_ = "NVM journal " + path_ + ": " + why;
  failed_.store(true, std::memory_order_release);
  changed_.notify_all();
}

// Said under the lock under which entries come: one that comes after a "no" wakes the thread.
bool Journal::pending_or_asleep() noexcept {
  const std::lock_guard lock(pending_lock_);
  awake_ = !pending_.empty();
  return awake_;
}

bool Journal::in_haste_locked() const {
  if (options_.mode == DurabilityKind::Sync || stopping_ || urgent_ > durable_position()) {
    return true;
  }
  const std::lock_guard lock(pending_lock_);
  return pending_.size() >= JournalBlockHeader::kEntriesMax;
}

// When what is pending is to be written: half of the window is left for that.
Clock::time_point Journal::deadline() const noexcept {
  const std::lock_guard lock(pending_lock_);
  return oldest_ + std::chrono::milliseconds(std::min(options_.window_ms, kWindowMsMax)) / 2;
}

bool Journal::due() const {
  {
    const std::lock_guard lock(pending_lock_);
    if (pending_.empty()) return false;
  }
  const std::lock_guard lock(mutex_);
  return in_haste_locked() || Clock::now() >= deadline();
}

void Journal::run() {
  for (;;) {
    bool last = false;
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return stopping_ || pending_or_asleep(); });
      wake_.wait_until(lock, deadline(), [this] { return in_haste_locked(); });
      last = stopping_;
    }
    if (!write_pending()) batch_.clear();
    if (last) return;
    if (!failed() && file_->bytes() > rewrite_at_) rewrite();
  }
}

// False: the log has failed, and what came is dropped.
bool Journal::write_pending() {
  std::uint64_t position = 0;
  batch_.clear();
  {
    const std::lock_guard lock(pending_lock_);
    batch_.swap(pending_);
    position = pending_end_ - batch_.size();
  }
  if (failed()) return false;
  for (std::span<const JournalEntry> rest = batch_; !rest.empty();) {
    // Each synced before the next is written: only the last block of a log may be torn.
    const auto block =
        rest.first(std::min<std::size_t>(rest.size(), JournalBlockHeader::kEntriesMax));
    int error = file_->write(block);
    FC_SEQUENCE_POINT("journal:written");
    if (error == 0) error = file_->sync();
    if (error != 0) {
      fail("it cannot be written: " + cause(error));
      return false;
    }
    syncs_.fetch_add(1, std::memory_order_relaxed);
    bytes_.store(file_->bytes(), std::memory_order_relaxed);
    position += block.size();
    rest = rest.subspan(block.size());
    const std::lock_guard lock(mutex_);
    durable_.store(position, std::memory_order_release);
    changed_.notify_all();
  }
  return true;
}

void Journal::rewrite() {
  int error = 0;
  std::unique_ptr<File> fresh = File::make(path_, set_id_, error);
  const bool copied = fresh != nullptr && copy_what_matters(*fresh);
  if (failed()) return;
  if (copied) error = fresh->install();
  if (!copied || !fresh->installed()) {
    // The log that there is serves as well; it is only longer.
    rewrite_at_ = 2 * file_->bytes();
    return;
  }
  if (error != 0) {
    // Nobody knows which of the two a crash would leave.
    fail("its directory cannot be synced: " + cause(error));
    return;
  }
  file_ = std::move(fresh);
  rewrite_at_ = std::max(options_.compact_bytes, kRewriteGrowth * file_->bytes());
  bytes_.store(file_->bytes(), std::memory_order_relaxed);
  rewrites_.fetch_add(1, std::memory_order_relaxed);
}

// False: it is not to be, or failed() says more. What comes meanwhile goes to the log that there
// is, and is read from there.
bool Journal::copy_what_matters(File& to) {
  JournalReader reader(file_->descriptor());
  std::vector<JournalEntry> kept;
  kept.reserve(JournalBlockHeader::kEntriesMax);
  std::uint64_t synced = 0;
  if (const std::string why = reader.begin(set_id_); !why.empty()) {
    fail("it was rewritten and " + why);
    return false;
  }
  for (;;) {
    const JournalReader::Next next = reader.next(file_->bytes());
    if (next == JournalReader::Next::Damaged) {
      fail("it was rewritten and " + reader.why());
      return false;
    }
    if (next == JournalReader::Next::End) break;
    for (const JournalEntry& entry : reader.entries()) {
      if (!still_matters_(entry)) continue;
      kept.push_back(entry);
      if (kept.size() < JournalBlockHeader::kEntriesMax) continue;
      if (to.write(kept) != 0) return false;
      kept.clear();
    }
    if (to.bytes() - synced >= kRewriteSyncBytes) {
      if (to.sync() != 0) return false;
      synced = to.bytes();
    }
    if (due() && !write_pending()) return false;
    const std::lock_guard lock(mutex_);
    if (stopping_) return false;
  }
  return to.write(kept) == 0;
}

}  // namespace fc::nvm
