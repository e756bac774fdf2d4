// binary_conv2d on CUDA: what a call asks for, and the packing of weights.
#include <climits>

#include "binary_conv2d_sm90a.h"

namespace basisconv::cuda::binary {
namespace {

constexpr int kPackThreads = 256;

struct PackProblem {
  const uint32_t* words;  // [groups * K, R, S, words]
  char* packed;
  uint64_t tag;
  Packing to;
};

BASISCONV_DEVICE int64_t thread_in_grid() { return static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x; }

// One thread a filter, those that fill a tile included: its totals.
__global__ void __launch_bounds__(kPackThreads) binary_conv2d_pack_totals(const PackProblem p) {
  const Packing& to = p.to;
  const int64_t i = thread_in_grid();
  if (i < kTagBytes / 8) reinterpret_cast<uint64_t*>(p.packed)[i] = i == 0 ? p.tag : 0;
  if (i >= to.groups * to.padded) return;
  const int64_t k = i % to.padded, group = i / to.padded, line = (to.S + 1) * to.padded;
  int32_t* totals = reinterpret_cast<int32_t*>(p.packed + kTagBytes + group * to.totals_bytes) + k;
  const uint32_t* words = p.words + (group * to.K + k) * to.R * to.S * to.words;
  for (int64_t s = 0; s <= to.S; ++s) totals[s * to.padded] = 0;
  for (int64_t r = 0; r < to.R; ++r, totals += line) {
    int32_t sum = 0;
    totals[line] = 0;
    for (int64_t s = 0; s < to.S; ++s) {
      if (k < to.K) {
        sum += static_cast<int32_t>(to.C);
        for (int64_t word = 0; word < to.words; ++word) sum -= 2 * __popc(*words++);
      }
      totals[line + (s + 1) * to.padded] = totals[(s + 1) * to.padded] + sum;
    }
  }
}

// One thread a word of the tiles; what is padding gets a zero.
__global__ void __launch_bounds__(kPackThreads) binary_conv2d_pack_tiles(const PackProblem p) {
  const Packing& to = p.to;
  const int64_t all = to.groups * to.blocks * to.tile_bytes / 4, threads = int64_t{gridDim.x} * kPackThreads;
  uint32_t* tiles = reinterpret_cast<uint32_t*>(p.packed + kTagBytes + to.groups * to.totals_bytes);
  const int slot_words = kUnitWords / to.merged, row_count = to.columns + 1;
  for (int64_t i = thread_in_grid(); i < all; i += threads) {
    const int in_unit = static_cast<int>(i % kUnitWords);
    const int64_t row = i / kUnitWords % row_count, unit = i / kUnitWords / row_count;  // among all units
    const int64_t in_slab = unit % (to.steps * 2), slab = unit / (to.steps * 2) % to.slabs;
    const int64_t block = unit / (to.steps * 2) / to.slabs % to.blocks;
    const int64_t group = unit / (to.steps * 2) / to.slabs / to.blocks;
    const int64_t position = in_slab / to.slab_units, r = position / to.across;
    const int64_t s = position % to.across * to.merged + in_unit / slot_words;
    const int64_t word = (slab * to.slab_units + in_slab % to.slab_units) * kUnitWords + in_unit % slot_words;
    const int column = static_cast<int>(row);
    const int64_t k = block * to.columns + (to.columns > kFewFilters ? filter_of_column(column) : column);
    uint32_t value = 0;
    if (position < to.positions && s < to.S && word < to.words) {
      if (row == to.columns) {
        const int64_t left = to.C - word * kWordBits;
        value = left < kWordBits ? (1u << left) - 1u : ~0u;
      } else if (k < to.K) {
        value = p.words[(((group * to.K + k) * to.R + r) * to.S + s) * to.words + word];
      }
    }
    tiles[i] = value;
  }
}

bool multiple_of(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace

Problem problem_of(const CudaBinaryConv2d& call) {
  const BinaryConv2dParams& params = call.params;
  const BinaryConv2dWeights& w = params.weights;
  const Packing packing = packing_of(w);
  const auto fits = [](int64_t value) { return static_cast<int>(value); };  // compared with INT_MAX before
  Problem p{};
  p.input = static_cast<const uint32_t*>(params.input);
  p.tag = static_cast<const uint64_t*>(params.packed);
  p.expected_tag = tag_of(w);
  p.totals = reinterpret_cast<const int32_t*>(static_cast<const char*>(params.packed) + kTagBytes);
  p.filters = static_cast<const char*>(params.packed) + kTagBytes + packing.groups * packing.totals_bytes;
  p.scale = call.scale;
  p.bias = call.bias;
  p.pixel_scale = call.pixel_scale;
  p.threshold = call.threshold;
  p.flip = call.flip;
  p.output = params.output;
  p.tile_bytes = packing.tile_bytes;
  p.N = fits(params.N), p.H = fits(params.H), p.W = fits(params.W), p.OH = fits(params.OH), p.OW = fits(params.OW);
  p.C = fits(packing.C), p.K = fits(packing.K), p.groups = fits(packing.groups), p.planes = params.planes;
  p.R = fits(w.R), p.S = fits(w.S), p.stride_h = fits(params.stride_h), p.stride_w = fits(params.stride_w);
  p.dilation_h = fits(params.dilation_h), p.dilation_w = fits(params.dilation_w);
  p.pad_top = fits(params.pad_top), p.pad_left = fits(params.pad_left);
  p.words = fits(words_for(w.C)), p.group_words = fits(packing.words);
  p.merged = packing.merged, p.slab_units = packing.slab_units, p.slabs = fits(packing.slabs);
  p.across = fits(packing.across), p.positions = fits(packing.positions), p.steps = fits(packing.steps);
  p.chunk_steps = fits(packing.chunk_steps), p.chunks = fits(packing.chunks), p.blocks = fits(packing.blocks);
  p.padded = fits(packing.padded);
  p.padding_value = params.padding_value;
  p.activation = params.activation;
  p.output_type = params.output_type;
  p.codes = params.codes;
  p.channels_last = params.channels_last;
  p.input_in_16_bytes = p.merged == 1 && p.words % kUnitWords == 0 && multiple_of(p.input, 16) &&
                        (p.groups == 1 || p.C % (kUnitWords * kWordBits) == 0);
  const bool wide = p.output_type == BinaryOutput::i32 || p.output_type == BinaryOutput::f32;
  p.output_in_16_bytes = p.channels_last && p.K % (wide ? 4 : 8) == 0 && multiple_of(p.output, 16);
  return p;
}

}  // namespace basisconv::cuda::binary

namespace basisconv {

using namespace cuda;

int64_t cuda_binary_packed_bytes(const BinaryConv2dWeights& weights) {
  const binary::Packing p = binary::packing_of(weights);
  return binary::kTagBytes + p.groups * (p.totals_bytes + p.blocks * p.tile_bytes);
}

const char* cuda_binary_pack(const BinaryConv2dWeights& weights, const uint32_t* words, void* packed, void* stream) {
  using namespace binary;
  const PackProblem p{words, static_cast<char*>(packed), tag_of(weights), packing_of(weights)};
  const auto on = static_cast<Stream>(stream);
  const dim3 block{kPackThreads, 1, 1};
  const int64_t filters = ceil_div(p.to.groups * p.to.padded, kPackThreads);
  if (filters > INT_MAX) return "too many filters";
  const char* wrong = launch(binary_conv2d_pack_totals, dim3{static_cast<unsigned>(filters), 1, 1}, block, 0, on, p);
  if (wrong != nullptr) return wrong;
  constexpr int64_t most_blocks = 1024;
  const int64_t blocks = ceil_div(p.to.groups * p.to.blocks * p.to.tile_bytes / 4, kPackThreads);
  const dim3 grid{static_cast<unsigned>(blocks < most_blocks ? blocks : most_blocks), 1, 1};
  return launch(binary_conv2d_pack_tiles, grid, block, 0, on, p);
}

bool cuda_binary_packs_output(const BinaryConv2dWeights& w) { return w.groups == 1 || w.K / w.groups % 8 == 0; }

const char* cuda_binary_reason(const CudaBinaryConv2d& call, const CudaDevice& device) {
  const BinaryConv2dParams& p = call.params;
  const BinaryConv2dWeights& w = p.weights;
  if (device.capability < 80) return "the CUDA kernels need compute capability 8.0";
  for (const int64_t value :
       {p.N, p.H, p.W, p.OH, p.OW, w.C, w.K, w.R * w.S, p.stride_h, p.stride_w, p.dilation_h, p.dilation_w, p.pad_top,
        p.pad_left, p.OH * p.stride_h, p.OW * p.stride_w, w.R * p.dilation_h, w.S * p.dilation_w}) {
    if (value >= INT_MAX / 4) return "the CUDA kernels take sizes below 2^29";
  }
  const binary::Packing packing = binary::packing_of(w);
  if (packing.groups * packing.blocks > USHRT_MAX) return "the CUDA kernels take at most 65535 groups";
  if (packing.totals_bytes >= INT_MAX || packing.slabs * packing.steps >= INT_MAX / 4)
    return "the filters are too large";
  return nullptr;
}

const char* cuda_binary_conv2d(const CudaBinaryConv2d& call, const CudaDevice& device, void* stream) {
  const BinaryConv2dParams& p = call.params;
  if (p.N == 0 || p.OH == 0 || p.OW == 0 || p.weights.K == 0) return nullptr;
  if (const char* reason = cuda_binary_reason(call, device)) return reason;
  if (p.output_type == BinaryOutput::packed && !cuda_binary_packs_output(p.weights)) {
    return "packed output of groups that end inside a byte: take whole numbers and pack them";
  }
  const binary::Problem problem = binary::problem_of(call);
#ifndef BASISCONV_WITHOUT_SM90A
  if (binary::hopper_takes(problem, device)) {
    const binary::HopperPlan plan = binary::hopper_plan(problem, device);
    const auto run = plan.slabs > 0 ? binary::run_sm90a_slabs : binary::run_sm90a;
    if (plan.bytes > 0) return run(problem, plan, static_cast<Stream>(stream));
  }
#endif
  return binary::run_sm80(problem, device, static_cast<Stream>(stream));
}

}  // namespace basisconv
