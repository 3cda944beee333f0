// The half of the node that writes: here, as a leaf for its own shards, or as a root to the leaves.

#include "core/hash.hpp"
#include "upstream/cache_node.hpp"

namespace fc {
namespace {

const wire::KeyColumn& keys_of(const wire::PutColumn& column) {
  return column.keys;
}
const wire::KeyColumn& keys_of(const wire::KeyColumn& column) {
  return column;
}

}  // namespace

// Which keys of a write this leaf takes; holds on to its view of shards while the write goes on.
class CacheNode::OwnedWrite {
 public:
  // `leaf` null: it takes all.
  OwnedWrite(LeafShards* leaf, std::uint64_t by_version) : leaf_(leaf), by_version_(by_version) {
    if (leaf_ != nullptr) view_ = leaf_->view();
  }

  void choose(NamespaceIndex index, const NamespaceLink& ns,
              const std::vector<std::string_view>& keys) {
    if (leaf_ == nullptr) return;
    taken_.assign(keys.size(), true);
    std::size_t refused = 0;
    for (std::size_t i = 0; i < keys.size(); ++i) {
      const std::uint64_t high = hash_key(ns.seed, keys[i]).high;
      taken_[i] = view_->takes_write(high, by_version_);
      if (taken_[i]) {
        // Before it is written: a peer that asks in between drops a key too many, never one too
        // few.
        leaf_->log.add(index, keys[i], high);
      } else {
        ++refused;
      }
    }
    if (refused != 0) leaf_->writes_refused.add(refused);
  }
  bool takes(std::size_t i) const { return leaf_ == nullptr || taken_[i]; }
  // One status a key: those of what was taken, ERROR for the rest.
  std::vector<WriteStatus> spread(std::vector<WriteStatus> of_taken, std::size_t count) const {
    if (of_taken.size() == count) return of_taken;
    std::vector<WriteStatus> all(count, WriteStatus::Error);
    std::size_t next = 0;
    for (std::size_t i = 0; i < count; ++i) {
      if (taken_[i]) all[i] = of_taken[next++];
    }
    return all;
  }
  std::uint64_t map_version() const { return view_ == nullptr ? 0 : view_->version; }
  void release() { view_.reset(); }

 private:
  LeafShards* const leaf_;
  const std::uint64_t by_version_;
  std::shared_ptr<const LeafShards::View> view_;
  std::vector<bool> taken_;
};

// The whole request is checked before any of it is done. `domains`: of puts alone; a key has one
// value in its namespace, wherever it lies.
template <class Request>
CallStatus CacheNode::decode_write(const RequestBytes& bytes, Request& request,
                                   std::vector<NamespaceIndex>& namespaces,
                                   std::vector<DomainIndex>& domains) {
  if (std::string error = wire::decode(bytes.bytes, limits_, request); !error.empty()) {
    refused_.add();
    return {CallStatus::InvalidArgument, std::move(error)};
  }
  namespaces.resize(request.columns.size());
  domains.resize(request.columns.size());
  for (std::size_t c = 0; c < request.columns.size(); ++c) {
    CallStatus status = resolve(keys_of(request.columns[c]), namespaces[c], domains[c]);
    if (!status.ok()) {
      refused_.add();
      return status;
    }
  }
  return {};
}

void CacheNode::batch_put(RequestBytes bytes, std::uint64_t timeout_ms, ReplyDone done) {
  const std::uint64_t started = monotonic_ns();
  requests_put_.add();
  const auto request = std::make_shared<wire::PutRequest>();
  std::vector<NamespaceIndex> namespaces;
  std::vector<DomainIndex> domains;
  if (CallStatus status = decode_write(bytes, *request, namespaces, domains); !status.ok()) {
    return done(std::move(status), {});
  }
  if (leaves_ != nullptr) {
    return write_to_leaves<wire::PutRequest>(std::move(bytes), request, std::move(namespaces),
                                             timeout_ms, std::move(done));
  }
  std::vector<std::vector<WriteStatus>> statuses(request->columns.size());
  std::vector<PutItem> items;
  OwnedWrite owned(leaf_.get(), request->map_version);
  for (std::size_t c = 0; c < request->columns.size(); ++c) {
    const wire::PutColumn& column = request->columns[c];
    const std::size_t count = column.keys.keys.size();
    items.clear();
    owned.choose(namespaces[c], *namespaces_[namespaces[c]], column.keys.keys);
    for (std::size_t i = 0; i < count; ++i) {
      if (!owned.takes(i)) continue;
      PutItem& item = items.emplace_back();
      item.key = column.keys.keys[i];
      item.value = column.values[i];
      item.domain = domains[c];
      if (!column.ttl_ms.empty()) item.ttl_ms = column.ttl_ms[column.ttl_ms.size() == 1 ? 0 : i];
    }
    std::vector<WriteStatus> taken(items.size());
    engine_->put(namespaces[c], items, taken);
    statuses[c] = owned.spread(std::move(taken), count);
  }
  const std::uint64_t map_version = owned.map_version();
  owned.release();
  put_seconds_.record_ns(monotonic_ns() - started);
  done({}, wire::encode_write_reply(statuses, map_version));
}

void CacheNode::batch_delete(RequestBytes bytes, std::uint64_t timeout_ms, ReplyDone done) {
  requests_delete_.add();
  const auto request = std::make_shared<wire::DeleteRequest>();
  std::vector<NamespaceIndex> namespaces;
  std::vector<DomainIndex> ignored;
  if (CallStatus status = decode_write(bytes, *request, namespaces, ignored); !status.ok()) {
    return done(std::move(status), {});
  }
  if (leaves_ != nullptr) {
    return write_to_leaves<wire::DeleteRequest>(std::move(bytes), request, std::move(namespaces),
                                                timeout_ms, std::move(done));
  }
  std::vector<std::vector<WriteStatus>> statuses(request->columns.size());
  std::vector<std::string_view> keys;
  OwnedWrite owned(leaf_.get(), request->map_version);
  for (std::size_t c = 0; c < request->columns.size(); ++c) {
    const std::vector<std::string_view>& all = request->columns[c].keys;
    keys.clear();
    owned.choose(namespaces[c], *namespaces_[namespaces[c]], all);
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (owned.takes(i)) keys.push_back(all[i]);
    }
    std::vector<WriteStatus> taken(keys.size());
    engine_->erase(namespaces[c], keys, taken);
    statuses[c] = owned.spread(std::move(taken), all.size());
  }
  const std::uint64_t map_version = owned.map_version();
  owned.release();
  done({}, wire::encode_write_reply(statuses, map_version));
}

// ---- of a leaf
// -----------------------------------------------------------------------------------

void CacheNode::set_owned(OwnedShards owned) {
  if (leaf_ == nullptr) throw std::invalid_argument("this node is no leaf: it owns all keys");
  leaf_->set(owned);
}

RecentWrites CacheNode::recent_writes(std::uint32_t shard_count,
                                      std::span<const std::uint32_t> shards,
                                      std::uint64_t age_ms) const {
  if (leaf_ == nullptr) throw std::invalid_argument("this node is no leaf: it logs no writes");
  RecentWrites result;
  // First: what was written by an older view is in the log by then, and what is the leaf's own by
  // the view that is looked at later was so meanwhile.
  result.map_version = leaf_->settled_version();
  const std::shared_ptr<const LeafShards::View> view = leaf_->view();
  if (shard_count == 0 || shard_count != view->shard_count()) return result;
  std::vector<bool> wanted(shard_count);
  for (const std::uint32_t shard : shards) {
    // What it did not own it was not told of.
    if (!view->owned_for(shard, age_ms)) return result;
    wanted[shard] = true;
  }
  for (const auto& link : namespaces_) result.columns.push_back({link->name, {}});
  result.complete = leaf_->log.since(age_ms, shard_count, wanted, result.columns);
  std::erase_if(result.columns, [](const auto& column) { return column.keys.empty(); });
  return result;
}

// ---- of a root
// -----------------------------------------------------------------------------------

void CacheNode::set_shard_map(ShardMap map) {
  if (leaves_ == nullptr) throw std::invalid_argument("this node is no root: it has no leaves");
  leaves_->leaves().set(std::move(map));
}

std::uint64_t CacheNode::newest_map_version() const noexcept {
  return leaves_ == nullptr ? 0 : leaves_->leaves().newest();
}

template <class Request>
void CacheNode::write_to_leaves(RequestBytes bytes, std::shared_ptr<const Request> request,
                                std::vector<NamespaceIndex> namespaces, std::uint64_t timeout_ms,
                                ReplyDone done) {
  if (stopped_.load(std::memory_order_relaxed)) {
    return done({CallStatus::Unavailable, "the node is stopping"}, {});
  }
  if (pending_.fetch_add(1, std::memory_order_relaxed) >= config_.max_pending_batches) {
    pending_.fetch_sub(1, std::memory_order_relaxed);
    refused_.add();
    return done({CallStatus::ResourceExhausted,
                 "more than " + std::to_string(config_.max_pending_batches) +
                     " batches wait for the leaves (limits.max_pending_batches)"},
                {});
  }
  const std::uint64_t started = monotonic_ns();
  std::uint64_t fetch_timeout_ms = 0;
  for (const NamespaceIndex ns : namespaces) {
    fetch_timeout_ms = std::max(fetch_timeout_ms, namespaces_[ns]->fetch_timeout_ms);
  }
  const std::uint64_t deadline =
      deadline_ns(started, timeout_ms != 0 ? timeout_ms : fetch_timeout_ms);
  auto written = [this, bytes = std::move(bytes), request, namespaces, started,
                  done = std::move(done)](const std::vector<std::vector<WriteStatus>>& statuses) {
    // After the leaves: what a get read from one of them before the write is dropped, and its
    // token void; what it reads from now on is the new value.
    for (std::size_t c = 0; c < namespaces.size(); ++c) {
      const std::vector<std::string_view>& keys = keys_of(request->columns[c]).keys;
      std::vector<WriteStatus> ignored(keys.size());
      engine_->erase(namespaces[c], keys, ignored);
    }
    pending_.fetch_sub(1, std::memory_order_relaxed);
    put_seconds_.record_ns(monotonic_ns() - started);
    done({}, wire::encode_write_reply(statuses));
  };
  if constexpr (std::is_same_v<Request, wire::PutRequest>) {
    leaves_->put(std::move(request), namespaces, deadline, std::move(written));
  } else {
    leaves_->erase(std::move(request), namespaces, deadline, std::move(written));
  }
}

void CacheNode::ask_leaves(const std::shared_ptr<PendingGet>& get,
                           const std::vector<DomainIndex>& hints,
                           const std::vector<std::vector<Absent>>& absent,
                           std::uint64_t ended_before, std::uint64_t deadline) {
  std::vector<LeafCell> cells;
  bool has_store = false;
  for (std::uint32_t c = 0; c < absent.size(); ++c) {
    has_store = has_store || namespaces_[get->columns[c].ns]->store != nullptr;
    for (const Absent& cell : absent[c]) cells.push_back({c, cell.position, cell.token});
  }
  if (cells.empty()) return;
  LeafUpstream::StoreFallback fallback;
  if (has_store && !get->request.cache_only) {
    fallback = [this, get, hints, ended_before](std::span<const LeafCell> lost) {
      std::vector<std::vector<Absent>> wanted(get->columns.size());
      for (const LeafCell& cell : lost) {
        if (namespaces_[get->columns[cell.column].ns]->store == nullptr) {
          get->answer(cell.column, cell.position, CellStatus::TimedOut, {});
        } else {
          wanted[cell.column].push_back({cell.position, cell.token});
        }
      }
      ask_stores(get, hints, wanted, ended_before);
    };
  }
  leaves_->get(get, cells, deadline, std::move(fallback));
}

// What the leaves said goes into the hot tier.
void CacheNode::install_from_leaves(const PendingGet& get,
                                    std::span<const LeafUpstream::Install> values) {
  for (std::size_t begin = 0; begin < values.size();) {
    const std::uint32_t column = values[begin].cell.column;
    const NamespaceIndex ns = get.columns[column].ns;
    std::vector<PutItem> items;
    std::vector<Token> tokens;
    for (; begin < values.size() && values[begin].cell.column == column; ++begin) {
      const LeafUpstream::Install& value = values[begin];
      if (value.negative && !namespaces_[ns]->negative_cached) continue;
      PutItem item;
      item.key = get.request.columns[column].keys[value.cell.position];
      item.value = value.value;
      item.negative = value.negative;
      items.push_back(item);
      tokens.push_back(value.cell.token);
    }
    std::vector<InstallStatus> statuses(items.size());
    engine_->install(ns, items, tokens, statuses);
  }
}

}  // namespace fc
