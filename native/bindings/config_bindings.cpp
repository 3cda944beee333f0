#include <pybind11/stl.h>

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

void bind_namespace(py::module_& module) {
  py::class_<fc::NamespaceConfig>(module, "NamespaceConfig")
      .def(py::init([](std::string name, std::vector<fc::DomainConfig> domains,
                       std::string default_domain, std::vector<fc::RouteRule> rules,
                       std::string store, std::uint64_t negative_ttl_ms,
                       std::uint64_t fetch_timeout_ms) {
             fc::NamespaceConfig ns;
             ns.name = std::move(name);
             ns.domains = std::move(domains);
             ns.default_domain = std::move(default_domain);
             ns.rules = std::move(rules);
             ns.store = std::move(store);
             ns.negative_ttl_ms = negative_ttl_ms;
             ns.fetch_timeout_ms = fetch_timeout_ms;
             return ns;
           }),
           py::kw_only(), "name"_a, "domains"_a, "default_domain"_a,
           "rules"_a = std::vector<fc::RouteRule>(), "store"_a = "", "negative_ttl_ms"_a = 0,
           "fetch_timeout_ms"_a = 1000)
      .def_readwrite("name", &fc::NamespaceConfig::name)
      .def_readwrite("domains", &fc::NamespaceConfig::domains)
      .def_readwrite("default_domain", &fc::NamespaceConfig::default_domain)
      .def_readwrite("rules", &fc::NamespaceConfig::rules)
      .def_readwrite("store", &fc::NamespaceConfig::store)
      .def_readwrite("negative_ttl_ms", &fc::NamespaceConfig::negative_ttl_ms)
      .def_readwrite("fetch_timeout_ms", &fc::NamespaceConfig::fetch_timeout_ms);
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

template <class T, class Class>
void engine_field(Class& bound, const char* name, T fc::EngineConfig::*field) {
  bound.def_property(
      name, [field](const fc::NodeConfig& config) { return config.engine.*field; },
      [field](fc::NodeConfig& config, T value) { config.engine.*field = std::move(value); });
}

void bind_node_config(py::module_& module) {
  py::class_<fc::NodeConfig> bound(module, "NodeConfig");
  bound
      .def(py::init([](std::uint64_t memory_bytes, std::vector<fc::NamespaceConfig> namespaces,
                       std::vector<fc::StoreConfig> stores, std::uint32_t segment_bytes,
                       std::uint32_t expected_item_bytes, bool huge_pages,
                       std::uint64_t max_value_bytes, std::uint32_t max_batch_keys,
                       std::uint64_t max_reply_bytes, std::uint32_t max_pending_batches,
                       std::uint32_t refresh_keys_per_second) {
             fc::NodeConfig config;
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
             return config;
           }),
           py::kw_only(), "memory_bytes"_a, "namespaces"_a,
           "stores"_a = std::vector<fc::StoreConfig>(), "segment_bytes"_a = 0,
           "expected_item_bytes"_a = 256, "huge_pages"_a = true, "max_value_bytes"_a = 8 << 20,
           "max_batch_keys"_a = 16384, "max_reply_bytes"_a = 64 << 20,
           "max_pending_batches"_a = 4096, "refresh_keys_per_second"_a = 1000)
      .def_readwrite("stores", &fc::NodeConfig::stores)
      .def_readwrite("max_batch_keys", &fc::NodeConfig::max_batch_keys)
      .def_readwrite("max_reply_bytes", &fc::NodeConfig::max_reply_bytes)
      .def_readwrite("max_pending_batches", &fc::NodeConfig::max_pending_batches)
      .def_readwrite("refresh_keys_per_second", &fc::NodeConfig::refresh_keys_per_second)
      .def("arena_bytes", [](const fc::NodeConfig& config) {
        return fc::Geometry::plan(config.engine).domain_bytes();
      });
  engine_field(bound, "memory_bytes", &fc::EngineConfig::memory_bytes);
  engine_field(bound, "namespaces", &fc::EngineConfig::namespaces);
  engine_field(bound, "segment_bytes", &fc::EngineConfig::segment_bytes);
  engine_field(bound, "expected_item_bytes", &fc::EngineConfig::expected_item_bytes);
  engine_field(bound, "huge_pages", &fc::EngineConfig::huge_pages);
  engine_field(bound, "max_value_bytes", &fc::EngineConfig::max_value_bytes);
}

}  // namespace

void bind_config(py::module_& module) {
  bind_domain(module);
  bind_rule(module);
  bind_namespace(module);
  bind_store(module);
  bind_node_config(module);
}
