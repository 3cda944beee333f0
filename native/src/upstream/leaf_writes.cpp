// The half of a root's upstream that writes: to all replicas of each key's shard.

#include <algorithm>
#include <atomic>

#include "client/request.hpp"
#include "core/clock.hpp"
#include "core/hash.hpp"
#include "upstream/leaf_upstream.hpp"

namespace fc {
namespace {

constexpr std::uint64_t kMapPollNs = 5'000'000;
constexpr std::uint64_t kMapWaitMostNs = 1'000'000'000;
constexpr std::uint64_t kLeastNs = 200'000;  // less is not worth a sub-request
constexpr int kRounds = 4;                   // by as many maps

}  // namespace

class LeafUpstream::Write final : public Timed, public std::enable_shared_from_this<Write> {
 public:
  // One of `put` and `erase` is given.
  Write(LeafUpstream& upstream, std::shared_ptr<const wire::PutRequest> put,
        std::shared_ptr<const wire::DeleteRequest> erase, std::uint64_t deadline_ns, WriteDone done)
      : upstream_(upstream),
        put_(std::move(put)),
        erase_(std::move(erase)),
        deadline_ns_(deadline_ns),
        done_(std::move(done)) {}

  void start(const std::vector<NamespaceIndex>& namespaces) {
    for (std::uint32_t c = 0; c < namespaces.size(); ++c) {
      const std::uint64_t seed = upstream_.seeds_[namespaces[c]];
      const std::vector<std::string_view>& keys = keys_of(c).keys;
      for (std::uint32_t i = 0; i < keys.size(); ++i) {
        cells_.push_back({c, i, hash_key(seed, keys[i]).high});
      }
    }
    columns_ = namespaces.size();
    std::vector<std::uint32_t> all(cells_.size());
    for (std::uint32_t i = 0; i < all.size(); ++i) all[i] = i;
    send(all);
  }

  // Looks whether the newer map is there.
  void due() override {
    const std::uint64_t now = monotonic_ns();
    const bool there = upstream_.leaves_.map()->map.version > version_;
    if (!there && now < wait_until_ns_) {
      upstream_.timers_.add(now + kMapPollNs, weak_from_this());
      return;
    }
    const std::shared_ptr<Write> self = shared_from_this();
    if (!upstream_.let_go(self)) return;
    if (!there) return finish();
    upstream_.writes_again_.add();
    send(std::exchange(again_, {}));
  }

  void finish() {
    std::vector<std::vector<WriteStatus>> statuses(columns_);
    for (const Cell& cell : cells_) statuses[cell.column].push_back(status_of(cell));
    const WriteDone done = std::move(done_);
    done(std::move(statuses));
  }

 private:
  struct Cell {
    std::uint32_t column = 0;
    std::uint32_t position = 0;
    std::uint64_t high = 0;  // of the key's hash
    std::uint32_t replicas = 0;
    std::uint32_t stored = 0;
    std::uint32_t rejected = 0;
  };
  struct Call {
    std::vector<std::uint32_t> cells;  // rising
  };

  const wire::KeyColumn& keys_of(std::uint32_t column) const {
    return put_ != nullptr ? put_->columns[column].keys : erase_->columns[column];
  }
  static WriteStatus status_of(const Cell& cell) noexcept {
    if (cell.replicas != 0 && cell.stored == cell.replicas) return WriteStatus::Stored;
    if (cell.stored != 0) return WriteStatus::Partial;
    // Where one did not answer, an older value may be left.
    return cell.replicas != 0 && cell.rejected == cell.replicas ? WriteStatus::Rejected
                                                                : WriteStatus::Error;
  }

  void send(const std::vector<std::uint32_t>& cells) {
    const std::shared_ptr<const RoutedMap> routed = upstream_.leaves_.map();
    const ShardMap& map = routed->map;
    version_ = map.version;
    ++rounds_;
    std::vector<std::shared_ptr<Call>> calls(routed->leaves.size());
    std::size_t count = 0;
    for (const std::uint32_t i : cells) {
      Cell& cell = cells_[i];
      cell.replicas = cell.stored = cell.rejected = 0;
      if (map.shard_count() == 0) continue;
      const std::uint32_t shard = shard_of(cell.high, map.shard_count());
      for (std::uint32_t r = map.first[shard]; r < map.first[shard + 1]; ++r) {
        std::shared_ptr<Call>& call = calls[map.replicas[r].leaf];
        if (call == nullptr) {
          call = std::make_shared<Call>();
          ++count;
        }
        call->cells.push_back(i);
        ++cell.replicas;
      }
    }
    const std::uint64_t now = monotonic_ns();
    if (count == 0 || now + kLeastNs >= deadline_ns_) return finish();
    left_ = count;
    for (std::size_t l = 0; l < calls.size(); ++l) {
      if (calls[l] == nullptr) continue;
      Leaf& leaf = *routed->leaves[l];
      leaf.asked(calls[l]->cells.size());
      const auto done = [self = shared_from_this(), call = calls[l], of = routed->leaves[l]](
                            const CallStatus& status, const WriteReply& reply) {
        self->ended(*call, *of, status, reply);
      };
      if (put_ != nullptr) {
        leaf.link().put(encode_put(*calls[l]), deadline_ns_ - now, done);
      } else {
        leaf.link().erase(encode_erase(*calls[l]), deadline_ns_ - now, done);
      }
    }
  }

  // Calls `add` for each column of the sub-request, with the places of its keys.
  template <class Add>
  void for_each_column(const Call& call, Add&& add) const {
    std::vector<std::uint32_t> positions;
    for (std::size_t begin = 0; begin < call.cells.size();) {
      const std::uint32_t column = cells_[call.cells[begin]].column;
      positions.clear();
      for (; begin < call.cells.size() && cells_[call.cells[begin]].column == column; ++begin) {
        positions.push_back(cells_[call.cells[begin]].position);
      }
      add(column, positions);
    }
  }
  client::KeyColumn keys_for(std::uint32_t column,
                             const std::vector<std::uint32_t>& positions) const {
    const wire::KeyColumn& from = keys_of(column);
    client::KeyColumn to{.name_space = from.ns, .domain = from.domain, .ids = {}, .keys = {}};
    for (const std::uint32_t position : positions) to.keys.parts.push_back(from.keys[position]);
    return to;
  }
  Buffer encode_put(const Call& call) const {
    client::PutRequest request;
    request.map_version = version_;
    for_each_column(call, [&](std::uint32_t column, const std::vector<std::uint32_t>& positions) {
      const wire::PutColumn& from = put_->columns[column];
      client::PutColumn to;
      to.keys = keys_for(column, positions);
      for (const std::uint32_t position : positions) {
        to.values.parts.push_back(from.values[position]);
        if (from.ttl_ms.size() > 1) to.ttl_ms.push_back(from.ttl_ms[position]);
      }
      if (from.ttl_ms.size() == 1) to.ttl_ms = from.ttl_ms;
      request.columns.push_back(std::move(to));
    });
    return client::encode(request);
  }
  Buffer encode_erase(const Call& call) const {
    client::DeleteRequest request;
    request.map_version = version_;
    for_each_column(call, [&](std::uint32_t column, const std::vector<std::uint32_t>& positions) {
      request.columns.push_back(keys_for(column, positions));
    });
    return client::encode(request);
  }

  void ended(const Call& call, Leaf& leaf, const CallStatus& status, const WriteReply& reply) {
    const bool whole = status.ok() && has_shape(reply, call);
    leaf.answered(call.cells.size(), monotonic_ns(), !whole);
    upstream_.leaves_.told(reply.map_version());
    {
      const std::lock_guard lock(mutex_);
      newest_ = std::max(newest_, reply.map_version());
      if (whole) {
        std::size_t at = 0;
        std::size_t column = 0;
        for (const std::uint32_t i : call.cells) {
          while (at == reply.statuses(column).size()) {
            at = 0;
            ++column;
          }
          const auto said = static_cast<WriteStatus>(reply.statuses(column)[at++]);
          if (said == WriteStatus::Stored) ++cells_[i].stored;
          if (said == WriteStatus::Rejected) ++cells_[i].rejected;
        }
      }
      if (--left_ != 0) return;
    }
    settle();
  }

  bool has_shape(const WriteReply& reply, const Call& call) const {
    std::size_t column = 0;
    bool same = true;
    for_each_column(call, [&](std::uint32_t, const std::vector<std::uint32_t>& positions) {
      same = same && column < reply.columns() && reply.statuses(column).size() == positions.size();
      ++column;
    });
    return same && column == reply.columns();
  }

  // All leaves have answered: only this thread touches the cells.
  void settle() {
    again_.clear();
    if (newest_ > version_ && rounds_ < kRounds) {
      for (std::uint32_t i = 0; i < cells_.size(); ++i) {
        if (cells_[i].stored + cells_[i].rejected < cells_[i].replicas) again_.push_back(i);
      }
    }
    const std::uint64_t now = monotonic_ns();
    wait_until_ns_ =
        std::min(deadline_ns_ - std::min(deadline_ns_, 2 * kMapPollNs), now + kMapWaitMostNs);
    if (again_.empty() || now >= wait_until_ns_ || !upstream_.keep(shared_from_this())) {
      return finish();
    }
    upstream_.timers_.add(now, weak_from_this());
  }

  LeafUpstream& upstream_;
  const std::shared_ptr<const wire::PutRequest> put_;
  const std::shared_ptr<const wire::DeleteRequest> erase_;
  const std::uint64_t deadline_ns_;
  WriteDone done_;
  std::size_t columns_ = 0;
  // What follows belongs to the thread that starts a round; then, until the round's last call has
  // ended, to who holds mutex_.
  std::mutex mutex_;
  std::vector<Cell> cells_;
  std::vector<std::uint32_t> again_;
  std::uint64_t version_ = 0;  // of the map of this round
  std::uint64_t newest_ = 0;   // that a leaf told of
  std::uint64_t wait_until_ns_ = 0;
  std::size_t left_ = 0;
  int rounds_ = 0;
};

LeafUpstream::~LeafUpstream() {
  stop();
}

void LeafUpstream::put(std::shared_ptr<const wire::PutRequest> request,
                       const std::vector<NamespaceIndex>& namespaces, std::uint64_t deadline_ns,
                       WriteDone done) {
  std::make_shared<Write>(*this, std::move(request), nullptr, deadline_ns, std::move(done))
      ->start(namespaces);
}

void LeafUpstream::erase(std::shared_ptr<const wire::DeleteRequest> request,
                         const std::vector<NamespaceIndex>& namespaces, std::uint64_t deadline_ns,
                         WriteDone done) {
  std::make_shared<Write>(*this, nullptr, std::move(request), deadline_ns, std::move(done))
      ->start(namespaces);
}

bool LeafUpstream::keep(const std::shared_ptr<Write>& write) {
  const std::lock_guard lock(waiting_mutex_);
  if (stopped_) return false;
  waiting_.insert(write);
  return true;
}

bool LeafUpstream::let_go(const std::shared_ptr<Write>& write) {
  const std::lock_guard lock(waiting_mutex_);
  return waiting_.erase(write) != 0;
}

void LeafUpstream::stop() {
  leaves_.close();
  std::unordered_set<std::shared_ptr<Write>> waiting;
  {
    const std::lock_guard lock(waiting_mutex_);
    stopped_ = true;
    waiting.swap(waiting_);
  }
  for (const std::shared_ptr<Write>& write : waiting) write->finish();
}

}  // namespace fc
