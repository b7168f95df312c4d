// The margin softmax on torch tensors. Functions that are registered have the parameters of their
// schemas, in order; they name them at once and pass structures on.
#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "margin_cross_entropy/cpu.h"
#include "row_update/cpu.h"
#include "torch/result_memory.h"
#include "torch/row_checks.h"
#include "torch/runtime.h"
#include "torch/tensors.h"

namespace synface::margin_cross_entropy {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Arguments {
  const Tensor &input, &weight;
  const OptionalTensor& class_ids;
  const Tensor& labels;
  double scale, limit;
  bool split_bf16;
  std::optional<at::ScalarType> gemm_dtype;
};

// The dtype that GEMM operands are rounded to; none: as the tensors' dtypes have it.
std::optional<Dtype> gemm_dtype_of(const Arguments& a) {
  if (!a.gemm_dtype) return std::nullopt;
  const bool is_half = *a.gemm_dtype == at::kBFloat16 || *a.gemm_dtype == at::kHalf;
  TORCH_CHECK_VALUE(is_half && a.input.scalar_type() != at::kDouble,
                    "gemm_dtype must be bfloat16 or float16, and None for float64 tensors, got ",
                    *a.gemm_dtype, " for ", a.input.scalar_type());
  return *a.gemm_dtype == at::kHalf ? Dtype::f16 : Dtype::bf16;
}

// Tensors of the forward pass, in the memory order that the kernel takes.
struct Inputs {
  explicit Inputs(const Arguments& a)
      : sub_centers(a.weight.dim() == 3 ? a.weight.size(1) : 1),
        input(with_contiguous_rows(a.input)),
        weight(with_contiguous_rows(a.weight.dim() == 3 ? a.weight.flatten(0, 1) : a.weight)),
        class_ids(contiguous_or_undefined(a.class_ids)),
        labels(a.labels.contiguous()),
        scale(a.scale),
        limit(a.limit),
        split_bf16(a.split_bf16),
        gemm_dtype(gemm_dtype_of(a)) {
    const int64_t n = input.size(0), d = input.size(1);
    check_tensor(input, "input", dtypes_beside(input), {-1, -1});
    check_tensor(weight, "weight", dtypes_beside(input), {-1, -1});
    check_tensor(labels, "labels", kLongOnly, {n, -1});
    TORCH_CHECK_VALUE(d == weight.size(1) && d > 0 && a.weight.size(0) > 0 && sub_centers > 0,
                      "input and weight differ in D: ", input.sizes(), " and ", a.weight.sizes());
    if (class_ids.defined()) {
      check_tensor(class_ids, "class_ids", kLongOnly, {-1});
      TORCH_CHECK_VALUE(class_ids.numel() > 0, "class_ids must name a class, got none");
    }
  }
  int64_t classes() const {
    return class_ids.defined() ? class_ids.numel() : weight.size(0) / sub_centers;
  }
  Problem problem() const {
    return {.input = rows_of(input),
            .weight = rows_of(weight),
            .sub_centers = sub_centers,
            .class_ids = data_or_null<int64_t>(class_ids),
            .classes = classes(),
            .labels = labels.const_data_ptr<int64_t>(),
            .labels_per_row = labels.size(1),
            .scale = scale,
            .limit = limit,
            .split_bf16 = split_bf16,
            .gemm_dtype = gemm_dtype};
  }
  int64_t sub_centers;
  Tensor input, weight, class_ids, labels;
  double scale, limit;
  bool split_bf16;
  std::optional<Dtype> gemm_dtype;
};

// The `workspace` of cosines that are saved in the memory of the centers' gradient.
constexpr int64_t kInGradient = -1;

// Size of the centers' gradient: a row for each class that is used.
std::vector<int64_t> gradient_size(const Inputs& in, const Tensor& weight) {
  std::vector<int64_t> size = weight.sizes().vec();
  size[0] = in.classes();
  return size;
}

Tensor empty_gradient(const Inputs& in, const Tensor& weight) {
  return empty_result(gradient_size(in, weight), weight.scalar_type(), false);
}

// Room for cosines in the memory of the centers' gradient; T may be const.
template <class T>
SavedCosines<T> in_gradient(const Inputs& in, void* rows) {
  const int64_t bytes_of_row = in.weight.size(1) * in.weight.element_size(), each = sizeof(T),
                stride = bytes_of_row % each == 0 ? bytes_of_row / each : 0;
  return {.cosines = static_cast<T*>(rows),
          .stride = stride,
          .classes = in.classes(),
          .embeddings = std::min({stride, kBlock, in.input.size(0)}),
          .in_gradient = true};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward_of(
    const Tensor& input, const Tensor& weight, const OptionalTensor& class_ids,
    const Tensor& labels, double scale, double limit, bool needs_input_grad, bool needs_cosine_sum,
    int64_t workspace, bool split_bf16, std::optional<at::ScalarType> gemm_dtype) {
  const Inputs in({.input = input,
                   .weight = weight,
                   .class_ids = class_ids,
                   .labels = labels,
                   .scale = scale,
                   .limit = limit,
                   .split_bf16 = split_bf16,
                   .gemm_dtype = gemm_dtype});
  const int64_t n = input.size(0), d = input.size(1);
  const at::TensorOptions statistics = input.options().dtype(compute_dtype(input)),
                          exact = statistics.dtype(at::kDouble);
  const bool filters = limit < std::numeric_limits<double>::infinity();
  Tensor lse = at::empty({n}, exact), most = at::empty({n}, statistics),
         cosine = at::empty(labels.sizes(), exact), filtered = at::empty({filters ? n : 0}, exact),
         sum = at::empty({needs_cosine_sum ? n : 0}, exact),
         mean = needs_input_grad ? at::empty({n, d}, statistics) : at::empty({0}, statistics),
         center_sum = at::empty({needs_cosine_sum ? d : 0}, exact);
  const auto class_bytes = int64_t(in.sub_centers * n * statistics.dtype().itemsize());
  const int64_t saved = std::min(in.classes(), workspace / std::max<int64_t>(1, class_bytes));
  const bool early = workspace == kInGradient;
  Tensor cosines = early ? empty_gradient(in, weight)
                         : empty_result({saved * in.sub_centers, n}, compute_dtype(input), false);
  with_compute_type(input, [&](auto zero) {
    using T = decltype(zero);
    const auto if_wanted = [](bool wanted, auto* data) { return wanted ? data : nullptr; };
    forward<T>(in.problem(), torch_runtime(),
               {.negative_lse = lse.data_ptr<double>(),
                .negative_max = most.data_ptr<T>(),
                .target_cosine = cosine.data_ptr<double>(),
                .filtered = if_wanted(filters, filtered.data_ptr<double>()),
                .cosine_sum = if_wanted(needs_cosine_sum, sum.data_ptr<double>()),
                .mean_center = if_wanted(needs_input_grad, mean.data_ptr<T>()),
                .center_sum = if_wanted(needs_cosine_sum, center_sum.data_ptr<double>()),
                .saved = early ? in_gradient<T>(in, cosines.data_ptr())
                               : SavedCosines<T>{.cosines = cosines.data_ptr<T>(),
                                                 .stride = n,
                                                 .classes = saved,
                                                 .embeddings = n}});
  });
  return {lse, most, cosine, filtered, sum, mean, center_sum, cosines};
}

// Statistics of the forward pass that backward reads, and their gradients.
struct UpstreamTensors {
  const Tensor &negative_lse, &mean_center, &center_sum, &saved;
  const Tensor &grad_negative_lse, &grad_target_cosine, &grad_cosine_sum;
};

// A backward pass, with or without the optimizer's step.
struct Backward {
  Backward(const Arguments& arguments, const UpstreamTensors& from, bool needs_input_grad)
      : in(arguments),
        lse(from.negative_lse.contiguous()),
        mean(from.mean_center.contiguous()),
        center_sum(from.center_sum.contiguous()),
        cosines(from.saved.contiguous()),
        grad_lse(from.grad_negative_lse.contiguous()),
        grad_cosine(from.grad_target_cosine.contiguous()),
        grad_sum(from.grad_cosine_sum.contiguous()),
        grad_input(empty_result(needs_input_grad ? in.input.sizes() : at::IntArrayRef{0},
                                in.input.scalar_type(), false)) {
    const int64_t n = in.input.size(0), d = in.input.size(1);
    check_tensor(lse, "negative_lse", kDoubleOnly, {n});
    check_tensor(grad_lse, "grad_negative_lse", kDoubleOnly, {n});
    check_tensor(grad_cosine, "grad_target_cosine", kDoubleOnly, in.labels.sizes());
    TORCH_CHECK_VALUE(!needs_input_grad || mean.sizes() == in.input.sizes(),
                      "mean_center must be of input's shape, got ", mean.sizes());
    TORCH_CHECK_VALUE(center_sum.numel() == 0 || (center_sum.numel() == d && grad_sum.numel() == n),
                      "center_sum must be (D,) and grad_cosine_sum (N,), got ", center_sum.sizes(),
                      " and ", grad_sum.sizes());
  }
  // Writes the centers' gradient to grad_rows unless that is empty, or passes it to `on_tile`.
  void run(const Tensor& grad_rows, const GradTileCallback& on_tile = {}) const {
    const int64_t n = in.input.size(0);
    const bool over = grad_rows.is_same(cosines);
    TORCH_CHECK_VALUE(over || (cosines.dim() == 2 && cosines.size(1) == n &&
                               cosines.size(0) <= in.classes() * in.sub_centers),
                      "saved cosines must be of at most C·M centers and N embeddings, got ",
                      cosines.sizes());
    with_compute_type(in.input, [&](auto zero) {
      using T = decltype(zero);
      const auto if_any = [](const Tensor& to) { return to.numel() ? to.data_ptr() : nullptr; };
      const SavedCosines<const T> saved =
          over ? in_gradient<const T>(in, grad_rows.data_ptr())
               : SavedCosines<const T>{.cosines = cosines.const_data_ptr<T>(),
                                       .stride = n,
                                       .classes = cosines.size(0) / in.sub_centers,
                                       .embeddings = n};
      backward<T>(
          in.problem(), torch_runtime(),
          {.negative_lse = lse.const_data_ptr<double>(),
           .mean_center = mean.const_data_ptr<T>(),
           .center_sum = center_sum.const_data_ptr<double>(),
           .grad_negative_lse = grad_lse.const_data_ptr<double>(),
           .grad_target_cosine = grad_cosine.const_data_ptr<double>(),
           .grad_cosine_sum = center_sum.numel() ? grad_sum.const_data_ptr<double>() : nullptr,
           .saved = saved},
          {.input = if_any(grad_input), .rows = if_any(grad_rows), .on_tile = on_tile});
    });
  }
  Inputs in;
  Tensor lse, mean, center_sum, cosines, grad_lse, grad_cosine, grad_sum, grad_input;
};

std::tuple<Tensor, Tensor> backward_of(const Tensor& input, const Tensor& weight,
                                       const OptionalTensor& class_ids, const Tensor& labels,
                                       const Tensor& negative_lse, const Tensor& mean_center,
                                       const Tensor& center_sum, const Tensor& saved,
                                       const Tensor& grad_negative_lse,
                                       const Tensor& grad_target_cosine,
                                       const Tensor& grad_cosine_sum, double scale, double limit,
                                       bool needs_input_grad, bool needs_weight_grad,
                                       bool split_bf16, std::optional<at::ScalarType> gemm_dtype) {
  const Backward backward({.input = input,
                           .weight = weight,
                           .class_ids = class_ids,
                           .labels = labels,
                           .scale = scale,
                           .limit = limit,
                           .split_bf16 = split_bf16,
                           .gemm_dtype = gemm_dtype},
                          {.negative_lse = negative_lse,
                           .mean_center = mean_center,
                           .center_sum = center_sum,
                           .saved = saved,
                           .grad_negative_lse = grad_negative_lse,
                           .grad_target_cosine = grad_target_cosine,
                           .grad_cosine_sum = grad_cosine_sum},
                          needs_input_grad);
  const Tensor grad_rows = needs_weight_grad
                               ? empty_gradient(backward.in, weight)
                               : empty_result(at::IntArrayRef{0}, weight.scalar_type(), false);
  backward.run(grad_rows);
  return {backward.grad_input, grad_rows};
}

// The backward pass where the cosines were saved in the memory of the centers' gradient, which it
// writes over them.
Tensor backward_over(const Tensor& input, const Tensor& weight, const OptionalTensor& class_ids,
                     const Tensor& labels, const Tensor& negative_lse, const Tensor& mean_center,
                     const Tensor& center_sum, const Tensor& saved, const Tensor& grad_negative_lse,
                     const Tensor& grad_target_cosine, const Tensor& grad_cosine_sum, double scale,
                     double limit, bool needs_input_grad, bool split_bf16,
                     std::optional<at::ScalarType> gemm_dtype) {
  const Backward backward({.input = input,
                           .weight = weight,
                           .class_ids = class_ids,
                           .labels = labels,
                           .scale = scale,
                           .limit = limit,
                           .split_bf16 = split_bf16,
                           .gemm_dtype = gemm_dtype},
                          {.negative_lse = negative_lse,
                           .mean_center = mean_center,
                           .center_sum = center_sum,
                           .saved = saved,
                           .grad_negative_lse = grad_negative_lse,
                           .grad_target_cosine = grad_target_cosine,
                           .grad_cosine_sum = grad_cosine_sum},
                          needs_input_grad);
  TORCH_CHECK_VALUE(saved.sizes() == gradient_size(backward.in, weight) &&
                        saved.scalar_type() == weight.scalar_type() && saved.is_contiguous(),
                    "saved must be contiguous, of weight's dtype and a row for each class, got ",
                    saved.scalar_type(), " ", saved.sizes());
  TORCH_CHECK_VALUE(
      reinterpret_cast<uintptr_t>(saved.const_data_ptr()) % at::elementSize(compute_dtype(input)) ==
          0,
      "saved must be aligned for cosines of dtype ", compute_dtype(input));
  backward.run(saved);
  return backward.grad_input;
}

// An optimizer step on the weight's rows, one tile of classes at a time.
struct Step {
  std::string_view rule;
  at::TensorList states;
  at::ArrayRef<double> numbers;  // the rule's options, in the order of its structure
  int64_t missed;                // the most steps that a row has missed

  // Calls run(take), where take(tile) is the step on a tile.
  template <class T, class F>
  void with(const Tensor& matrix, F&& run) const {
    const Runtime runtime = one_thread();
    const auto state = [&](size_t i) {
      return mutable_rows_of(i < states.size() ? std::optional(states[i]) : std::nullopt, matrix);
    };
    TORCH_CHECK_VALUE(numbers.size() == 5, "numbers must be 5, got ", numbers.size());
    if (rule == "sgd") {
      const row_update::Sgd options{.lr = numbers[0],
                                    .momentum = numbers[1],
                                    .weight_decay = numbers[2],
                                    .dampening = numbers[3],
                                    .nesterov = numbers[4] != 0};
      run([&](const row_update::Problem& tile) {
        row_update::sgd<T>(tile, state(0), options, runtime);
      });
    } else {
      TORCH_CHECK_VALUE(rule == "adamw" && states.size() == 2,
                        "rule must be sgd or adamw, with its states, got ", rule);
      row_update::check_betas(numbers[1], numbers[2], 1 - numbers[0] * numbers[4], missed);
      const row_update::AdamW options{.lr = numbers[0],
                                      .beta1 = numbers[1],
                                      .beta2 = numbers[2],
                                      .eps = numbers[3],
                                      .weight_decay = numbers[4]};
      run([&](const row_update::Problem& tile) {
        row_update::adamw<T>(tile, state(0), state(1), options, runtime);
      });
    }
  }
};

Tensor update_of(const Tensor& input, const Tensor& weight, const OptionalTensor& class_ids,
                 const Tensor& labels, const Tensor& negative_lse, const Tensor& mean_center,
                 const Tensor& center_sum, const Tensor& saved, const Tensor& grad_negative_lse,
                 const Tensor& grad_target_cosine, const Tensor& grad_cosine_sum, double scale,
                 double limit, bool needs_input_grad, bool split_bf16, std::string_view rule,
                 at::TensorList states, const OptionalTensor& last_step,
                 at::ArrayRef<double> numbers, int64_t step, std::optional<int64_t> seed,
                 std::optional<at::ScalarType> gemm_dtype) {
  const Backward backward({.input = input,
                           .weight = weight,
                           .class_ids = class_ids,
                           .labels = labels,
                           .scale = scale,
                           .limit = limit,
                           .split_bf16 = split_bf16,
                           .gemm_dtype = gemm_dtype},
                          {.negative_lse = negative_lse,
                           .mean_center = mean_center,
                           .center_sum = center_sum,
                           .saved = saved,
                           .grad_negative_lse = grad_negative_lse,
                           .grad_target_cosine = grad_target_cosine,
                           .grad_cosine_sum = grad_cosine_sum},
                          needs_input_grad);
  const Tensor matrix = weight.flatten(1);
  for (const Tensor& view : {matrix, backward.in.weight}) {
    TORCH_CHECK_VALUE(view.const_data_ptr() == weight.const_data_ptr(),
                      "weight must have contiguous rows, got strides ", weight.strides());
  }
  const MutableRows rows = mutable_rows_of(matrix, matrix);
  row_update::check_states(matrix, states, last_step, step);
  const Tensor& class_ids_used = backward.in.class_ids;
  const auto* ids = data_or_null<int64_t>(class_ids_used);
  if (ids) row_update::check_rising(class_ids_used, weight.size(0));
  const int64_t missed = row_update::check_last_steps(
      last_step, ids ? std::optional(class_ids_used) : std::nullopt, step);
  const Step of_rule{.rule = rule, .states = states, .numbers = numbers, .missed = missed};
  with_compute_type(weight, [&](auto zero) {
    of_rule.with<decltype(zero)>(matrix, [&](const auto& take_step) {
      backward.run({}, [&](Range classes, const void* gradient) {
        std::vector<int64_t> all(ids ? 0 : size_t(classes.size()));
        std::iota(all.begin(), all.end(), classes.begin);
        take_step({.weight = rows,
                   .gradient = {.data = gradient,
                                .dtype = rows.dtype,
                                .rows = classes.size(),
                                .cols = matrix.size(1),
                                .stride = matrix.size(1)},
                   .class_ids = ids ? ids + classes.begin : all.data(),
                   .count = classes.size(),
                   .cols = matrix.size(1),
                   .step = step,
                   .last_step = last_step ? last_step->data_ptr() : nullptr,
                   .long_steps = last_step && last_step->scalar_type() == at::kLong,
                   .stochastic = seed.has_value(),
                   .seed = uint64_t(seed.value_or(0))});
      });
    });
  });
  return backward.grad_input;
}

}  // namespace

TORCH_LIBRARY_IMPL(synface_kernels, CPU, library) {
  library.impl("margin_cross_entropy_forward_cpu", forward_of);
  library.impl("margin_cross_entropy_backward_cpu", backward_of);
  library.impl("margin_cross_entropy_backward_over_cpu", backward_over);
  library.impl("margin_cross_entropy_update_cpu", update_of);
}

}  // namespace synface::margin_cross_entropy
