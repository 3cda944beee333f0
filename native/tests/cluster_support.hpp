// A root over real leaves in one process, joined by links that tests can cut, silence and bend.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <thread>

#include "core/hash.hpp"
#include "feature_cache/leaf_link.hpp"
#include "node_support.hpp"

namespace fc::testing {

// Runs what links have to deliver, at its time.
class Courier {
 public:
  Courier() : thread_([this] { run(); }) {}
  ~Courier() { stop(); }
  void after(std::chrono::nanoseconds delay, std::function<void()> what) {
    const std::lock_guard lock(mutex_);
    due_.emplace(steady_clock::now() + delay, std::move(what));
    wake_.notify_one();
  }
  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_one();
    if (thread_.joinable()) thread_.join();
  }

 private:
  void run() {
    std::unique_lock lock(mutex_);
    // What is still on its way when it stops is delivered at once.
    while (!stop_ || !due_.empty()) {
      if (due_.empty()) {
        wake_.wait(lock);
        continue;
      }
      if (!stop_ && due_.begin()->first > steady_clock::now()) {
        wake_.wait_until(lock, due_.begin()->first);
        continue;
      }
      const std::function<void()> what = std::move(due_.begin()->second);
      due_.erase(due_.begin());
      lock.unlock();
      what();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::multimap<steady_clock::time_point, std::function<void()>> due_;
  bool stop_ = false;
  std::thread thread_;
};

// How a leaf behaves towards its root.
struct Manners {
  std::atomic<bool> dead{false};    // connections are refused
  std::atomic<bool> silent{false};  // takes requests and never answers
  std::atomic<int> delay_ms{0};
  std::atomic<bool> garbled{false};  // answers with a column too few
  std::atomic<int> gets{0};
  std::atomic<int> writes{0};
};

class TestConnector final : public LeafConnector {
 public:
  struct Place {
    Node* node = nullptr;
    Manners manners;
  };
  Place& at(const std::string& address) { return places_[address]; }

  std::shared_ptr<LeafLink> connect(const std::string& address) override {
    return std::make_shared<Link>(*this, at(address));
  }
  void close() override { courier_.stop(); }

 private:
  class Link final : public LeafLink {
   public:
    Link(TestConnector& connector, Place& place) : connector_(connector), place_(place) {}
    void get(Buffer request, std::uint64_t timeout_ns, GetDone done) override {
      ++place_.manners.gets;
      call<Reply>(&Node::batch_get, std::move(request), timeout_ns, std::move(done));
    }
    void put(Buffer request, std::uint64_t timeout_ns, WriteDone done) override {
      ++place_.manners.writes;
      call<WriteReply>(&Node::batch_put, std::move(request), timeout_ns, std::move(done));
    }
    void erase(Buffer request, std::uint64_t timeout_ns, WriteDone done) override {
      ++place_.manners.writes;
      call<WriteReply>(&Node::batch_delete, std::move(request), timeout_ns, std::move(done));
    }

   private:
    template <class Answer, class Done>
    void call(void (Node::*method)(RequestBytes, std::uint64_t, ReplyDone), Buffer request,
              std::uint64_t timeout_ns, Done done) {
      Courier& courier = connector_.courier_;
      if (place_.manners.dead) {
        courier.after({}, [done] { done({CallStatus::Unavailable, "refused"}, {}); });
        return;
      }
      if (place_.manners.silent) {
        courier.after(std::chrono::nanoseconds(timeout_ns),
                      [done] { done({4, "deadline exceeded"}, {}); });
        return;
      }
      const auto bytes = std::make_shared<Buffer>(std::move(request));
      const bool garbled = place_.manners.garbled;
      const milliseconds delay(place_.manners.delay_ms);
      ((*place_.node).*method)(
          {{bytes->data(), bytes->size()}, bytes}, timeout_ns / 1'000'000,
          [&courier, done, delay, garbled](CallStatus status, const std::vector<Buffer>& pieces) {
            auto answer = std::make_shared<Answer>();
            std::vector<Reply::Piece> views;
            for (const Buffer& piece : pieces) views.emplace_back(piece.data(), piece.size());
            if (!garbled) {
              EXPECT_EQ(Answer::gather(views, *answer), ReplyFault::None);
            }
            courier.after(delay, [done, status, answer] { done(status, std::move(*answer)); });
          });
    }
    TestConnector& connector_;
    Place& place_;
  };

  std::map<std::string, Place> places_;  // filled before there are calls
  Courier courier_;
};

class ClusterTest : public ::testing::Test {
 protected:
  static constexpr std::uint32_t kShards = 16;

  static EngineConfig leaf_engine() {
    return engine_config(8 * kMiB, {name_space("pin", {domain("all", kMiB)}),
                                    name_space("user", {domain("all", kMiB)})});
  }
  // Shard s lives on leaves s, s+1, ... modulo their number.
  void start(std::uint32_t leaves, std::uint32_t replicas, RootConfig root = {},
             std::uint64_t hot_tier_bytes = 0, bool with_store = false) {
    for (std::uint32_t l = 0; l < leaves; ++l) {
      NodeConfig config;
      config.engine = leaf_engine();
      config.leaf.enabled = true;
      leaves_.push_back(make_node(config));
      place(l).node = leaves_.back().get();
    }
    NodeConfig config;
    config.engine = leaf_engine();
    config.engine.memory_bytes = hot_tier_bytes;
    for (NamespaceConfig& ns : config.engine.namespaces) {
      ns.domains[0].ttl_ms = 900;
      if (with_store) ns.store = "store";
    }
    if (with_store) {
      StoreConfig store;
      store.name = "store";
      store.timeout_ms = 10'000;
      config.stores.push_back(store);
    }
    config.root = root;
    config.root.enabled = true;
    root_ = make_node(config, {}, nullptr, connector_);
    replicas_ = replicas;
    publish(1);
  }
  void TearDown() override {
    if (root_ != nullptr) root_->stop();
    root_.reset();
  }

  static std::string name_of(std::uint32_t leaf) { return "leaf-" + std::to_string(leaf); }
  TestConnector::Place& place(std::uint32_t leaf) { return connector_->at(name_of(leaf)); }
  Manners& manners(std::uint32_t leaf) { return place(leaf).manners; }

  // By default as start() says; `replicas_of` may say otherwise.
  std::vector<std::uint32_t> usual_replicas(std::uint32_t shard) const {
    std::vector<std::uint32_t> result;
    for (std::uint32_t r = 0; r < replicas_; ++r) {
      result.push_back((shard + r) % static_cast<std::uint32_t>(leaves_.size()));
    }
    return result;
  }
  ShardMap map_of(std::uint64_t version) const {
    ShardMap map;
    map.version = version;
    for (std::uint32_t l = 0; l < leaves_.size(); ++l) {
      map.leaves.push_back({name_of(l), name_of(l), "zone"});
    }
    for (std::uint32_t s = 0; s < kShards; ++s) {
      map.first.push_back(static_cast<std::uint32_t>(map.replicas.size()));
      for (const std::uint32_t leaf : replicas_of_(s)) {
        map.replicas.push_back({leaf, ReplicaState::Online});
      }
    }
    map.first.push_back(static_cast<std::uint32_t>(map.replicas.size()));
    return map;
  }
  void own(std::uint32_t leaf, std::uint64_t version, std::uint64_t written_since = 0) {
    OwnedShards owned{version, kShards, {}, {}, {}};
    for (std::uint32_t s = 0; s < kShards; ++s) {
      const std::vector<std::uint32_t> replicas = replicas_of_(s);
      if (std::find(replicas.begin(), replicas.end(), leaf) == replicas.end()) continue;
      owned.shards.push_back(s);
      owned.written_since.push_back(written_since);
    }
    leaves_[leaf]->set_owned(owned);
  }
  void publish(std::uint64_t version) {
    for (std::uint32_t l = 0; l < leaves_.size(); ++l) own(l, version);
    root_->set_shard_map(map_of(version));
  }

  static std::vector<std::string> many_keys(std::size_t count, const std::string& prefix = "key-") {
    std::vector<std::string> keys;
    for (std::size_t i = 0; i < count; ++i) keys.push_back(prefix + std::to_string(i));
    return keys;
  }
  static std::uint32_t shard(const std::string& key, const std::string& ns = "pin") {
    return shard_of(ns, key, kShards);
  }

  static std::future<Answer> ask_async(Node& node, const Ask& what) {
    client::GetRequest request;
    request.request_id = 7;
    request.cache_only = what.cache_only;
    for (const auto& [ns, keys] : what.columns) request.columns.push_back(column_of(ns, keys));
    auto promise = std::make_shared<std::promise<Answer>>();
    const auto started = steady_clock::now();
    node.batch_get(encoded(request), what.timeout_ms,
                   [promise, started](CallStatus call, const std::vector<Buffer>& pieces) {
                     Answer answer = parsed(std::move(call), pieces);
                     answer.took =
                         std::chrono::duration_cast<milliseconds>(steady_clock::now() - started);
                     promise->set_value(std::move(answer));
                   });
    return promise->get_future();
  }
  static Answer ask(Node& node, const Ask& what) { return ask_async(node, what).get(); }
  std::vector<Cell> get(const std::vector<std::string>& keys, std::uint64_t timeout_ms = 5000) {
    const Answer answer = ask(*root_, {.columns = {{"pin", keys}}, .timeout_ms = timeout_ms});
    EXPECT_TRUE(answer.call.ok()) << answer.call.message;
    return answer.columns.at(0);
  }
  static Written put(Node& node, const std::vector<std::string>& keys, const std::string& value,
                     std::uint64_t map_version = 0, std::uint64_t timeout_ms = 5000) {
    client::PutRequest request;
    request.map_version = map_version;
    request.columns.push_back({.keys = column_of("pin", keys), .values = {}, .ttl_ms = {}});
    for (const std::string& key : keys) {
      values_.push_back(value + key);
      request.columns[0].values.parts.push_back(values_.back());
    }
    return write(node, &Node::batch_put, encoded(request), timeout_ms);
  }
  static Written erase(Node& node, const std::vector<std::string>& keys,
                       std::uint64_t timeout_ms = 5000) {
    client::DeleteRequest request;
    request.columns.push_back(column_of("pin", keys));
    return write(node, &Node::batch_delete, encoded(request), timeout_ms);
  }
  static std::size_t count(const std::vector<Cell>& cells, CellStatus status) {
    return static_cast<std::size_t>(std::count_if(
        cells.begin(), cells.end(), [&](const Cell& one) { return one.status == status; }));
  }
  double counter(std::string_view name) { return Counters::of(*root_).sum(name); }

  // The connector outlives the root, the leaves outlive what the connector delivers.
  std::vector<std::unique_ptr<Node>> leaves_;
  std::shared_ptr<TestConnector> connector_ = std::make_shared<TestConnector>();
  std::unique_ptr<Node> root_;
  std::uint32_t replicas_ = 1;
  std::function<std::vector<std::uint32_t>(std::uint32_t)> replicas_of_ = [this](std::uint32_t s) {
    return usual_replicas(s);
  };

 private:
  static inline std::deque<std::string> values_;  // what requests point into
};

}  // namespace fc::testing
