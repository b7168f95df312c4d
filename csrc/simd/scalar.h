// 16-bit floating point to float and back, to nearest even, free of branches and of hardware
// support, so that loops over them vectorize for every instruction set.
#pragma once

#include <bit>
#include <cstdint>

#include "common/host_device.h"

namespace synface {

SYNFACE_HOST_DEVICE inline float from_bf16(uint16_t x) {
  return std::bit_cast<float>(uint32_t(x) << 16);
}

SYNFACE_HOST_DEVICE inline uint16_t to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return uint16_t(x == x ? rounded : 0x7fc0);
}

SYNFACE_HOST_DEVICE inline float from_f16(uint16_t x) {
  const uint32_t magnitude = uint32_t(x & 0x7fff) << 13;
  // The exponents' biases differ by 112; the product is exact for subnormals too.
  const float finite = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7f800000;
  const uint32_t bits = (x & 0x7c00) == 0x7c00 ? special : std::bit_cast<uint32_t>(finite);
  return std::bit_cast<float>(bits | uint32_t(x & 0x8000) << 16);
}

SYNFACE_HOST_DEVICE inline uint16_t to_f16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const int32_t magnitude = int32_t(bits & 0x7fffffff);
  const int32_t normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 puts a subnormal's 2^-24 steps at the last bit of the mantissa.
  const int32_t subnormal =
      std::bit_cast<int32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  int32_t half = magnitude < (113 << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? 0x7c00 : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  return uint16_t(uint32_t(half) | (bits >> 16 & 0x8000));
}

}  // namespace synface
