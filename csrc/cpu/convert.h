// 16-bit floats to and from fp32, one value at a time, by their bits: round to nearest even, one
// NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/core/params.h"

namespace fa::cpu {

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline float half_to_float(uint16_t h) {
  uint32_t const sign = static_cast<uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // inf; a NaN becomes quiet, as the hardware's conversion makes it
    uint32_t const quiet = magnitude > 0x7c00u ? 0x00400000u : 0u;
    return float_of(sign | 0x7f800000u | quiet | ((magnitude & 0x3ffu) << 13));
  }
  if (magnitude >= 0x0400u)
    return float_of(sign | ((magnitude << 13) + 0x38000000u));                // rebias by 112
  return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));  // subnormal, exact
}

static inline float bfloat_to_float(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

static inline uint16_t float_to_half(float value) {
  uint32_t const bits = bits_of(value), sign = (bits >> 16) & 0x8000u,
                 magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7e00u;
  if (magnitude >= 0x477ff000u)
    return static_cast<uint16_t>(sign | 0x7c00u);  // rounds past the largest half
  if (magnitude <
      0x38800000u) {  // subnormal: adding 1/2 puts the half's last bit at the sum's last bit
    float const sum = float_of(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of(sum) - 0x3f000000u));
  }
  uint32_t const odd = (magnitude >> 13) & 1u;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

static inline uint16_t float_to_bfloat(float value) {
  uint32_t const bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float load_scalar(DType dtype, void const* data, int64_t index) {
  if (dtype == DType::kFloat32) return static_cast<float const*>(data)[index];
  uint16_t const h = static_cast<uint16_t const*>(data)[index];
  return dtype == DType::kFloat16 ? half_to_float(h) : bfloat_to_float(h);
}

static inline void store_scalar(DType dtype, void* data, int64_t index, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[index] = value != value ? float_of(0x7fc00000u) : value;
  } else {
    static_cast<uint16_t*>(data)[index] =
        dtype == DType::kFloat16 ? float_to_half(value) : float_to_bfloat(value);
  }
}

}  // namespace fa::cpu
