#include "engine/nvm_read.hpp"

#include <algorithm>

namespace fc {
namespace {

constexpr std::size_t kTriesMost = 8;  // entries of one key's tag; more are not looked for

}  // namespace

void NvmRead::done(std::span<const nvm::ReadResult> results) {
  std::vector<NvmCell> retries;
  {
    const std::lock_guard lock(mutex_);
    std::vector<NvmAnswer> answers;
    answers.reserve(results.size());
    const Tick now = dram_.ticks().now();
    std::uint64_t hits = 0;
    NamespaceIndex hits_of = kNoNamespace;
    const auto count_hits = [&] {
      if (hits == 0) return;
      tier_.ns(hits_of).hits.add(hits);
      dram_.count_later(hits_of, hits, 0);
      hits = 0;
    };
    for (const nvm::ReadResult& result : results) {
      if (result.outcome == nvm::ReadOutcome::Hit && !result.record.header.expired(now) &&
          !dram_.is_hidden_below(result.cell.ns, result.cell.key, result.cell.entry)) [[likely]] {
        if (hits_of != result.cell.ns) {
          count_hits();
          hits_of = result.cell.ns;
        }
        ++hits;
        answers.push_back({result.cell,
                           CellStatus::HitNvm,
                           {result.record.value, result.record.header.value_bytes()}});
        continue;
      }
      look_again_locked(result, answers, retries);
    }
    count_hits();
    if (!answers.empty()) reader_->answer(answers);
    found_.clear();
  }
  for (const nvm::ReadResult& result : results) {
    if (result.outcome == nvm::ReadOutcome::Hit) promote_(result);
  }
  // Outside of the lock: what is refused is told at once, by this same thread.
  if (!retries.empty()) tier_.read(std::move(retries), shared_from_this());
}

void NvmRead::look_again_locked(const nvm::ReadResult& result, std::vector<NvmAnswer>& answers,
                                std::vector<NvmCell>& retries) {
  const NvmCell& cell = result.cell;
  nvm::LogNamespace& ns = tier_.ns(cell.ns);
  switch (result.outcome) {
    case nvm::ReadOutcome::Hit:  // expired, or its key has moved since
      (result.record.header.expired(dram_.ticks().now()) ? ns.expired : ns.hidden).add();
      dram_.drop_below(cell.hash, cell.entry);
      break;
    case nvm::ReadOutcome::OtherKey:
      break;
    case nvm::ReadOutcome::Damaged:
      ns.lost_damaged.add();
      dram_.drop_below(cell.hash, cell.entry);
      break;
    case nvm::ReadOutcome::DeviceError:
      ns.lost_device.add();
      break;
    case nvm::ReadOutcome::OutOfService:
      ns.lost_out_of_service.add();
      break;
    case nvm::ReadOutcome::Refused:
      answers.push_back({cell, CellStatus::Throttled, {}});
      return;
    case nvm::ReadOutcome::Abandoned:
      answers.push_back({cell, CellStatus::Miss, {}});
      return;
  }
  auto tried = std::find_if(tried_.begin(), tried_.end(), [&](const Tried& seen) {
    return seen.column == cell.column && seen.position == cell.position;
  });
  if (tried == tried_.end()) {
    tried_.push_back({cell.column, cell.position, {}});
    tried = tried_.end() - 1;
  }
  tried->entries.push_back(cell.entry);
  CellStatus status = CellStatus::Unspecified;
  std::uint32_t length = 0;
  auto value = std::make_unique<Buffer>();
  std::vector<Absent> absent;
  std::vector<NvmCell> below;
  GetColumn again;
  again.ns = cell.ns;
  again.keys = {&cell.key, 1};
  again.statuses = {&status, 1};
  again.lengths = {&length, 1};
  again.values = value.get();
  again.absent = &absent;
  again.nvm = tried->entries.size() < kTriesMost ? &below : nullptr;
  dram_.get(again, tried->entries);
  if (!below.empty()) {
    NvmCell retry = below.front();
    retry.column = cell.column;
    retry.position = cell.position;
    retries.push_back(retry);
    return;
  }
  NvmAnswer answer{cell, status, {}};
  if (!absent.empty()) answer.cell.token = absent.front().token;
  if (status == CellStatus::HitNvm) ns.hits.add();
  if (carries_value(status)) {
    answer.value = {value->data(), length};
    found_.push_back(std::move(value));
  }
  answers.push_back(answer);
}

}  // namespace fc
