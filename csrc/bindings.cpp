// The CPU implementations of the ops. Their schemas live in Python, beside what they mean.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "gemm/torch_gemm.h"
#include "margin_cross_entropy/cpu.h"
#include "simd/isa.h"

namespace synface {
namespace {

using at::Tensor;

std::string cpu_isa() { return name(isa()); }

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (Isa each : isas()) names.emplace_back(name(each));
  return names;
}

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Dtype::f64;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    default:
      TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat, "expected float32, float64, bfloat16 ",
                        "or float16, got ", tensor.scalar_type());
      return Dtype::f32;
  }
}

// Rows must be contiguous; columns of a larger matrix are copied.
Tensor with_contiguous_rows(const Tensor& matrix) {
  TORCH_CHECK_VALUE(matrix.dim() == 2, "expected a matrix, got shape ", matrix.sizes());
  return matrix.stride(1) == 1 && matrix.stride(0) >= matrix.size(1) ? matrix : matrix.contiguous();
}

Rows rows_of(const Tensor& matrix) {
  return {matrix.const_data_ptr(), dtype_of(matrix), matrix.size(0), matrix.size(1),
          matrix.stride(0)};
}

template <class F>
auto with_statistics_type(const Tensor& input, F&& run) {
  return input.scalar_type() == at::kDouble ? run(double()) : run(float());
}

struct MarginInputs {
  MarginInputs(const Tensor& input, const Tensor& weight, const Tensor& labels, double scale)
      : input(with_contiguous_rows(input)),
        weight(with_contiguous_rows(weight)),
        labels(labels.contiguous()),
        statistics(
            input.options().dtype(input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat)),
        scale(scale) {
    TORCH_CHECK_VALUE(
        labels.dim() == 2 && labels.scalar_type() == at::kLong && labels.size(0) == input.size(0),
        "labels must be int64 (N, K), got ", labels.scalar_type(), " ", labels.sizes());
    TORCH_CHECK_VALUE(input.size(1) == weight.size(1),
                      "input and weight differ in D: ", input.sizes(), " and ", weight.sizes());
  }
  margin_cross_entropy::Problem problem() const {
    return {rows_of(input), rows_of(weight), labels.const_data_ptr<int64_t>(), labels.size(1),
            scale};
  }
  Tensor input, weight, labels;
  at::TensorOptions statistics;
  double scale;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> margin_forward(const Tensor& input, const Tensor& weight,
                                                          const Tensor& labels, double scale,
                                                          bool needs_input_grad) {
  const MarginInputs in(input, weight, labels, scale);
  const int64_t n = input.size(0);
  Tensor lse = at::empty({n}, in.statistics), most = at::empty({n}, in.statistics);
  Tensor cosine = at::empty(labels.sizes(), in.statistics.dtype(at::kDouble));
  Tensor mean = needs_input_grad ? at::empty({n, input.size(1)}, in.statistics)
                                 : at::empty({0}, in.statistics);
  with_statistics_type(input, [&](auto zero) {
    using T = decltype(zero);
    margin_cross_entropy::forward<T>(in.problem(), torch_runtime<T>(), lse.data_ptr<T>(),
                                     most.data_ptr<T>(), cosine.data_ptr<double>(),
                                     needs_input_grad ? mean.data_ptr<T>() : nullptr);
  });
  return {lse, most, cosine, mean};
}

std::tuple<Tensor, Tensor> margin_backward(const Tensor& input, const Tensor& weight,
                                           const Tensor& labels, const Tensor& negative_lse,
                                           const Tensor& mean_center,
                                           const Tensor& grad_negative_lse,
                                           const Tensor& grad_target_cosine, double scale,
                                           bool needs_input_grad, bool needs_weight_grad) {
  const MarginInputs in(input, weight, labels, scale);
  TORCH_CHECK_VALUE(!needs_input_grad || mean_center.sizes() == input.sizes(),
                    "mean_center must be of input's shape, got ", mean_center.sizes());
  const auto empty = [](bool wanted, const Tensor& like) {
    return wanted
               ? at::empty(like.sizes(), like.options().memory_format(at::MemoryFormat::Contiguous))
               : at::empty({0}, like.options());
  };
  Tensor grad_input = empty(needs_input_grad, input),
         grad_weight = empty(needs_weight_grad, weight);
  const Tensor lse = negative_lse.contiguous(), mean = mean_center.contiguous(),
               grad_lse = grad_negative_lse.contiguous(),
               grad_cosine = grad_target_cosine.contiguous();
  with_statistics_type(input, [&](auto zero) {
    using T = decltype(zero);
    margin_cross_entropy::backward<T>(in.problem(), torch_runtime<T>(), lse.const_data_ptr<T>(),
                                      mean.const_data_ptr<T>(), grad_lse.const_data_ptr<T>(),
                                      grad_cosine.const_data_ptr<double>(),
                                      needs_input_grad ? grad_input.data_ptr() : nullptr,
                                      needs_weight_grad ? grad_weight.data_ptr() : nullptr);
  });
  return {grad_input, grad_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(synface_kernels, CPU, library) {
  library.impl("margin_cross_entropy_forward_cpu", margin_forward);
  library.impl("margin_cross_entropy_backward_cpu", margin_backward);
}

TORCH_LIBRARY_IMPL(synface_kernels, CompositeExplicitAutograd, library) {
  library.impl("_cpu_isa", cpu_isa);
  library.impl("_cpu_isas", cpu_isas);
}

}  // namespace synface
