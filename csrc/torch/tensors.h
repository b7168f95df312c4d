// Tensors as the matrices that kernels take.
#pragma once

#include <optional>
#include <utility>

#include <ATen/core/Tensor.h>

#include "common/rows.h"

namespace synface {

Dtype dtype_of_tensor(const at::Tensor& tensor);

// Dtypes that an argument may have beside float64, and with float64 tensors.
using Dtypes = at::ArrayRef<at::ScalarType>;
inline constexpr at::ScalarType kUpToSingle[] = {at::kFloat, at::kBFloat16, at::kHalf};
inline constexpr at::ScalarType kDoubleOnly[] = {at::kDouble};
inline constexpr at::ScalarType kLongOnly[] = {at::kLong};

// Returns the floating dtypes that go together with an input's: float64 alone, or the others.
inline Dtypes dtypes_beside(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? Dtypes(kDoubleOnly) : Dtypes(kUpToSingle);
}

// Raises ValueError unless the tensor is of one of these dtypes and of this shape; −1: any size.
void check_tensor(const at::Tensor& tensor, const char* name, Dtypes dtypes, at::IntArrayRef shape);

// Returns the matrix, or a copy unless its rows are contiguous.
at::Tensor with_contiguous_rows(const at::Tensor& matrix);

Rows rows_of(const at::Tensor& matrix);

// Rows of a matrix that is written, of the shape of `like`; none without a tensor.
MutableRows mutable_rows_of(const std::optional<at::Tensor>& matrix, const at::Tensor& like);

// Calls run(T()) with T double for float64 input, otherwise float: the type of the arithmetic.
template <class F>
auto with_compute_type(const at::Tensor& input, F&& run) {
  return input.scalar_type() == at::kDouble ? run(double()) : run(float());
}

inline at::ScalarType compute_dtype(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Returns the data of an optional input, or null.
template <class T>
const T* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

// Returns the tensor in contiguous memory; undefined without one.
inline at::Tensor contiguous_or_undefined(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->contiguous() : at::Tensor();
}

}  // namespace synface
