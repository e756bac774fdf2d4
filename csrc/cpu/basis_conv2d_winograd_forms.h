// The forms of Winograd's convolution for a 3x3 basis: F(2x2, 3x3), F(2x4, 3x3), and with stride 2 the like of
// F(2x2, 3x3).
//
// For an input tile d of 4 rows and a filter g, the outputs of a tile are  AT [ (G g HT) . (BT d C) ] D, with
//
//        1  0 -1  0             1    0    0           1  1  1  0
//   BT = 0  1  1  0       G =  1/2  1/2  1/2     AT = 0  1 -1 -1
//        0 -1  1  0            1/2 -1/2  1/2
//        0  1  0 -1             0    0    1
//
// along the rows. Columns are treated alike in tiles of 2x2 outputs (H = G, C = B, D = A; 4x4 inputs). In tiles of 2x4
// outputs (4x6 inputs) they go by the interpolation points 0, +-a, +-b and infinity, a = 5/8 and b = 3/2, all of whose
// constants are exact; s = a^2 + b^2:
//
//        a^2 b^2     0    -s    0   1  0          1/(a^2 b^2)       0          0            1   1   1   1   1   0
//           0    -a b^2  -b^2   a   1  0           [1  a  a^2] / (2 a^2 (a^2 - b^2))   DT = 0   a  -a   b  -b   0
//   CT =    0     a b^2  -b^2  -a   1  0      H =  [1 -a  a^2] / (2 a^2 (a^2 - b^2))        0  a^2 a^2 b^2 b^2  0
//           0    -a^2 b  -a^2   b   1  0           [1  b  b^2] / (2 b^2 (b^2 - a^2))        0  a^3-a^3 b^3-b^3  1
//           0     a^2 b  -a^2  -b   1  0           [1 -b  b^2] / (2 b^2 (b^2 - a^2))
//           0   a^2 b^2    0   -s   0  1             0        0          1
//
// With stride 2 a tile of 2x2 outputs reads 5x5 inputs. Even rows are a convolution with taps 0 and 2, odd ones with
// tap 1, which gives, along rows and columns alike and without any constant,
//
//        1  0 -1  0  0          1  0  0
//        0  0  1  0  0          1  0  1           1  1  0  1  0
//   BT = 0  0 -1  0  1      G = 0  0  1      AT = 0  1  1  0  1
//        0  1  0  0  0          0  1  0
//        0  0  0  1  0          0  1  0
//
// The sum over channels moves inside the brackets: 16 products a channel and filter serve 4 outputs instead of 36, 24
// serve 8 instead of 72, or with stride 2 25 serve 4 instead of 36. Of the points that were tried (1 and 2, 1 and 1/2,
// roots of 2 and 1/2, 1/2 and 3/2, 3/4 and 3/2, ...) these lose least to rounding: 1.0 to 1.4 times the error of a
// direct sum over 64 channels and more, where tiles of 2x2 lose less than it. Short sums are more exact when summed
// directly, and take the tiles of 2x2; tiles of 4x4 would lose twice as much as a direct sum. See cpu_pack.
#pragma once
#include "simd.h"

namespace basisconv {
namespace BASISCONV_ISA {

// Sizes of a form: tiles of 2 x W outputs.
template <int STRIDE, int W>
struct Form {
  static_assert(STRIDE == 1 ? W == 2 || W == 4 : STRIDE == 2 && W == 2);
  static constexpr int kOutputs = W, kStride = STRIDE;
  static constexpr int kRows = STRIDE == 1 ? 4 : 5, kColumns = STRIDE == 1 ? W + 2 : 5;  // inputs, and positions
  static constexpr int kNextRow = 2 * STRIDE, kNextColumn = STRIDE * W;                  // to a neighbour's first input
  // Row i of BT d is row kFirst[i] of d, or that plus or minus row kSecond[i].
  static constexpr int kFirst[2][5] = {{0, 1, 2, 1, 0}, {0, 2, 4, 1, 3}};
  static constexpr int kSecond[2][5] = {{2, 2, 1, 3, 0}, {2, 2, 2, 1, 3}};
  static constexpr int first(int row) { return kFirst[STRIDE - 1][row]; }
  static constexpr int second(int row) { return kSecond[STRIDE - 1][row]; }
};

template <int ROW>
struct Row {
  static constexpr int value = ROW;
};

// Rows of positions, one after the other; each is code of its own.
template <typename F, typename Do>
static BASISCONV_INLINE void each_row(const Do& run) {
  run(Row<0>{});
  run(Row<1>{});
  run(Row<2>{});
  run(Row<3>{});
  if constexpr (F::kRows == 5) run(Row<4>{});
}

// The points of F(2x4, 3x3).
constexpr float kA = 0.625f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;

// One row of d C from one row of d, for a register of channels.
template <typename F>
static BASISCONV_INLINE void transform_columns(const Vec::Reg (&d)[F::kColumns], float* out, int64_t position_stride) {
  if constexpr (F::kStride == 2) {
    Vec::store(out, Vec::sub(d[0], d[2]));
    Vec::store(out + position_stride, d[2]);
    Vec::store(out + 2 * position_stride, Vec::sub(d[4], d[2]));
    Vec::store(out + 3 * position_stride, d[1]);
    Vec::store(out + 4 * position_stride, d[3]);
  } else if constexpr (F::kOutputs == 2) {
    Vec::store(out, Vec::sub(d[0], d[2]));
    Vec::store(out + position_stride, Vec::add(d[1], d[2]));
    Vec::store(out + 2 * position_stride, Vec::sub(d[2], d[1]));
    Vec::store(out + 3 * position_stride, Vec::sub(d[1], d[3]));
  } else {
    const Vec::Reg product = Vec::set1(kA2 * kB2), sum = Vec::set1(-kA2 - kB2);
    Vec::store(out, Vec::fma(product, d[0], Vec::fma(sum, d[2], d[4])));
    Vec::store(out + 5 * position_stride, Vec::fma(product, d[1], Vec::fma(sum, d[3], d[5])));
    const Vec::Reg a_even = Vec::fma(Vec::set1(-kB2), d[2], d[4]), a_odd = Vec::fma(Vec::set1(-kB2), d[1], d[3]);
    Vec::store(out + position_stride, Vec::fma(Vec::set1(kA), a_odd, a_even));
    Vec::store(out + 2 * position_stride, Vec::fma(Vec::set1(-kA), a_odd, a_even));
    const Vec::Reg b_even = Vec::fma(Vec::set1(-kA2), d[2], d[4]), b_odd = Vec::fma(Vec::set1(-kA2), d[1], d[3]);
    Vec::store(out + 3 * position_stride, Vec::fma(Vec::set1(kB), b_odd, b_even));
    Vec::store(out + 4 * position_stride, Vec::fma(Vec::set1(-kB), b_odd, b_even));
  }
}

// AT m: two outputs down.
template <typename F>
static BASISCONV_INLINE void transform_products_down(const Vec::Reg (&m)[F::kRows], Vec::Reg& upper, Vec::Reg& lower) {
  if constexpr (F::kStride == 2) {
    upper = Vec::add(Vec::add(m[0], m[1]), m[3]);
    lower = Vec::add(Vec::add(m[1], m[2]), m[4]);
  } else {
    upper = Vec::add(Vec::add(m[0], m[1]), m[2]);
    lower = Vec::sub(Vec::sub(m[1], m[2]), m[3]);
  }
}

// One row of m D: W outputs across.
template <typename F>
static BASISCONV_INLINE void transform_products_across(const Vec::Reg (&m)[F::kColumns], Vec::Reg (&z)[F::kOutputs]) {
  if constexpr (F::kStride == 2) {
    z[0] = Vec::add(Vec::add(m[0], m[1]), m[3]);
    z[1] = Vec::add(Vec::add(m[1], m[2]), m[4]);
  } else if constexpr (F::kOutputs == 2) {
    z[0] = Vec::add(Vec::add(m[0], m[1]), m[2]);
    z[1] = Vec::sub(Vec::sub(m[1], m[2]), m[3]);
  } else {
    const Vec::Reg a_even = Vec::add(m[1], m[2]), a_odd = Vec::sub(m[1], m[2]);
    const Vec::Reg b_even = Vec::add(m[3], m[4]), b_odd = Vec::sub(m[3], m[4]);
    z[0] = Vec::add(m[0], Vec::add(a_even, b_even));
    z[1] = Vec::fma(Vec::set1(kA), a_odd, Vec::mul(Vec::set1(kB), b_odd));
    z[2] = Vec::fma(Vec::set1(kA2), a_even, Vec::mul(Vec::set1(kB2), b_even));
    z[3] = Vec::fma(Vec::set1(kA2 * kA), a_odd, Vec::fma(Vec::set1(kB2 * kB), b_odd, m[5]));
  }
}

// Value I of G g, not yet halved: three values become four, or five with stride 2.
template <typename F, int I>
static BASISCONV_INLINE Vec::Reg filter_sum(const Vec::Reg* g, int64_t g_step) {
  if constexpr (F::kStride == 2) {
    return I == 0 ? g[0] : I == 1 ? Vec::add(g[0], g[2 * g_step]) : I == 2 ? g[2 * g_step] : g[g_step];
  } else if constexpr (I == 0 || I == 3) {
    return g[I == 0 ? 0 : 2 * g_step];
  } else {
    const Vec::Reg ends = Vec::add(g[0], g[2 * g_step]);
    return I == 1 ? Vec::add(ends, g[g_step]) : Vec::sub(ends, g[g_step]);
  }
}

template <typename F, int I>
constexpr float kFilterScale = F::kStride == 1 && (I == 1 || I == 2) ? 0.5f : 1.0f;

// Value I of g HT for tiles of two columns, scaled.
template <typename F, int I>
static BASISCONV_INLINE void transform_filter_value(const Vec::Reg* g, float scale, float* out, int64_t stride) {
  Vec::store(out + I * stride, Vec::mul(Vec::set1(scale * kFilterScale<F, I>), filter_sum<F, I>(g, 1)));
}

// g HT, scaled: three values become four, five or six, so many floats apart.
template <typename F>
static BASISCONV_INLINE void transform_filter_across(const Vec::Reg* g, float scale, float* out, int64_t stride) {
  if constexpr (F::kOutputs == 2) {
    transform_filter_value<F, 0>(g, scale, out, stride);
    transform_filter_value<F, 1>(g, scale, out, stride);
    transform_filter_value<F, 2>(g, scale, out, stride);
    transform_filter_value<F, 3>(g, scale, out, stride);
    if constexpr (F::kColumns == 5) transform_filter_value<F, 4>(g, scale, out, stride);
  } else {
    const float a = scale * 0.5f / (kA2 * (kA2 - kB2)), b = scale * 0.5f / (kB2 * (kB2 - kA2));
    const Vec::Reg a_even = Vec::fma(Vec::set1(a * kA2), g[2], Vec::mul(Vec::set1(a), g[0]));
    const Vec::Reg b_even = Vec::fma(Vec::set1(b * kB2), g[2], Vec::mul(Vec::set1(b), g[0]));
    Vec::store(out, Vec::mul(Vec::set1(scale / (kA2 * kB2)), g[0]));
    Vec::store(out + stride, Vec::fma(Vec::set1(a * kA), g[1], a_even));
    Vec::store(out + 2 * stride, Vec::fma(Vec::set1(-a * kA), g[1], a_even));
    Vec::store(out + 3 * stride, Vec::fma(Vec::set1(b * kB), g[1], b_even));
    Vec::store(out + 4 * stride, Vec::fma(Vec::set1(-b * kB), g[1], b_even));
    Vec::store(out + 5 * stride, scale == 1.0f ? g[2] : Vec::mul(Vec::set1(scale), g[2]));
  }
}

// Row ROW of G g HT for a register of filters: taps [9][width] → positions [columns], so many floats apart.
template <typename F, int ROW>
static BASISCONV_INLINE void transform_filter(const float* taps, float* positions, int64_t stride) {
  Vec::Reg g[9], row[3];
  BASISCONV_UNROLL for (int i = 0; i < 9; i++) g[i] = Vec::load(taps + i * kWidth);
  BASISCONV_UNROLL for (int j = 0; j < 3; j++) row[j] = filter_sum<F, ROW>(g + j, 3);
  transform_filter_across<F>(row, kFilterScale<F, ROW>, positions, stride);
}

// All rows of it: positions [rows * columns][width].
template <typename F>
static inline void transform_filter(const float* taps, float* positions) {
  each_row<F>([&](auto row) BASISCONV_LAMBDA {
    transform_filter<F, row.value>(taps, positions + row.value * F::kColumns * kWidth, kWidth);
  });
}

}  // namespace BASISCONV_ISA
}  // namespace basisconv
