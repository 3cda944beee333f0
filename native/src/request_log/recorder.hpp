// Records what a node is asked for, beside its requests.
//
// A request copies its keys into a buffer that it gets without waiting, or they are lost and
// counted; a thread of the recorder's own encodes what is there and writes it. Whatever the disk
// does, requests never notice: while it is full or slow, log is lost.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string_view>
#include <thread>
#include <vector>

#include "core/counter.hpp"
#include "feature_cache/config.hpp"
#include "feature_cache/types.hpp"
#include "request_log/encoder.hpp"
#include "request_log/key_hasher.hpp"
#include "request_log/log_file.hpp"
#include "request_log/reader.hpp"

namespace fc::request_log {

// Milliseconds since 1970.
using WallClock = std::function<std::uint64_t()>;

class Recorder {
 public:
  // A column of a request; `domain` is the engine's number, or kNoDomain.
  struct Column {
    NamespaceIndex ns;
    DomainIndex domain;
    std::span<const std::string_view> keys;
  };

  // `namespaces` in the engine's order. Throws std::system_error for a directory that cannot be
  // used. With `background`, a thread of its own writes; tests call write_out() by hand.
  Recorder(const RecordConfig& config, std::span<const NamespaceConfig> namespaces,
           WallClock wall_clock = {}, bool background = true);
  ~Recorder();  // what is there is written, and the file gets its name
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;

  // Whether a request is to be recorded (of those by key: always). Any thread; a few ns.
  bool samples_request() noexcept;
  // Records the keys of a request that is sampled. Any thread; does not wait.
  void offer(std::span<const Column> columns);

  // Encodes and writes what was offered; ends the window when its time is over.
  void write_out();
  // Ends the window that is written now, whatever the time.
  void end_window();

  void visit(CounterVisitor& visitor) const;

 private:
  static constexpr std::size_t kStripes = 8;
  static constexpr std::uint16_t kNotRecorded = 0xffff;

  // What requests left, as it will be encoded: columns, each a head and its keys.
  struct ColumnHead {
    std::uint16_t kind;
    std::uint16_t begins_request;
    std::uint32_t keys;
    std::uint32_t bytes;  // of the keys; 8 times `keys`: ids, without lengths
    std::uint32_t ids;
  };
  struct Stripe {
    std::mutex mutex;
    std::vector<std::uint8_t> bytes;  // guarded by mutex
    std::uint64_t keys = 0;           // guarded by mutex
  };

  void run();
  std::uint16_t kind_of(const Column& column) const noexcept;
  bool samples_key(std::string_view key) const noexcept;
  bool copy(std::span<const Column> columns, Stripe& stripe);
  // For the holder of write_mutex_:
  void write_taken();
  void no_memory() noexcept;
  bool may_write(std::uint64_t now, std::uint64_t window, std::uint64_t keys);
  void encode(std::span<const std::uint8_t> bytes);
  void write_block();
  void close_window();
  void lose(Counter& reason, std::uint64_t keys) noexcept;
  void disk_failed(int error);

  const RecordConfig config_;
  const WallClock wall_clock_;
  const std::uint64_t key_threshold_;
  std::vector<std::string> names_;  // by namespace, as what follows; all fixed
  std::vector<KeyPrivacy> privacy_;
  std::vector<std::uint16_t> first_kind_;  // without a hint; then one each domain
  std::vector<DomainIndex> first_domain_;
  Description description_;
  LogDirectory directory_;
  const std::unique_ptr<KeyHasher> hasher_;  // null: no keys are hashed

  std::atomic<std::uint64_t> requests_seen_{0};
  std::array<Stripe, kStripes> stripes_;
  const std::size_t stripe_bytes_;
  std::atomic<bool> pressing_{false};  // a stripe is half full

  std::mutex write_mutex_;            // guards what follows: the thread's, and the end's
  std::unique_ptr<Encoder> encoder_;  // of the open file; null: there is none
  LogFile file_;
  std::uint64_t window_start_ms_ = 0;
  std::uint64_t window_dropped_ = 0;  // keys, since the last file
  std::uint64_t busy_counted_ = 0;    // of dropped_busy_: those that are in window_dropped_
  std::uint64_t taken_keys_ = 0;      // from the stripes, ever
  std::uint64_t block_since_ms_ = 0;  // since when something waits in the encoder
  std::uint64_t retry_at_ms_ = 0;     // until then the disk is left alone
  bool full_ = false;                 // the open file alone is as large as all may be
  bool complained_ = false;
  std::vector<std::uint8_t> taken_;

  Counter requests_;
  Counter keys_;
  Counter bytes_;
  Counter dropped_busy_;
  Counter dropped_disk_;
  Counter dropped_memory_;
  Counter dropped_size_;
  Counter files_;
  Counter files_dropped_;
  std::atomic<std::uint64_t> window_start_shown_{0};

  std::mutex wake_mutex_;
  std::condition_variable wake_;
  bool stop_ = false;  // guarded by wake_mutex_
  std::thread thread_;
};

}  // namespace fc::request_log
