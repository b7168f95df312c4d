// Domain mixup on a CPU; synface_kernels/ops/domain_mixup/reference.py defines it.
#pragma once

#include <cstdint>

#include "common/rows.h"
#include "common/runtime.h"
#include "domain_mixup/math.h"

namespace synface::domain_mixup {

// (B, C, H, W); each sample dense, planar (CHW) or interleaved (HWC) in memory.
template <class Data>
struct ImagesOf {
  Data* data = nullptr;
  Dtype dtype = Dtype::f32;
  bool interleaved = false;
  int64_t sample_stride = 0;  // in elements
};
using Images = ImagesOf<const void>;
using MutableImages = ImagesOf<void>;

struct Problem {
  Images synthetic, real;  // of one dtype
  const double* psi;       // (B,)
  const Affine* affine;    // (C,)
  const bool* flip_synthetic = nullptr;
  const bool* flip_real = nullptr;  // (B,) or null: no flip
  int64_t batch, channels, height, width;
};

// Gradients of the images, in their dtype, which then is not u8, and of ψ, (B,). Those with null
// data are not computed.
struct Gradients {
  MutableImages synthetic = {}, real = {};
  double* psi = nullptr;
};

// out: float32, float64, bfloat16 or float16.
void forward(const Problem& problem, const Runtime& runtime, const MutableImages& out);

// gradient: of the result, in any memory order.
void backward(const Problem& problem, const Runtime& runtime, const Images& gradient,
              const Gradients& gradients);

}  // namespace synface::domain_mixup
