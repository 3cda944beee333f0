// A batch of misses, as a fetch loop in Python sees it.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "feature_cache/fetch.hpp"
#include "node_gate.hpp"

namespace fc::bindings {

namespace py = pybind11;

struct HintedValue {
  py::object value;  // bytes or None
  std::string domain;
  std::uint64_t ttl_ms = 0;
};

class PyFetchBatch {
 public:
  PyFetchBatch(std::shared_ptr<FetchBatch> batch, std::shared_ptr<NodeGate> gate)
      : batch_(std::move(batch)), gate_(std::move(gate)) {}
  ~PyFetchBatch() {
    // Giving up a batch answers its waiters: not with the interpreter's lock held.
    py::gil_scoped_release release;
    batch_.reset();
  }
  PyFetchBatch(const PyFetchBatch&) = delete;
  PyFetchBatch& operator=(const PyFetchBatch&) = delete;

  // Made anew at each call; a fetch loop asks once.
  py::list groups() const {
    py::list result;
    for (const FetchBatch::Group& group : batch_->groups()) {
      py::list keys(group.keys.size());
      for (std::size_t i = 0; i < group.keys.size(); ++i) {
        keys[i] = py::bytes(group.keys[i].data(), group.keys[i].size());
      }
      result.append(py::make_tuple(py::str(group.ns.data(), group.ns.size()), keys));
    }
    return result;
  }
  std::size_t keys() const { return batch_->key_count(); }
  double timeout_s() const { return batch_->seconds_left(); }
  int priority() const { return static_cast<int>(batch_->priority()); }

  void complete(const py::object& values) {
    FetchAnswer answer;
    answer.values.resize(batch_->key_count());  // Garbled until read
    std::vector<std::string> domains;           // what the hints point into
    read(values, answer, domains);
    py::gil_scoped_release release;
    if (const auto inside = gate_->enter()) batch_->complete(std::move(answer));
  }
  void fail(const std::string& reason) {
    CellStatus status = CellStatus::Error;
    if (reason == "throttled") status = CellStatus::Throttled;
    if (reason == "timed_out") status = CellStatus::TimedOut;
    py::gil_scoped_release release;
    if (const auto inside = gate_->enter()) batch_->fail(status);
  }

 private:
  void read(const py::object& values, FetchAnswer& answer, std::vector<std::string>& domains) {
    domains.reserve(answer.values.size());  // views into it must not move
    const py::object outer = to_fast_sequence(values);
    if (!outer) return;
    std::size_t first = 0;
    const auto outer_size = static_cast<std::size_t>(PySequence_Fast_GET_SIZE(outer.ptr()));
    const std::vector<FetchBatch::Group>& wanted = batch_->groups();
    for (std::size_t g = 0; g < wanted.size() && g < outer_size; ++g) {
      const py::object group = to_fast_sequence(py::reinterpret_borrow<py::object>(
          PySequence_Fast_GET_ITEM(outer.ptr(), static_cast<Py_ssize_t>(g))));
      read_group(group, std::span(answer.values).subspan(first, wanted[g].keys.size()), answer,
                 domains);
      first += wanted[g].keys.size();
    }
  }

  // One garbled value makes its whole group ERROR: which key it belongs to cannot be trusted.
  static void read_group(const py::object& group, std::span<FetchedValue> cells,
                         FetchAnswer& answer, std::vector<std::string>& domains) {
    if (!group) return;
    if (static_cast<std::size_t>(PySequence_Fast_GET_SIZE(group.ptr())) != cells.size()) return;
    PyObject** items = PySequence_Fast_ITEMS(group.ptr());
    // Room once for all: growing step by step would copy what is there each time.
    std::size_t bytes = 0;
    for (std::size_t i = 0; i < cells.size(); ++i) {
      if (PyBytes_Check(items[i])) bytes += static_cast<std::size_t>(PyBytes_GET_SIZE(items[i]));
    }
    answer.bytes.reserve(bytes);
    for (std::size_t i = 0; i < cells.size(); ++i) {
      if (!read_value(items[i], cells[i], answer, domains)) {
        std::fill(cells.begin(), cells.end(), FetchedValue{});
        return;
      }
    }
  }

  static bool read_value(PyObject* item, FetchedValue& cell, FetchAnswer& answer,
                         std::vector<std::string>& domains) {
    if (item == Py_None) {
      cell.kind = FetchedValue::Kind::NotFound;
      return true;
    }
    if (PyBytes_Check(item)) {
      const auto size = static_cast<std::size_t>(PyBytes_GET_SIZE(item));
      if (size > kMaxValueBytes) return false;
      cell.kind = FetchedValue::Kind::Found;
      cell.offset = answer.bytes.size();
      cell.size = static_cast<std::uint32_t>(size);
      answer.bytes.append(PyBytes_AS_STRING(item), size);
      return true;
    }
    if (!py::isinstance<HintedValue>(item)) return false;
    const auto& hinted = py::cast<const HintedValue&>(py::handle(item));
    if (!read_value(hinted.value.ptr(), cell, answer, domains)) return false;
    cell.ttl_ms = hinted.ttl_ms;
    if (!hinted.domain.empty()) {
      domains.push_back(hinted.domain);
      cell.domain_hint = domains.back();
    }
    return true;
  }

  // Lists and tuples only: a str or bytes is a sequence too, but never an answer.
  static py::object to_fast_sequence(const py::object& object) {
    if (!PyList_Check(object.ptr()) && !PyTuple_Check(object.ptr())) return {};
    return object;
  }

  std::shared_ptr<FetchBatch> batch_;
  std::shared_ptr<NodeGate> gate_;
};

}  // namespace fc::bindings
