// A node over a clock and fetch loops that the tests hold in their hands, and what they ask of it.
#pragma once

#include "feature_cache/node.hpp"

#include <atomic>
#include <chrono>
#include <future>
#include <map>
#include <thread>

#include "client/request.hpp"
#include "feature_cache/reply.hpp"
#include "support.hpp"
#include "testing/sequence_point.hpp"

namespace fc::testing {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

struct Cell {
  CellStatus status = CellStatus::Unspecified;
  std::string value;
  friend bool operator==(const Cell&, const Cell&) = default;
  friend void PrintTo(const Cell& cell, std::ostream* to) {
    *to << static_cast<int>(cell.status) << " '" << cell.value.substr(0, 40) << "'";
  }
};
inline Cell cell(CellStatus status, std::string value = {}) {
  return {status, std::move(value)};
}

struct Answer {
  CallStatus call;
  std::vector<std::vector<Cell>> columns;
  std::uint64_t request_id = 0;
  milliseconds took{0};
  const Cell& only() const { return columns.at(0).at(0); }
};

struct Ask {
  std::vector<std::pair<std::string, std::vector<std::string>>> columns;
  std::uint64_t timeout_ms = 20'000;
  bool cache_only = false;
  std::string domain{};
};

template <class Request>
RequestBytes encoded(const Request& request) {
  auto bytes = std::make_shared<std::vector<std::uint8_t>>(request.size());
  request.write(bytes->data());
  return {*bytes, bytes};
}

inline client::KeyColumn column_of(std::string_view ns, const std::vector<std::string>& keys,
                                   std::string_view domain = {}) {
  client::KeyColumn column{.name_space = ns, .domain = domain, .ids = {}, .keys = {}};
  column.keys.parts.assign(keys.begin(), keys.end());
  return column;
}

inline Answer parsed(CallStatus call, const std::vector<Buffer>& pieces) {
  Answer answer;
  answer.call = std::move(call);
  if (!answer.call.ok()) return answer;
  std::vector<Reply::Piece> views;
  for (const Buffer& piece : pieces) views.emplace_back(piece.data(), piece.size());
  Reply reply;
  EXPECT_EQ(Reply::gather(views, reply), ReplyFault::None);
  answer.request_id = reply.request_id();
  for (std::size_t c = 0; c < reply.columns(); ++c) {
    const Reply::Column& column = reply.column(c);
    std::vector<Cell> cells;
    std::size_t at = 0;
    for (std::size_t i = 0; i < column.statuses.size(); ++i) {
      const auto status = static_cast<CellStatus>(column.statuses[i]);
      EXPECT_TRUE(carries_value(status) || column.value_lengths[i] == 0);
      cells.push_back(
          cell(status, std::string(reinterpret_cast<const char*>(column.values.data()) + at,
                                   column.value_lengths[i])));
      at += column.value_lengths[i];
    }
    answer.columns.push_back(std::move(cells));
  }
  return answer;
}

struct Written {
  CallStatus call;
  std::vector<std::vector<WriteStatus>> columns;
  std::uint64_t map_version = 0;
};

inline Written written(CallStatus call, const std::vector<Buffer>& pieces) {
  Written answer;
  answer.call = std::move(call);
  if (!answer.call.ok()) return answer;
  std::vector<Reply::Piece> views;
  for (const Buffer& piece : pieces) views.emplace_back(piece.data(), piece.size());
  WriteReply reply;
  EXPECT_EQ(WriteReply::gather(views, reply), ReplyFault::None);
  answer.map_version = reply.map_version();
  for (std::size_t c = 0; c < reply.columns(); ++c) {
    std::vector<WriteStatus>& statuses = answer.columns.emplace_back();
    for (const std::uint8_t status : reply.statuses(c)) {
      statuses.push_back(static_cast<WriteStatus>(status));
    }
  }
  return answer;
}

// Waits for the answer of a put or a delete.
inline Written write(Node& node, void (Node::*method)(RequestBytes, std::uint64_t, ReplyDone),
                     RequestBytes request, std::uint64_t timeout_ms = 20'000) {
  const auto promise = std::make_shared<std::promise<Written>>();
  (node.*method)(std::move(request), timeout_ms,
                 [promise](CallStatus call, const std::vector<Buffer>& pieces) {
                   promise->set_value(written(std::move(call), pieces));
                 });
  return promise->get_future().get();
}

class NodeTest : public ::testing::Test {
 protected:
  static NodeConfig usual_config() {
    NodeConfig config;
    config.engine = engine_config(
        8 * kMiB,
        {name_space("pin",
                    {domain("lasting", kMiB), domain("brief", kMiB, PolicyKind::S3Fifo, 60'000)}),
         name_space("user", {domain("all", kMiB)}), name_space("local", {domain("all", kMiB)})});
    config.engine.namespaces[0].store = "store";
    config.engine.namespaces[1].store = "store";
    config.engine.namespaces[0].negative_ttl_ms = 60'000;
    StoreConfig store;
    store.name = "store";
    store.timeout_ms = 10'000;
    config.stores.push_back(store);
    return config;
  }
  void start(const NodeConfig& config) { node_ = make_node(config); }
  void SetUp() override { start(usual_config()); }

  // Sends a BatchGet; the future is ready when `done` was called (once, or this throws).
  std::future<Answer> ask(const Ask& what) {
    client::GetRequest request;
    request.request_id = 77;
    request.cache_only = what.cache_only;
    for (const auto& [ns, keys] : what.columns) {
      request.columns.push_back(column_of(ns, keys, what.domain));
    }
    auto promise = std::make_shared<std::promise<Answer>>();
    const auto started = steady_clock::now();
    node_->batch_get(encoded(request), what.timeout_ms,
                     [promise, started](CallStatus call, std::vector<Buffer> pieces) {
                       Answer answer = parsed(std::move(call), pieces);
                       answer.took =
                           std::chrono::duration_cast<milliseconds>(steady_clock::now() - started);
                       promise->set_value(std::move(answer));
                     });
    return promise->get_future();
  }
  std::future<Answer> ask(const std::string& key, std::uint64_t timeout_ms = 20'000) {
    return ask(Ask{.columns = {{"pin", {key}}}, .timeout_ms = timeout_ms});
  }
  static bool ready(const std::future<Answer>& answer) {
    return answer.wait_for(milliseconds(0)) == std::future_status::ready;
  }
  // What a call that cannot wait says.
  Cell cached(const std::string& key, const std::string& ns = "pin") {
    return ask(Ask{.columns = {{ns, {key}}}, .cache_only = true}).get().only();
  }
  CallStatus put(const std::string& key, const std::string& value, const std::string& domain = {}) {
    const std::vector<std::string> keys{key};
    client::PutRequest request;
    request.columns.push_back({.keys = column_of("pin", keys, domain), .values = {}, .ttl_ms = {}});
    request.columns[0].values.parts = {value};
    return write(*node_, &Node::batch_put, encoded(request)).call;
  }
  CallStatus erase(const std::string& key) {
    const std::vector<std::string> keys{key};
    client::DeleteRequest request;
    request.columns.push_back(column_of("pin", keys));
    return write(*node_, &Node::batch_delete, encoded(request)).call;
  }
  std::shared_ptr<FetchBatch> take(std::uint64_t wait_ms = 10'000) {
    return node_->take_fetch("store", wait_ms);
  }
  static std::vector<std::string> keys_of(const FetchBatch& batch) {
    std::vector<std::string> keys;
    for (const FetchBatch::Group& group : batch.groups()) {
      for (const std::string_view key : group.keys) {
        keys.push_back(std::string(group.ns) + ":" + std::string(key));
      }
    }
    EXPECT_EQ(keys.size(), batch.key_count());
    return keys;
  }
  struct Given {
    FetchedValue::Kind kind = FetchedValue::Kind::Found;
    std::string value;
    std::string_view domain{};
    std::uint64_t ttl_ms = 0;
  };
  static void complete(FetchBatch& batch, const std::vector<Given>& given) {
    FetchAnswer answer;
    for (const Given& one : given) {
      FetchedValue value;
      value.kind = one.kind;
      value.offset = answer.bytes.size();
      value.size = static_cast<std::uint32_t>(one.value.size());
      value.domain_hint = one.domain;
      value.ttl_ms = one.ttl_ms;
      answer.bytes.append(one.value.data(), one.value.size());
      answer.values.push_back(value);
    }
    batch.complete(std::move(answer));
  }
  static Given found(std::string value) { return {FetchedValue::Kind::Found, std::move(value)}; }
  double counter(std::string_view name) { return Counters::of(*node_).sum(name); }

  std::unique_ptr<Node> node_;
};

// ---- reading through
// ------------------------------------------------------------------------------

}  // namespace fc::testing
