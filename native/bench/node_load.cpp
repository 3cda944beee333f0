#include "node_load.hpp"

#include <chrono>

#include "client/request.hpp"

namespace fc::bench {
namespace {

constexpr std::uint64_t kTakeWaitMs = 20;

void sleep_until(std::uint64_t at_ns) {
  const std::uint64_t now = monotonic_ns();
  if (at_ns > now) std::this_thread::sleep_for(std::chrono::nanoseconds(at_ns - now));
}

}  // namespace

SlowStore::SlowStore(Node& node, std::uint64_t delay_ns, std::size_t value_bytes)
    : node_(node),
      delay_ns_(delay_ns),
      value_(value_bytes, 's'),
      taker_([this] { take(); }),
      answerer_([this] { answer(); }) {}

SlowStore::~SlowStore() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  taker_.join();
  answerer_.join();
}

std::vector<SlowStore::Taken> SlowStore::take_log() {
  const std::lock_guard lock(mutex_);
  return std::exchange(log_, {});
}

void SlowStore::take() {
  for (;;) {
    std::shared_ptr<FetchBatch> batch = node_.take_fetch("store", kTakeWaitMs);
    const std::lock_guard lock(mutex_);
    if (stop_) return;
    if (batch == nullptr) continue;
    const std::uint64_t now = monotonic_ns();
    log_.push_back({now, batch->key_count(), batch->priority()});
    out_.push_back({now + delay_ns_, std::move(batch)});
    changed_.notify_all();
  }
}

void SlowStore::answer() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stop_ || !out_.empty(); });
    if (stop_) return;
    const Out out = std::move(out_.front());
    out_.pop_front();
    lock.unlock();
    sleep_until(out.due_ns);
    FetchAnswer answer;
    for (std::size_t i = 0; i < out.batch->key_count(); ++i) {
      FetchedValue value;
      value.kind = FetchedValue::Kind::Found;
      value.offset = answer.bytes.size();
      value.size = static_cast<std::uint32_t>(value_.size());
      answer.bytes.append(value_.data(), value_.size());
      answer.values.push_back(value);
    }
    out.batch->complete(std::move(answer));
    lock.lock();
  }
}

void NodeLoad::send(std::function<void(bool refused)> done) {
  std::uniform_int_distribution<std::size_t> any(0, keys_.size() - 1);
  client::KeyColumn column{.name_space = "bench", .domain = {}, .ids = {}, .keys = {}};
  column.keys.parts.reserve(kKeys);
  for (std::size_t i = 0; i < kKeys; ++i) column.keys.parts.push_back(keys_[any(random_)].view());
  client::GetRequest request;
  request.columns.push_back(std::move(column));
  const auto bytes = std::make_shared<std::vector<std::uint8_t>>(request.size());
  request.write(bytes->data());
  node_.batch_get({*bytes, bytes}, timeout_ms_,
                  [done = std::move(done)](const CallStatus& status, std::vector<Buffer>) {
                    done(!status.ok());
                  });
}

std::vector<NodeLoad::Sample> NodeLoad::run(double per_second, double seconds) {
  const auto count = static_cast<std::size_t>(per_second * seconds);
  const double interval_ns = 1e9 / per_second;
  std::vector<Sample> samples(count);
  std::atomic<std::size_t> answered{0};
  const std::uint64_t start = monotonic_ns();
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint64_t intended =
        start + static_cast<std::uint64_t>(interval_ns * static_cast<double>(i));
    sleep_until(intended);
    Sample& sample = samples[i];
    sample.sent_ns = monotonic_ns();
    send([this, &sample, &answered, intended](bool refused) {
      const std::uint64_t now = monotonic_ns();
      sample.latency_ms = static_cast<double>(now - intended) * 1e-6;
      sample.after_deadline_ms =
          static_cast<double>(now - sample.sent_ns) * 1e-6 - static_cast<double>(timeout_ms_);
      sample.refused = refused;
      answered.fetch_add(1, std::memory_order_release);
    });
  }
  while (answered.load(std::memory_order_acquire) != count) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return samples;
}

double NodeLoad::capacity(unsigned clients, double seconds) {
  std::mutex mutex;
  std::condition_variable changed;
  unsigned free = clients;
  std::uint64_t answered = 0;
  const std::uint64_t start = monotonic_ns();
  const std::uint64_t end = start + static_cast<std::uint64_t>(seconds * 1e9);
  std::unique_lock lock(mutex);
  while (monotonic_ns() < end) {
    changed.wait(lock, [&] { return free != 0; });
    --free;
    lock.unlock();
    send([&](bool) {
      const std::lock_guard ended(mutex);
      ++free;
      ++answered;
      changed.notify_one();
    });
    lock.lock();
  }
  const double rate =
      static_cast<double>(answered) * 1e9 / static_cast<double>(monotonic_ns() - start);
  changed.wait(lock, [&] { return free == clients; });
  return rate;
}

}  // namespace fc::bench
