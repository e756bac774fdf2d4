#include "binary_conv2d_table.h"

#include <algorithm>

namespace basisconv {
namespace {

// Rounded towards minus infinity, b > 0.
int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

// to += times * counts. The factors of signs as constants: the portable instruction set shifts lanes, but has no
// product of them.
void add_counts(int32_t* to, const int32_t* counts, int32_t times, int64_t size) {
  switch (times) {
    case 0:
      return;
    case 2:
      for (int64_t k = 0; k < size; k++) to[k] += 2 * counts[k];
      return;
    default:
      for (int64_t k = 0; k < size; k++) to[k] += times * counts[k];
  }
}

BinaryClasses classes_of(int64_t outputs, int64_t stride, int64_t pad, int64_t dilation, int64_t taps, int64_t size) {
  BinaryClasses found;
  found.of.reserve(outputs);
  for (int64_t o = 0; o < outputs; o++) {
    const int64_t first = o * stride - pad;  // where tap 0 lies
    int64_t lo = std::max<int64_t>(0, -floor_div(first, dilation));
    int64_t hi = std::min<int64_t>(taps - 1, floor_div(size - 1 - first, dilation));
    if (lo > hi) lo = 0, hi = -1;
    // The class before last is the last or a new one, but for strides beyond the map, where any may come again.
    size_t at = 0;
    while (at < found.lo.size() && (found.lo[at] != lo || found.hi[at] != hi)) at++;
    if (at == found.lo.size()) {
      found.lo.push_back(static_cast<int32_t>(lo));
      found.hi.push_back(static_cast<int32_t>(hi));
    }
    found.of.push_back(static_cast<int32_t>(at));
  }
  return found;
}

// What a tap adds to v and what it adds to factor * raw, with c set bits among the L channels of the filter's tap:
//   inside the image                     computed: v gets L - 2 * popc(a ^ w) by itself, so the table gets L
//   a column outside, zero bits there    computed: raw gets c, v shall get d = padding_value * (2c - L): d + 2c
//   a row outside                        skipped: v shall get d
// For codes 2 * popc(a & w) - popc(a) = c - popc(a ^ w) for each plane, right outside too, where a = 0: the table gets
// (2^planes - 1) * c of every computed tap.
void fill_table(const BinaryConv2dParams& p, const BinaryPack& pack, const BinaryClasses& rows,
                const BinaryClasses& columns, const int32_t* counts, int32_t* table) {
  const BinaryConv2dWeights& w = p.weights;
  const int32_t L = static_cast<int32_t>(w.C / w.groups), value = p.padding_value, codes = (1 << p.planes) - 1;
  const int64_t size = pack.padded;
  for (size_t row = 0; row < rows.lo.size(); row++) {
    for (size_t column = 0; column < columns.lo.size(); column++) {
      for (int64_t g = 0; g < w.groups; g++, table += size) {
        int32_t constants = 0;
        for (int64_t r = 0; r < w.R; r++) {
          const bool computed = rows.lo[row] <= r && r <= rows.hi[row];
          for (int64_t s = 0; s < w.S; s++) {
            const bool inside = columns.lo[column] <= s && s <= columns.hi[column];
            const int32_t* c = counts + ((g * w.R + r) * w.S + s) * size;
            int32_t constant, per_bit;
            if (p.codes) {
              constant = 0, per_bit = computed ? codes : 0;
            } else if (computed && inside) {
              constant = L, per_bit = 0;
            } else {
              constant = -value * L, per_bit = 2 * value + (computed ? 2 : 0);
            }
            constants += constant;
            add_counts(table, c, per_bit, size);
          }
        }
        for (int64_t k = 0; k < size; k++) table[k] += constants;
      }
    }
  }
}

// All outputs in one class.
BinaryClasses one_class(int64_t outputs) { return {std::vector<int32_t>(outputs, 0), {0}, {-1}}; }

}  // namespace

BinaryBorders binary_borders(const BinaryConv2dParams& p, const BinaryPlan& plan, const int32_t* counts) {
  const BinaryConv2dWeights& w = p.weights;
  const int64_t size = w.groups * plan.pack.padded;
  if (plan.raw == BinaryRaw::products) {
    return {one_class(p.OH), one_class(p.OW), 1, std::vector<int32_t>(size, 0)};
  }
  BinaryBorders found{classes_of(p.OH, p.stride_h, p.pad_top, p.dilation_h, w.R, p.H),
                      classes_of(p.OW, p.stride_w, p.pad_left, p.dilation_w, w.S, p.W),
                      p.codes ? 1 : 2,
                      {}};
  found.table.assign(found.rows.count() * found.columns.count() * size, 0);
  fill_table(p, plan.pack, found.rows, found.columns, counts, found.table.data());
  return found;
}

// v >= t  <=>  factor * raw <= T - t  <=>  raw <= floor((T - t) / factor)
// v <= t  <=>  factor * raw >= T - t  <=>  not raw <= ceil((T - t) / factor) - 1 = floor((T - t - 1) / factor)
//
// A threshold beyond all sums is moved to the first such number; then no difference leaves int32, as a table holds at
// most three times the longest sum.
void binary_limits(const BinaryConv2dParams& p, const BinaryPack& pack, int64_t classes, const int32_t* threshold,
                   const int32_t* flip, int32_t* table) {
  const BinaryConv2dWeights& w = p.weights;
  const int64_t size = w.groups * pack.padded;
  const int32_t most = static_cast<int32_t>(w.C / w.groups * w.R * w.S) * (p.codes ? (1 << p.planes) - 1 : 1);
  const int32_t shift = p.factor == 2 ? 1 : 0;
  std::vector<int32_t> bound(size);
  for (int64_t k = 0; k < size; k++) bound[k] = std::clamp(threshold[k], -most - 1, most + 1) - flip[k];
  for (int64_t i = 0; i < classes; i++, table += size) {
    for (int64_t k = 0; k < size; k++) table[k] = (table[k] - bound[k]) >> shift;
  }
}

}  // namespace basisconv
