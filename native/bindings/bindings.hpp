// The parts of the extension module, in the order in which they have to be bound.
#pragma once

#include <pybind11/pybind11.h>

void bind_config(pybind11::module_& module);
void bind_recovery(pybind11::module_& module);  // used by the node
void bind_client(pybind11::module_& module);    // Reply, WriteReply, RpcError: used by the node
void bind_cluster(pybind11::module_& module);   // ShardMap: used by the node
void bind_node(pybind11::module_& module);
void bind_copy(pybind11::module_& module);         // of a node
void bind_request_log(pybind11::module_& module);  // of a node
