#include <grpcpp/grpcpp.h>

#include <exception>

#include "bindings.hpp"

namespace py = pybind11;

namespace {

// The global translator belongs to whichever pybind11 module was imported first, and one that was
// built by another pybind11 does not recognise our py::value_error and the like: it would turn them
// into RuntimeError. A translator of our own comes before it.
void translate(std::exception_ptr raised) {
  try {
    std::rethrow_exception(raised);
  } catch (const py::builtin_exception& exception) {
    exception.set_error();
  }
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  py::register_local_exception_translator(&translate);
  module.doc() = "The native data plane: engine, request path, gRPC server and client transport.";
  bind_config(module);
  bind_recovery(module);
  bind_client(module);
  bind_cluster(module);
  bind_node(module);
  bind_request_log(module);
  bind_copy(module);
  module.def("build_info", [] {
    py::dict info;
    info["version"] = FC_VERSION;
    info["compiler"] = "g++ " __VERSION__;
    info["grpc"] = grpc::Version();
#if defined(__SSE2__)
    info["simd"] = "sse2";
#else
    info["simd"] = "none";
#endif
    return info;
  });
}
