// Element types of the kernels and their scalar conversions. No torch headers, no STL: included by code that is
// compiled once per instruction set.
#pragma once
#include <cstdint>
#include <cstring>

namespace basisconv {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

namespace detail {
static inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
static inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
}  // namespace detail

static inline float to_float(float value) { return value; }
static inline float to_float(bf16 value) { return detail::float_of(static_cast<uint32_t>(value.bits) << 16); }

// IEEE binary16 → binary32. Multiplying by 2^112 moves the exponent and makes subnormals exact; Inf and NaN keep
// theirs.
static inline float to_float(f16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return detail::float_of(sign | 0x70000000u | magnitude);
  return detail::float_of(sign | detail::bits_of(detail::float_of(magnitude) * detail::float_of(0x77800000u)));
}

static inline void from_float(float value, float* out) { *out = value; }

// Round to nearest, ties to even; NaN stays NaN (quiet).
static inline void from_float(float value, bf16* out) {
  const uint32_t bits = detail::bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = static_cast<uint16_t>((bits >> 16) | 0x40u);
    return;
  }
  out->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline void from_float(float value, f16* out) {
  const uint32_t bits = detail::bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and above round to infinity
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {
    // Subnormal: adding 0.5 aligns the result to multiples of 2^-24 and rounds to nearest even.
    half = detail::bits_of(detail::float_of(magnitude) + 0.5f) - 0x3f000000u;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace basisconv
