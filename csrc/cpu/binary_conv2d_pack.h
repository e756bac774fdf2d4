// Packing of filters, in the layout of binary_conv2d_plan.h.
#pragma once
#include "binary_conv2d_plan.h"
#include "simd.h"

namespace basisconv {
namespace BASISCONV_ISA {

static void pack(const BinaryConv2dWeights& w, const BinaryPack& pack, const uint32_t* words, int32_t* counts,
                 uint8_t* bits) {
  const int64_t filters = w.K / w.groups, taps = w.R * w.S, count = words_for(w.C / w.groups);
  for (int64_t k = 0; k < w.K; k++) {
    const int64_t g = k / filters, within = k % filters, block = within / pack.block, lane = within % pack.block;
    const int64_t place = lane / pack.lanes * pack.lanes + binary_place(pack, lane % pack.lanes);
    for (int64_t t = 0; t < taps; t++, words += count) {
      uint8_t* to = bits + ((g * pack.blocks + block) * taps + t) * pack.units * pack.block * pack.unit_bytes;
      int32_t set = 0;
      for (int64_t j = 0; j < count; j++) set += __builtin_popcount(words[j]);
      counts[(g * taps + t) * pack.padded + within] = set;
      for (int64_t u = 0; u < pack.units; u++) {
        if (pack.variant == BinaryVariant::words) {
          memcpy(to + (u * pack.block + place) * 4, words + u, 4);
        } else {
          to[u * pack.block + place] = static_cast<uint8_t>(words[u / 4] >> (u % 4 * 8));
        }
      }
    }
  }
}

}  // namespace BASISCONV_ISA
}  // namespace basisconv
