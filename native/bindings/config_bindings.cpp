#include <pybind11/stl.h>

#include <map>

#include <optional>
#include <utility>

#include "bindings.hpp"
#include "feature_cache/config.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace {

// The policy is an enum inside and its name outside.
std::string policy_of(const fc::DomainConfig& domain) {
  return fc::policy_name(domain.policy);
}
void set_policy(fc::DomainConfig& domain, const std::string& name) {
  domain.policy = fc::parse_policy(name);
}

void bind_domain(py::module_& module) {
  py::class_<fc::DomainConfig>(module, "DomainConfig")
      .def(py::init([](std::string name, std::uint64_t budget_bytes, const std::string& policy,
                       std::uint64_t ttl_ms, double ttl_jitter, double refresh_ahead) {
             fc::DomainConfig domain;
             domain.name = std::move(name);
             domain.budget_bytes = budget_bytes;
             domain.policy = fc::parse_policy(policy);
             domain.ttl_ms = ttl_ms;
             domain.ttl_jitter = ttl_jitter;
             domain.refresh_ahead = refresh_ahead;
             return domain;
           }),
           py::kw_only(), "name"_a, "budget_bytes"_a, "policy"_a = "s3fifo", "ttl_ms"_a = 0,
           "ttl_jitter"_a = 0.1, "refresh_ahead"_a = 0.0)
      .def_readwrite("name", &fc::DomainConfig::name)
      .def_readwrite("budget_bytes", &fc::DomainConfig::budget_bytes)
      .def_property("policy", policy_of, set_policy)
      .def_readwrite("ttl_ms", &fc::DomainConfig::ttl_ms)
      .def_readwrite("ttl_jitter", &fc::DomainConfig::ttl_jitter)
      .def_readwrite("refresh_ahead", &fc::DomainConfig::refresh_ahead);
}

void bind_rule(py::module_& module) {
  py::class_<fc::RouteRule>(module, "RouteRule")
      .def(py::init([](std::string domain, const py::bytes& prefix, std::uint32_t asked) {
             return fc::RouteRule{std::move(domain), std::string(prefix), asked};
           }),
           py::kw_only(), "domain"_a, "prefix"_a = py::bytes(), "asked_at_least"_a = 0)
      .def_readwrite("domain", &fc::RouteRule::domain)
      .def_property(
          "prefix", [](const fc::RouteRule& rule) { return py::bytes(rule.prefix); },
          [](fc::RouteRule& rule, const py::bytes& prefix) { rule.prefix = std::string(prefix); })
      .def_readwrite("asked_at_least", &fc::RouteRule::asked_at_least);
}

// A budget of 0 is how Python says that there are no speculative lookups.
double speculative_budget_of(const fc::NamespaceConfig& ns) {
  return ns.speculative.enabled ? ns.speculative.budget : 0.0;
}
void set_speculative_budget(fc::NamespaceConfig& ns, double budget) {
  ns.speculative.enabled = budget != 0.0;
  if (ns.speculative.enabled) ns.speculative.budget = budget;
}

// A field of a part of a config, shown as the config's own.
template <class Config, class Part, class T>
void inner_field(py::class_<Config>& bound, const char* name, Part Config::*part, T Part::*field) {
  bound.def_property(
      name, [part, field](const Config& config) { return config.*part.*field; },
      [part, field](Config& config, T value) { config.*part.*field = std::move(value); });
}

void bind_namespace(py::module_& module) {
  py::class_<fc::NamespaceConfig> bound(module, "NamespaceConfig");
  bound
      .def(py::init([](std::string name, std::vector<fc::DomainConfig> domains,
                       std::string default_domain, std::vector<fc::RouteRule> rules,
                       std::string store, std::uint64_t negative_ttl_ms,
                       std::uint64_t fetch_timeout_ms, std::uint64_t nvm_budget_bytes,
                       const std::string& nvm_admission, std::uint32_t nvm_admission_frequency,
                       const std::string& nvm_promotion, double speculative_budget,
                       std::uint64_t speculative_after_us, double speculative_after_quantile) {
             fc::NamespaceConfig ns;
             ns.name = std::move(name);
             ns.domains = std::move(domains);
             ns.default_domain = std::move(default_domain);
             ns.rules = std::move(rules);
             ns.store = std::move(store);
             ns.negative_ttl_ms = negative_ttl_ms;
             ns.fetch_timeout_ms = fetch_timeout_ms;
             ns.nvm.budget_bytes = nvm_budget_bytes;
             ns.nvm.admission = fc::parse_admission(nvm_admission);
             ns.nvm.admission_frequency = nvm_admission_frequency;
             ns.nvm.promotion = fc::parse_promotion(nvm_promotion);
             set_speculative_budget(ns, speculative_budget);
             ns.speculative.after_us = speculative_after_us;
             ns.speculative.after_quantile = speculative_after_quantile;
             return ns;
           }),
           py::kw_only(), "name"_a, "domains"_a, "default_domain"_a,
           "rules"_a = std::vector<fc::RouteRule>(), "store"_a = "", "negative_ttl_ms"_a = 0,
           "fetch_timeout_ms"_a = 1000, "nvm_budget_bytes"_a = 0, "nvm_admission"_a = "all",
           "nvm_admission_frequency"_a = 2, "nvm_promotion"_a = "second_hit",
           "speculative_budget"_a = 0.0, "speculative_after_us"_a = 0,
           "speculative_after_quantile"_a = 0.99)
      .def_readwrite("name", &fc::NamespaceConfig::name)
      .def_readwrite("domains", &fc::NamespaceConfig::domains)
      .def_readwrite("default_domain", &fc::NamespaceConfig::default_domain)
      .def_readwrite("rules", &fc::NamespaceConfig::rules)
      .def_readwrite("store", &fc::NamespaceConfig::store)
      .def_readwrite("negative_ttl_ms", &fc::NamespaceConfig::negative_ttl_ms)
      .def_readwrite("fetch_timeout_ms", &fc::NamespaceConfig::fetch_timeout_ms)
      .def_property("speculative_budget", speculative_budget_of, set_speculative_budget);
  inner_field(bound, "nvm_budget_bytes", &fc::NamespaceConfig::nvm,
              &fc::NvmShareConfig::budget_bytes);
  inner_field(bound, "nvm_admission_frequency", &fc::NamespaceConfig::nvm,
              &fc::NvmShareConfig::admission_frequency);
  inner_field(bound, "speculative_after_us", &fc::NamespaceConfig::speculative,
              &fc::SpeculativeConfig::after_us);
  inner_field(bound, "speculative_after_quantile", &fc::NamespaceConfig::speculative,
              &fc::SpeculativeConfig::after_quantile);
  bound
      .def_property(
          "nvm_admission",
          [](const fc::NamespaceConfig& ns) { return fc::admission_name(ns.nvm.admission); },
          [](fc::NamespaceConfig& ns, const std::string& name) {
            ns.nvm.admission = fc::parse_admission(name);
          })
      .def_property(
          "nvm_promotion",
          [](const fc::NamespaceConfig& ns) { return fc::promotion_name(ns.nvm.promotion); },
          [](fc::NamespaceConfig& ns, const std::string& name) {
            ns.nvm.promotion = fc::parse_promotion(name);
          });
}

void bind_store(py::module_& module) {
  py::class_<fc::StoreConfig>(module, "StoreConfig")
      .def(py::init([](std::string name, std::uint32_t max_batch_keys, std::uint32_t concurrency,
                       std::uint64_t timeout_ms, std::uint64_t queue_keys) {
             return fc::StoreConfig{std::move(name), max_batch_keys, concurrency, timeout_ms,
                                    queue_keys};
           }),
           py::kw_only(), "name"_a, "max_batch_keys"_a = 2000, "concurrency"_a = 4,
           "timeout_ms"_a = 1000, "queue_keys"_a = 1'000'000)
      .def_readwrite("name", &fc::StoreConfig::name)
      .def_readwrite("max_batch_keys", &fc::StoreConfig::max_batch_keys)
      .def_readwrite("concurrency", &fc::StoreConfig::concurrency)
      .def_readwrite("timeout_ms", &fc::StoreConfig::timeout_ms)
      .def_readwrite("queue_keys", &fc::StoreConfig::queue_keys);
}

constexpr std::uint64_t kIndexSlotBytes = 8;  // the bindings do not see core/layout.hpp

using Devices = std::vector<std::pair<std::string, std::uint64_t>>;

Devices devices_of(const fc::NvmConfig& nvm) {
  Devices devices;
  for (const fc::NvmDeviceConfig& device : nvm.devices) {
    devices.emplace_back(device.path, device.bytes);
  }
  return devices;
}
void set_devices(fc::NvmConfig& nvm, const Devices& devices) {
  nvm.devices.clear();
  for (const auto& [path, bytes] : devices) nvm.devices.push_back({path, bytes});
}

void bind_nvm(py::module_& module) {
  py::class_<fc::NvmConfig>(module, "NvmConfig")
      .def(py::init([](const Devices& devices, std::uint32_t region_bytes, const std::string& io,
                       bool direct, std::uint32_t queue_depth, std::uint32_t io_threads,
                       std::uint32_t coalesce_gap_bytes, std::uint32_t queued_reads,
                       std::uint64_t read_memory_bytes, std::uint32_t write_buffers,
                       std::uint64_t write_bytes_per_second, std::uint32_t errors_max,
                       std::uint64_t probe_interval_ms) {
             fc::NvmConfig nvm;
             set_devices(nvm, devices);
             nvm.region_bytes = region_bytes;
             nvm.io = fc::parse_io(io);
             nvm.direct = direct;
             nvm.queue_depth = queue_depth;
             nvm.io_threads = io_threads;
             nvm.coalesce_gap_bytes = coalesce_gap_bytes;
             nvm.queued_reads = queued_reads;
             nvm.read_memory_bytes = read_memory_bytes;
             nvm.write_buffers = write_buffers;
             nvm.write_bytes_per_second = write_bytes_per_second;
             nvm.errors_max = errors_max;
             nvm.probe_interval_ms = probe_interval_ms;
             return nvm;
           }),
           py::kw_only(), "devices"_a, "region_bytes"_a = 0, "io"_a = "auto", "direct"_a = true,
           "queue_depth"_a = 128, "io_threads"_a = 64, "coalesce_gap_bytes"_a = 4096,
           "queued_reads"_a = 65536, "read_memory_bytes"_a = 16 << 20, "write_buffers"_a = 2,
           "write_bytes_per_second"_a = 0, "errors_max"_a = 16, "probe_interval_ms"_a = 5000)
      .def_property("devices", devices_of, set_devices)
      .def_readwrite("region_bytes", &fc::NvmConfig::region_bytes)
      .def_property(
          "io", [](const fc::NvmConfig& nvm) { return fc::io_name(nvm.io); },
          [](fc::NvmConfig& nvm, const std::string& name) { nvm.io = fc::parse_io(name); })
      .def_readwrite("direct", &fc::NvmConfig::direct)
      .def_readwrite("queue_depth", &fc::NvmConfig::queue_depth)
      .def_readwrite("io_threads", &fc::NvmConfig::io_threads)
      .def_readwrite("coalesce_gap_bytes", &fc::NvmConfig::coalesce_gap_bytes)
      .def_readwrite("queued_reads", &fc::NvmConfig::queued_reads)
      .def_readwrite("read_memory_bytes", &fc::NvmConfig::read_memory_bytes)
      .def_readwrite("write_buffers", &fc::NvmConfig::write_buffers)
      .def_readwrite("write_bytes_per_second", &fc::NvmConfig::write_bytes_per_second)
      .def_readwrite("errors_max", &fc::NvmConfig::errors_max)
      .def_readwrite("probe_interval_ms", &fc::NvmConfig::probe_interval_ms);
}

std::string durability_of(const fc::PersistConfig& persist) {
  return fc::durability_name(persist.durability);
}
void set_durability(fc::PersistConfig& persist, const std::string& name) {
  persist.durability = fc::parse_durability(name);
}

void bind_persist(py::module_& module) {
  py::class_<fc::PersistConfig>(module, "PersistConfig")
      .def(py::init([](std::string dir, std::string name, const std::string& durability,
                       std::uint64_t durability_window_ms, std::string journal,
                       bool keep_on_clock_doubt, bool spill_on_shutdown,
                       std::uint64_t shutdown_limit_ms) {
             fc::PersistConfig persist;
             persist.dir = std::move(dir);
             persist.name = std::move(name);
             set_durability(persist, durability);
             persist.durability_window_ms = durability_window_ms;
             persist.journal = std::move(journal);
             persist.keep_on_clock_doubt = keep_on_clock_doubt;
             persist.spill_on_shutdown = spill_on_shutdown;
             persist.shutdown_limit_ms = shutdown_limit_ms;
             return persist;
           }),
           py::kw_only(), "dir"_a, "name"_a = "feature-cache", "durability"_a = "drop_nvm",
           "durability_window_ms"_a = 100, "journal"_a = "", "keep_on_clock_doubt"_a = false,
           "spill_on_shutdown"_a = false, "shutdown_limit_ms"_a = 20'000)
      .def_readwrite("dir", &fc::PersistConfig::dir)
      .def_readwrite("name", &fc::PersistConfig::name)
      .def_property("durability", durability_of, set_durability)
      .def_readwrite("durability_window_ms", &fc::PersistConfig::durability_window_ms)
      .def_readwrite("journal", &fc::PersistConfig::journal)
      .def_readwrite("keep_on_clock_doubt", &fc::PersistConfig::keep_on_clock_doubt)
      .def_readwrite("spill_on_shutdown", &fc::PersistConfig::spill_on_shutdown)
      .def_readwrite("shutdown_limit_ms", &fc::PersistConfig::shutdown_limit_ms);
}

// None, where there is no NVM tier: inside that is an empty list of devices.
std::optional<fc::NvmConfig> nvm_of(const fc::NodeConfig& config) {
  if (config.engine.nvm.devices.empty()) return std::nullopt;
  return config.engine.nvm;
}
void set_nvm(fc::NodeConfig& config, const std::optional<fc::NvmConfig>& nvm) {
  config.engine.nvm = nvm.value_or(fc::NvmConfig{});
}

// None, where nothing outlives the process: inside that is an empty directory.
std::optional<fc::PersistConfig> persist_of(const fc::NodeConfig& config) {
  if (!config.engine.persist.enabled()) return std::nullopt;
  return config.engine.persist;
}
void set_persist(fc::NodeConfig& config, const std::optional<fc::PersistConfig>& persist) {
  config.engine.persist = persist.value_or(fc::PersistConfig{});
}

// What a root asks its leaves, and what a leaf remembers. None of them: the node is neither.
template <class Config>
py::object role_of(const Config& config) {
  return config.enabled ? py::cast(config) : py::object(py::none());
}
template <class Config>
void set_role(Config& to, const std::optional<Config>& from) {
  to = from.value_or(Config{});
  to.enabled = from.has_value();
}

void bind_roles(py::module_& module) {
  py::class_<fc::RootConfig>(module, "RootConfig")
      .def(py::init([](std::uint32_t threads, std::uint32_t connections,
                       std::uint64_t leaf_timeout_ms, std::uint32_t attempts, double retry_budget,
                       bool hedge, std::uint64_t hedge_after_us, double hedge_quantile,
                       double hedge_budget, double store_budget) {
             fc::RootConfig root;
             root.enabled = true;
             root.threads = threads;
             root.connections_per_leaf = connections;
             root.leaf_timeout_ms = leaf_timeout_ms;
             root.attempts = attempts;
             root.retry_budget = retry_budget;
             root.hedge = hedge;
             root.hedge_after_us = hedge_after_us;
             root.hedge_quantile = hedge_quantile;
             root.hedge_budget = hedge_budget;
             root.store_budget = store_budget;
             return root;
           }),
           py::kw_only(), "threads"_a = 2, "connections_per_leaf"_a = 1, "leaf_timeout_ms"_a = 0,
           "attempts"_a = 3, "retry_budget"_a = 0.2, "hedge"_a = true, "hedge_after_us"_a = 0,
           "hedge_quantile"_a = 0.99, "hedge_budget"_a = 0.02, "store_budget"_a = 0.05)
      .def_readwrite("threads", &fc::RootConfig::threads)
      .def_readwrite("connections_per_leaf", &fc::RootConfig::connections_per_leaf)
      .def_readwrite("leaf_timeout_ms", &fc::RootConfig::leaf_timeout_ms)
      .def_readwrite("attempts", &fc::RootConfig::attempts)
      .def_readwrite("retry_budget", &fc::RootConfig::retry_budget)
      .def_readwrite("hedge", &fc::RootConfig::hedge)
      .def_readwrite("hedge_after_us", &fc::RootConfig::hedge_after_us)
      .def_readwrite("hedge_quantile", &fc::RootConfig::hedge_quantile)
      .def_readwrite("hedge_budget", &fc::RootConfig::hedge_budget)
      .def_readwrite("store_budget", &fc::RootConfig::store_budget);
  py::class_<fc::LeafConfig>(module, "LeafConfig")
      .def(py::init([](std::uint64_t write_log_bytes) {
             return fc::LeafConfig{.enabled = true, .write_log_bytes = write_log_bytes};
           }),
           py::kw_only(), "write_log_bytes"_a = 16 << 20)
      .def_readwrite("write_log_bytes", &fc::LeafConfig::write_log_bytes);
  py::class_<fc::RecordConfig>(module, "RecordConfig")
      .def(py::init([](std::string dir, double sample, const std::string& by,
                       std::uint64_t window_ms, std::uint64_t max_bytes, std::uint64_t buffer_bytes,
                       std::uint32_t dictionary_keys, std::string host,
                       const std::map<std::string, std::string>& privacy, std::string hash_key) {
             fc::RecordConfig record;
             record.dir = std::move(dir);
             record.sample = sample;
             record.by = fc::parse_sample_by(by);
             record.window_ms = window_ms;
             record.max_bytes = max_bytes;
             record.buffer_bytes = buffer_bytes;
             record.dictionary_keys = dictionary_keys;
             record.host = std::move(host);
             for (const auto& [ns, how] : privacy) {
               record.privacy.push_back({ns, fc::parse_privacy(how)});
             }
             record.hash_key = std::move(hash_key);
             return record;
           }),
           py::kw_only(), "dir"_a, "sample"_a = 0.1, "by"_a = "requests", "window_ms"_a = 600'000,
           "max_bytes"_a = std::uint64_t{1} << 30, "buffer_bytes"_a = 8 << 20,
           "dictionary_keys"_a = 1 << 20, "host"_a = "",
           "privacy"_a = std::map<std::string, std::string>(), "hash_key"_a = "")
      .def_readonly("dir", &fc::RecordConfig::dir)
      .def_readonly("sample", &fc::RecordConfig::sample)
      .def_property_readonly(
          "by", [](const fc::RecordConfig& record) { return fc::sample_by_name(record.by); })
      .def_readonly("window_ms", &fc::RecordConfig::window_ms)
      .def_readonly("max_bytes", &fc::RecordConfig::max_bytes)
      .def_readonly("buffer_bytes", &fc::RecordConfig::buffer_bytes)
      .def_readonly("dictionary_keys", &fc::RecordConfig::dictionary_keys)
      .def_readonly("host", &fc::RecordConfig::host)
      .def_property_readonly("privacy", [](const fc::RecordConfig& record) {
        std::map<std::string, std::string> privacy;
        for (const fc::RecordConfig::Privacy& each : record.privacy) {
          privacy.emplace(each.ns, fc::privacy_name(each.privacy));
        }
        return privacy;
      });
}

// Over all instances. What budgets may share is as much as the instance with the least has, times
// their number: budgets are divided evenly.
std::uint64_t arena_bytes(const fc::NodeConfig& config) {
  const std::vector<fc::EngineConfig> parts = fc::split_instances(config.engine);
  std::uint64_t least = ~std::uint64_t{0};
  for (const fc::EngineConfig& part : parts) {
    least = std::min(least, fc::Geometry::plan(part).domain_bytes());
  }
  return least * parts.size();
}
std::uint64_t nvm_memory_bytes(const fc::NodeConfig& config) {
  std::uint64_t sum = 0;
  for (const fc::EngineConfig& part : fc::split_instances(config.engine)) {
    const fc::Geometry plan = fc::Geometry::plan(part);
    sum += plan.nvm_slots * kIndexSlotBytes + plan.nvm_memory_bytes;
  }
  return sum;
}

void bind_node_config(py::module_& module) {
  py::class_<fc::NodeConfig> bound(module, "NodeConfig");
  bound
      .def(py::init([](std::uint64_t memory_bytes, std::vector<fc::NamespaceConfig> namespaces,
                       std::vector<fc::StoreConfig> stores, std::uint32_t segment_bytes,
                       std::uint32_t expected_item_bytes, bool huge_pages,
                       std::uint64_t max_value_bytes, std::uint32_t max_batch_keys,
                       std::uint64_t max_reply_bytes, std::uint32_t max_pending_batches,
                       std::uint32_t refresh_keys_per_second,
                       const std::optional<fc::NvmConfig>& nvm,
                       const std::optional<fc::PersistConfig>& persist,
                       const std::optional<fc::RootConfig>& root,
                       const std::optional<fc::LeafConfig>& leaf, std::uint32_t shard_count,
                       std::uint32_t instances, std::uint64_t max_instance_bytes,
                       const std::optional<fc::RecordConfig>& record) {
             fc::NodeConfig config;
             config.record = record.value_or(fc::RecordConfig{});
             config.engine.instances = instances;
             config.engine.max_instance_bytes = max_instance_bytes;
             config.engine.shard_count = shard_count;
             config.engine.memory_bytes = memory_bytes;
             config.engine.namespaces = std::move(namespaces);
             config.engine.segment_bytes = segment_bytes;
             config.engine.expected_item_bytes = expected_item_bytes;
             config.engine.huge_pages = huge_pages;
             config.engine.max_value_bytes = max_value_bytes;
             config.stores = std::move(stores);
             config.max_batch_keys = max_batch_keys;
             config.max_reply_bytes = max_reply_bytes;
             config.max_pending_batches = max_pending_batches;
             config.refresh_keys_per_second = refresh_keys_per_second;
             set_nvm(config, nvm);
             set_persist(config, persist);
             set_role(config.root, root);
             set_role(config.leaf, leaf);
             return config;
           }),
           py::kw_only(), "memory_bytes"_a, "namespaces"_a,
           "stores"_a = std::vector<fc::StoreConfig>(), "segment_bytes"_a = 0,
           "expected_item_bytes"_a = 256, "huge_pages"_a = true, "max_value_bytes"_a = 8 << 20,
           "max_batch_keys"_a = 16384, "max_reply_bytes"_a = 64 << 20,
           "max_pending_batches"_a = 4096, "refresh_keys_per_second"_a = 1000, "nvm"_a = py::none(),
           "persist"_a = py::none(), "root"_a = py::none(), "leaf"_a = py::none(),
           "shard_count"_a = 0, "instances"_a = 0,
           "max_instance_bytes"_a = std::uint64_t{256} << 30, "record"_a = py::none())
      .def_readwrite("stores", &fc::NodeConfig::stores)
      .def_readwrite("max_batch_keys", &fc::NodeConfig::max_batch_keys)
      .def_readwrite("max_reply_bytes", &fc::NodeConfig::max_reply_bytes)
      .def_readwrite("max_pending_batches", &fc::NodeConfig::max_pending_batches)
      .def_readwrite("refresh_keys_per_second", &fc::NodeConfig::refresh_keys_per_second)
      .def_property("nvm", nvm_of, set_nvm)
      .def_property("persist", persist_of, set_persist)
      .def_property(
          "root", [](const fc::NodeConfig& config) { return role_of(config.root); },
          [](fc::NodeConfig& config, const std::optional<fc::RootConfig>& root) {
            set_role(config.root, root);
          })
      .def_property(
          "leaf", [](const fc::NodeConfig& config) { return role_of(config.leaf); },
          [](fc::NodeConfig& config, const std::optional<fc::LeafConfig>& leaf) {
            set_role(config.leaf, leaf);
          })
      .def_property(
          "record",
          [](const fc::NodeConfig& config) {
            return config.record.enabled() ? py::cast(config.record) : py::object(py::none());
          },
          [](fc::NodeConfig& config, const std::optional<fc::RecordConfig>& record) {
            config.record = record.value_or(fc::RecordConfig{});
          })
      .def("instance_count",
           [](const fc::NodeConfig& config) { return config.engine.instances_wanted(); })
      .def("arena_bytes", arena_bytes)
      .def("nvm_memory_bytes", nvm_memory_bytes);
  inner_field(bound, "memory_bytes", &fc::NodeConfig::engine, &fc::EngineConfig::memory_bytes);
  inner_field(bound, "namespaces", &fc::NodeConfig::engine, &fc::EngineConfig::namespaces);
  inner_field(bound, "instances", &fc::NodeConfig::engine, &fc::EngineConfig::instances);
  inner_field(bound, "max_instance_bytes", &fc::NodeConfig::engine,
              &fc::EngineConfig::max_instance_bytes);
  inner_field(bound, "shard_count", &fc::NodeConfig::engine, &fc::EngineConfig::shard_count);
  inner_field(bound, "segment_bytes", &fc::NodeConfig::engine, &fc::EngineConfig::segment_bytes);
  inner_field(bound, "expected_item_bytes", &fc::NodeConfig::engine,
              &fc::EngineConfig::expected_item_bytes);
  inner_field(bound, "huge_pages", &fc::NodeConfig::engine, &fc::EngineConfig::huge_pages);
  inner_field(bound, "max_value_bytes", &fc::NodeConfig::engine,
              &fc::EngineConfig::max_value_bytes);
}

}  // namespace

void bind_config(py::module_& module) {
  bind_domain(module);
  bind_rule(module);
  bind_namespace(module);
  bind_store(module);
  bind_nvm(module);
  bind_persist(module);
  bind_roles(module);
  bind_node_config(module);
}
