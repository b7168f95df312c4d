// NumPy arrays as the matrices that kernels take.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <type_traits>

#include "common/rows.h"

namespace synface {

namespace py = pybind11;

// Defines the functions of an op.
void define_domain_mixup(py::module_& module);
void define_margin_cross_entropy(py::module_& module);

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
Rows rows_of(const Array<T>& matrix) {
  return {.data = matrix.data(),
          .dtype = dtype_of<T>,
          .rows = matrix.shape(0),
          .cols = matrix.shape(1),
          .stride = matrix.shape(1)};
}

}  // namespace synface
