#include "torch/tensors.h"

#include <algorithm>

namespace synface {

using at::Tensor;

Dtype dtype_of_tensor(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Dtype::f64;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    case at::kByte:
      return Dtype::u8;
    default:
      TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat, "expected float32, float64, bfloat16, ",
                        "float16 or uint8, got ", tensor.scalar_type());
      return Dtype::f32;
  }
}

void check_tensor(const Tensor& tensor, const char* name, Dtypes dtypes, at::IntArrayRef shape) {
  const auto fits = [](int64_t came, int64_t wanted) { return wanted == -1 || came == wanted; };
  const bool of_dtype =
      std::find(dtypes.begin(), dtypes.end(), tensor.scalar_type()) != dtypes.end();
  const bool of_shape =
      std::equal(tensor.sizes().begin(), tensor.sizes().end(), shape.begin(), shape.end(), fits);
  TORCH_CHECK_VALUE(of_dtype && of_shape, name, " must be of dtype ", dtypes, " and shape ", shape,
                    " (-1: any size), got ", tensor.scalar_type(), " ", tensor.sizes());
}

Tensor with_contiguous_rows(const Tensor& matrix) {
  TORCH_CHECK_VALUE(matrix.dim() == 2, "expected a matrix, got shape ", matrix.sizes());
  const bool dense = matrix.stride(1) == 1 || matrix.size(1) < 2;
  return dense && matrix.stride(0) >= matrix.size(1) ? matrix : matrix.contiguous();
}

Rows rows_of(const Tensor& matrix) {
  return {.data = matrix.const_data_ptr(),
          .dtype = dtype_of_tensor(matrix),
          .rows = matrix.size(0),
          .cols = matrix.size(1),
          // A single row's stride may be anything, and a GEMM's must not be below its columns.
          .stride = matrix.size(0) < 2 ? matrix.size(1) : matrix.stride(0)};
}

MutableRows mutable_rows_of(const std::optional<Tensor>& matrix, const Tensor& like) {
  if (!matrix) return {};
  TORCH_CHECK_VALUE(
      matrix->sizes() == like.sizes() && (matrix->size(1) < 2 || matrix->stride(1) == 1),
      "expected contiguous rows of shape ", like.sizes());
  return {
      .data = matrix->data_ptr(), .dtype = dtype_of_tensor(*matrix), .stride = matrix->stride(0)};
}

}  // namespace synface
