// Domain mixup on a CPU: see synface_kernels/ops/domain_mixup/reference.py for what it computes.
#pragma once

#include <cstdint>

#include "domain_mixup/math.h"
#include "runtime.h"

namespace synface::domain_mixup {

// (B, C, H, W); each sample dense, planar (CHW) or interleaved (HWC) in memory.
template <class Data>
struct ImagesOf {
  Data* data;
  Dtype dtype;
  bool interleaved;
  int64_t sample_stride;  // in elements
};
using Images = ImagesOf<const void>;
using MutableImages = ImagesOf<void>;

struct Problem {
  Images synthetic, real;  // of one dtype
  const double* psi;       // (B,)
  const Affine* affine;    // (C,)
  const bool* flip_synthetic;
  const bool* flip_real;  // (B,) or null: no flip
  int64_t batch, channels, height, width;
};

// out: float32, float64, bfloat16 or float16.
void forward(const Problem& problem, const Runtime& runtime, const MutableImages& out);

// gradient: of the result, any order. grad_synthetic and grad_real (in the inputs' dtype, which
// then is not u8) and grad_psi (B,) may be null: then they are not computed.
void backward(const Problem& problem, const Runtime& runtime, const Images& gradient,
              const MutableImages& grad_synthetic, const MutableImages& grad_real,
              double* grad_psi);

}  // namespace synface::domain_mixup
