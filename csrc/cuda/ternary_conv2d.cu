// ternary_conv2d on CUDA: whether there is a kernel for a call, and the packing of filters.
#include "ternary_conv2d.h"

#include <climits>

#include "ternary_conv2d_problem.h"

namespace basisconv::cuda {
namespace {

bool multiple_of_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

TernaryProblem ternary_problem_of(const CudaTernaryConv2d& call) {
  const CudaTernaryWeights& w = call.weights;
  const TernaryPacking packing(w);
  const auto fits = [](int64_t value) { return static_cast<int>(value); };
  TernaryProblem s{};
  s.scale = {call.scale.values, call.scale.one ? 0 : 1, call.scale.is_float};
  s.bias = {call.bias.values, call.bias.one ? 0 : 1, call.bias.is_float};
  Problem& p = s.problem;
  p.input = call.input;
  p.in = {call.input_stride_n, 1, call.input_stride_h, call.input_stride_w};
  p.tag = static_cast<const uint64_t*>(call.packed);
  p.expected_tag = tag_of(w);
  p.basis = static_cast<const char*>(call.packed) + kTagBytes;
  p.output = call.output;
  p.out = {call.OH * call.OW * w.K, 1, call.OW * w.K, w.K};
  p.N = fits(call.N), p.H = fits(call.H), p.W = fits(call.W), p.OH = fits(call.OH), p.OW = fits(call.OW);
  p.C = fits(w.C), p.K = fits(w.K), p.groups = 1;
  p.R = fits(w.R), p.S = fits(w.S), p.stride_h = fits(call.stride_h), p.stride_w = fits(call.stride_w);
  p.dilation_h = fits(call.dilation_h), p.dilation_w = fits(call.dilation_w);
  p.pad_top = fits(call.pad_top), p.pad_left = fits(call.pad_left);
  p.taps = fits(packing.taps), p.slabs = fits(packing.slabs);
  p.activation = static_cast<int>(call.activation);
  p.input_in_16_bytes = true;
  p.output_in_16_bytes = w.K % 8 == 0 && multiple_of_16(call.output);
  return s;
}

namespace {

constexpr int kPackThreads = 256;

struct PackProblem {
  const uint32_t* words;  // [K, planes, taps, words]
  int planes, words_each;
  char* packed;
  uint64_t tag;
  int64_t K, C, blocks, slabs, taps;
};

// One thread a pair of 16-bit elements of the packed tiles; what is padding gets a zero.
__global__ void __launch_bounds__(kPackThreads) ternary_conv2d_pack(const PackProblem p) {
  constexpr int pairs = kSlab / 2, tile_pairs = kTernaryRows * pairs;
  const int64_t all = p.blocks * p.slabs * p.taps * tile_pairs;
  if (blockIdx.x == 0 && threadIdx.x < kTagBytes / 8) {
    reinterpret_cast<uint64_t*>(p.packed)[threadIdx.x] = threadIdx.x == 0 ? p.tag : 0;
  }
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kPackThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x; i < all; i += threads) {
    const int64_t tile = i / tile_pairs, inside = i % tile_pairs, row = inside / pairs;
    const int64_t k = tile / p.taps / p.slabs * kTernaryRows + row, tap = tile % p.taps;
    const int64_t c = tile / p.taps % p.slabs * kSlab + inside % pairs * 2;
    uint32_t pair = 0;
    for (int half = 0; half < 2; ++half) {
      if (k >= p.K || c + half >= p.C) continue;
      const int64_t at = (k * p.planes * p.taps + tap) * p.words_each + (c + half) / 32;
      const uint32_t plus = p.words[at] >> ((c + half) % 32) & 1;
      const uint32_t minus = p.planes == 1 ? plus ^ 1 : p.words[at + p.taps * p.words_each] >> ((c + half) % 32) & 1;
      constexpr uint32_t two = 0x4000, sign = 0x8000;  // of bfloat16 and of float16
      pair |= ((plus | minus) * two | minus * sign) << (16 * half);
    }
    const uint32_t at = swizzled(static_cast<uint32_t>(row * kSlab * 2 + inside % pairs * 4), kSlab * 2);
    *reinterpret_cast<uint32_t*>(p.packed + kTagBytes + tile * kTernaryTileBytes + at) = pair;
  }
}

}  // namespace
}  // namespace basisconv::cuda

namespace basisconv {

using namespace cuda;

int64_t cuda_ternary_packed_bytes(const CudaTernaryWeights& weights) { return TernaryPacking(weights).bytes(); }

const char* cuda_ternary_pack(const CudaTernaryWeights& weights, const uint32_t* words, int planes, void* packed,
                              void* stream) {
  const TernaryPacking to(weights);
  PackProblem p{words,     planes,   0,      static_cast<char*>(packed), tag_of(weights), weights.K, weights.C,
                to.blocks, to.slabs, to.taps};
  p.words_each = static_cast<int>(tiles_of(weights.C, 32));
  constexpr int64_t most_blocks = 1024;
  const int64_t blocks = tiles_of((to.bytes() - kTagBytes) / 4, kPackThreads);
  const dim3 grid{static_cast<unsigned>(blocks < most_blocks ? blocks : most_blocks), 1, 1}, block{kPackThreads, 1, 1};
  return launch(ternary_conv2d_pack, grid, block, 0, static_cast<Stream>(stream), p);
}

// Why the kernel does not take a call, or the problem and the plan by which it runs.
static const char* planned(const CudaTernaryConv2d& call, const CudaDevice& device, TernaryProblem& s,
                           TernaryPlan& plan) {
#ifdef BASISCONV_WITHOUT_SM90A
  return "the library was built without the kernel for compute capability 9.0";
#endif
  const CudaTernaryWeights& w = call.weights;
  if (device.capability != 90) return "the kernel needs compute capability 9.0";  // sm_90a code runs there alone
  if (call.dtype != DType::bf16 && call.dtype != DType::f16) return "the kernel takes bfloat16 and float16";
  if (w.C % 8 != 0) return "the kernel takes numbers of channels that 8 divides";
  for (const int64_t value :
       {call.N, call.H, call.W, call.OH, call.OW, w.C, w.K, w.R * w.S, call.stride_h, call.stride_w, call.dilation_h,
        call.dilation_w, call.pad_top, call.pad_left, call.OH * call.stride_h, call.OW * call.stride_w,
        w.R * call.dilation_h, w.S * call.dilation_w, tiles_of(w.C, kSlab) * w.R * w.S}) {
    if (value >= INT_MAX / 4) return "the kernel takes sizes below 2^29";
  }
  if (call.H == 0 || call.W == 0) return "the kernel takes no empty maps";
  s = ternary_problem_of(call);
  const Problem& p = s.problem;
  plan = ternary_plan(p, device);
  if (plan.bytes == 0) return "the halo tile does not fit into shared memory";
  return reason_against(image_map(p.input, call.dtype == DType::bf16, p.N, p.H, p.W, p.C, p.in.n, p.in.h, p.in.w,
                                  plan.rows, plan.columns));
}

const char* cuda_ternary_reason(const CudaTernaryConv2d& call, const CudaDevice& device) {
  TernaryProblem s{};
  TernaryPlan plan{};
  return planned(call, device, s, plan);
}

const char* cuda_ternary_conv2d(const CudaTernaryConv2d& call, const CudaDevice& device, void* stream) {
  if (call.N == 0 || call.OH == 0 || call.OW == 0 || call.weights.K == 0) return nullptr;
  TernaryProblem s{};
  TernaryPlan plan{};
  if (const char* reason = planned(call, device, s, plan)) return reason;
#ifndef BASISCONV_WITHOUT_SM90A
  return ternary_conv2d_on_hopper(s, call.dtype, plan, device, static_cast<Stream>(stream));
#else
  return nullptr;
#endif
}

}  // namespace basisconv
