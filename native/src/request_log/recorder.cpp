#include "request_log/recorder.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <new>
#include <random>
#include <utility>

#include "core/check.hpp"
#include "core/sequence_point.hpp"

namespace fc::request_log {
namespace {

constexpr std::chrono::milliseconds kWriteEvery{100};
constexpr std::uint64_t kFlushMs = 10'000;  // a block that is not full by then is written as it is
constexpr std::uint64_t kRetryMs = 5'000;   // how long a disk that refused is left alone
constexpr unsigned kStripesTried = 3;
constexpr std::uint64_t kEndBytes = sizeof(BlockHeader);  // of the block that ends a file

std::uint64_t wall_ms() {
  return static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::milliseconds>(
                                        std::chrono::system_clock::now().time_since_epoch())
                                        .count());
}

std::uint64_t mix(std::uint64_t value) noexcept {
  value = (value ^ (value >> 32)) * 0xD6E8FEB86659FD93ull;
  value = (value ^ (value >> 32)) * 0xD6E8FEB86659FD93ull;
  return value ^ (value >> 32);
}

std::uint64_t random_id() {
  std::random_device device;
  return std::uint64_t{device()} << 32 | device();
}

// All of [0, 2^64) for a share of one.
std::uint64_t threshold_of(double share) noexcept {
  return share >= 1 ? ~std::uint64_t{0}
                    : static_cast<std::uint64_t>(share * 18446744073709551616.0);
}

}  // namespace

Recorder::Recorder(const RecordConfig& config, std::span<const NamespaceConfig> namespaces,
                   WallClock wall_clock, bool background)
    : config_(config),
      wall_clock_(wall_clock ? std::move(wall_clock) : wall_ms),
      key_threshold_(threshold_of(config.sample)),
      directory_(config.dir),
      hasher_(config.hash_key.empty() ? nullptr : std::make_unique<KeyHasher>(config.hash_key)),
      stripe_bytes_(std::max<std::size_t>(config.buffer_bytes / kStripes, 4096)) {
  description_.host = config_.host;
  description_.sample = config_.sample;
  description_.by = config_.by;
  DomainIndex domain = 0;
  for (const NamespaceConfig& ns : namespaces) {
    KeyPrivacy privacy = KeyPrivacy::Plain;
    for (const RecordConfig::Privacy& entry : config_.privacy) {
      if (entry.ns == ns.name) privacy = entry.privacy;
    }
    const auto number = static_cast<std::uint32_t>(description_.namespaces.size());
    names_.push_back(ns.name);
    privacy_.push_back(privacy);
    first_domain_.push_back(domain);
    first_kind_.push_back(privacy == KeyPrivacy::Excluded
                              ? kNotRecorded
                              : static_cast<std::uint16_t>(description_.kinds.size()));
    domain = static_cast<DomainIndex>(domain + ns.domains.size());
    description_.namespaces.push_back({ns.name, privacy});
    if (privacy == KeyPrivacy::Excluded) continue;
    description_.kinds.push_back({number, {}});
    for (const DomainConfig& each : ns.domains) description_.kinds.push_back({number, each.name});
  }
  files_.add(directory_.adopt_left_over());
  if (background) thread_ = std::thread([this] { run(); });
}

Recorder::~Recorder() {
  {
    const std::lock_guard lock(wake_mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
  write_out();
  end_window();
}

bool Recorder::samples_request() noexcept {
  if (config_.by == SampleBy::Keys) return true;
  return mix(requests_seen_.fetch_add(1, std::memory_order_relaxed) + 1) <= key_threshold_;
}

bool Recorder::samples_key(std::string_view key) const noexcept {
  if (key.size() != sizeof(std::uint64_t)) {
    return XXH3_64bits(key.data(), key.size()) <= key_threshold_;
  }
  std::uint64_t id = 0;
  std::memcpy(&id, key.data(), sizeof(id));
  return mix(id) <= key_threshold_;
}

std::uint16_t Recorder::kind_of(const Column& column) const noexcept {
  const std::uint16_t first = first_kind_[column.ns];
  if (first == kNotRecorded || column.domain == kNoDomain) return first;
  return static_cast<std::uint16_t>(first + 1 + (column.domain - first_domain_[column.ns]));
}

void Recorder::offer(std::span<const Column> columns) {
  std::vector<std::vector<std::string_view>> chosen;  // by keys: those that are sampled
  std::vector<Column> sampled;
  if (config_.by == SampleBy::Keys) {
    chosen.reserve(columns.size());
    for (const Column& column : columns) {
      if (first_kind_[column.ns] == kNotRecorded) continue;
      std::vector<std::string_view>& keys = chosen.emplace_back();
      for (const std::string_view key : column.keys) {
        if (samples_key(key)) keys.push_back(key);
      }
      if (!keys.empty()) sampled.push_back({column.ns, column.domain, keys});
    }
    if (sampled.empty()) return;
    columns = sampled;
  }
  static std::atomic<std::uint32_t> next{0};
  thread_local const std::uint32_t mine = next.fetch_add(1, std::memory_order_relaxed);
  for (unsigned i = 0; i < kStripesTried; ++i) {
    Stripe& stripe = stripes_[(mine + i) % kStripes];
    const std::unique_lock lock(stripe.mutex, std::try_to_lock);
    if (lock.owns_lock() && copy(columns, stripe)) return;
  }
  std::uint64_t keys = 0;
  for (const Column& column : columns) {
    if (first_kind_[column.ns] != kNotRecorded) keys += column.keys.size();
  }
  dropped_busy_.add(keys);
}

// Into the buffer of a stripe, whose mutex is held; false when there is no room for all of it.
bool Recorder::copy(std::span<const Column> columns, Stripe& stripe) {
  std::size_t needed = 0;
  for (const Column& column : columns) {
    if (first_kind_[column.ns] == kNotRecorded) continue;
    needed += sizeof(ColumnHead);
    for (const std::string_view key : column.keys) needed += sizeof(std::uint16_t) + key.size();
  }
  if (needed > stripe_bytes_ - std::min(stripe_bytes_, stripe.bytes.size())) return false;
  std::size_t at = stripe.bytes.size();
  stripe.bytes.resize(at + needed);
  bool begins = true;
  for (const Column& column : columns) {
    const std::uint16_t kind = kind_of(column);
    if (kind == kNotRecorded || column.keys.empty()) continue;
    const bool ids = std::all_of(column.keys.begin(), column.keys.end(), [](std::string_view key) {
      return key.size() == sizeof(std::uint64_t);
    });
    const std::size_t head_at = at;
    at += sizeof(ColumnHead);
    std::uint8_t* to = stripe.bytes.data() + at;
    if (ids) {
      for (const std::string_view key : column.keys) {
        std::memcpy(to, key.data(), sizeof(std::uint64_t));
        to += sizeof(std::uint64_t);
      }
    } else {
      for (const std::string_view key : column.keys) {
        const auto length = static_cast<std::uint16_t>(key.size());
        std::memcpy(to, &length, sizeof(length));
        std::memcpy(to + sizeof(length), key.data(), key.size());
        to += sizeof(length) + key.size();
      }
    }
    const auto bytes = static_cast<std::uint32_t>(to - (stripe.bytes.data() + at));
    at += bytes;
    const ColumnHead head{kind, begins, static_cast<std::uint32_t>(column.keys.size()), bytes, ids};
    std::memcpy(stripe.bytes.data() + head_at, &head, sizeof(head));
    stripe.keys += column.keys.size();
    begins = false;
  }
  stripe.bytes.resize(at);  // ids took less than was allowed for
  if (at > stripe_bytes_ / 2 && !pressing_.exchange(true, std::memory_order_relaxed)) {
    wake_.notify_one();
  }
  return true;
}

void Recorder::run() {
  std::unique_lock lock(wake_mutex_);
  while (!stop_) {
    wake_.wait_for(lock, kWriteEvery,
                   [this] { return stop_ || pressing_.load(std::memory_order_relaxed); });
    lock.unlock();
    write_out();
    lock.lock();
  }
}

void Recorder::write_out() {
  const std::lock_guard writing(write_mutex_);
  try {
    write_taken();
  } catch (const std::bad_alloc&) {
    no_memory();
  }
}

// As write_out; throws std::bad_alloc.
void Recorder::write_taken() {
  pressing_.store(false, std::memory_order_relaxed);
  const std::uint64_t busy = dropped_busy_.get();
  window_dropped_ += busy - std::exchange(busy_counted_, busy);
  const std::uint64_t now = wall_clock_();
  const std::uint64_t window = now - now % config_.window_ms;
  if (encoder_ != nullptr && window != window_start_ms_) close_window();
  for (Stripe& stripe : stripes_) {
    std::uint64_t keys = 0;
    {
      const std::lock_guard lock(stripe.mutex);
      if (stripe.bytes.empty()) continue;
      taken_.swap(stripe.bytes);
      keys = std::exchange(stripe.keys, 0);
    }
    taken_keys_ += keys;
    FC_SEQUENCE_POINT("request_log:taken");
    if (may_write(now, window, keys)) encode(taken_);
    taken_.clear();
  }
  if (encoder_ == nullptr || encoder_->empty()) {
    block_since_ms_ = now;
  } else if (now - block_since_ms_ >= kFlushMs || now < block_since_ms_) {
    write_block();
    block_since_ms_ = now;
  }
}

void Recorder::end_window() {
  const std::lock_guard writing(write_mutex_);
  try {
    close_window();
  } catch (const std::bad_alloc&) {
    no_memory();
  }
}

// Whether there is a file to write to and room for it; else `keys` are counted as lost.
bool Recorder::may_write(std::uint64_t now, std::uint64_t window, std::uint64_t keys) {
  if (now < retry_at_ms_ && retry_at_ms_ - now <= kRetryMs) {  // else the clock was set back
    lose(dropped_disk_, keys);
    return false;
  }
  if (encoder_ != nullptr) {
    if (full_) lose(dropped_size_, keys);
    return !full_;
  }
  const std::vector<std::uint8_t> description = request_log::encode(description_);
  FileHeader header{};
  header.magic = kMagic;
  header.version = kVersion;
  header.description_bytes = static_cast<std::uint32_t>(description.size());
  header.window_start_ms = window;
  header.window_ms = config_.window_ms;
  header.file_id = random_id();
  header.checksum = header.sum(description.data());
  if (const int error = file_.create(directory_.path(), header, description); error != 0) {
    lose(dropped_disk_, keys);
    disk_failed(error);
    return false;
  }
  full_ = false;
  encoder_ = std::make_unique<Encoder>(header.file_id, config_.dictionary_keys);
  window_start_ms_ = window;
  window_start_shown_.store(window, std::memory_order_relaxed);
  return true;
}

void Recorder::encode(std::span<const std::uint8_t> bytes) {
  std::vector<std::string_view> keys;
  KeyHasher::Hashed hashed;
  const std::uint8_t* at = bytes.data();
  const std::uint8_t* const end = at + bytes.size();
  while (at != end) {
    ColumnHead head;
    std::memcpy(&head, at, sizeof(head));
    at += sizeof(head);
    const std::uint8_t* key = at;
    at += head.bytes;
    const std::uint32_t ns = description_.kinds[head.kind].ns;
    const bool hash = privacy_[ns] == KeyPrivacy::Hashed;
    const auto alias = [&](std::string_view plain) {
      if (!hash) return plain;
      hashed = hasher_->hash(names_[ns], plain);
      return hashed.view();
    };
    bool begins = head.begins_request != 0;
    if (begins) requests_.add();
    for (std::uint32_t done = 0; done < head.keys;) {
      if (encoder_ == nullptr) {  // its file is gone
        lose(dropped_disk_, head.keys - done);
        break;
      }
      const auto count = std::min<std::uint32_t>(head.keys - done,
                                                 static_cast<std::uint32_t>(Encoder::kAddKeysMax));
      keys.clear();
      for (std::uint32_t i = 0; i < count; ++i) {
        std::uint16_t length = sizeof(std::uint64_t);
        if (head.ids == 0) {
          std::memcpy(&length, key, sizeof(length));
          key += sizeof(length);
        }
        keys.emplace_back(reinterpret_cast<const char*>(key), length);
        key += length;
      }
      encoder_->add(head.kind, begins, keys, alias);
      FC_SEQUENCE_POINT("request_log:encoded");
      begins = false;
      done += count;
      if (encoder_->full()) write_block();
    }
  }
}

void Recorder::write_block() {
  const std::uint64_t before = encoder_->total_keys();
  const std::span<const std::uint8_t> block = encoder_->take(window_dropped_);
  const std::uint64_t keys = encoder_->total_keys() - before;
  bool fits = true;
  const std::uint64_t needed = std::min(config_.max_bytes, block.size() + kEndBytes);
  files_dropped_.add(directory_.make_room(config_.max_bytes - needed, file_.bytes(), fits));
  if (!fits) {
    full_ = true;
    lose(dropped_size_, keys);
    encoder_->lost();
    return;
  }
  if (const int error = file_.append(block); error != 0) {
    lose(dropped_disk_, keys);
    disk_failed(error);
    if (!file_.is_open()) {
      encoder_.reset();  // the next start makes of it what it can
      return;
    }
    encoder_->lost();
    return;
  }
  keys_.add(keys);
  bytes_.add(block.size());
  if (complained_) {
    std::fprintf(stderr, "feature cache: the request log is written again\n");
    complained_ = false;
  }
}

void Recorder::close_window() {
  if (encoder_ == nullptr) return;
  if (!encoder_->empty()) write_block();
  if (encoder_ != nullptr) {
    // Without its last block it is whole up to here all the same.
    if (const int error = file_.append(encoder_->finish(window_dropped_)); error != 0) {
      disk_failed(error);
    }
    if (const int error = file_.finish(); error != 0) disk_failed(error);
    files_.add();
  }
  encoder_.reset();
  window_dropped_ = 0;
}

// What was taken and not written is lost. The encoder may be amid a key: its file ends here.
void Recorder::no_memory() noexcept {
  const std::uint64_t settled =
      keys_.get() + dropped_disk_.get() + dropped_size_.get() + dropped_memory_.get();
  lose(dropped_memory_, taken_keys_ - settled);
  taken_.clear();
  encoder_.reset();
  if (file_.finish() == 0) files_.add();
  std::fprintf(stderr,
               "feature cache: the request log found no memory; requests are served, and "
               "some were not recorded\n");
}

void Recorder::lose(Counter& reason, std::uint64_t keys) noexcept {
  reason.add(keys);
  window_dropped_ += keys;
}

void Recorder::disk_failed(int error) {
  retry_at_ms_ = wall_clock_() + kRetryMs;
  if (complained_) return;
  std::fprintf(stderr,
               "feature cache: the request log in %s cannot be written (%s); requests are served, "
               "and not recorded until it can\n",
               directory_.path().c_str(), std::strerror(error));
  complained_ = true;
}

void Recorder::visit(CounterVisitor& visitor) const {
  visitor.counter("feature_cache_record_requests_total", "Requests in the request log.", {},
                  requests_.get());
  visitor.counter("feature_cache_record_keys_total", "Keys in the request log.", {}, keys_.get());
  visitor.counter("feature_cache_record_bytes_total", "Bytes of the request log.", {},
                  bytes_.get());
  const auto dropped = [&](const char* reason, const Counter& counter) {
    const Label labels[] = {{"reason", reason}};
    visitor.counter("feature_cache_record_dropped_keys_total",
                    "Keys that were sampled, and are not in the request log.", labels,
                    counter.get());
  };
  dropped("busy", dropped_busy_);
  dropped("disk", dropped_disk_);
  dropped("memory", dropped_memory_);
  dropped("size", dropped_size_);
  visitor.counter("feature_cache_record_files_total", "Files of the request log that were ended.",
                  {}, files_.get());
  visitor.counter("feature_cache_record_files_dropped_total",
                  "Files of the request log that went because its directory was full.", {},
                  files_dropped_.get());
  visitor.gauge("feature_cache_record_window_start_seconds",
                "Start of the newest window that was recorded, since 1970; 0: none yet.", {},
                static_cast<double>(window_start_shown_.load(std::memory_order_relaxed)) * 1e-3);
}

}  // namespace fc::request_log
