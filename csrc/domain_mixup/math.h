// The arithmetic of domain mixup, the same on a CPU and on a GPU: double precision without fused
// multiply-adds, in one order, rounded once to the result's type. So every implementation gives the
// same bits, those of the float64 definition.
#pragma once

#include <bit>
#include <cstdint>

#include "host_device.h"
#include "simd/scalar.h"

namespace synface::domain_mixup {

// How a sample is mixed: ψ and 1 − ψ.
struct Blend {
  double psi, rest;
};

// How a channel is normalized: (x − shift)·scale; for bytes, shift = 255·mean and
// scale = 1/(255·std).
struct Affine {
  double shift, scale;
};

#ifdef __CUDA_ARCH__
__device__ inline double multiply(double a, double b) { return __dmul_rn(a, b); }
#else
SYNFACE_HOST_DEVICE inline double multiply(double a, double b) { return a * b; }
#endif

SYNFACE_HOST_DEVICE inline double mix(double synthetic, double real, Blend blend, Affine affine) {
  const double mixed = multiply(blend.psi, synthetic) + multiply(blend.rest, real);
  return multiply(mixed - affine.shift, affine.scale);
}

// The derivative by the mixed image.
SYNFACE_HOST_DEVICE inline double mixed_gradient(double gradient, Affine affine) {
  return multiply(gradient, affine.scale);
}

// To float such that rounding on to 16 bits is as if rounded once: toward zero, with the last bit
// set where that was inexact. Without branches, so that loops over it become vectors.
SYNFACE_HOST_DEVICE inline float round_to_odd(double x) {
  const float nearest = float(x);
  const int32_t bits = std::bit_cast<int32_t>(nearest);
  // What is missing, enlarged to be a float that is not zero; NaN beside infinities and NaN.
  const float missing = float(multiply(x - double(nearest), 0x1p300));
  const int32_t up = int32_t(missing > 0) - int32_t(missing < 0);
  const int32_t outward = bits < 0 ? -up : up;
  return std::bit_cast<float>(bits + (bits & 1 ? 0 : outward));
}

// Types that a result is rounded to, once.
struct Float32 {
  using Storage = float;
  SYNFACE_HOST_DEVICE static float rounded(double x) { return float(x); }
  SYNFACE_HOST_DEVICE static double load(float x) { return x; }
};

struct Float64 {
  using Storage = double;
  SYNFACE_HOST_DEVICE static double rounded(double x) { return x; }
  SYNFACE_HOST_DEVICE static double load(double x) { return x; }
};

// `tie` says where rounding a double by way of float, its nearest, may go the wrong way.
struct Bfloat16 {
  using Storage = uint16_t;
  SYNFACE_HOST_DEVICE static uint16_t round(float x) { return to_bf16(x); }
  SYNFACE_HOST_DEVICE static bool tie(float x) {
    return std::bit_cast<uint32_t>(x) << 16 == 0x80000000u;
  }
  SYNFACE_HOST_DEVICE static uint16_t rounded(double x) { return to_bf16(round_to_odd(x)); }
  SYNFACE_HOST_DEVICE static double load(uint16_t x) { return from_bf16(x); }
};

struct Float16 {
  using Storage = uint16_t;
  SYNFACE_HOST_DEVICE static uint16_t round(float x) { return to_f16(x); }
  SYNFACE_HOST_DEVICE static bool tie(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const int32_t magnitude = int32_t(bits & 0x7fffffffu);
    // Below 2^-14 the dropped bits vary in number: all but zero count.
    return ((bits & 0x1fffu) == 0x1000u) | ((magnitude > 0) & (magnitude < 0x38800000));
  }
  SYNFACE_HOST_DEVICE static uint16_t rounded(double x) { return to_f16(round_to_odd(x)); }
  SYNFACE_HOST_DEVICE static double load(uint16_t x) { return from_f16(x); }
};

}  // namespace synface::domain_mixup
