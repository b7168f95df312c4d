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

// How a channel is normalised: (x − shift)·scale; for bytes, shift = 255·mean and
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
// set where that was inexact.
SYNFACE_HOST_DEVICE inline float round_to_odd(double x) {
  const float nearest = float(x);
  const uint32_t bits = std::bit_cast<uint32_t>(nearest);
  const double back = nearest;
  if (!(back != x) || (bits & 1) || x != x) return nearest;
  const bool away = (x > back) == !(bits >> 31);  // the exact value is the larger in magnitude
  return std::bit_cast<float>(away ? bits + 1 : bits - 1);
}

// Types that a result is rounded to. `Wide` is what rounds once from double, and `tie` says where
// rounding on from there might go the wrong way, so that round_to_odd is called for.
struct Float32 {
  using Storage = float;
  using Wide = float;
  SYNFACE_HOST_DEVICE static bool tie(float) { return false; }
  SYNFACE_HOST_DEVICE static float round(float x) { return x; }
  SYNFACE_HOST_DEVICE static double load(float x) { return x; }
};

struct Float64 {
  using Storage = double;
  using Wide = double;
  SYNFACE_HOST_DEVICE static bool tie(double) { return false; }
  SYNFACE_HOST_DEVICE static double round(double x) { return x; }
  SYNFACE_HOST_DEVICE static double load(double x) { return x; }
};

struct Bfloat16 {
  using Storage = uint16_t;
  using Wide = float;
  SYNFACE_HOST_DEVICE static bool tie(float x) {
    return std::bit_cast<uint32_t>(x) << 16 == 0x80000000u;
  }
  SYNFACE_HOST_DEVICE static uint16_t round(float x) { return to_bf16(x); }
  SYNFACE_HOST_DEVICE static double load(uint16_t x) { return from_bf16(x); }
};

struct Float16 {
  using Storage = uint16_t;
  using Wide = float;
  SYNFACE_HOST_DEVICE static bool tie(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const int32_t magnitude = int32_t(bits & 0x7fffffffu);
    // Below 2^-14 the dropped bits vary in number: all but zero count.
    return ((bits & 0x1fffu) == 0x1000u) | ((magnitude > 0) & (magnitude < 0x38800000));
  }
  SYNFACE_HOST_DEVICE static uint16_t round(float x) { return to_f16(x); }
  SYNFACE_HOST_DEVICE static double load(uint16_t x) { return from_f16(x); }
};

// The result of one element.
template <class Out>
SYNFACE_HOST_DEVICE inline typename Out::Storage rounded(double x) {
  typename Out::Wide wide = typename Out::Wide(x);
  if (Out::tie(wide)) wide = typename Out::Wide(round_to_odd(x));
  return Out::round(wide);
}

}  // namespace synface::domain_mixup
