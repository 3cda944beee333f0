// The half of the node that warm-ups use: keys that nobody waits for, fetched by the way of a miss.

#include <algorithm>
#include <cassert>

#include "core/hash.hpp"
#include "core/sequence_point.hpp"
#include "upstream/cache_node.hpp"

namespace fc {
namespace {

constexpr std::size_t kHeldBatchKeys = 1024;

bool known(CellStatus status) noexcept {
  return status == CellStatus::HitDram || status == CellStatus::NotFound;
}

// The keys as columns of one namespace and domain each, and where each of them came from.
struct Columns {
  explicit Columns(std::span<const WarmKey> keys) {
    for (std::uint32_t i = 0; i < keys.size(); ++i) {
      Column& column = column_of(keys[i]);
      column.keys.push_back(keys[i].key);
      column.asked.push_back(keys[i].asked);
      column.from.push_back(i);
    }
  }
  struct Column {
    NamespaceIndex ns;
    DomainIndex domain;
    std::vector<std::string_view> keys;
    std::vector<std::uint8_t> asked;
    std::vector<std::uint32_t> from;
  };
  std::vector<Column> all;  // few: a config has few domains, and a plan goes through them in turn

 private:
  Column& column_of(const WarmKey& key) {
    // The last one first: keys of one domain come together.
    const auto found = std::find_if(all.rbegin(), all.rend(), [&](const Column& column) {
      return column.ns == key.ns && column.domain == key.domain;
    });
    return found != all.rend() ? *found : all.emplace_back(Column{key.ns, key.domain, {}, {}, {}});
  }
};

}  // namespace

// Looks keys up for a warm-up: what may lie on NVM is given back unread, and taken as known.
void CacheNode::look_up_quietly(GetColumn& lookup, std::vector<NvmCell>& on_nvm) {
  Buffer values;  // nobody wants them
  on_nvm.clear();
  lookup.values = &values;
  lookup.max_value_bytes = config_.max_reply_bytes;
  lookup.quiet = true;
  lookup.nvm = &on_nvm;
  engine_->get(lookup);
  engine_->release(on_nvm);
  for (const NvmCell& cell : on_nvm) lookup.statuses[cell.position] = CellStatus::HitNvm;
  for (CellStatus& status : lookup.statuses) {
    // What did not fit into `values` is there all the same.
    if (status == CellStatus::Throttled) status = CellStatus::HitDram;
  }
  lookup.values = nullptr;
}

void CacheNode::warm(std::vector<WarmKey> keys, std::shared_ptr<const void> owner,
                     std::uint64_t timeout_ms, WarmDone done) {
  assert(timeout_ms != 0);
  const std::uint64_t started = monotonic_ns();
  const auto columns = std::make_shared<const Columns>(keys);
  const std::size_t count = keys.size();
  const auto get = std::make_shared<PendingGet>(
      std::move(owner), [this, columns, count, done = std::move(done)](const PendingGet& ended) {
        if (ended.counted_pending) leave_pending(ended);
        std::vector<CellStatus> statuses(count);
        for (std::size_t c = 0; c < columns->all.size(); ++c) {
          const Columns::Column& column = columns->all[c];
          NamespaceLink& link = *namespaces_[column.ns];
          for (std::size_t i = 0; i < column.from.size(); ++i) {
            const CellStatus status = ended.columns[c].statuses[i];
            statuses[column.from[i]] = status;
            link.warmed[static_cast<std::size_t>(status)].add();
          }
        }
        done(statuses);
      });
  get->started_ns = started;
  get->columns.resize(columns->all.size());
  get->request.columns.resize(columns->all.size());
  std::vector<DomainIndex> hints;
  std::vector<std::vector<Absent>> absent(columns->all.size());
  const std::uint64_t ended_before = flights_.ended();
  const std::shared_ptr<const LeafShards::View> owned = leaf_ != nullptr ? leaf_->view() : nullptr;
  std::vector<NvmCell> on_nvm;
  std::size_t waiting = 0;
  for (std::size_t c = 0; c < columns->all.size(); ++c) {
    const Columns::Column& column = columns->all[c];
    hints.push_back(column.domain);
    PendingGet::Column& to = get->columns[c];
    get->request.columns[c].keys = column.keys;
    to.ns = column.ns;
    to.asked = column.asked;
    to.statuses.assign(column.keys.size(), CellStatus::Miss);
    to.lengths.assign(column.keys.size(), 0);
    const NamespaceLink& link = *namespaces_[column.ns];
    to.fetchable = link.store != nullptr && leaves_ == nullptr;
    GetColumn lookup;
    lookup.ns = column.ns;
    lookup.keys = get->request.columns[c].keys;
    lookup.statuses = to.statuses;
    lookup.lengths = to.lengths;
    lookup.absent = to.fetchable ? &absent[c] : nullptr;
    look_up_quietly(lookup, on_nvm);
    if (owned != nullptr) {
      for (std::size_t i = 0; i < column.keys.size(); ++i) {
        if (owned->reads(hash_key(link.seed, column.keys[i]).high)) continue;
        to.statuses[i] = CellStatus::WrongShard;
      }
      std::erase_if(absent[c], [&](const Absent& cell) {
        return to.statuses[cell.position] == CellStatus::WrongShard;
      });
    }
    waiting += absent[c].size();
  }
  FC_SEQUENCE_POINT("node:warm_looked_up");
  if (waiting != 0 && enter_pending(get).ok()) {
    for (std::size_t c = 0; c < absent.size(); ++c) {
      for (const Absent& cell : absent[c]) {
        get->columns[c].statuses[cell.position] = CellStatus::Unspecified;
      }
    }
    ask_stores(get, hints, absent, ended_before, FetchPriority::Replay);
    deadlines_->add(deadline_ns(started, timeout_ms), get);
  } else if (waiting != 0) {  // too many wait, or the node stops
    for (std::size_t c = 0; c < absent.size(); ++c) {
      for (const Absent& cell : absent[c]) {
        get->columns[c].statuses[cell.position] = CellStatus::Throttled;
      }
    }
    waiting = 0;
  }
  get->start(waiting);
}

void CacheNode::held(std::span<const WarmKey> keys, std::span<std::uint8_t> held) {
  assert(held.size() == keys.size());
  std::vector<CellStatus> statuses;
  std::vector<std::uint32_t> lengths;
  std::vector<NvmCell> on_nvm;
  for (std::size_t begin = 0; begin < keys.size(); begin += kHeldBatchKeys) {
    const Columns columns(keys.subspan(begin, std::min(kHeldBatchKeys, keys.size() - begin)));
    for (const Columns::Column& column : columns.all) {
      statuses.assign(column.keys.size(), CellStatus::Unspecified);
      lengths.assign(column.keys.size(), 0);
      GetColumn lookup;
      lookup.ns = column.ns;
      lookup.keys = column.keys;
      lookup.statuses = statuses;
      lookup.lengths = lengths;
      look_up_quietly(lookup, on_nvm);
      for (std::size_t i = 0; i < statuses.size(); ++i) {
        held[begin + column.from[i]] = known(statuses[i]) || statuses[i] == CellStatus::HitNvm;
      }
    }
  }
}

}  // namespace fc
