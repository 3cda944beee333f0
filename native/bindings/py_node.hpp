// A node as Python holds it: no call outlives it, and none comes when it was shut down.
#pragma once

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <condition_variable>
#include <map>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "callback_thread.hpp"
#include "client_bindings.hpp"
#include "cluster_bindings.hpp"
#include "counter_views.hpp"
#include "feature_cache/engine.hpp"
#include "feature_cache/leaf_link.hpp"
#include "feature_cache/node.hpp"
#include "feature_cache/reply.hpp"
#include "fetch_batch.hpp"
#include "node_gate.hpp"

namespace fc::bindings {

namespace py = pybind11;

inline constexpr int kInternal = 13;  // grpc.StatusCode.INTERNAL
inline constexpr const char* kShutDown = "the cache was shut down";

// ---- the node
// ------------------------------------------------------------------------------------

// Nodes that are alive, so that all can be stopped before the interpreter ends: a node's thread
// that asks for the interpreter's lock after that would never return.
class LiveNodes {
 public:
  void add(Node* node, CallbackThread* callbacks) {
    const std::lock_guard lock(mutex_);
    nodes_.emplace(node, callbacks);
  }
  void remove(Node* node) {
    const std::lock_guard lock(mutex_);
    nodes_.erase(node);
  }
  void stop_all() {
    const std::lock_guard lock(mutex_);
    for (const auto& [node, callbacks] : nodes_) {
      node->stop();
      callbacks->drain();
    }
  }

 private:
  std::mutex mutex_;
  std::map<Node*, CallbackThread*> nodes_;
};

inline LiveNodes& live_nodes() {
  static auto* instance = new LiveNodes();  // never destroyed: nodes may outlive main()
  return *instance;
}

struct Outcome {
  CallStatus status;
  std::vector<Buffer> pieces;
};

template <class ReplyType>
py::object to_python(Outcome outcome, bool* failed) {
  *failed = true;
  if (!outcome.status.ok()) return make_rpc_error(outcome.status.code, outcome.status.message);
  std::vector<Reply::Piece> pieces;
  for (const Buffer& piece : outcome.pieces) pieces.emplace_back(piece.data(), piece.size());
  auto reply = std::make_unique<ReplyType>();
  const ReplyFault fault = ReplyType::gather(pieces, *reply);
  if (fault != ReplyFault::None) return make_rpc_error(kInternal, describe(fault));
  *failed = false;
  return py::cast(std::move(reply));
}

template <class ReplyType>
py::object result_or_raise(Outcome outcome) {
  if (!outcome.status.ok()) raise_rpc_error(outcome.status.code, outcome.status.message);
  bool failed = false;
  py::object result = to_python<ReplyType>(std::move(outcome), &failed);
  if (failed) raise_rpc_error(kInternal, "the node's reply could not be read");
  return result;
}

inline std::uint64_t to_ms(double seconds) {
  if (!(seconds > 0)) throw py::value_error("timeout_s must be positive");
  return std::max<std::uint64_t>(1, static_cast<std::uint64_t>(std::min(seconds, 1e6) * 1000.0));
}

// A copy that no Python thread has to give back: a pending request may end on any thread.
inline RequestBytes copy(const py::bytes& request) {
  auto owned = std::make_shared<std::string>(std::string_view(request));
  RequestBytes bytes;
  bytes.bytes = {reinterpret_cast<const std::uint8_t*>(owned->data()), owned->size()};
  bytes.owner = std::move(owned);
  return bytes;
}

// What the operating system refuses is an OSError: its code, and what to do about it.
[[noreturn]] inline void raise_os_error(const std::system_error& error) {
  const py::object args = py::make_tuple(error.code().value(), error.what());
  PyErr_SetObject(PyExc_OSError, args.ptr());
  throw py::error_already_set();
}

inline std::shared_ptr<LeafConnector> leaf_connector_of(const RootConfig& root) {
  if (!root.enabled) return nullptr;
  LeafConnectorConfig config;
  config.threads = root.threads;
  config.connections = root.connections_per_leaf;
  return make_leaf_connector(config);
}

class PyNode {
 public:
  PyNode(const NodeConfig& config, RecoveryProgress* progress) {
    try {
      py::gil_scoped_release release;  // reserving memory and the space of a device takes its time
      node_ = make_node(config, {}, progress, leaf_connector_of(config.root));
    } catch (const std::system_error& error) {
      raise_os_error(error);
    }
    start_report_ = node_->engine().start_report();
    live_nodes().add(node_.get(), &callbacks_);
  }
  ~PyNode() {
    live_nodes().remove(node_.get());
    py::gil_scoped_release release;
    if (node_ != nullptr) node_->stop();
    callbacks_.drain();
    node_.reset();
  }
  PyNode(const PyNode&) = delete;
  PyNode& operator=(const PyNode&) = delete;

  // For a server, which must be closed before shutdown().
  Node& node() {
    if (node_ == nullptr) throw std::runtime_error(kShutDown);
    return *node_;
  }

  py::object batch_get(const py::bytes& request, double timeout_s) {
    return call<Reply>(&Node::batch_get, request, timeout_s);
  }
  void batch_get_async(const py::bytes& request, double timeout_s, py::function done) {
    call_async<Reply>(&Node::batch_get, request, timeout_s, std::move(done));
  }
  py::object batch_put(const py::bytes& request, double timeout_s) {
    return call<WriteReply>(&Node::batch_put, request, timeout_s);
  }
  py::object batch_delete(const py::bytes& request, double timeout_s) {
    return call<WriteReply>(&Node::batch_delete, request, timeout_s);
  }
  void batch_put_async(const py::bytes& request, double timeout_s, py::function done) {
    call_async<WriteReply>(&Node::batch_put, request, timeout_s, std::move(done));
  }
  void batch_delete_async(const py::bytes& request, double timeout_s, py::function done) {
    call_async<WriteReply>(&Node::batch_delete, request, timeout_s, std::move(done));
  }

  std::unique_ptr<PyFetchBatch> take_fetch(const std::string& store, double wait_s) {
    // By hand: at the interpreter's end a daemon thread is unwound from here, which a guard's
    // destructor would turn into an abort.
    PyThreadState* state = PyEval_SaveThread();
    std::shared_ptr<FetchBatch> batch;
    bool known = true;
    if (const auto inside = gate_->enter()) {
      known = node_->has_store(store);
      const double wait_ms = std::max(0.0, wait_s) * 1000.0;
      if (known) batch = node_->take_fetch(store, static_cast<std::uint64_t>(wait_ms));
    }
    PyEval_RestoreThread(state);
    if (!known) throw py::key_error("no store named " + store);
    if (batch == nullptr) return nullptr;
    return std::make_unique<PyFetchBatch>(std::move(batch), gate_);
  }
  std::uint64_t resize_domain(const std::string& ns_name, const std::string& domain_name,
                              std::uint64_t budget_bytes) {
    py::gil_scoped_release release;
    const auto inside = enter();
    const NamespaceIndex ns = find(ns_name);
    const DomainIndex domain = node_->engine().find_domain(ns, domain_name);
    if (domain == kNoDomain) {
      throw py::key_error("namespace " + ns_name + " has no domain " + domain_name);
    }
    return node_->engine().resize(domain, budget_bytes);
  }
  std::uint64_t flush_namespace(const std::string& ns_name) {
    py::gil_scoped_release release;
    const auto inside = enter();
    return node_->engine().flush(find(ns_name));
  }
  void set_shard_map(const ShardMap& map) {
    py::gil_scoped_release release;
    const auto inside = enter();
    node_->set_shard_map(map);
  }
  // For what else is done with a node, without the interpreter's lock: `body(node)`, unless it was
  // shut down: then RuntimeError.
  template <class Body>
  auto inside(Body&& body) const {
    const auto entered = enter();
    return body(*node_);
  }
  // Runs `callback` in the thread of callbacks, without the interpreter's lock.
  void post(std::function<void()> callback) { callbacks_.post(std::move(callback)); }
  std::uint64_t newest_map_version() const {
    const auto inside = gate_->enter();
    return inside ? node_->newest_map_version() : 0;
  }
  void set_owned(std::uint64_t version, std::uint32_t shard_count,
                 const Array<std::uint32_t>& shards, const Array<std::uint64_t>& written_since,
                 const Array<std::uint8_t>& readable) {
    OwnedShards owned{version, shard_count, to_vector(shards), to_vector(written_since),
                      to_vector(readable)};
    py::gil_scoped_release release;
    const auto inside = enter();
    node_->set_owned(std::move(owned));
  }
  void drop_shards(std::uint32_t shard_count, const Array<std::uint32_t>& shards) {
    const std::vector<std::uint32_t> dropped = to_vector(shards);
    py::gil_scoped_release release;
    const auto inside = enter();
    node_->engine().drop_shards(shard_count, dropped);
  }
  void hold_shards(std::uint32_t shard_count, const Array<std::uint32_t>& shards) {
    const std::vector<std::uint32_t> held = to_vector(shards);
    py::gil_scoped_release release;
    const auto inside = enter();
    node_->engine().hold_shards(shard_count, held);
  }
  KeptShards kept_shards() const {
    const auto inside = enter();
    return node_->engine().kept_shards();
  }
  py::tuple recent_writes(std::uint32_t shard_count, const Array<std::uint32_t>& shards,
                          double age_s) const {
    const std::vector<std::uint32_t> wanted = to_vector(shards);
    RecentWrites writes;
    {
      py::gil_scoped_release release;
      const auto inside = enter();
      writes = node_->recent_writes(shard_count, wanted, to_ms(age_s));
    }
    return py::make_tuple(writes.complete, writes.map_version, columns_of(writes));
  }
  Collector collect() const {
    py::gil_scoped_release release;
    Collector collector;
    if (const auto inside = gate_->enter()) node_->visit(collector);
    return collector;
  }
  const StartReport& start_report() const noexcept { return start_report_; }
  void stop() {
    py::gil_scoped_release release;
    if (const auto inside = gate_->enter()) node_->stop();
    callbacks_.drain();
  }
  bool shutdown() {
    py::gil_scoped_release release;
    const std::lock_guard lock(shutdown_mutex_);
    if (node_ == nullptr) return whole_;
    node_->stop();  // wakes and answers who waits inside
    callbacks_.drain();
    gate_->close();
    whole_ = node_->shutdown();
    // Gives the memory and its name back, whoever still has this object. A fetch that is still out
    // keeps the node: it is answered when it ends.
    if (gate_.use_count() == 1) {
      live_nodes().remove(node_.get());
      node_.reset();
    }
    return whole_;
  }

 private:
  using Method = void (Node::*)(RequestBytes, std::uint64_t, ReplyDone);

  template <class ReplyType>
  py::object call(Method method, const py::bytes& request, double timeout_s) {
    Outcome outcome;
    {
      const std::uint64_t timeout_ms = to_ms(timeout_s);
      RequestBytes bytes = copy(request);
      py::gil_scoped_release release;
      std::mutex mutex;
      std::condition_variable ready;
      bool done = false;
      const auto inside = gate_->enter();
      run(inside.owns_lock(), method, std::move(bytes), timeout_ms,
          [&](CallStatus status, std::vector<Buffer> pieces) {
            const std::lock_guard lock(mutex);
            outcome = {std::move(status), std::move(pieces)};
            done = true;
            ready.notify_one();
          });
      std::unique_lock lock(mutex);
      ready.wait(lock, [&] { return done; });
    }
    return result_or_raise<ReplyType>(std::move(outcome));
  }
  template <class ReplyType>
  void call_async(Method method, const py::bytes& request, double timeout_s, py::function done) {
    const std::uint64_t timeout_ms = to_ms(timeout_s);
    RequestBytes bytes = copy(request);
    auto callback = std::make_shared<py::function>(std::move(done));
    py::gil_scoped_release release;
    const auto caller = std::this_thread::get_id();
    const auto inside = gate_->enter();
    run(inside.owns_lock(), method, std::move(bytes), timeout_ms,
        [this, caller, callback](CallStatus status, std::vector<Buffer> pieces) mutable {
          // Shared, since a std::function copies what it holds.
          const auto outcome =
              std::make_shared<Outcome>(Outcome{std::move(status), std::move(pieces)});
          if (std::this_thread::get_id() == caller) {
            call_back<ReplyType>(callback, std::move(*outcome));
          } else {
            callbacks_.post([callback = std::move(callback), outcome]() mutable {
              call_back<ReplyType>(callback, std::move(*outcome));
            });
          }
        });
  }
  std::shared_lock<std::shared_mutex> enter() const {
    auto inside = gate_->enter();
    if (!inside) throw std::runtime_error(kShutDown);
    return inside;
  }
  void run(bool inside, Method method, RequestBytes bytes, std::uint64_t timeout_ms,
           ReplyDone done) {
    if (!inside) return done({CallStatus::Unavailable, kShutDown}, {});
    ((*node_).*method)(std::move(bytes), timeout_ms, std::move(done));
  }
  NamespaceIndex find(const std::string& name) const {
    const NamespaceIndex ns = node_->engine().find_namespace(name);
    if (ns == kNoNamespace) throw py::key_error("no namespace " + name);
    return ns;
  }
  template <class ReplyType>
  static void call_back(std::shared_ptr<py::function>& callback, Outcome outcome) {
    const py::gil_scoped_acquire acquire;
    try {
      bool failed = false;
      (*callback)(to_python<ReplyType>(std::move(outcome), &failed));
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("Node callback");
    }
    callback.reset();
  }

  const std::shared_ptr<NodeGate> gate_ = std::make_shared<NodeGate>();
  StartReport start_report_;
  std::mutex shutdown_mutex_;
  bool whole_ = false;        // guarded by shutdown_mutex_; what the first shutdown() said
  CallbackThread callbacks_;  // first in, last out: the node posts to it
  std::unique_ptr<Node> node_;
};

}  // namespace fc::bindings
