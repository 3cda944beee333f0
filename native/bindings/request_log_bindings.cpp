// The request log and the plan of a warm-up, as Python sees them.

#include "bindings.hpp"
#include "core/clock.hpp"
#include "feature_cache/request_log.hpp"
#include "feature_cache/warm_plan.hpp"
#include "py_node.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace fc::bindings {
namespace {

py::object& log_error() {
  static auto* const type = new py::object();  // lives as long as the module
  return *type;
}

void raise_unless_none(LogFault fault) {
  if (fault == LogFault::None) return;
  py::object error = log_error()(describe(fault));
  error.attr("reason") = fault_name(fault);
  PyErr_SetObject(log_error().ptr(), error.ptr());
  throw py::error_already_set();
}

// The bytes of anything that has the buffer protocol; they stay where they are meanwhile.
class Bytes {
 public:
  explicit Bytes(const py::buffer& from) : info_(from.request()) {
    if (info_.itemsize != 1 || info_.ndim != 1) throw py::type_error("bytes are expected");
  }
  std::span<const std::uint8_t> view() const {
    return {static_cast<const std::uint8_t*>(info_.ptr), static_cast<std::size_t>(info_.size)};
  }

 private:
  const py::buffer_info info_;
};

LogInfo inspect(const py::buffer& data) {
  const Bytes bytes(data);
  LogInfo info;
  LogFault fault = LogFault::None;
  {
    py::gil_scoped_release release;
    fault = inspect_log(bytes.view(), info);
  }
  raise_unless_none(fault);
  return info;
}

struct WarmResult {
  std::uint64_t held = 0;
  std::uint64_t fetched = 0;
  std::uint64_t not_found = 0;
  std::uint64_t timed_out = 0;
  std::uint64_t throttled = 0;
  std::uint64_t error = 0;
  std::uint64_t skipped = 0;
  double seconds = 0;

  void add(CellStatus status) noexcept {
    switch (status) {
      case CellStatus::HitDram:
      case CellStatus::HitNvm:
        ++held;
        break;
      case CellStatus::Fetched:
        ++fetched;
        break;
      case CellStatus::NotFound:
        ++not_found;
        break;
      case CellStatus::TimedOut:
        ++timed_out;
        break;
      case CellStatus::Throttled:
        ++throttled;
        break;
      case CellStatus::Error:
        ++error;
        break;
      default:
        ++skipped;
    }
  }
};

bool failed(CellStatus status) noexcept {
  return status == CellStatus::TimedOut || status == CellStatus::Throttled ||
         status == CellStatus::Error;
}

// A plan and the node that it is of.
class PyWarmPlan {
 public:
  PyWarmPlan(py::object node, std::uint64_t max_keys)
      : owner_(std::move(node)),
        node_(owner_.cast<PyNode&>()),
        shared_(std::make_shared<Shared>()) {
    py::gil_scoped_release release;
    shared_->plan = node_.inside(
        [&](Node& target) { return std::make_unique<WarmPlan>(namespaces_of(target), max_keys); });
  }

  void own(std::uint32_t shard_count, const Array<std::uint32_t>& shards) {
    const std::vector<std::uint32_t> owned = to_vector(shards);
    py::gil_scoped_release release;
    const Locked plan(*shared_);
    plan->own(shard_count, owned);
  }
  WarmPlan::Added add(const py::buffer& data, double weight) {
    const Bytes bytes(data);
    WarmPlan::Added added;
    LogFault fault = LogFault::None;
    {
      py::gil_scoped_release release;
      const Locked plan(*shared_);
      fault = plan->add(bytes.view(), weight, added);
    }
    raise_unless_none(fault);
    return added;
  }
  std::uint64_t drop_domains(const std::vector<std::pair<std::string, std::string>>& domains) {
    py::gil_scoped_release release;
    const Locked plan(*shared_);
    std::uint64_t dropped = 0;
    for (const auto& [ns_name, domain_name] : domains) {
      const auto [ns, numbers] = node_.inside([&](Node& node) {
        const NamespaceIndex found = node.engine().find_namespace(ns_name);
        if (found == kNoNamespace) throw py::key_error("no namespace " + ns_name);
        const std::vector<DomainConfig>& known = node.config().engine.namespaces[found].domains;
        std::vector<std::uint32_t> wanted;
        for (std::uint32_t d = 0; d < known.size(); ++d) {
          if (domain_name.empty() || known[d].name == domain_name) wanted.push_back(d);
        }
        if (wanted.empty() && !domain_name.empty()) {
          throw py::key_error("namespace " + ns_name + " has no domain " + domain_name);
        }
        return std::pair{found, wanted};
      });
      for (const std::uint32_t domain : numbers) dropped += plan->drop_domain(ns, domain);
    }
    return dropped;
  }
  std::uint64_t drop_held() {
    py::gil_scoped_release release;
    const Locked plan(*shared_);
    return plan->drop_held(held());
  }
  void order(double realtime_ttl_s) {
    py::gil_scoped_release release;
    const Locked plan(*shared_);
    plan->order(static_cast<std::uint64_t>(std::max(0.0, realtime_ttl_s) * 1000));
  }
  std::size_t issue(std::size_t max_keys, double timeout_s, py::function done) {
    const std::uint64_t timeout_ms = to_ms(timeout_s);
    auto callback = std::make_shared<py::function>(std::move(done));
    py::gil_scoped_release release;
    std::vector<WarmKey> keys;
    {
      const Locked plan(*shared_);
      keys = plan->take(max_keys);
    }
    const std::size_t count = keys.size();
    if (count == 0) {
      const py::gil_scoped_acquire acquire;
      callback.reset();
      return 0;
    }
    const std::uint64_t began = monotonic_ns();
    auto asked = std::make_shared<const std::vector<WarmKey>>(keys);
    // The node ends all that it was asked before it goes, and is kept by the plan's Python object.
    PyNode* const node = &node_;
    node_.inside([&](Node& target) {
      target.warm(std::move(keys), shared_, timeout_ms,
                  [node, shared = shared_, asked, began,
                   callback = std::move(callback)](std::span<const CellStatus> statuses) mutable {
                    WarmResult result;
                    result.seconds = static_cast<double>(monotonic_ns() - began) * 1e-9;
                    {
                      const std::lock_guard lock(shared->failed_mutex);
                      for (std::size_t i = 0; i < statuses.size(); ++i) {
                        result.add(statuses[i]);
                        if (failed(statuses[i])) shared->failed.push_back((*asked)[i]);
                      }
                    }
                    node->post([result, callback = std::move(callback)]() mutable {
                      call_back(callback, result);
                    });
                  });
      return 0;
    });
    return count;
  }
  std::size_t retry_failed() {
    py::gil_scoped_release release;
    std::vector<WarmKey> failed;
    {
      const std::lock_guard lock(shared_->failed_mutex);
      failed.swap(shared_->failed);
    }
    const Locked plan(*shared_);
    std::size_t count = 0;
    for (const WarmKey& key : failed) count += plan->again(key) ? 1 : 0;
    return count;
  }
  double predicted_hit_ratio(std::size_t sample) {
    py::gil_scoped_release release;
    const Locked plan(*shared_);
    return plan->held_share(held(), sample);
  }
  std::uint64_t keys() const {
    py::gil_scoped_release release;  // somebody may be adding a log
    return Locked(*shared_)->keys();
  }
  std::uint64_t keys_left() const {
    py::gil_scoped_release release;
    return Locked(*shared_)->keys_left();
  }
  double total_weight() const {
    py::gil_scoped_release release;
    return Locked(*shared_)->total_weight();
  }

 private:
  struct Shared {
    std::mutex mutex;
    std::unique_ptr<WarmPlan> plan;  // guarded by mutex; fixed, and so are its keys' bytes
    std::mutex failed_mutex;
    std::vector<WarmKey> failed;  // guarded by failed_mutex
  };
  class Locked {
   public:
    explicit Locked(Shared& shared) : lock_(shared.mutex), plan_(*shared.plan) {}
    WarmPlan* operator->() const { return &plan_; }

   private:
    const std::lock_guard<std::mutex> lock_;
    WarmPlan& plan_;
  };

  static std::vector<WarmPlan::Namespace> namespaces_of(Node& node) {
    std::vector<WarmPlan::Namespace> namespaces;
    for (const NamespaceConfig& ns : node.config().engine.namespaces) {
      WarmPlan::Namespace& to = namespaces.emplace_back();
      to.name = ns.name;
      to.fetchable = !ns.store.empty();
      for (std::uint32_t d = 0; d < ns.domains.size(); ++d) {
        if (ns.domains[d].name == ns.default_domain) to.default_domain = d;
        to.domains.push_back({ns.domains[d].name, ns.domains[d].ttl_ms});
      }
      if (ns.domains.empty()) continue;
      const NamespaceIndex number = node.engine().find_namespace(ns.name);
      to.first_domain = node.engine().find_domain(number, ns.domains.front().name);
    }
    return namespaces;
  }
  WarmPlan::Held held() const {
    return [this](std::span<const WarmKey> keys, std::span<std::uint8_t> flags) {
      node_.inside([&](Node& node) {
        node.held(keys, flags);
        return 0;
      });
    };
  }
  static void call_back(std::shared_ptr<py::function>& callback, const WarmResult& result) {
    const py::gil_scoped_acquire acquire;
    try {
      (*callback)(result);
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("WarmPlan callback");
    }
    callback.reset();
  }

  const py::object owner_;
  PyNode& node_;
  const std::shared_ptr<Shared> shared_;
};

void bind_info(py::module_& module) {
  py::class_<LogInfo>(module, "RequestLogInfo")
      .def_readonly("version", &LogInfo::version)
      .def_readonly("host", &LogInfo::host)
      .def_readonly("window_start_ms", &LogInfo::window_start_ms)
      .def_readonly("window_ms", &LogInfo::window_ms)
      .def_readonly("sample", &LogInfo::sample)
      .def_property_readonly("by", [](const LogInfo& info) { return sample_by_name(info.by); })
      .def_readonly("complete", &LogInfo::complete)
      .def_readonly("requests", &LogInfo::requests)
      .def_readonly("keys", &LogInfo::keys)
      .def_readonly("distinct_keys", &LogInfo::distinct_keys)
      .def_readonly("dropped_keys", &LogInfo::dropped_keys)
      .def_property_readonly("namespaces", [](const LogInfo& info) {
        py::list namespaces;
        for (const LogInfo::Namespace& ns : info.namespaces) {
          namespaces.append(
              py::make_tuple(ns.name, privacy_name(ns.privacy), ns.keys, ns.distinct_keys));
        }
        return namespaces;
      });
  module.def("inspect_request_log", &inspect, "data"_a);
}

}  // namespace
}  // namespace fc::bindings

void bind_request_log(py::module_& module) {
  using namespace fc::bindings;
  log_error() = py::reinterpret_steal<py::object>(
      PyErr_NewException("cache_daemon._native.RequestLogError", PyExc_ValueError, nullptr));
  module.attr("RequestLogError") = log_error();
  bind_info(module);
  py::class_<fc::WarmPlan::Added>(module, "PlanAdded")
      .def_readonly("keys", &fc::WarmPlan::Added::keys)
      .def_readonly("new_keys", &fc::WarmPlan::Added::new_keys)
      .def_readonly("unknown_namespace", &fc::WarmPlan::Added::unknown_namespace)
      .def_readonly("not_fetchable", &fc::WarmPlan::Added::not_fetchable)
      .def_readonly("hashed", &fc::WarmPlan::Added::hashed)
      .def_readonly("not_owned", &fc::WarmPlan::Added::not_owned)
      .def_readonly("over_limit", &fc::WarmPlan::Added::over_limit);
  py::class_<WarmResult>(module, "WarmResult")
      .def_readonly("held", &WarmResult::held)
      .def_readonly("fetched", &WarmResult::fetched)
      .def_readonly("not_found", &WarmResult::not_found)
      .def_readonly("timed_out", &WarmResult::timed_out)
      .def_readonly("throttled", &WarmResult::throttled)
      .def_readonly("error", &WarmResult::error)
      .def_readonly("skipped", &WarmResult::skipped)
      .def_readonly("seconds", &WarmResult::seconds);
  py::class_<PyWarmPlan>(module, "WarmPlan")
      .def(py::init<py::object, std::uint64_t>(), "node"_a, py::kw_only(),
           "max_keys"_a = 10'000'000)
      .def("own", &PyWarmPlan::own, "shard_count"_a, "shards"_a)
      .def("add", &PyWarmPlan::add, "data"_a, "weight"_a = 1.0)
      .def("drop_domains", &PyWarmPlan::drop_domains, "domains"_a)
      .def("drop_held", &PyWarmPlan::drop_held)
      .def("order", &PyWarmPlan::order, "realtime_ttl_s"_a)
      .def("issue", &PyWarmPlan::issue, "max_keys"_a, "timeout_s"_a, "done"_a)
      .def("retry_failed", &PyWarmPlan::retry_failed)
      .def("predicted_hit_ratio", &PyWarmPlan::predicted_hit_ratio, "sample"_a = 200'000)
      .def_property_readonly("keys", &PyWarmPlan::keys)
      .def_property_readonly("keys_left", &PyWarmPlan::keys_left)
      .def_property_readonly("total_weight", &PyWarmPlan::total_weight);
}
