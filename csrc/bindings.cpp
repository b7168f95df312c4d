// The CPU implementations of the ops. Their schemas live in Python, beside what they mean.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string_view>
#include <unordered_map>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include "domain_mixup/cpu.h"
#include "torch_runtime.h"
#include "hypersphere_repulsion/cpu.h"
#include "margin_cross_entropy/cpu.h"
#include "result_memory.h"
#include "row_update/cpu.h"
#include "sample_classes/cpu.h"
#include "simd/isa.h"

#ifdef SYNFACE_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "domain_mixup/cuda.h"
#endif

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
    case at::kByte:
      return Dtype::u8;
    default:
      TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat, "expected float32, float64, bfloat16, ",
                        "float16 or uint8, got ", tensor.scalar_type());
      return Dtype::f32;
  }
}

// Rows must be contiguous; columns of a larger matrix are copied.
Tensor with_contiguous_rows(const Tensor& matrix) {
  TORCH_CHECK_VALUE(matrix.dim() == 2, "expected a matrix, got shape ", matrix.sizes());
  const bool dense = matrix.stride(1) == 1 || matrix.size(1) < 2;
  return dense && matrix.stride(0) >= matrix.size(1) ? matrix : matrix.contiguous();
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
  MarginInputs(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& class_ids,
               const Tensor& labels, double scale, double limit, bool halves)
      : sub_centers(weight.dim() == 3 ? weight.size(1) : 1),
        input(with_contiguous_rows(input)),
        weight(with_contiguous_rows(weight.dim() == 3 ? weight.flatten(0, 1) : weight)),
        class_ids(class_ids ? class_ids->contiguous() : Tensor()),
        labels(labels.contiguous()),
        statistics(
            input.options().dtype(input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat)),
        scale(scale),
        limit(limit),
        halves(halves) {
    TORCH_CHECK_VALUE(
        labels.dim() == 2 && labels.scalar_type() == at::kLong && labels.size(0) == input.size(0),
        "labels must be int64 (N, K), got ", labels.scalar_type(), " ", labels.sizes());
    TORCH_CHECK_VALUE(input.size(1) == weight.size(-1) && weight.size(0) > 0 && sub_centers > 0,
                      "input and weight differ in D: ", input.sizes(), " and ", weight.sizes());
    TORCH_CHECK_VALUE(!class_ids || class_ids->dim() == 1, "class_ids must be int64 (S,)");
  }
  int64_t classes() const {
    return class_ids.defined() ? class_ids.numel() : weight.size(0) / sub_centers;
  }
  margin_cross_entropy::Problem problem() const {
    return {rows_of(input), rows_of(weight),
            sub_centers,    class_ids.defined() ? class_ids.const_data_ptr<int64_t>() : nullptr,
            classes(),      labels.const_data_ptr<int64_t>(),
            labels.size(1), scale,
            limit,          halves};
  }
  int64_t sub_centers;
  Tensor input, weight, class_ids, labels;
  at::TensorOptions statistics;
  double scale, limit;
  bool halves;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> margin_forward(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& class_ids,
    const Tensor& labels, double scale, double limit, bool needs_input_grad, bool needs_cosine_sum,
    int64_t workspace, bool halves) {
  const MarginInputs in(input, weight, class_ids, labels, scale, limit, halves);
  const int64_t n = input.size(0), d = input.size(1);
  const at::TensorOptions statistics = in.statistics, exact = statistics.dtype(at::kDouble);
  const bool filters = limit < std::numeric_limits<double>::infinity();
  Tensor lse = at::empty({n}, exact), most = at::empty({n}, statistics),
         cosine = at::empty(labels.sizes(), exact), filtered = at::empty({filters ? n : 0}, exact),
         sum = at::empty({needs_cosine_sum ? n : 0}, exact),
         mean = needs_input_grad ? at::empty({n, d}, statistics) : at::empty({0}, statistics),
         center_sum = at::empty({needs_cosine_sum ? d : 0}, exact);
  const auto class_bytes = int64_t(in.sub_centers * n * statistics.dtype().itemsize());
  const int64_t kept = std::min(in.classes(), workspace / std::max<int64_t>(1, class_bytes));
  Tensor cosines =
      empty_result({kept * in.sub_centers, n}, statistics.dtype().toScalarType(), false);
  with_statistics_type(input, [&](auto zero) {
    using T = decltype(zero);
    const auto if_asked = [](bool asked, auto* data) { return asked ? data : nullptr; };
    margin_cross_entropy::forward<T>(in.problem(), torch_runtime(),
                                     {lse.data_ptr<double>(),
                                      most.data_ptr<T>(),
                                      cosine.data_ptr<double>(),
                                      if_asked(filters, filtered.data_ptr<double>()),
                                      if_asked(needs_cosine_sum, sum.data_ptr<double>()),
                                      if_asked(needs_input_grad, mean.data_ptr<T>()),
                                      if_asked(needs_cosine_sum, center_sum.data_ptr<double>()),
                                      {cosines.data_ptr<T>(), kept}});
  });
  return {lse, most, cosine, filtered, sum, mean, center_sum, cosines};
}

// What the backward passes share.
struct MarginBackward {
  MarginBackward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& class_ids,
                 const Tensor& labels, const Tensor& negative_lse, const Tensor& mean_center,
                 const Tensor& center_sum, const Tensor& kept, const Tensor& grad_negative_lse,
                 const Tensor& grad_target_cosine, const Tensor& grad_cosine_sum, double scale,
                 double limit, bool needs_input_grad, bool halves)
      : in(input, weight, class_ids, labels, scale, limit, halves),
        lse(negative_lse.contiguous()),
        mean(mean_center.contiguous()),
        all(center_sum.contiguous()),
        cosines(kept.contiguous()),
        grad_lse(grad_negative_lse.contiguous()),
        grad_cosine(grad_target_cosine.contiguous()),
        grad_sum(grad_cosine_sum.contiguous()),
        grad_input(empty_result(needs_input_grad ? input.sizes() : at::IntArrayRef{0},
                                input.scalar_type(), false)) {
    TORCH_CHECK_VALUE(!needs_input_grad || mean.sizes() == input.sizes(),
                      "mean_center must be of input's shape, got ", mean.sizes());
    TORCH_CHECK_VALUE(
        all.numel() == 0 || (all.numel() == input.size(1) && grad_sum.numel() == input.size(0)),
        "center_sum must be (D,) and grad_cosine_sum (N,), got ", all.sizes(), " and ",
        grad_sum.sizes());
    TORCH_CHECK_VALUE(kept.dim() == 2 && kept.size(1) == input.size(0) &&
                          kept.size(0) <= in.classes() * in.sub_centers,
                      "kept must be of cosines with N embeddings, got ", kept.sizes());
  }
  // Of the centers, into grad_rows if that is not empty, or to `take`.
  void run(const Tensor& grad_rows, const margin_cross_entropy::TakeRows& take = {}) const {
    with_statistics_type(in.input, [&](auto zero) {
      using T = decltype(zero);
      const auto if_any = [](const Tensor& to) { return to.numel() ? to.data_ptr() : nullptr; };
      margin_cross_entropy::backward<T>(
          in.problem(), torch_runtime(),
          {lse.const_data_ptr<double>(),
           mean.const_data_ptr<T>(),
           all.const_data_ptr<double>(),
           grad_lse.const_data_ptr<double>(),
           grad_cosine.const_data_ptr<double>(),
           all.numel() ? grad_sum.const_data_ptr<double>() : nullptr,
           {cosines.const_data_ptr<T>(), cosines.size(0) / in.sub_centers}},
          if_any(grad_input), if_any(grad_rows), take);
    });
  }
  MarginInputs in;
  Tensor lse, mean, all, cosines, grad_lse, grad_cosine, grad_sum, grad_input;
};

std::tuple<Tensor, Tensor> margin_backward(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& class_ids,
    const Tensor& labels, const Tensor& negative_lse, const Tensor& mean_center,
    const Tensor& center_sum, const Tensor& kept, const Tensor& grad_negative_lse,
    const Tensor& grad_target_cosine, const Tensor& grad_cosine_sum, double scale, double limit,
    bool needs_input_grad, bool needs_weight_grad, bool halves) {
  const MarginBackward backward(input, weight, class_ids, labels, negative_lse, mean_center,
                                center_sum, kept, grad_negative_lse, grad_target_cosine,
                                grad_cosine_sum, scale, limit, needs_input_grad, halves);
  std::vector<int64_t> rows = weight.sizes().vec();
  rows[0] = backward.in.classes();
  const Tensor grad_rows = empty_result(
      needs_weight_grad ? at::IntArrayRef(rows) : at::IntArrayRef{0}, weight.scalar_type(), false);
  backward.run(grad_rows);
  return {backward.grad_input, grad_rows};
}

using hypersphere_repulsion::Points;

// Rows with their inverse norms. Where a row is so long that squares or products might leave T's
// range, rows are taken times powers of two, `shrink` (N, 1), as gradients by them then must be.
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
      rows = tensor.mul(shrink).to(tensor.scalar_type());
      bad = find_norms();
    }
    TORCH_CHECK_VALUE(bad < 0, name, " must have finite, non-zero rows, got a norm of ",
                      1 / inverse.const_data_ptr<double>()[std::max<int64_t>(bad, 0)], " in row ",
                      bad);
  }
  int64_t find_norms() const {
    return hypersphere_repulsion::inverse_norms<T>(rows_of(rows), torch_runtime(),
                                                   inverse.data_ptr<double>());
  }
  Points points() const { return {rows_of(rows), inverse.const_data_ptr<double>()}; }
  Tensor rows, inverse, shrink;
};

// run(T(), problem), which may fill gradients, or leave them empty.
template <class F>
void with_points(const Tensor& x, const std::optional<Tensor>& y, const Tensor& grad_x,
                 const Tensor& grad_y, F&& run) {
  with_statistics_type(x, [&](auto zero) {
    using T = decltype(zero);
    const PointsOf<T> of_x(x, "x");
    if (y) {
      TORCH_CHECK_VALUE(x.size(1) == y->size(1), "x and y differ in D: ", x.sizes(), " and ",
                        y->sizes());
      const PointsOf<T> of_y(*y, "y");
      const Points points = of_y.points();
      run(zero, hypersphere_repulsion::Problem{of_x.points(), &points});
      if (of_y.shrink.defined() && grad_y.numel()) grad_y.mul_(of_y.shrink);
    } else {
      run(zero, hypersphere_repulsion::Problem{of_x.points(), nullptr});
    }
    if (of_x.shrink.defined() && grad_x.numel()) grad_x.mul_(of_x.shrink);
  });
}

// The gradient's memory, or an empty tensor.
Tensor gradient_of(const Tensor& like, bool wanted, at::ScalarType dtype) {
  return empty_result(wanted ? like.sizes() : at::IntArrayRef{0}, dtype, false);
}

std::tuple<Tensor, Tensor, Tensor> repulsion_pairs(const Tensor& x, const std::optional<Tensor>& y,
                                                   std::string_view kind, double a, int64_t power,
                                                   double r_min, bool needs_x_grad,
                                                   bool needs_y_grad) {
  using hypersphere_repulsion::Kind;
  static const std::unordered_map<std::string_view, Kind> kinds{{"log_sum_exp", Kind::log_sum_exp},
                                                                {"riesz", Kind::riesz},
                                                                {"log", Kind::log},
                                                                {"hinge", Kind::hinge}};
  const auto found = kinds.find(kind);
  TORCH_CHECK_VALUE(found != kinds.end(), "kind must be one of the kernel's, got ", kind);
  const auto dtype = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor grad_x = gradient_of(x, needs_x_grad, dtype).zero_();
  Tensor grad_y = gradient_of(y ? *y : x, y && needs_y_grad, dtype).zero_();
  double value = 0;
  with_points(x, y, grad_x, grad_y, [&](auto zero, const auto& problem) {
    using T = decltype(zero);
    value =
        hypersphere_repulsion::pairs<T>(problem, {found->second, a, power, r_min}, torch_runtime(),
                                        needs_x_grad ? grad_x.data_ptr<T>() : nullptr,
                                        y && needs_y_grad ? grad_y.data_ptr<T>() : nullptr);
  });
  return {at::full({}, value, x.options().dtype(at::kDouble)), grad_x, grad_y};
}

std::tuple<Tensor, Tensor> repulsion_nearest(const Tensor& x, const std::optional<Tensor>& y,
                                             int64_t k) {
  const int64_t others = y ? y->size(0) : x.size(0) - 1;
  TORCH_CHECK_VALUE(k >= 1 && k <= others, "k must be in [1, ", others, "], got ", k);
  Tensor square = at::empty({x.size(0), k}, x.options().dtype(at::kDouble));
  Tensor index = at::empty({x.size(0), k}, x.options().dtype(at::kLong));
  const Tensor none = at::empty({0}, x.options());
  with_points(x, y, none, none, [&](auto zero, const auto& problem) {
    using T = decltype(zero);
    hypersphere_repulsion::nearest<T>(problem, k, torch_runtime(), square.data_ptr<double>(),
                                      index.data_ptr<int64_t>());
  });
  return {square, index};
}

std::tuple<Tensor, Tensor> repulsion_nearest_backward(const Tensor& x,
                                                      const std::optional<Tensor>& y,
                                                      const Tensor& index,
                                                      const Tensor& grad_square, double r_min,
                                                      bool needs_x_grad, bool needs_y_grad) {
  TORCH_CHECK_VALUE(index.sizes() == grad_square.sizes() && index.size(0) == x.size(0),
                    "index and grad_square must be (N, k), got ", index.sizes(), " and ",
                    grad_square.sizes());
  const int64_t others = y ? y->size(0) : x.size(0);
  TORCH_CHECK_VALUE(index.numel() == 0 ||
                        (index.min().item<int64_t>() >= 0 && index.max().item<int64_t>() < others),
                    "index must be in [0, ", others, ")");
  Tensor grad_x = gradient_of(x, needs_x_grad, x.scalar_type());
  Tensor grad_y = gradient_of(y ? *y : x, y && needs_y_grad, (y ? *y : x).scalar_type());
  const Tensor indices = index.contiguous(), gradient = grad_square.contiguous();
  with_points(x, y, grad_x, grad_y, [&](auto zero, const auto& problem) {
    using T = decltype(zero);
    hypersphere_repulsion::nearest_backward<T>(
        problem, index.size(1), indices.const_data_ptr<int64_t>(),
        gradient.const_data_ptr<double>(), r_min, torch_runtime(),
        needs_x_grad ? grad_x.data_ptr() : nullptr,
        y && needs_y_grad ? grad_y.data_ptr() : nullptr);
  });
  return {grad_x, grad_y};
}

using domain_mixup::Affine;
using domain_mixup::Images;
using domain_mixup::MutableImages;

bool has_strides(const Tensor& sample, std::array<int64_t, 3> strides) {
  if (sample.numel() == 0) return true;  // no two elements that strides could be between
  for (int dim = 0; dim < 3; ++dim) {
    if (sample.size(dim + 1) > 1 && sample.stride(dim + 1) != strides[dim]) return false;
  }
  return true;
}
bool is_planar(const Tensor& images) {
  return has_strides(images, {images.size(2) * images.size(3), images.size(3), 1});
}
bool is_interleaved(const Tensor& images) {
  return has_strides(images, {1, images.size(1) * images.size(3), images.size(1)});
}

// Samples must be dense, CHW or HWC; else they are copied.
Tensor with_dense_samples(const Tensor& images) {
  TORCH_CHECK_VALUE(images.dim() == 4, "expected (B, C, H, W), got ", images.sizes());
  return is_planar(images) || is_interleaved(images) ? images : images.contiguous();
}

Images images_of(const Tensor& images) {
  return {images.const_data_ptr(), dtype_of(images), !is_planar(images), images.stride(0)};
}

MutableImages mutable_images_of(const std::optional<Tensor>& images, const Tensor& like) {
  if (!images) return {nullptr, Dtype::f32, false, 0};
  TORCH_CHECK_VALUE(
      images->sizes() == like.sizes() && (is_planar(*images) || is_interleaved(*images)),
      "expected dense samples of shape ", like.sizes());
  return {images->data_ptr(), dtype_of(*images), !is_planar(*images), images->stride(0)};
}

struct MixupInputs {
  MixupInputs(const Tensor& synthetic, const Tensor& real, const Tensor& psi, const Tensor& affine,
              const std::optional<Tensor>& flip_synthetic, const std::optional<Tensor>& flip_real)
      : synthetic(with_dense_samples(synthetic)),
        real(with_dense_samples(real)),
        psi(psi.contiguous()),
        affine(affine.contiguous()),
        flip_synthetic(flip_synthetic ? flip_synthetic->contiguous() : Tensor()),
        flip_real(flip_real ? flip_real->contiguous() : Tensor()) {
    TORCH_CHECK_VALUE(
        real.sizes() == synthetic.sizes() && real.scalar_type() == synthetic.scalar_type() &&
            psi.numel() == real.size(0) && affine.numel() == 2 * real.size(1),
        "synthetic, real (B, C, H, W), psi (B,) and affine (C, 2) do not fit together");
    for (const Tensor& flip : {this->flip_synthetic, this->flip_real}) {
      TORCH_CHECK_VALUE(!flip.defined() || flip.numel() == real.size(0), "flips must be (B,)");
    }
  }
  domain_mixup::Problem problem() const {
    const auto flips = [](const Tensor& flip) {
      return flip.defined() ? flip.const_data_ptr<bool>() : nullptr;
    };
    return {images_of(synthetic),
            images_of(real),
            psi.const_data_ptr<double>(),
            reinterpret_cast<const Affine*>(affine.const_data_ptr<double>()),
            flips(flip_synthetic),
            flips(flip_real),
            real.size(0),
            real.size(1),
            real.size(2),
            real.size(3)};
  }
  Tensor synthetic, real, psi, affine, flip_synthetic, flip_real;
};

struct OnCpu {
  static void forward(const domain_mixup::Problem& p, const MutableImages& out, const Tensor&) {
    domain_mixup::forward(p, torch_runtime(), out);
  }
  static void backward(const domain_mixup::Problem& p, const Images& gradient,
                       const MutableImages& grad_synthetic, const MutableImages& grad_real,
                       double* grad_psi, const Tensor&) {
    domain_mixup::backward(p, torch_runtime(), gradient, grad_synthetic, grad_real, grad_psi);
  }
};

#ifdef SYNFACE_CUDA
struct OnCuda {
  static void check(const char* error) { TORCH_CHECK(!error, "domain_mixup: ", error); }
  static void forward(const domain_mixup::Problem& p, const MutableImages& out, const Tensor& psi) {
    const c10::cuda::CUDAGuard guard(psi.device());
    check(domain_mixup::forward_cuda(p, out, c10::cuda::getCurrentCUDAStream().stream()));
  }
  static void backward(const domain_mixup::Problem& p, const Images& gradient,
                       const MutableImages& grad_synthetic, const MutableImages& grad_real,
                       double* grad_psi, const Tensor& psi) {
    const c10::cuda::CUDAGuard guard(psi.device());
    const Tensor workspace =
        at::empty({grad_psi ? domain_mixup::psi_workspace(p) : 0}, psi.options());
    check(domain_mixup::backward_cuda(p, gradient, grad_synthetic, grad_real, grad_psi,
                                      workspace.data_ptr<double>(),
                                      c10::cuda::getCurrentCUDAStream().stream()));
  }
};
#endif

template <class Device>
void mixup(const Tensor& synthetic, const Tensor& real, const Tensor& psi, const Tensor& affine,
           const std::optional<Tensor>& flip_synthetic, const std::optional<Tensor>& flip_real,
           Tensor out) {
  const MixupInputs in(synthetic, real, psi, affine, flip_synthetic, flip_real);
  Device::forward(in.problem(), mutable_images_of(out, in.synthetic), in.psi);
}

template <class Device>
void mixup_backward(const Tensor& gradient, const Tensor& synthetic, const Tensor& real,
                    const Tensor& psi, const Tensor& affine,
                    const std::optional<Tensor>& flip_synthetic,
                    const std::optional<Tensor>& flip_real,
                    const std::optional<Tensor>& grad_synthetic,
                    const std::optional<Tensor>& grad_real, const std::optional<Tensor>& grad_psi) {
  const MixupInputs in(synthetic, real, psi, affine, flip_synthetic, flip_real);
  const Tensor dense = with_dense_samples(gradient);
  TORCH_CHECK_VALUE(dense.sizes() == real.sizes(), "gradient must be ", real.sizes());
  Device::backward(in.problem(), images_of(dense), mutable_images_of(grad_synthetic, in.synthetic),
                   mutable_images_of(grad_real, in.synthetic),
                   grad_psi ? grad_psi->data_ptr<double>() : nullptr, in.psi);
}

row_update::State state_of(const std::optional<Tensor>& rows, const Tensor& like) {
  if (!rows) return {nullptr, Dtype::f32, 0};
  TORCH_CHECK_VALUE(rows->sizes() == like.sizes() && (rows->size(1) < 2 || rows->stride(1) == 1),
                    "expected contiguous rows of shape ", like.sizes());
  return {rows->data_ptr(), dtype_of(*rows), rows->stride(0)};
}

struct RowInputs {
  RowInputs(const Tensor& weight, const std::optional<Tensor>& row_grad,
            const std::optional<Tensor>& class_ids, const std::optional<Tensor>& last_step,
            int64_t step, std::optional<int64_t> seed)
      : gradient(row_grad ? with_contiguous_rows(*row_grad) : Tensor()),
        class_ids(class_ids ? class_ids->contiguous() : Tensor()),
        problem{state_of(weight, weight),
                row_grad ? rows_of(gradient) : Rows{nullptr, Dtype::f32, 0, 0, 0},
                class_ids ? this->class_ids.const_data_ptr<int64_t>() : nullptr,
                class_ids ? class_ids->numel() : 0,
                weight.size(1),
                step,
                last_step ? last_step->data_ptr() : nullptr,
                last_step && last_step->scalar_type() == at::kLong,
                seed.has_value(),
                uint64_t(seed.value_or(0))} {}
  Tensor gradient, class_ids;
  row_update::Problem problem;
};

void row_sgd(const Tensor& weight, const std::optional<Tensor>& row_grad, const Tensor& class_ids,
             const std::optional<Tensor>& momentum_buffer, const std::optional<Tensor>& last_step,
             double lr, double momentum, double weight_decay, double dampening, bool nesterov,
             int64_t step, std::optional<int64_t> seed) {
  const RowInputs in(weight, row_grad, class_ids, last_step, step, seed);
  with_statistics_type(weight, [&](auto zero) {
    using T = decltype(zero);
    row_update::sgd<T>(in.problem, state_of(momentum_buffer, weight),
                       {lr, momentum, weight_decay, dampening, nesterov}, torch_runtime());
  });
}

void row_adamw(const Tensor& weight, const std::optional<Tensor>& row_grad, const Tensor& class_ids,
               const Tensor& exp_avg, const Tensor& exp_avg_sq,
               const std::optional<Tensor>& last_step, double lr, double beta1, double beta2,
               double eps, double weight_decay, int64_t step, std::optional<int64_t> seed) {
  const RowInputs in(weight, row_grad, class_ids, last_step, step, seed);
  with_statistics_type(weight, [&](auto zero) {
    using T = decltype(zero);
    row_update::adamw<T>(in.problem, state_of(exp_avg, weight), state_of(exp_avg_sq, weight),
                         {lr, beta1, beta2, eps, weight_decay}, torch_runtime());
  });
}

Tensor margin_update(const Tensor& input, const Tensor& weight,
                     const std::optional<Tensor>& class_ids, const Tensor& labels,
                     const Tensor& negative_lse, const Tensor& mean_center,
                     const Tensor& center_sum, const Tensor& kept, const Tensor& grad_negative_lse,
                     const Tensor& grad_target_cosine, const Tensor& grad_cosine_sum, double scale,
                     double limit, bool needs_input_grad, bool halves, std::string_view rule,
                     at::TensorList states, const std::optional<Tensor>& last_step,
                     at::ArrayRef<double> numbers, int64_t step, std::optional<int64_t> seed) {
  const MarginBackward backward(input, weight, class_ids, labels, negative_lse, mean_center,
                                center_sum, kept, grad_negative_lse, grad_target_cosine,
                                grad_cosine_sum, scale, limit, needs_input_grad, halves);
  const Tensor matrix = weight.flatten(1);
  for (const Tensor& view : {matrix, backward.in.weight}) {
    TORCH_CHECK_VALUE(view.const_data_ptr() == weight.const_data_ptr(),
                      "weight must have contiguous rows, got strides ", weight.strides());
  }
  const RowInputs rows(matrix, std::nullopt, class_ids, last_step, step, seed);
  // step(problem) with a tile's rows
  const auto run = [&](const auto& take_step) {
    backward.run({}, [&](Range classes, const void* gradient) {
      row_update::Problem tile = rows.problem;
      std::vector<int64_t> ids(class_ids ? 0 : size_t(classes.size()));
      std::iota(ids.begin(), ids.end(), classes.begin);
      tile.class_ids = class_ids ? tile.class_ids + classes.begin : ids.data();
      tile.count = classes.size();
      tile.gradient = {gradient, tile.weight.dtype, tile.count, tile.cols, tile.cols};
      take_step(tile);
    });
  };
  with_statistics_type(weight, [&](auto zero) {
    using T = decltype(zero);
    const Runtime runtime = one_thread();
    const auto state = [&](size_t i) {
      return state_of(i < states.size() ? std::optional(states[i]) : std::nullopt, matrix);
    };
    TORCH_CHECK_VALUE(numbers.size() == 5, "numbers must be 5, got ", numbers.size());
    if (rule == "sgd") {
      const row_update::Sgd options{numbers[0], numbers[1], numbers[2], numbers[3],
                                    numbers[4] != 0};
      run([&](const row_update::Problem& tile) {
        row_update::sgd<T>(tile, state(0), options, runtime);
      });
    } else {
      TORCH_CHECK_VALUE(rule == "adamw" && states.size() == 2,
                        "rule must be sgd or adamw, with its states, got ", rule);
      const row_update::AdamW options{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]};
      run([&](const row_update::Problem& tile) {
        row_update::adamw<T>(tile, state(0), state(1), options, runtime);
      });
    }
  });
  return backward.grad_input;
}

std::tuple<Tensor, Tensor> draw_classes(const Tensor& target, int64_t classes, int64_t wanted,
                                        int64_t seed, int64_t ignore) {
  const Tensor labels = target.contiguous();
  const sample_classes::Sample sample(
      {labels.const_data_ptr<int64_t>(), labels.numel(), classes, wanted, ignore, uint64_t(seed)});
  Tensor class_ids = at::empty({sample.size()}, labels.options());
  Tensor remapped = at::empty(labels.sizes(), labels.options());
  advise_huge_pages(class_ids);
  sample.write(torch_runtime(), class_ids.data_ptr<int64_t>(), remapped.data_ptr<int64_t>());
  return {class_ids, remapped};
}

}  // namespace

TORCH_LIBRARY_IMPL(synface_kernels, CPU, library) {
  library.impl("domain_mixup_cpu", mixup<OnCpu>);
  library.impl("domain_mixup_backward_cpu", mixup_backward<OnCpu>);
  library.impl("hypersphere_repulsion_nearest_cpu", repulsion_nearest);
  library.impl("hypersphere_repulsion_nearest_backward_cpu", repulsion_nearest_backward);
  library.impl("hypersphere_repulsion_pairs_cpu", repulsion_pairs);
  library.impl("margin_cross_entropy_forward_cpu", margin_forward);
  library.impl("margin_cross_entropy_backward_cpu", margin_backward);
  library.impl("margin_cross_entropy_update_cpu", margin_update);
  library.impl("row_update_adamw_cpu", row_adamw);
  library.impl("row_update_sgd_cpu", row_sgd);
  library.impl("sample_classes_cpu", draw_classes);
}

#ifdef SYNFACE_CUDA
TORCH_LIBRARY_IMPL(synface_kernels, CUDA, library) {
  library.impl("domain_mixup_cuda", mixup<OnCuda>);
  library.impl("domain_mixup_backward_cuda", mixup_backward<OnCuda>);
}
#endif

TORCH_LIBRARY_IMPL(synface_kernels, CompositeExplicitAutograd, library) {
  library.impl("_cpu_isa", cpu_isa);
  library.impl("_cpu_isas", cpu_isas);
  library.impl("_cached_bytes", cached_bytes);
  library.impl("_empty_cache", empty_cache);
  library.impl("_empty_result", empty_result);
}

}  // namespace synface
