// The arithmetic of domain mixup on a CPU and on a GPU: double precision without fused
// multiply-adds, in one order, rounded once to the result's type. So every implementation is
// bitwise equal to the float64 definition.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/host_device.h"
#include "simd/scalar.h"

namespace synface::domain_mixup {

// The mixing weights of a sample: ψ and 1 − ψ.
struct Blend {
  double psi, rest;
};

// The normalization of a channel: (x − shift)·scale; for bytes, shift = 255·mean and
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

// Returns the gradient of the mixed image.
SYNFACE_HOST_DEVICE inline double mixed_gradient(double gradient, Affine affine) {
  return multiply(gradient, affine.scale);
}

// Rounds to float such that rounding the result to 16 bits equals rounding once: toward zero, with
// the last bit set where that is inexact. Without branches, so that loops over it vectorize.
SYNFACE_HOST_DEVICE inline float round_to_odd(double x) {
  const float nearest = float(x);
  const int32_t bits = std::bit_cast<int32_t>(nearest);
  // The rounding error, scaled so that it is nonzero in float; NaN for infinities and NaN.
  const float missing = float(multiply(x - double(nearest), 0x1p300));
  const int32_t up = int32_t(missing > 0) - int32_t(missing < 0);
  const int32_t outward = bits < 0 ? -up : up;
  return std::bit_cast<float>(bits + (bits & 1 ? 0 : outward));
}

// Result types; values are rounded to them once.
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

// `tie`: whether rounding a double to this nearest float and then to 16 bits may differ from
// rounding once.
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
    // Below 2^-14 the number of dropped bits varies: all values but zero are taken for ties.
    return ((bits & 0x1fffu) == 0x1000u) | ((magnitude > 0) & (magnitude < 0x38800000));
  }
  SYNFACE_HOST_DEVICE static uint16_t rounded(double x) { return to_f16(round_to_odd(x)); }
  SYNFACE_HOST_DEVICE static double load(uint16_t x) { return from_f16(x); }
};

// Bytes become bfloat16 by float32 arithmetic (`estimate`) wherever that provably gives what the
// exact arithmetic does. With u = 2^-24 and d = ψ·s + (1 − ψ)·r − shift, so that x = d·scale:
//
// - ψ and shift are split into multiples of 2^-16 and a rest of at most 2^-17. As 0 <= ψ <= 1 and
//   0 <= shift <= 255, all that is computed of the former are multiples of 2^-16 up to 255: float32
//   holds them exactly. The rests give at most 255·2^-17 + 2^-17, with three roundings (or two,
//   where a multiply-add is fused): an error below u·2^-7.
// - Adding the two, rounding scale and multiplying by it are off by 3·u relatively, to first order.
// - The result in float64 is itself off by less than u·2^-18 before the multiplication, and then by
//   less than u·2^-28 relatively.
//
// Where |d| >= 2^-6, u·2^-7 is at most u·|d|/2; so the two differ by less than 5·u·|x|, less than
// five units in x's last place (as scale is far from the least and the greatest floats). Move x by
// kOff = 8 units inwards and outwards: if both round to the same bfloat16, so does all in between,
// as rounding is monotonic; a tie cannot be in between, as it would have told the two apart.
//
// Without rests, as at ψ = 1/2 and mean 1/2, d is exact, in float64 too, and no |d| is too small.
constexpr uint32_t kOff = 8;

struct Split {
  SYNFACE_HOST_DEVICE explicit Split(double x)
      : high(float(std::nearbyint(x * 0x1p16) * 0x1p-16)), low(float(x - double(high))) {}
  float high, low;
};

// AVX-512 takes a shorter way. Let high = ψ's multiple·(s − r) + (r − shift's multiple), which is
// exact, c = float(scale), and low = ψ's rest·scale·(s − r) − shift's rest·scale, so that
// x = high·scale + low and |low| <= 2^-9·scale. To 16 bits, one multiply-add gives high·c + low:
// both factors of low, and low, are rounded, an error of at most u·2^-8·scale; c and the sum are
// off by u·|x| each, and a little more. Where |high| >= 2^-6, |x| is more than 2^-7·scale, so the
// two differ by less than four units in the last place.
constexpr uint32_t kOffBytes = 4;

// To float32, scale has a rest too: x = high·c + (high·scale's rest + low), the sum in parentheses
// off by little, and rounded once with the product. Returns a bound of the error, relative to
// scale, of a sum that adds twice the bound. With m = 255·|ψ's rest| + |shift's rest| at most:
// m·u for the factors of low, m·u for low, and m·u for each of two sums; below 2^-38 for
// high·scale's rest (2^-16 at most, rounded four times), and for float64's own errors, 2^-43.
inline double error_bound(double psi_rest, double shift_rest) {
  return 0x4p-24 * (255 * std::abs(psi_rest) + std::abs(shift_rest)) + 0x1p-37;
}

}  // namespace synface::domain_mixup
