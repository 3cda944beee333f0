// ShardMap and shard_of, as Python sees them.

#include "cluster_bindings.hpp"

#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>

#include "bindings.hpp"
#include "feature_cache/engine.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace fc::bindings {
namespace {

using LeafTuple = std::tuple<std::string, std::string, std::string>;  // name, address, zone

ShardMap make_map(std::uint64_t version, std::vector<LeafTuple> leaves,
                  const Array<std::uint32_t>& first, const Array<std::uint32_t>& leaf,
                  const Array<std::uint8_t>& state) {
  if (leaf.ndim() != 1 || state.ndim() != 1 || leaf.size() != state.size()) {
    throw py::value_error("shard map: `leaf` and `state` must have one number a replica");
  }
  ShardMap map;
  map.version = version;
  for (auto& [name, address, zone] : leaves) {
    map.leaves.push_back({std::move(name), std::move(address), std::move(zone)});
  }
  map.first = to_vector(first);
  map.replicas.resize(static_cast<std::size_t>(leaf.size()));
  for (std::size_t i = 0; i < map.replicas.size(); ++i) {
    map.replicas[i] = {leaf.data()[i], static_cast<ReplicaState>(state.data()[i])};
  }
  map.validate();
  return map;
}

}  // namespace

py::list columns_of(const RecentWrites& writes) {
  py::list columns;
  for (const RecentWrites::Column& column : writes.columns) {
    py::list keys(column.keys.size());
    for (std::size_t i = 0; i < column.keys.size(); ++i) {
      keys[i] = py::bytes(column.keys[i].data(), column.keys[i].size());
    }
    columns.append(py::make_tuple(column.ns, keys));
  }
  return columns;
}

}  // namespace fc::bindings

void bind_cluster(py::module_& module) {
  using namespace fc::bindings;
  py::class_<fc::ShardMap>(module, "ShardMap")
      .def(py::init(&make_map), "version"_a, "leaves"_a, "first"_a, "leaf"_a, "state"_a)
      .def_readonly("version", &fc::ShardMap::version)
      .def_property_readonly("shard_count", &fc::ShardMap::shard_count);
  py::class_<fc::KeptShards>(module, "KeptShards")
      .def_readonly("shard_count", &fc::KeptShards::shard_count)
      .def_readonly("shards", &fc::KeptShards::shards)
      .def_readonly("away_ms", &fc::KeptShards::away_ms);
  module.def(
      "shard_of",
      [](const std::string& ns, const py::bytes& key, std::uint32_t shard_count) {
        if (shard_count == 0) throw py::value_error("a cluster has at least one shard");
        return fc::shard_of(ns, std::string_view(key), shard_count);
      },
      "namespace"_a, "key"_a, "shard_count"_a);
}
