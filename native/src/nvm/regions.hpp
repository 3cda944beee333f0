// The regions of all devices: where each lies and what it is good for now.
//
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/check.hpp"
#include "index/entry.hpp"
#include "nvm/device.hpp"
#include "nvm/format.hpp"
#include "nvm/health.hpp"
#include "nvm/region.hpp"

namespace fc::nvm {

// One device and its part of the regions.
struct DevicePart {
  DevicePart(std::shared_ptr<NvmDevice> of, std::uint32_t errors_max)
      : device(std::move(of)), health(errors_max) {}
  const std::shared_ptr<NvmDevice> device;
  DeviceHealth health;
  std::uint32_t first_region = 0;
  std::uint32_t regions = 0;
};

class Regions {
 public:
  Regions(const std::vector<std::shared_ptr<NvmDevice>>& devices, std::uint32_t region_bytes,
          std::uint32_t errors_max)
      : region_bytes_(region_bytes) {
    for (const auto& device : devices) {
      auto part = std::make_unique<DevicePart>(device, errors_max);
      part->first_region = count_;
      if (device->bytes() > layout::kNvmDataOffset) {
        part->regions =
            static_cast<std::uint32_t>((device->bytes() - layout::kNvmDataOffset) / region_bytes);
      }
      count_ += part->regions;
      devices_.push_back(std::move(part));
    }
  }

  // Where the rows are; before anything else is asked of them.
  void use(Region* table) noexcept { table_ = table; }

  std::uint32_t count() const noexcept { return count_; }
  std::uint32_t region_bytes() const noexcept { return region_bytes_; }
  Region& at(std::uint32_t region) noexcept {
    FC_DCHECK(region < count_);
    return table_[region];
  }
  const Region& at(std::uint32_t region) const noexcept { return table_[region]; }
  const std::vector<std::unique_ptr<DevicePart>>& devices() const noexcept { return devices_; }
  std::size_t device_of(std::uint32_t region) const noexcept {
    std::size_t device = devices_.size() - 1;
    while (device > 0 && devices_[device]->first_region > region) --device;
    return device;
  }
  // Where a region begins on its device.
  std::uint64_t offset_of(std::uint32_t region) const noexcept {
    return layout::kNvmDataOffset +
           std::uint64_t{region - devices_[device_of(region)]->first_region} * region_bytes_;
  }

  // Locations count kNvmRecordAlignment over all regions.
  std::uint64_t location(std::uint32_t region, std::uint32_t offset) const noexcept {
    return (std::uint64_t{region} * region_bytes_ + offset) / layout::kNvmRecordAlignment;
  }
  std::uint32_t region_of(Entry entry) const noexcept {
    return static_cast<std::uint32_t>(entry.nvm_location() * layout::kNvmRecordAlignment /
                                      region_bytes_);
  }
  std::uint32_t offset_in_region(Entry entry) const noexcept {
    return static_cast<std::uint32_t>(entry.nvm_location() * layout::kNvmRecordAlignment &
                                      (region_bytes_ - 1));
  }

 private:
  const std::uint32_t region_bytes_;
  std::uint32_t count_ = 0;
  std::vector<std::unique_ptr<DevicePart>> devices_;  // fixed after construction
  Region* table_ = nullptr;
};

}  // namespace fc::nvm
