// row_sgd_ and row_adamw_ on torch tensors.
#include <optional>

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "row_update/cpu.h"
#include "torch/row_checks.h"
#include "torch/runtime.h"
#include "torch/tensors.h"

namespace synface::row_update {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Tensors of an update, in the memory order that the kernel takes.
struct Inputs {
  Inputs(const Tensor& weight, const OptionalTensor& row_grad, const Tensor& class_ids)
      : weight(weight),
        gradient(row_grad ? with_contiguous_rows(*row_grad) : Tensor()),
        class_ids(class_ids.contiguous()) {
    check_tensor(class_ids, "class_ids", kLongOnly, {-1});
    check_rising(this->class_ids, weight.size(0));
    if (row_grad) {
      check_tensor(*row_grad, "row_grad", dtypes_beside(weight),
                   {class_ids.numel(), weight.size(1)});
    }
  }
  Problem problem(const OptionalTensor& last_step, int64_t step,
                  std::optional<int64_t> seed) const {
    return {.weight = mutable_rows_of(weight, weight),
            .gradient = gradient.defined() ? rows_of(gradient) : Rows{},
            .class_ids = class_ids.const_data_ptr<int64_t>(),
            .count = class_ids.numel(),
            .cols = weight.size(1),
            .step = step,
            .last_step = last_step ? last_step->data_ptr() : nullptr,
            .long_steps = last_step && last_step->scalar_type() == at::kLong,
            .stochastic = seed.has_value(),
            .seed = uint64_t(seed.value_or(0))};
  }
  Tensor weight, gradient, class_ids;
};

void sgd_step(const Tensor& weight, const OptionalTensor& row_grad, const Tensor& class_ids,
              const OptionalTensor& momentum_buffer, const OptionalTensor& last_step, double lr,
              double momentum, double weight_decay, double dampening, bool nesterov, int64_t step,
              std::optional<int64_t> seed) {
  check_states(weight, momentum_buffer ? at::TensorList(*momentum_buffer) : at::TensorList(),
               last_step, step);
  const Inputs in(weight, row_grad, class_ids);
  check_last_steps(last_step, in.class_ids, step);
  const Problem problem = in.problem(last_step, step, seed);
  with_compute_type(weight, [&](auto zero) {
    sgd<decltype(zero)>(problem, mutable_rows_of(momentum_buffer, weight),
                        {.lr = lr,
                         .momentum = momentum,
                         .weight_decay = weight_decay,
                         .dampening = dampening,
                         .nesterov = nesterov},
                        torch_runtime());
  });
}

void adamw_step(const Tensor& weight, const OptionalTensor& row_grad, const Tensor& class_ids,
                const Tensor& exp_avg, const Tensor& exp_avg_sq, const OptionalTensor& last_step,
                double lr, double beta1, double beta2, double eps, double weight_decay,
                int64_t step, std::optional<int64_t> seed) {
  check_states(weight, {exp_avg, exp_avg_sq}, last_step, step);
  const Inputs in(weight, row_grad, class_ids);
  const int64_t missed = check_last_steps(last_step, in.class_ids, step);
  check_betas(beta1, beta2, 1 - lr * weight_decay, missed);
  const Problem problem = in.problem(last_step, step, seed);
  with_compute_type(weight, [&](auto zero) {
    adamw<decltype(zero)>(
        problem, mutable_rows_of(exp_avg, weight), mutable_rows_of(exp_avg_sq, weight),
        {.lr = lr, .beta1 = beta1, .beta2 = beta2, .eps = eps, .weight_decay = weight_decay},
        torch_runtime());
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(synface_kernels, CPU, library) {
  library.impl("row_update_adamw_cpu", adamw_step);
  library.impl("row_update_sgd_cpu", sgd_step);
}

}  // namespace synface::row_update
