// Domain mixup on NumPy arrays.
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "domain_mixup/cpu.h"
#include "numpy/arrays.h"

namespace synface {
namespace {

// Mixes uint8 or float32 images, planar or interleaved, into out: float32, or the bits of float16
// or bfloat16.
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
  const auto images = [&](const auto& array) {
    return domain_mixup::Images{.data = array.data(),
                                .dtype = std::is_same_v<In, uint8_t> ? Dtype::u8 : Dtype::f32,
                                .interleaved = interleaved,
                                .sample_stride = sample};
  };
  const domain_mixup::Problem problem{
      .synthetic = images(synthetic),
      .real = images(real),
      .psi = psi.data(),
      .affine = reinterpret_cast<const domain_mixup::Affine*>(affine.data()),
      .flip_synthetic = flip_synthetic ? flip_synthetic->data() : nullptr,
      .flip_real = flip_real ? flip_real->data() : nullptr,
      .batch = batch,
      .channels = channels,
      .height = height,
      .width = width};
  const domain_mixup::MutableImages target{.data = out.mutable_data(),
                                           .dtype = std::is_same_v<Out, float> ? Dtype::f32
                                                    : bfloat16                 ? Dtype::bf16
                                                                               : Dtype::f16,
                                           .interleaved = out_interleaved,
                                           .sample_stride = sample};
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

void define_domain_mixup(py::module_& module) {
  define_mixup<uint8_t, float>(module);
  define_mixup<uint8_t, uint16_t>(module);
  define_mixup<float, float>(module);
  define_mixup<float, uint16_t>(module);
}

}  // namespace synface
