// Peer copy, as Python sees it.

#include "bindings.hpp"
#include "feature_cache/peer_copy.hpp"
#include "py_node.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace fc::bindings {
namespace {

class PyPeerCopy {
 public:
  PyPeerCopy(py::object node, std::string address,
             const std::vector<std::pair<std::string, std::string>>& domains,
             std::uint32_t shard_count, const std::optional<Array<std::uint32_t>>& shards,
             std::uint64_t map_version, std::uint64_t bytes_per_second, std::uint64_t cursor)
      : owner_(std::move(node)), node_(owner_.cast<PyNode&>()) {
    PeerCopyConfig config;
    config.address = std::move(address);
    for (const auto& [ns, domain] : domains) config.wanted.domains.push_back({ns, domain});
    config.wanted.shard_count = shard_count;
    if (shards) config.wanted.shards = to_vector(*shards);
    config.wanted.map_version = map_version;
    config.bytes_per_second = bytes_per_second;
    config.cursor = cursor;
    py::gil_scoped_release release;
    copy_ = node_.inside(
        [&](Node& target) { return make_peer_copy(target.engine(), std::move(config)); });
  }
  ~PyPeerCopy() {
    py::gil_scoped_release release;
    copy_->stop();
    copy_.reset();
  }
  PyPeerCopy(const PyPeerCopy&) = delete;
  PyPeerCopy& operator=(const PyPeerCopy&) = delete;

  bool run(double seconds) {
    bool done = false;
    CallStatus status;
    {
      py::gil_scoped_release release;
      const std::lock_guard lock(running_);
      status = node_.inside([&](Node&) { return copy_->run(seconds, done); });
    }
    if (!status.ok()) raise_rpc_error(status.code, status.message);
    return done;
  }
  void stop() {
    py::gil_scoped_release release;
    copy_->stop();
  }
  PeerCopyCounts counts() const { return copy_->counts(); }

 private:
  const py::object owner_;
  PyNode& node_;
  std::mutex running_;
  std::unique_ptr<PeerCopy> copy_;
};

std::vector<ItemTotals> describe(const std::string& address, double timeout_s) {
  std::vector<ItemTotals> totals;
  CallStatus status;
  {
    py::gil_scoped_release release;
    status = describe_peer(address, timeout_s, totals);
  }
  if (!status.ok()) raise_rpc_error(status.code, status.message);
  return totals;
}

double to_seconds(std::uint64_t ms) {
  return static_cast<double>(ms) * 1e-3;
}

}  // namespace
}  // namespace fc::bindings

void bind_copy(py::module_& module) {
  using namespace fc::bindings;
  using fc::ItemTotals;
  py::class_<ItemTotals>(module, "PeerDomain")
      .def_readonly("namespace", &ItemTotals::ns)
      .def_readonly("domain", &ItemTotals::domain)
      .def_readonly("items", &ItemTotals::items)
      .def_readonly("bytes", &ItemTotals::bytes)
      .def_property_readonly("ttl_s", [](const ItemTotals& t) { return to_seconds(t.ttl_ms); })
      .def_property_readonly("mean_ttl_left_s",
                             [](const ItemTotals& t) { return to_seconds(t.mean_ttl_left_ms); });
  module.def("describe_peer", &describe, "address"_a, "timeout_s"_a);
  py::class_<PyPeerCopy>(module, "PeerCopy")
      .def(
          py::init<py::object, std::string, const std::vector<std::pair<std::string, std::string>>&,
                   std::uint32_t, const std::optional<Array<std::uint32_t>>&, std::uint64_t,
                   std::uint64_t, std::uint64_t>(),
          "node"_a, "address"_a, "domains"_a, py::kw_only(), "shard_count"_a = 0,
          "shards"_a = py::none(), "map_version"_a = 0, "bytes_per_second"_a = 0, "cursor"_a = 0)
      .def("run", &PyPeerCopy::run, "seconds"_a)
      .def("stop", &PyPeerCopy::stop)
      .def_property_readonly("cursor", [](const PyPeerCopy& c) { return c.counts().cursor; })
      .def_property_readonly("items", [](const PyPeerCopy& c) { return c.counts().items; })
      .def_property_readonly("bytes", [](const PyPeerCopy& c) { return c.counts().bytes; })
      .def_property_readonly("installed", [](const PyPeerCopy& c) { return c.counts().installed; })
      .def_property_readonly("void",
                             [](const PyPeerCopy& c) { return c.counts().not_installed_void; })
      .def_property_readonly("rejected", [](const PyPeerCopy& c) { return c.counts().rejected; });
}
