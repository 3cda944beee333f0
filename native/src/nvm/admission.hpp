// Which evicted items are worth a write.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "core/layout.hpp"
#include "eviction/ghost.hpp"
#include "eviction/sketch.hpp"
#include "feature_cache/config.hpp"

namespace fc::nvm {

// A namespace's admission policy. Its owner guards it by a lock.
class Admission {
 public:
  // `items`: how many the namespace may have on NVM.
  Admission(const NvmShareConfig& config, std::uint64_t items)
      : kind_(config.admission), least_(config.admission_frequency) {
    if (kind_ == AdmissionKind::Frequency) {
      sketch_ = std::make_unique<FrequencySketch>(items / layout::kNvmItemsPerSketchItem);
    } else if (kind_ == AdmissionKind::RejectFirst) {
      ghosts_ = std::make_unique<GhostSet>(items / layout::kNvmItemsPerGhost);
    }
  }

  // `hits`: what the item collected in DRAM since it was last judged; its arrival is one more.
  bool admits(std::uint64_t hash, unsigned hits) {
    switch (kind_) {
      case AdmissionKind::All:
        return true;
      case AdmissionKind::Frequency:
        sketch_->add(hash, hits + 1);
        return sketch_->estimate(hash) >= least_;
      case AdmissionKind::RejectFirst:
        if (ghosts_->take(hash)) return true;
        ghosts_->insert(hash);
        return false;
    }
    return true;
  }
  std::size_t memory_bytes() const noexcept {
    return (sketch_ ? sketch_->memory_bytes() : 0) + (ghosts_ ? ghosts_->memory_bytes() : 0);
  }

 private:
  const AdmissionKind kind_;
  const std::uint32_t least_;
  std::unique_ptr<FrequencySketch> sketch_;
  std::unique_ptr<GhostSet> ghosts_;
};

// A budget of bytes a second that saves up at most a quarter of a second's worth. Its owner guards
// it by a lock.
class WriteBudget {
 public:
  explicit WriteBudget(std::uint64_t bytes_per_second)
      : rate_(static_cast<double>(bytes_per_second)), tokens_(rate_ / 4) {}

  bool limited() const noexcept { return rate_ != 0; }
  bool take(std::size_t bytes, std::uint64_t now_ns) noexcept {
    if (rate_ == 0) return true;
    if (now_ns > filled_ns_) {
      const double gained = rate_ * static_cast<double>(now_ns - filled_ns_) * 1e-9;
      // Never less than one large record, or it could never be written.
      const double most = std::max(rate_ / 4, static_cast<double>(layout::kMaxNvmRecordBytes));
      tokens_ = filled_ns_ == 0 ? tokens_ : std::min(most, tokens_ + gained);
      filled_ns_ = now_ns;
    }
    if (tokens_ < static_cast<double>(bytes)) return false;
    tokens_ -= static_cast<double>(bytes);
    return true;
  }

 private:
  const double rate_;
  double tokens_;
  std::uint64_t filled_ns_ = 0;
};

}  // namespace fc::nvm
