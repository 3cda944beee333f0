// The log of NVM records that became invalid: without it a delete or an overwrite is in memory
// alone, and an NVM tier that is rebuilt from its device would bring the old value back.
//
// Who makes something invalid appends, under whatever short locks he holds, and gets a position;
// one thread of the log's own writes and syncs what came. Whoever must not be answered before that
// waits for his position, without locks. When the log is long, the same thread rewrites it with the
// entries that still matter; appends go on meanwhile.
//
// An error of the file ends it for good: failed() stays true, nobody waits any more, and what the
// owner then believes of his device after a crash must not rest on this log.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "core/spin.hpp"
#include "feature_cache/config.hpp"
#include "nvm/journal_format.hpp"

namespace fc::nvm {

struct JournalOptions {
  DurabilityKind mode = DurabilityKind::Sync;  // Bounded or Sync
  std::uint64_t window_ms = 100;               // Bounded: an entry is durable after so long
  std::uint64_t compact_bytes = std::uint64_t{64} << 20;  // a shorter log is not rewritten
};

// Threads: any, for all but construction and destruction.
class Journal {
 public:
  // Called by the log's thread, of every entry on file, while the log is rewritten; no lock is
  // held. False must be true for ever after. It may not wait for this log.
  using StillMatters = std::function<bool(const JournalEntry&)>;

  // Entries that were not synced yet; beyond, the log has failed rather than grown.
  static constexpr std::size_t kPendingMax = std::size_t{1} << 20;

  // Makes a new log at `path` that begins with `carried`, in place of the log that is there, which
  // stays whole until then. Throws std::system_error: no such directory, no permission, no room,
  // another user's file, or one that is no log and so is not replaced.
  static std::unique_ptr<Journal> start(const std::string& path, std::uint64_t set_id,
                                        const JournalOptions& options, StillMatters still_matters,
                                        std::span<const JournalEntry> carried = {});
  // Everything in the log at `path`, in order; what was being written when the process or the
  // machine died may be missing. None, and why, when it may not be trusted: there is no log, it is
  // of other devices or another version, or damaged in its midst.
  static std::optional<std::vector<JournalEntry>> read(const std::string& path,
                                                       std::uint64_t set_id, std::string* why);
  // The same, handed out block by block, for logs that are large. What was handed out before it
  // turned out damaged is true of the devices all the same.
  static bool scan(const std::string& path, std::uint64_t set_id, std::string* why,
                   const std::function<void(std::span<const JournalEntry>)>& each);

  // Writes and syncs what came, unless it has failed.
  ~Journal();
  Journal(const Journal&) = delete;
  Journal& operator=(const Journal&) = delete;

  // The entry's position. Never waits for the file.
  std::uint64_t append(const JournalEntry& entry) noexcept;
  // The position of the last entry appended; 0: none yet.
  std::uint64_t tail() const noexcept { return tail_.load(std::memory_order_acquire); }
  std::uint64_t durable_position() const noexcept {
    return durable_.load(std::memory_order_acquire);
  }
  // Until the entry at `position`, and all before it, is on the device; in Bounded mode too it is
  // then written at once. False: the log has failed before that.
  bool wait_durable(std::uint64_t position);

  bool failed() const noexcept { return failed_.load(std::memory_order_acquire); }
  // Why; empty while it has not.
  std::string reason() const;

  std::uint64_t syncs() const noexcept { return syncs_.load(std::memory_order_relaxed); }
  std::uint64_t rewrites() const noexcept { return rewrites_.load(std::memory_order_relaxed); }
  std::uint64_t bytes() const noexcept { return bytes_.load(std::memory_order_relaxed); }

 private:
  class File;

  Journal(const std::string& path, std::uint64_t set_id, const JournalOptions& options,
          StillMatters still_matters);
  void run();
  bool pending_or_asleep() noexcept;
  bool in_haste_locked() const;
  std::chrono::steady_clock::time_point deadline() const noexcept;
  bool due() const;
  bool write_pending();
  void rewrite();
  bool copy_what_matters(File& to);
  void fail(const std::string& why) noexcept;

  const std::string path_;
  const std::uint64_t set_id_;
  const JournalOptions options_;
  const StillMatters still_matters_;

  // The thread's own.
  std::unique_ptr<File> file_;
  std::uint64_t rewrite_at_ = 0;
  std::vector<JournalEntry> batch_;

  // Guarded by pending_lock_. Room for all is reserved at the start: an append allocates nothing.
  mutable SpinLock pending_lock_;
  std::vector<JournalEntry> pending_;
  std::uint64_t pending_end_ = 0;                 // the position of the last entry in it
  std::chrono::steady_clock::time_point oldest_;  // when the first in it came
  bool awake_ = false;                            // the thread looks at it without being woken

  // Guarded by mutex_, which is held for moments only.
  mutable std::mutex mutex_;
  std::condition_variable wake_;     // the thread's
  std::condition_variable changed_;  // of those who wait
  std::uint64_t urgent_ = 0;         // somebody waits for this position
  bool stopping_ = false;
  std::string reason_;

  std::atomic<std::uint64_t> tail_{0};     // written under pending_lock_
  std::atomic<std::uint64_t> durable_{0};  // written under mutex_
  std::atomic<bool> failed_{false};        // never becomes false again
  std::atomic<std::uint64_t> syncs_{0};
  std::atomic<std::uint64_t> rewrites_{0};
  std::atomic<std::uint64_t> bytes_{0};

  std::thread thread_;  // the last member: it uses the others
};

}  // namespace fc::nvm
