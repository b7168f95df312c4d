// The CPU kernels on NumPy arrays, without torch: for data-loader workers and for programs that
// have NumPy alone. One thread.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <optional>

#include "domain_mixup/cpu.h"
#include "margin_cross_entropy/cpu.h"
#include "simd/isa.h"

namespace py = pybind11;

namespace synface {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
Rows rows_of(const Array<T>& matrix) {
  return {matrix.data(), std::is_same_v<T, double> ? Dtype::f64 : Dtype::f32, matrix.shape(0),
          matrix.shape(1), matrix.shape(1)};
}

template <class T>
margin_cross_entropy::Problem margin_problem(const Array<T>& input, const Array<T>& weight,
                                             const Array<int64_t>& labels, double scale) {
  if (input.ndim() != 2 || weight.ndim() != 2 || labels.ndim() != 2 ||
      input.shape(0) != labels.shape(0) || input.shape(1) != weight.shape(1) ||
      weight.shape(0) < 1) {
    throw py::value_error("input (N, D), weight (C, D) and labels (N, K) do not fit together");
  }
  return {rows_of(input),  rows_of(weight), 1,
          nullptr,         weight.shape(0), labels.data(),
          labels.shape(1), scale,           std::numeric_limits<double>::infinity()};
}

template <class T>
py::tuple margin_forward(const Array<T>& input, const Array<T>& weight,
                         const Array<int64_t>& labels, double scale, bool needs_input_grad) {
  const auto problem = margin_problem(input, weight, labels, scale);
  const py::ssize_t n = input.shape(0);
  py::array_t<T> most(n), mean({needs_input_grad ? n : 0, input.shape(1)});
  py::array_t<double> lse(n), cosine({n, labels.shape(1)});
  const margin_cross_entropy::Statistics<T> results{
      lse.mutable_data(),
      most.mutable_data(),
      cosine.mutable_data(),
      nullptr,
      nullptr,
      needs_input_grad ? mean.mutable_data() : nullptr,
      nullptr};
  {
    const py::gil_scoped_release release;
    margin_cross_entropy::forward<T>(problem, one_thread(), results);
  }
  return py::make_tuple(lse, most, cosine, mean);
}

template <class T>
py::tuple margin_backward(const Array<T>& input, const Array<T>& weight,
                          const Array<int64_t>& labels, const Array<double>& negative_lse,
                          const Array<T>& mean_center, const Array<double>& grad_negative_lse,
                          const Array<double>& grad_target_cosine, double scale) {
  const auto problem = margin_problem(input, weight, labels, scale);
  const py::ssize_t n = input.shape(0), d = input.shape(1);
  if (negative_lse.size() != n || grad_negative_lse.size() != n || mean_center.size() != n * d ||
      grad_target_cosine.size() != labels.size()) {
    throw py::value_error(
        "negative_lse and grad_negative_lse must be (N,), mean_center (N, D), "
        "grad_target_cosine (N, K)");
  }
  py::array_t<T> grad_input({n, d}), grad_weight({weight.shape(0), d});
  const margin_cross_entropy::Upstream<T> upstream{
      negative_lse.data(),      mean_center.data(),        nullptr,
      grad_negative_lse.data(), grad_target_cosine.data(), nullptr};
  void *to_input = grad_input.mutable_data(), *to_weight = grad_weight.mutable_data();
  {
    const py::gil_scoped_release release;
    margin_cross_entropy::backward<T>(problem, one_thread(), upstream, to_input, to_weight);
  }
  return py::make_tuple(grad_input, grad_weight);
}

template <class T>
void define_margin(py::module_& module) {
  module.def("margin_cross_entropy_forward", margin_forward<T>, py::arg("input").noconvert(),
             py::arg("weight").noconvert(), py::arg("labels"), py::arg("scale"),
             py::arg("needs_input_grad"));
  module.def("margin_cross_entropy_backward", margin_backward<T>, py::arg("input").noconvert(),
             py::arg("weight").noconvert(), py::arg("labels"), py::arg("negative_lse"),
             py::arg("mean_center"), py::arg("grad_negative_lse"), py::arg("grad_target_cosine"),
             py::arg("scale"));
}

// uint8 or float32 images, planar or interleaved; out: float32, or float16's and bfloat16's bits.
template <class In, class Out>
void mixup(const py::array_t<In, py::array::c_style>& synthetic,
           const py::array_t<In, py::array::c_style>& real, const Array<double>& psi,
           const Array<double>& affine, const std::optional<Array<bool>>& flip_synthetic,
           const std::optional<Array<bool>>& flip_real, bool interleaved,
           py::array_t<Out, py::array::c_style>& out, bool out_interleaved, bool bfloat16) {
  const auto shape = [](const py::array& images, bool of_interleaved) {
    const auto* s = images.shape();
    return of_interleaved ? std::array<int64_t, 4>{s[0], s[3], s[1], s[2]}
                          : std::array<int64_t, 4>{s[0], s[1], s[2], s[3]};
  };
  if (synthetic.ndim() != 4 || real.ndim() != 4 || out.ndim() != 4) {
    throw py::value_error("images must have 4 dimensions");
  }
  const auto [batch, channels, height, width] = shape(synthetic, interleaved);
  const std::array<int64_t, 4> expected{batch, channels, height, width};
  if (shape(real, interleaved) != expected || shape(out, out_interleaved) != expected ||
      psi.size() != batch || affine.size() != 2 * channels ||
      (flip_synthetic && flip_synthetic->size() != batch) ||
      (flip_real && flip_real->size() != batch)) {
    throw py::value_error("synthetic, real, psi, mean, std, flips and out do not fit together");
  }
  const int64_t sample = channels * height * width;
  const Dtype in = std::is_same_v<In, uint8_t> ? Dtype::u8 : Dtype::f32;
  const Dtype to = std::is_same_v<Out, float> ? Dtype::f32 : bfloat16 ? Dtype::bf16 : Dtype::f16;
  const domain_mixup::Problem problem{{synthetic.data(), in, interleaved, sample},
                                      {real.data(), in, interleaved, sample},
                                      psi.data(),
                                      reinterpret_cast<const domain_mixup::Affine*>(affine.data()),
                                      flip_synthetic ? flip_synthetic->data() : nullptr,
                                      flip_real ? flip_real->data() : nullptr,
                                      batch,
                                      channels,
                                      height,
                                      width};
  const domain_mixup::MutableImages target{out.mutable_data(), to, out_interleaved, sample};
  const Runtime runtime = one_thread();
  const py::gil_scoped_release release;
  domain_mixup::forward(problem, runtime, target);
}

template <class In, class Out>
void define_mixup(py::module_& module) {
  module.def("domain_mixup", mixup<In, Out>, py::arg("synthetic").noconvert(),
             py::arg("real").noconvert(), py::arg("psi"), py::arg("affine"),
             py::arg("flip_synthetic"), py::arg("flip_real"), py::arg("interleaved"),
             py::arg("out").noconvert(), py::arg("out_interleaved"), py::arg("bfloat16"));
}

}  // namespace

PYBIND11_MODULE(_numpy, module) {
  module.doc() = "CPU kernels on NumPy arrays; see synface_kernels.numpy.";
  module.def("cpu_isa", [] { return std::string(name(isa())); });
  define_mixup<uint8_t, float>(module);
  define_mixup<uint8_t, uint16_t>(module);
  define_mixup<float, float>(module);
  define_mixup<float, uint16_t>(module);
  define_margin<float>(module);
  define_margin<double>(module);
}

}  // namespace synface
