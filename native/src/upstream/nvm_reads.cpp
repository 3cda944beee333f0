#include "upstream/nvm_reads.hpp"

#include <algorithm>

#include "core/hash.hpp"
#include "core/sequence_point.hpp"

namespace fc {

void CacheNode::NvmReads::answer(std::span<const NvmAnswer> answers) {
  const PendingGet::NotRead not_read = get_->answer(answers);
  // Their reads are over: nothing but the flight will answer now, so it goes with the live ones.
  for (const NvmAnswer* answer : not_read.asked) {
    const auto found = asked_.find(place_of(answer->cell));
    if (found == asked_.end()) continue;
    node_.namespaces_[answer->cell.ns]->store->raise(found->second, FetchPriority::Live);
  }
  if (!not_read.absent.empty()) {
    std::vector<std::vector<Absent>> absent(get_->columns.size());
    for (const NvmAnswer* answer : not_read.absent) {
      absent[answer->cell.column].push_back({answer->cell.position, answer->cell.token});
    }
    FC_SEQUENCE_POINT("node:nvm_missed");
    node_.ask_stores(get_, hints_, absent, ended_before_);
  }
  FC_SEQUENCE_POINT("node:nvm_answered");
}

void CacheNode::NvmReads::late(std::span<const NvmCell> cells) {
  std::vector<NvmCell> begun = get_->begin_asking(cells);
  std::stable_sort(begun.begin(), begun.end(),
                   [](const NvmCell& a, const NvmCell& b) { return a.ns < b.ns; });
  std::vector<NvmCell> of_one;
  for (std::size_t at = 0; at < begun.size();) {
    const NamespaceIndex ns = begun[at].ns;
    of_one.clear();
    for (; at < begun.size() && begun[at].ns == ns; ++at) of_one.push_back(begun[at]);
    if (node_.namespaces_[ns]->speculation != nullptr) ask(ns, of_one);
    get_->give_up_asking(of_one);
  }
}

void CacheNode::NvmReads::ask(NamespaceIndex ns, std::vector<NvmCell>& cells) {
  const NamespaceLink& link = *node_.namespaces_[ns];
  const auto waiter_of = [&](const NvmCell& cell) {
    return Waiter{get_, cell.column, cell.position};
  };
  const auto hash_of = [&](const NvmCell& cell) { return hash_key(link.seed, cell.key).low; };
  const auto keep = [&](const NvmCell& cell, FlightRef flight) {
    if (flight->priority == FetchPriority::Live) return;
    if (flight->priority > FetchPriority::Speculative) {
      link.store->raise(flight, FetchPriority::Speculative);
    }
    asked_.insert_or_assign(place_of(cell), std::move(flight));
  };
  // A flight that is under way already costs nothing.
  std::erase_if(cells, [&](const NvmCell& cell) {
    FlightRef flight =
        node_.flights_.join_existing(ns, cell.key, hash_of(cell), cell.token, waiter_of(cell));
    if (flight == nullptr) return false;
    keep(cell, std::move(flight));
    return true;
  });
  // What was written since it was looked up: the read will tell, and the store's value would be
  // neither kept nor shared with those who ask from now on.
  std::vector<NvmCell> left;
  std::erase_if(cells, [&](const NvmCell& cell) {
    if (node_.engine_->token_alive(ns, cell.key, cell.token)) return false;
    left.push_back(cell);
    return true;
  });
  const std::size_t granted = link.speculation->budget.take(monotonic_ns(), cells.size());
  link.speculation->denied.add(cells.size() - granted);
  std::vector<FlightRef> started;
  for (std::size_t i = 0; i < granted; ++i) {
    const NvmCell& cell = cells[i];
    const Waiter waiter = waiter_of(cell);
    FlightRef flight;
    if (node_.flights_.join(ns, cell.key, hash_of(cell), cell.token, FetchPriority::Speculative,
                            &waiter, flight) == FlightTable::Joined::Started) {
      flight->domain_hint = hints_[cell.column];
      started.push_back(flight);
    }
    keep(cell, std::move(flight));
  }
  cells.erase(cells.begin(), cells.begin() + static_cast<std::ptrdiff_t>(granted));
  cells.insert(cells.end(), left.begin(), left.end());
  FC_SEQUENCE_POINT("node:speculating");
  // As of an absent key: the flight that ended since the lookup may have been this key's.
  if (node_.flights_.ended() != ended_before_) node_.drop_already_cached(ns, started);
  const std::size_t wanted = started.size();
  link.store->push(started);
  link.speculation->launched.add(wanted - started.size());
  for (const FlightRef& refused : started) {
    node_.end_flight(refused, CellStatus::Throttled, {});
  }
}

}  // namespace fc
