// Domain mixup on torch tensors.
#include <array>
#include <optional>

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "domain_mixup/cpu.h"
#include "torch/runtime.h"
#include "torch/tensors.h"

#ifdef SYNFACE_CUDA
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "domain_mixup/cuda.h"
#endif

namespace synface::domain_mixup {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

bool has_strides(const Tensor& sample, std::array<int64_t, 3> strides) {
  if (sample.numel() == 0) return true;  // strides of an empty sample do not matter
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

// Returns the images, or a copy unless samples are dense, CHW or HWC.
Tensor with_dense_samples(const Tensor& images) {
  TORCH_CHECK_VALUE(images.dim() == 4, "expected (B, C, H, W), got ", images.sizes());
  return is_planar(images) || is_interleaved(images) ? images : images.contiguous();
}

template <class Data>
ImagesOf<Data> images_at(Data* data, const Tensor& images) {
  return {.data = data,
          .dtype = dtype_of_tensor(images),
          .interleaved = !is_planar(images),
          .sample_stride = images.stride(0)};
}

Images images_of(const Tensor& images) { return images_at(images.const_data_ptr(), images); }

MutableImages mutable_images_of(const OptionalTensor& images, const Tensor& like) {
  if (!images) return {};
  TORCH_CHECK_VALUE(
      images->sizes() == like.sizes() && (is_planar(*images) || is_interleaved(*images)),
      "expected dense samples of shape ", like.sizes());
  return images_at(images->data_ptr(), *images);
}

// Dtypes of the images, and of results and gradients.
constexpr at::ScalarType kReadable[] = {at::kByte, at::kFloat, at::kDouble, at::kBFloat16,
                                        at::kHalf};
constexpr at::ScalarType kWritable[] = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};

void check_device(const Tensor& tensor, const char* name, const Tensor& like) {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), name, " must be on real's device ",
                    like.device(), ", got ", tensor.device());
}

void check_gradient(const OptionalTensor& gradient, const char* name, const Tensor& of) {
  if (!gradient) return;
  check_tensor(*gradient, name, of.scalar_type(), of.sizes());
  check_device(*gradient, name, of);
}

// Tensors of a mixture, in the memory order that the kernels take.
struct Inputs {
  Inputs(const Tensor& synthetic, const Tensor& real, const Tensor& psi, const Tensor& affine,
         const OptionalTensor& flip_synthetic, const OptionalTensor& flip_real)
      : synthetic(with_dense_samples(synthetic)),
        real(with_dense_samples(real)),
        psi(psi.contiguous()),
        affine(affine.contiguous()),
        flip_synthetic(contiguous_or_undefined(flip_synthetic)),
        flip_real(contiguous_or_undefined(flip_real)) {
    TORCH_CHECK_VALUE(
        real.sizes() == synthetic.sizes() && real.scalar_type() == synthetic.scalar_type() &&
            psi.numel() == real.size(0) && affine.numel() == 2 * real.size(1),
        "synthetic, real (B, C, H, W), psi (B,) and affine (C, 2) do not fit together");
    check_tensor(real, "real", kReadable, {-1, -1, -1, -1});
    for (const Tensor& flip : {this->flip_synthetic, this->flip_real}) {
      TORCH_CHECK_VALUE(!flip.defined() || flip.numel() == real.size(0), "flips must be (B,)");
    }
    for (const Tensor& each : {synthetic, psi, affine, this->flip_synthetic, this->flip_real}) {
      if (each.defined()) check_device(each, "each argument", real);
    }
  }
  Problem problem() const {
    return {.synthetic = images_of(synthetic),
            .real = images_of(real),
            .psi = psi.const_data_ptr<double>(),
            .affine = reinterpret_cast<const Affine*>(affine.const_data_ptr<double>()),
            .flip_synthetic = data_or_null<bool>(flip_synthetic),
            .flip_real = data_or_null<bool>(flip_real),
            .batch = real.size(0),
            .channels = real.size(1),
            .height = real.size(2),
            .width = real.size(3)};
  }
  Tensor synthetic, real, psi, affine, flip_synthetic, flip_real;
};

// synface_kernels/_cuda.py defines SYNFACE_NO_CPU: it compiles the CUDA kernels alone.
#ifndef SYNFACE_NO_CPU
struct OnCpu {
  static void mix(const Inputs& in, const MutableImages& out) {
    forward(in.problem(), torch_runtime(), out);
  }
  static void mix_backward(const Inputs& in, const Images& gradient, const Gradients& to) {
    backward(in.problem(), torch_runtime(), gradient, to);
  }
};
#endif

#ifdef SYNFACE_CUDA
struct OnCuda {
  static void check(const char* error) { TORCH_CHECK(!error, "domain_mixup: ", error); }
  static void mix(const Inputs& in, const MutableImages& out) {
    const c10::cuda::CUDAGuard guard(in.psi.device());
    check(forward_cuda(in.problem(), out, c10::cuda::getCurrentCUDAStream().stream()));
  }
  static void mix_backward(const Inputs& in, const Images& gradient, const Gradients& to) {
    const c10::cuda::CUDAGuard guard(in.psi.device());
    const Problem problem = in.problem();
    const Tensor workspace = at::empty({to.psi ? psi_workspace(problem) : 0}, in.psi.options());
    check(backward_cuda(problem, gradient, to, workspace.data_ptr<double>(),
                        c10::cuda::getCurrentCUDAStream().stream()));
  }
};
#endif

template <class Device>
void mixup(const Tensor& synthetic, const Tensor& real, const Tensor& psi, const Tensor& affine,
           const OptionalTensor& flip_synthetic, const OptionalTensor& flip_real, Tensor out) {
  const Inputs in(synthetic, real, psi, affine, flip_synthetic, flip_real);
  check_tensor(out, "out", kWritable, real.sizes());
  check_device(out, "out", real);
  Device::mix(in, mutable_images_of(out, in.synthetic));
}

template <class Device>
void mixup_backward(const Tensor& gradient, const Tensor& synthetic, const Tensor& real,
                    const Tensor& psi, const Tensor& affine, const OptionalTensor& flip_synthetic,
                    const OptionalTensor& flip_real, const OptionalTensor& grad_synthetic,
                    const OptionalTensor& grad_real, const OptionalTensor& grad_psi) {
  const Inputs in(synthetic, real, psi, affine, flip_synthetic, flip_real);
  const Tensor dense = with_dense_samples(gradient);
  check_tensor(dense, "gradient", kWritable, real.sizes());
  check_device(dense, "gradient", real);
  check_gradient(grad_synthetic, "grad_synthetic", synthetic);
  check_gradient(grad_real, "grad_real", real);
  check_gradient(grad_psi, "grad_psi", psi);
  for (const auto* written : {&grad_synthetic, &grad_real}) {
    TORCH_CHECK_VALUE(!*written || (*written)->scalar_type() != at::kByte,
                      "images of uint8 have no gradient");
  }
  TORCH_CHECK_VALUE(!grad_psi || grad_psi->is_contiguous(), "grad_psi must be contiguous");
  Device::mix_backward(in, images_of(dense),
                       {.synthetic = mutable_images_of(grad_synthetic, in.synthetic),
                        .real = mutable_images_of(grad_real, in.synthetic),
                        .psi = grad_psi ? grad_psi->data_ptr<double>() : nullptr});
}

}  // namespace

#ifndef SYNFACE_NO_CPU
TORCH_LIBRARY_IMPL(synface_kernels, CPU, library) {
  library.impl("domain_mixup_cpu", mixup<OnCpu>);
  library.impl("domain_mixup_backward_cpu", mixup_backward<OnCpu>);
}
#endif

#ifdef SYNFACE_CUDA
TORCH_LIBRARY_IMPL(synface_kernels, CUDA, library) {
  library.impl("domain_mixup_cuda", mixup<OnCuda>);
  library.impl("domain_mixup_backward_cuda", mixup_backward<OnCuda>);
}
#endif

}  // namespace synface::domain_mixup
