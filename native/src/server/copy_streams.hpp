// Gives items of the node to nodes that are new: a bounded number of streams at a time, each in a
// thread of its own, all together at a bounded rate.
//
// A slow receiver holds its own stream and nothing else. A drain ends them all at once: who copies
// goes on with another peer.
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <condition_variable>
#include <list>
#include <memory>
#include <mutex>
#include <thread>

#include "core/counter.hpp"
#include "feature_cache/server.hpp"
#include "server/call_gate.hpp"
#include "server/node_slot.hpp"

namespace fc::server {

// How many bytes may go out now, over all streams.
class CopyPace {
 public:
  explicit CopyPace(std::uint64_t bytes_per_second) : bytes_per_second_(bytes_per_second) {}
  // Takes `bytes` and returns how long to wait before they are sent. Thread-safe.
  std::chrono::nanoseconds take(std::uint64_t bytes);

 private:
  const std::uint64_t bytes_per_second_;
  std::mutex mutex_;
  std::chrono::steady_clock::time_point free_at_;  // guarded by mutex_
};

class CopyStreams {
 public:
  CopyStreams(NodeSlot& node, CallGate& gate, const ServerConfig& config)
      : node_(node),
        gate_(gate),
        at_once_(config.copies_at_once),
        pace_(config.copy_bytes_per_second),
        refuses_(config.copy_bytes_per_second == 0) {}
  ~CopyStreams();  // after the server has ended: joins the threads
  CopyStreams(const CopyStreams&) = delete;
  CopyStreams& operator=(const CopyStreams&) = delete;

  grpc::ServerWriteReactor<grpc::ByteBuffer>* start(const grpc::ByteBuffer& request);

 private:
  class Stream;
  friend class Stream;

  NodeSlot& node_;
  CallGate& gate_;
  const std::uint32_t at_once_;
  CopyPace pace_;
  const bool refuses_;
  std::mutex mutex_;
  std::uint32_t running_ = 0;         // guarded by mutex_
  std::list<std::thread> threads_;    // guarded by mutex_; some may have ended
  std::list<std::thread::id> ended_;  // guarded by mutex_
};

}  // namespace fc::server
