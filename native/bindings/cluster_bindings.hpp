// What Python says of a cluster, as the data plane wants it.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "feature_cache/cluster.hpp"

namespace fc::bindings {

template <class Number>
using Array = pybind11::array_t<Number, pybind11::array::c_style | pybind11::array::forcecast>;

template <class Number>
std::vector<Number> to_vector(const Array<Number>& array) {
  if (array.ndim() != 1) throw pybind11::value_error("an array of one dimension is wanted");
  return {array.data(), array.data() + array.size()};
}

// [(namespace, [key, ...]), ...]
pybind11::list columns_of(const RecentWrites& writes);

}  // namespace fc::bindings
