// Hypersphere repulsion on torch tensors.
#include <algorithm>
#include <cmath>
#include <optional>
#include <string_view>
#include <tuple>
#include <unordered_map>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include "hypersphere_repulsion/cpu.h"
#include "torch/result_memory.h"
#include "torch/runtime.h"
#include "torch/tensors.h"

namespace synface::hypersphere_repulsion {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Points with their inverse norms. If a row is so long that squares or dot products might overflow
// T, the rows are scaled by powers of two, `shrink` (N, 1), which their gradients are then
// multiplied by.
template <class T>
struct PointsOf {
  PointsOf(const Tensor& tensor, const char* name)
      : rows(with_contiguous_rows(tensor)), inverse(at::empty({tensor.size(0)}, at::kDouble)) {
    int64_t bad = find_norms();
    if (bad >= 0) {
      shrink = std::get<0>(tensor.abs().max(1, true)).to(at::kDouble);
      double* most = shrink.data_ptr<double>();
      for (int64_t i = 0; i < tensor.size(0); ++i) {
        const bool is_long = most[i] > 0x1p60 && std::isfinite(most[i]);
        most[i] = is_long ? std::ldexp(1.0, -std::min(std::ilogb(most[i]), 1000)) : 1;
      }
      rows = with_contiguous_rows(tensor.mul(shrink).to(tensor.scalar_type()));
      bad = find_norms();
    }
    TORCH_CHECK_VALUE(bad < 0, name, " must have finite, non-zero rows (norms above ", kNormMin,
                      "), got a norm of ",
                      1 / inverse.const_data_ptr<double>()[std::max<int64_t>(bad, 0)], " in row ",
                      bad);
  }
  // Returns the first row whose norm is out of range, or −1.
  int64_t find_norms() const {
    return inverse_norms<T>(rows_of(rows), torch_runtime(), inverse.data_ptr<double>());
  }
  Points points() const {
    return {.rows = rows_of(rows), .inverse = inverse.const_data_ptr<double>()};
  }
  Tensor rows, inverse, shrink;
};

// Gradients by the points; an empty tensor where none is wanted.
struct GradientTensors {
  // The tensors are of x's and y's shapes and, unless one is given, dtypes.
  GradientTensors(const Tensor& x, const OptionalTensor& y, bool needs_x, bool needs_y,
                  std::optional<at::ScalarType> dtype)
      : x(empty_like(x, needs_x, dtype)), y(empty_like(y ? *y : x, y && needs_y, dtype)) {}

  template <class Data>
  Gradients<Data> data() const {
    const auto data_of = [](const Tensor& to) {
      return to.numel() ? static_cast<Data*>(to.data_ptr()) : nullptr;
    };
    return {.x = data_of(x), .y = data_of(y)};
  }

  Tensor x, y;

 private:
  static Tensor empty_like(const Tensor& like, bool wanted, std::optional<at::ScalarType> dtype) {
    return empty_result(wanted ? like.sizes() : at::IntArrayRef{0},
                        dtype.value_or(like.scalar_type()), false);
  }
};

// Calls run(T(), problem), then scales the gradients, if any, to the unscaled points.
template <class F>
void with_points(const Tensor& x, const OptionalTensor& y, const GradientTensors* gradients,
                 F&& run) {
  const auto unscale = [](const Tensor& gradient, const Tensor& shrink) {
    if (shrink.defined() && gradient.numel()) gradient.mul_(shrink);
  };
  for (const Tensor& points : {x, y.value_or(x)}) {
    check_tensor(points, points.is_same(x) ? "x" : "y", dtypes_beside(x), {-1, -1});
    TORCH_CHECK_VALUE(points.size(1) > 0, "x and y must have D of at least 1, got ",
                      points.sizes());
  }
  with_compute_type(x, [&](auto zero) {
    using T = decltype(zero);
    const PointsOf<T> of_x(x, "x");
    if (y) {
      TORCH_CHECK_VALUE(x.size(1) == y->size(1), "x and y differ in D: ", x.sizes(), " and ",
                        y->sizes());
      const PointsOf<T> of_y(*y, "y");
      const Points points = of_y.points();
      run(zero, Problem{.x = of_x.points(), .y = &points});
      if (gradients) unscale(gradients->y, of_y.shrink);
    } else {
      run(zero, Problem{.x = of_x.points()});
    }
    if (gradients) unscale(gradients->x, of_x.shrink);
  });
}

std::tuple<Tensor, Tensor, Tensor> pairs_of(const Tensor& x, const OptionalTensor& y,
                                            std::string_view kind, double a, int64_t power,
                                            double r_min, bool needs_x_grad, bool needs_y_grad,
                                            bool split_bf16) {
  static const std::unordered_map<std::string_view, Kind> kinds{{"log_sum_exp", Kind::log_sum_exp},
                                                                {"riesz", Kind::riesz},
                                                                {"log", Kind::log},
                                                                {"hinge", Kind::hinge}};
  const auto found = kinds.find(kind);
  TORCH_CHECK_VALUE(found != kinds.end(), "kind must be log_sum_exp, riesz, log or hinge, got ",
                    kind);
  const GradientTensors gradients(x, y, needs_x_grad, needs_y_grad, compute_dtype(x));
  gradients.x.zero_();
  gradients.y.zero_();
  double value = 0;
  with_points(x, y, &gradients, [&](auto zero, const Problem& problem) {
    using T = decltype(zero);
    value = pairs<T>(
        problem,
        {.kind = found->second, .a = a, .power = power, .r_min = r_min, .split_bf16 = split_bf16},
        torch_runtime(), gradients.data<T>());
  });
  return {at::full({}, value, x.options().dtype(at::kDouble)), gradients.x, gradients.y};
}

std::tuple<Tensor, Tensor> nearest_of(const Tensor& x, const OptionalTensor& y, int64_t k) {
  const int64_t others = y ? y->size(0) : x.size(0) - 1;
  TORCH_CHECK_VALUE(k >= 1 && k <= others, "k must be in [1, ", others, "], got ", k);
  Tensor square = at::empty({x.size(0), k}, x.options().dtype(at::kDouble));
  Tensor index = at::empty({x.size(0), k}, x.options().dtype(at::kLong));
  with_points(x, y, nullptr, [&](auto zero, const Problem& problem) {
    nearest<decltype(zero)>(
        problem, k, torch_runtime(),
        {.square = square.data_ptr<double>(), .index = index.data_ptr<int64_t>()});
  });
  return {square, index};
}

std::tuple<Tensor, Tensor> nearest_backward_of(const Tensor& x, const OptionalTensor& y,
                                               const Tensor& index, const Tensor& grad_square,
                                               double r_min, bool needs_x_grad, bool needs_y_grad) {
  check_tensor(index, "index", kLongOnly, {x.size(0), -1});
  check_tensor(grad_square, "grad_square", kDoubleOnly, index.sizes());
  const int64_t others = y ? y->size(0) : x.size(0);
  TORCH_CHECK_VALUE(index.numel() == 0 ||
                        (index.min().item<int64_t>() >= 0 && index.max().item<int64_t>() < others),
                    "index must be in [0, ", others, ")");
  const GradientTensors gradients(x, y, needs_x_grad, needs_y_grad, std::nullopt);
  const Tensor indices = index.contiguous(), gradient = grad_square.contiguous();
  with_points(x, y, &gradients, [&](auto zero, const Problem& problem) {
    nearest_backward<decltype(zero)>(problem,
                                     {.k = index.size(1),
                                      .index = indices.const_data_ptr<int64_t>(),
                                      .grad_square = gradient.const_data_ptr<double>(),
                                      .r_min = r_min},
                                     torch_runtime(), gradients.data<void>());
  });
  return {gradients.x, gradients.y};
}

}  // namespace

TORCH_LIBRARY_IMPL(synface_kernels, CPU, library) {
  library.impl("hypersphere_repulsion_nearest_cpu", nearest_of);
  library.impl("hypersphere_repulsion_nearest_backward_cpu", nearest_backward_of);
  library.impl("hypersphere_repulsion_pairs_cpu", pairs_of);
}

}  // namespace synface::hypersphere_repulsion
