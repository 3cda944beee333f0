// What a start found and how far it has come, as Python sees it.

#include <pybind11/stl.h>

#include "bindings.hpp"
#include "feature_cache/recovery.hpp"

namespace py = pybind11;

void bind_recovery(py::module_& module) {
  py::class_<fc::RecoveryProgress>(module, "RecoveryProgress")
      .def(py::init<>())
      .def_property_readonly("phase",
                             [](const fc::RecoveryProgress& progress) {
                               return progress.phase.load(std::memory_order_relaxed);
                             })
      .def_property_readonly("done",
                             [](const fc::RecoveryProgress& progress) {
                               return progress.done.load(std::memory_order_relaxed);
                             })
      .def_property_readonly("total", [](const fc::RecoveryProgress& progress) {
        return progress.total.load(std::memory_order_relaxed);
      });
  py::class_<fc::StartReport>(module, "StartReport")
      .def_readonly("memory", &fc::StartReport::memory)
      .def_readonly("memory_reason", &fc::StartReport::memory_reason)
      .def_readonly("pages", &fc::StartReport::pages)
      .def_readonly("memory_ms", &fc::StartReport::memory_ms)
      .def_readonly("memory_items", &fc::StartReport::memory_items)
      .def_readonly("memory_dropped", &fc::StartReport::memory_dropped)
      .def_readonly("nvm", &fc::StartReport::nvm)
      .def_readonly("nvm_reason", &fc::StartReport::nvm_reason)
      .def_readonly("nvm_ms", &fc::StartReport::nvm_ms)
      .def_readonly("nvm_items", &fc::StartReport::nvm_items)
      .def_readonly("nvm_dropped", &fc::StartReport::nvm_dropped)
      .def_readonly("set_aside", &fc::StartReport::set_aside);
}
