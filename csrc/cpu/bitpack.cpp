// bitpack on the CPU: signs, thresholds and codes of maps in any layout. Compiled once per instruction set.
//
// Signs, the common case, run a register at a time (bitpack_rows.h); thresholds and codes number by number.
// Test: tests/ops/test_bitpack.py. Bench: python -m bench.binary_conv2d.
#include "bitpack.h"

#include "bitpack_rows.h"

#define BASISCONV_JOIN2(a, b) a##b
#define BASISCONV_JOIN(a, b) BASISCONV_JOIN2(a, b)

namespace basisconv {
namespace BASISCONV_ISA {

static BASISCONV_INLINE int32_t code_of(int32_t value, int32_t most) {
  return value < 0 ? 0 : value > most ? most : value;
}
// Half to even, the rounding mode of every program that did not change it; NaN is not above 0 and gives 0.
static BASISCONV_INLINE int32_t code_of(float value, int32_t most) {
  const float kept = value > 0.0f ? value : 0.0f;
  return kept > static_cast<float>(most) ? most : static_cast<int32_t>(__builtin_rintf(kept));
}

// A number as it is compared: integers stay whole, as float32 would round the large ones.
static BASISCONV_INLINE int32_t comparable(int32_t value) { return value; }
template <typename T>
static BASISCONV_INLINE float comparable(T value) {
  return to_float(value);
}

template <typename T>
static void pack_row(const BitpackParams& p, const T* x, uint32_t* out) {
  using Number = decltype(comparable(T{}));
  const Number* threshold = static_cast<const Number*>(p.threshold);
  const int64_t words = words_for(p.C), plane_size = p.H * p.W * words;
  const int32_t most = (1 << p.planes) - 1;
  for (int64_t w = 0; w < p.W; w++) {
    for (int64_t j = 0; j < words; j++) {
      const int64_t end = (j + 1) * kWordBits < p.C ? (j + 1) * kWordBits : p.C;
      uint32_t word[4] = {};
      for (int64_t c = j * kWordBits; c < end; c++) {
        const Number value = comparable(x[w * p.stride_w + c * p.stride_c]);
        const int64_t bit = c % kWordBits;
        if (p.codes) {
          const uint32_t code = static_cast<uint32_t>(code_of(value, most));
          for (int32_t b = 0; b < p.planes; b++) word[b] |= ((code >> b) & 1u) << bit;
        } else {
          const Number bound = threshold != nullptr ? threshold[c] : Number{0};
          const bool flipped = ((p.flip[j] >> bit) & 1u) != 0;
          word[0] |= static_cast<uint32_t>(flipped ? value <= bound : value >= bound) << bit;
        }
      }
      for (int32_t b = 0; b < p.planes; b++) out[b * plane_size + w * words + j] = word[b];
    }
  }
}

template <typename T>
static void pack_rows(const BitpackParams& p, int64_t begin, int64_t end) {
  const int64_t words = words_for(p.C);
  for (int64_t i = begin; i < end; i++) {
    const int64_t n = i / p.H, y = i % p.H;
    const T* x = static_cast<const T*>(p.input) + n * p.stride_n + y * p.stride_h;
    uint32_t* out = p.output + (n * p.planes * p.H + y) * p.W * words;
    if constexpr (!__is_same(T, int32_t)) {
      if (!p.codes && p.threshold == nullptr) {
        sign_row(x, p.stride_c, p.stride_w, p.C, p.W, out);
        continue;
      }
    }
    pack_row(p, x, out);
  }
}

}  // namespace BASISCONV_ISA

void BASISCONV_JOIN(cpu_bitpack_, BASISCONV_ISA)(const BitpackParams& p, int64_t begin, int64_t end) {
  using namespace BASISCONV_ISA;
  switch (p.type) {
    case BitpackType::f32:
      return pack_rows<float>(p, begin, end);
    case BitpackType::bf16:
      return pack_rows<bf16>(p, begin, end);
    case BitpackType::f16:
      return pack_rows<f16>(p, begin, end);
    case BitpackType::i32:
      return pack_rows<int32_t>(p, begin, end);
  }
}

}  // namespace basisconv
