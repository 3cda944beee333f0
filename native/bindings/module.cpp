#include <grpcpp/grpcpp.h>

#include "bindings.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_native, module) {
  module.doc() = "The native data plane: engine, request path, gRPC server and client transport.";
  bind_config(module);
  bind_client(module);
  bind_node(module);
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
