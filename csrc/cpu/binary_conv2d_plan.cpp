#include "binary_conv2d_plan.h"

#include <algorithm>
#include <cstring>

namespace basisconv {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t aligned(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

// Rows of the ring that a pass works on; above this a longer pass costs the first-level cache more than it saves.
constexpr int64_t kRingBytes = 16 << 10;

}  // namespace

Isa binary_isa_for(Isa isa) { return std::min(isa, Isa::avx512_vpopcntdq); }

BinaryPack binary_pack(const BinaryConv2dWeights& w, Isa wanted) {
  const Isa isa = binary_isa_for(wanted);
  const int64_t channels = w.C / w.groups, filters = w.K / w.groups;
  BinaryPack p{};
  switch (isa) {
    case Isa::avx2:
      p.variant = BinaryVariant::nibbles;
      p.lanes = 32;
      p.vectors = filters > 32 ? 2 : 1;
      p.pixels = filters > 32 ? 4 : 7;
      break;
    case Isa::avx512:
      p.variant = BinaryVariant::nibbles;
      p.lanes = 64;
      p.vectors = 1;
      p.pixels = 7;
      break;
    case Isa::avx512_vpopcntdq:
      p.lanes = 16;
      p.vectors = filters > 16 ? 2 : 1;
      p.pixels = 7;
      break;
    default:
      p.lanes = 4;
      p.vectors = 2;
      p.pixels = 2;
      break;
  }
  p.block = static_cast<int64_t>(p.lanes) * p.vectors;
  p.blocks = ceil_div(filters, p.block);
  p.padded = p.blocks * p.block;
  p.units = p.variant == BinaryVariant::nibbles ? ceil_div(channels, 8) : words_for(channels);
  p.unit_bytes = p.variant == BinaryVariant::nibbles ? 1 : 4;
  p.counts_bytes = aligned(w.groups * w.R * w.S * p.padded * 4);
  p.bits_bytes = aligned(w.groups * w.R * w.S * p.padded * p.units * p.unit_bytes);
  return p;
}

BinaryPackHeader binary_pack_header(const BinaryConv2dWeights& w, Isa isa) {
  BinaryPackHeader h{};
  std::memcpy(h.magic, "bcBINARY", 8);
  h.version = kBinaryPackVersion;
  h.isa = static_cast<int64_t>(binary_isa_for(isa));
  h.C = w.C;
  h.K = w.K;
  h.R = w.R;
  h.S = w.S;
  h.groups = w.groups;
  return h;
}

int64_t binary_packed_bytes(const BinaryConv2dWeights& w, Isa isa) {
  const BinaryPack p = binary_pack(w, isa);
  return static_cast<int64_t>(sizeof(BinaryPackHeader)) + p.counts_bytes + p.bits_bytes;
}

int64_t binary_packed_bytes(const BinaryConv2dWeights& w) {
  int64_t most = 0;
  for (Isa isa : {Isa::base, Isa::avx2, Isa::avx512, Isa::avx512_vpopcntdq}) {
    most = std::max(most, binary_packed_bytes(w, isa));
  }
  return most;
}

BinaryPlan binary_plan(const BinaryConv2dParams& p, const BinaryPack& pack, int64_t threads) {
  const BinaryConv2dWeights& w = p.weights;
  BinaryPlan plan{};
  plan.pack = pack;
  plan.columns = (p.OW - 1) * p.stride_w + (w.S - 1) * p.dilation_w + 1;
  plan.pixel_bytes = pack.units * (pack.variant == BinaryVariant::nibbles ? 2 : 4);
  plan.plane_bytes = aligned(w.groups * plan.columns * plan.pixel_bytes);
  plan.row_bytes = p.planes * plan.plane_bytes;
  // Long passes read the weights less often; but a ring within the cache, and work for every thread.
  const int64_t reach = (w.R - 1) * p.dilation_h + 1;
  const int64_t fit = (kRingBytes / plan.row_bytes - reach) / p.stride_h + 1;
  const int64_t share = ceil_div(p.N * p.OH, threads);
  plan.rows = std::clamp<int64_t>(std::min(fit, share), 1, std::min(kMostPassRows, p.OH));
  plan.passes = ceil_div(p.OH, plan.rows);
  plan.rows = ceil_div(p.OH, plan.passes);
  plan.units = p.N * plan.passes;
  plan.ring_rows = std::min(p.H, (plan.rows - 1) * p.stride_h + reach);
  const int64_t group_words = w.groups > 1 ? p.W * words_for(w.C / w.groups) : 0;
  plan.line_words = p.W * words_for(w.C) + group_words;
  plan.pointers = plan.rows * w.R;
  plan.scratch_bytes = aligned(plan.ring_rows * plan.row_bytes) + aligned(plan.line_words * 4) +
                       aligned(plan.pointers * static_cast<int64_t>(sizeof(void*)));
  return plan;
}

}  // namespace basisconv
