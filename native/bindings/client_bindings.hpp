// Python types of the client: Reply, WriteReply, RpcError, Channel, and the request encoders.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "feature_cache/reply.hpp"

// Must run before anything is bound whose signature names Reply or WriteReply.
void bind_client(pybind11::module_& module);

namespace fc::bindings {

// An instance of RpcError, to hand to a callback. Requires the GIL.
pybind11::object make_rpc_error(int code, const std::string& details);

// Throws it as a Python exception. Requires the GIL.
[[noreturn]] void raise_rpc_error(int code, const std::string& details);

}  // namespace fc::bindings
