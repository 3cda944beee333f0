// Node, Server, FetchBatch and the counters, as Python sees them.

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "feature_cache/server.hpp"
#include "py_node.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace fc::bindings {
namespace {

// ---- the server
// ----------------------------------------------------------------------------------

class PyServer {
 public:
  PyServer(py::object node, std::vector<std::string> addresses, std::uint64_t max_message_bytes,
           bool reflection, bool misses_until_attached, std::uint32_t max_batch_keys,
           std::uint64_t copy_bytes_per_second, std::uint32_t copies_at_once)
      : owner_(std::move(node)) {
    ServerConfig config;
    config.addresses = std::move(addresses);
    config.max_message_bytes = max_message_bytes;
    config.reflection = reflection;
    config.misses_until_attached = misses_until_attached;
    config.max_batch_keys = max_batch_keys;
    config.copy_bytes_per_second = copy_bytes_per_second;
    config.copies_at_once = copies_at_once;
    Node* const target = owner_.is_none() ? nullptr : &owner_.cast<PyNode&>().node();
    try {
      py::gil_scoped_release release;
      server_ = make_server(target, config);
    } catch (const std::system_error& error) {
      raise_os_error(error);
    }
  }
  ~PyServer() {
    py::gil_scoped_release release;
    server_.reset();
  }
  PyServer(const PyServer&) = delete;
  PyServer& operator=(const PyServer&) = delete;

  std::vector<std::string> addresses() const { return server_->addresses(); }
  void attach(py::object node) {
    if (!owner_.is_none()) throw std::logic_error("the server has a node already");
    Node& target = node.cast<PyNode&>().node();
    owner_ = std::move(node);
    server_->attach(target);
  }
  void set_serving(bool serving) {
    py::gil_scoped_release release;
    server_->set_serving(serving);
  }
  bool drain(double timeout_s) {
    py::gil_scoped_release release;
    return server_->drain(timeout_s);
  }
  void stop() {
    py::gil_scoped_release release;
    server_->stop();
  }

 private:
  py::object owner_;  // the node outlives the server
  std::unique_ptr<DataServer> server_;
};

void bind_views(py::module_& module) {
  py::class_<SampleView>(module, "Sample")
      .def_readonly("name", &SampleView::name)
      .def_readonly("help", &SampleView::help)
      .def_readonly("kind", &SampleView::kind)
      .def_readonly("labels", &SampleView::labels)
      .def_readonly("value", &SampleView::value);
  py::class_<HistogramView>(module, "Histogram")
      .def_readonly("name", &HistogramView::name)
      .def_readonly("help", &HistogramView::help)
      .def_readonly("labels", &HistogramView::labels)
      .def_readonly("bounds", &HistogramView::bounds)
      .def_readonly("counts", &HistogramView::counts)
      .def_readonly("sum", &HistogramView::sum);
  py::class_<HintedValue>(module, "HintedValue")
      .def(py::init([](py::object value, std::string domain, std::uint64_t ttl_ms) {
             if (!value.is_none() && !py::isinstance<py::bytes>(value)) {
               throw py::type_error("HintedValue takes bytes or None");
             }
             return HintedValue{std::move(value), std::move(domain), ttl_ms};
           }),
           "value"_a, py::kw_only(), "domain"_a = "", "ttl_ms"_a = 0)
      .def_readonly("value", &HintedValue::value)
      .def_readonly("domain", &HintedValue::domain)
      .def_readonly("ttl_ms", &HintedValue::ttl_ms);
  py::class_<PyFetchBatch>(module, "FetchBatch")
      .def_property_readonly("groups", &PyFetchBatch::groups)
      .def_property_readonly("keys", &PyFetchBatch::keys)
      .def_property_readonly("timeout_s", &PyFetchBatch::timeout_s)
      .def_property_readonly("priority", &PyFetchBatch::priority)
      .def("complete", &PyFetchBatch::complete, "values"_a)
      .def("fail", &PyFetchBatch::fail, "reason"_a);
}

}  // namespace
}  // namespace fc::bindings

void bind_node(py::module_& module) {
  using namespace fc::bindings;
  bind_views(module);
  py::class_<PyNode>(module, "Node")
      // The progress is the caller's, and kept as long as anything could write to it.
      .def(py::init<const fc::NodeConfig&, fc::RecoveryProgress*>(), "config"_a,
           "progress"_a = py::none(), py::keep_alive<1, 3>())
      .def("batch_get", &PyNode::batch_get, "request"_a, "timeout_s"_a)
      .def("batch_put", &PyNode::batch_put, "request"_a, "timeout_s"_a)
      .def("batch_delete", &PyNode::batch_delete, "request"_a, "timeout_s"_a)
      .def("batch_get_async", &PyNode::batch_get_async, "request"_a, "timeout_s"_a, "done"_a)
      .def("batch_put_async", &PyNode::batch_put_async, "request"_a, "timeout_s"_a, "done"_a)
      .def("batch_delete_async", &PyNode::batch_delete_async, "request"_a, "timeout_s"_a, "done"_a)
      .def("take_fetch", &PyNode::take_fetch, "store"_a, "wait_s"_a)
      .def("resize_domain", &PyNode::resize_domain, "namespace"_a, "domain"_a, "budget_bytes"_a)
      .def("flush_namespace", &PyNode::flush_namespace, "namespace"_a)
      .def("set_shard_map", &PyNode::set_shard_map, "shard_map"_a)
      .def("newest_map_version", &PyNode::newest_map_version)
      .def("set_owned", &PyNode::set_owned, "version"_a, "shard_count"_a, "shards"_a,
           "written_since"_a = Array<std::uint64_t>(0), "readable"_a = Array<std::uint8_t>(0))
      .def("drop_shards", &PyNode::drop_shards, "shard_count"_a, "shards"_a)
      .def("hold_shards", &PyNode::hold_shards, "shard_count"_a, "shards"_a)
      .def("kept_shards", &PyNode::kept_shards)
      .def("recent_writes", &PyNode::recent_writes, "shard_count"_a, "shards"_a, "age_s"_a)
      .def("samples", [](const PyNode& node) { return node.collect().samples; })
      .def("histograms", [](const PyNode& node) { return node.collect().histograms; })
      .def("start_report", &PyNode::start_report)
      .def("stop", &PyNode::stop)
      .def("shutdown", &PyNode::shutdown);
  py::class_<PyServer>(module, "Server")
      .def(py::init<py::object, std::vector<std::string>, std::uint64_t, bool, bool, std::uint32_t,
                    std::uint64_t, std::uint32_t>(),
           "node"_a, "addresses"_a, py::kw_only(), "max_message_bytes"_a = 64 << 20,
           "reflection"_a = true, "misses_until_attached"_a = false, "max_batch_keys"_a = 16384,
           "copy_bytes_per_second"_a = std::uint64_t{256} << 20, "copies_at_once"_a = 2)
      .def_property_readonly("addresses", &PyServer::addresses)
      .def("attach", &PyServer::attach, "node"_a)
      .def("set_serving", &PyServer::set_serving, "serving"_a)
      .def("drain", &PyServer::drain, "timeout_s"_a)
      .def("stop", &PyServer::stop);
  py::module_::import("atexit").attr("register")(py::cpp_function([] {
    py::gil_scoped_release release;
    live_nodes().stop_all();
  }));
}
