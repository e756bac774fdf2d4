// Reading the filters of basis_conv2d to pack them. Included per instruction set.
#pragma once
#include <cstring>

#include "basis_conv2d.h"
#include "simd.h"

namespace basisconv {
namespace BASISCONV_ISA {

// The filters of a block over the channels of a block, dense, and zeros where there are none: what lies beside each
// other in a packed register lies far apart in memory, and is gathered from here.
class FilterBlock {
 public:
  FilterBlock(const BasisConv2dWeights& weights, const CpuPack& pack, const BasisFilters& filters)
      : w(weights),
        pack(pack),
        from(filters),
        taps(weights.R * weights.S),
        values(new float[pack.filters * taps * pack.block]) {}
  ~FilterBlock() { delete[] values; }
  FilterBlock(const FilterBlock&) = delete;
  FilterBlock& operator=(const FilterBlock&) = delete;

  void read(int64_t group, int64_t filter_block, int64_t channel_block) {
    const int64_t first_q = filter_block * pack.filters, first_c = channel_block * pack.block;
    const int64_t filters = rest(w.Q / w.groups - first_q, pack.filters);
    const int64_t channels = rest(w.C / w.groups - first_c, pack.block);
    if (filters < pack.filters || channels < pack.block) {
      memset(values, 0, pack.filters * taps * pack.block * sizeof(float));
    }
    for (int64_t q = 0; q < filters; q++) {
      const float* filter =
          from.values + (group * (w.Q / w.groups) + first_q + q) * from.filter_stride + first_c * from.channel_stride;
      for (int64_t t = 0; t < taps; t++) {
        float* to = values + (q * taps + t) * pack.block;
        const float* tap = filter + t * from.tap_stride;
        for (int64_t c = 0; c < channels; c++) to[c] = tap[c * from.channel_stride];
      }
    }
  }

  // Where the value of a filter, tap and channel of the block lies.
  int64_t place(int64_t filter, int64_t tap, int64_t channel) const {
    return (filter * taps + tap) * pack.block + channel;
  }
  const float* at(int64_t place) const { return values + place; }

 private:
  static int64_t rest(int64_t left, int64_t most) { return left < most ? left : most; }

  const BasisConv2dWeights& w;
  const CpuPack& pack;
  const BasisFilters from;
  const int64_t taps;
  float* values;
};

}  // namespace BASISCONV_ISA
}  // namespace basisconv
