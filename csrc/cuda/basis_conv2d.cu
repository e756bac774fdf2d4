// basis_conv2d on CUDA: which kernel a call gets, and the packing of weights.
#include <climits>

#include "basis_conv2d_problem.h"
#include "basis_conv2d_sm90a.h"

namespace basisconv::cuda {
namespace {

Strides strides_of(int64_t channels, int64_t height, int64_t width, bool channels_last) {
  return channels_last ? Strides{channels * height * width, 1, channels * width, channels}
                       : Strides{channels * height * width, height * width, width, 1};
}

bool multiple_of(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace

Problem problem_of(const CudaBasisConv2d& call) {
  const BasisConv2dParams& params = call.params;
  const BasisConv2dWeights& w = params.weights;
  const Packing packing = packing_of(w);
  const auto fits = [](int64_t value) { return static_cast<int>(value); };  // cuda_variant has compared with INT_MAX
  Problem p{};
  p.input = params.input;
  p.in = {params.input_stride_n, params.input_stride_c, params.input_stride_h, params.input_stride_w};
  p.tag = static_cast<const uint64_t*>(params.packed);
  p.expected_tag = tag_of(w);
  p.basis = static_cast<const char*>(params.packed) + kTagBytes;
  p.mixing = p.basis + packing.groups * packing.basis_bytes;
  p.bias = call.bias;
  p.residual = params.residual;
  p.output = params.output;
  p.out = strides_of(w.K, params.OH, params.OW, params.channels_last);
  p.maps = params.maps;
  p.map = strides_of(w.Q, params.OH, params.OW, params.channels_last);
  p.basis_bytes = packing.basis_bytes;
  p.mixing_bytes = packing.mixing_bytes;
  p.N = fits(params.N), p.H = fits(params.H), p.W = fits(params.W), p.OH = fits(params.OH), p.OW = fits(params.OW);
  p.C = fits(packing.C), p.Q = fits(packing.Q), p.K = fits(packing.K), p.groups = fits(packing.groups);
  p.R = fits(w.R), p.S = fits(w.S), p.stride_h = fits(w.stride_h), p.stride_w = fits(w.stride_w);
  p.dilation_h = fits(w.dilation_h), p.dilation_w = fits(w.dilation_w);
  p.pad_top = fits(params.pad_top), p.pad_left = fits(params.pad_left);
  p.taps = fits(packing.taps), p.slabs = fits(packing.slabs), p.chunks = fits(packing.chunks);
  p.activation = static_cast<int>(params.activation);
  p.input_in_16_bytes = p.in.c == 1 && p.in.n % 8 == 0 && p.in.h % 8 == 0 && p.in.w % 8 == 0 &&
                        multiple_of(p.input, 16) && (p.groups == 1 || p.C % 8 == 0);
  p.pixels_side_by_side = p.in.w == 1 && p.in.c != 1;
  p.output_in_16_bytes = params.channels_last && p.K % 8 == 0 && multiple_of(p.output, 16) &&
                         multiple_of(p.residual, 16) && multiple_of(p.bias, 4);
  return p;
}

namespace {

constexpr int kPackThreads = 256;

struct PackProblem {
  const void* basis;
  int64_t basis_stride[4];
  const void* mixing;
  int64_t mixing_stride[2];
  char* packed;
  uint64_t tag;
  Packing to;
  int64_t S;
};

// One thread an element of 16 bits of the packed tiles; what is padding gets a zero.
template <class T>
__global__ void __launch_bounds__(kPackThreads) basis_conv2d_pack(const PackProblem p) {
  const Packing& to = p.to;
  const int64_t all_basis = to.groups * to.basis_bytes / 2, all = all_basis + to.groups * to.mixing_bytes / 2;
  char* tiles = p.packed + kTagBytes;
  if (blockIdx.x == 0 && threadIdx.x < kTagBytes / 8) {
    reinterpret_cast<uint64_t*>(p.packed)[threadIdx.x] = threadIdx.x == 0 ? p.tag : 0;
  }
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kPackThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x; i < all; i += threads) {
    T value{0};
    int64_t tile_at, inside;
    int row_bytes;
    if (i < all_basis) {
      const int64_t tile = i / (to.Q16 * kSlab), q = i / kSlab % to.Q16, tap = tile % to.taps;
      const int64_t c = tile / to.taps % to.slabs * kSlab + i % kSlab, group = tile / to.taps / to.slabs;
      if (q < to.Q && c < to.C) {
        value = static_cast<const T*>(p.basis)[(group * to.Q + q) * p.basis_stride[0] + c * p.basis_stride[1] +
                                               tap / p.S * p.basis_stride[2] + tap % p.S * p.basis_stride[3]];
      }
      row_bytes = kSlab * 2;
      tile_at = tile * to.Q16 * row_bytes;
      inside = q * row_bytes + i % kSlab * 2;
    } else {
      const int width = mixing_width(to.Q16), wide = to.Q16 / width;  // tiles side by side
      const int64_t j = i - all_basis, tile = j / (kChunk * width), row = j / width % kChunk;
      const int64_t q = tile % wide * width + j % width, k = tile / wide % to.chunks * kChunk + row;
      const int64_t group = tile / wide / to.chunks;
      if (q < to.Q && k < to.K) {
        value = static_cast<const T*>(p.mixing)[(group * to.K + k) * p.mixing_stride[0] + q * p.mixing_stride[1]];
      }
      row_bytes = width * 2;
      tile_at = to.groups * to.basis_bytes + tile * kChunk * row_bytes;
      inside = row * row_bytes + j % width * 2;
    }
    *reinterpret_cast<T*>(tiles + tile_at + swizzled(static_cast<uint32_t>(inside), row_bytes)) = value;
  }
}

}  // namespace
}  // namespace basisconv::cuda

namespace basisconv {

using namespace cuda;

int64_t cuda_packed_bytes(const BasisConv2dWeights& weights) {
  const Packing p = packing_of(weights);
  return kTagBytes + p.groups * (p.basis_bytes + p.mixing_bytes);
}

const char* cuda_pack(const CudaPack& pack, void* stream) {
  PackProblem p{};
  p.basis = pack.basis_weight;
  p.mixing = pack.coefficients;
  for (int i = 0; i < 4; ++i) p.basis_stride[i] = pack.basis_stride[i];
  for (int i = 0; i < 2; ++i) p.mixing_stride[i] = pack.coefficients_stride[i];
  p.packed = static_cast<char*>(pack.packed);
  p.tag = tag_of(pack.weights);
  p.to = packing_of(pack.weights);
  p.S = pack.weights.S;
  constexpr int64_t most_blocks = 1024;
  const int64_t blocks = tiles_of(cuda_packed_bytes(pack.weights) / 2, kPackThreads);
  const dim3 grid{static_cast<unsigned>(blocks < most_blocks ? blocks : most_blocks), 1, 1}, block{kPackThreads, 1, 1};
  const auto kernel = pack.weights.dtype == DType::bf16 ? basis_conv2d_pack<bf16> : basis_conv2d_pack<f16>;
  return launch(kernel, grid, block, 0, static_cast<Stream>(stream), p);
}

// Whether sm_90a's kernel takes a call that the CUDA kernels take at all. sm_90a code runs on 9.0 alone.
static bool hopper_takes(const CudaBasisConv2d& call, const CudaDevice& device) {
#ifdef BASISCONV_WITHOUT_SM90A
  return false;
#endif
  if (device.capability != 90 || call.params.weights.precise || call.params.weights.groups != 1) return false;
  const Problem p = problem_of(call);
  if (!p.input_in_16_bytes || p.C % 8 != 0 || p.H == 0 || p.W == 0) return false;
  const HopperPlan plan = hopper_plan(p, device);
  const TensorMapRequest map =
      image_map(p.input, true, p.N, p.H, p.W, p.C, p.in.n, p.in.h, p.in.w, plan.rows, plan.columns, plan.images);
  return plan.bytes > 0 && reason_against(map) == nullptr;
}

CudaVariant cuda_variant(const CudaBasisConv2d& call, const CudaDevice& device, const char** reason) {
  const BasisConv2dParams& p = call.params;
  const BasisConv2dWeights& w = p.weights;
  const char* unused;
  const char*& why = reason != nullptr ? *reason : unused;
  why = nullptr;
  if (device.capability < 80) why = "the CUDA kernels need compute capability 8.0";
  if (w.dtype != DType::bf16 && w.dtype != DType::f16) why = "the CUDA kernels take bfloat16 and float16";
  if (w.groups != w.mixing_groups) why = "the CUDA kernels take groups with coefficients [K, Q/groups] only";
  if (w.Q / w.mixing_groups > kLargestQ) why = "the CUDA kernels take at most 256 basis filters a group";
  if (w.mixing_groups > USHRT_MAX) why = "the CUDA kernels take at most 65535 groups";
  for (const int64_t value :
       {p.N, p.H, p.W, p.OH, p.OW, w.C, w.K, w.R * w.S, w.stride_h, w.stride_w, w.dilation_h, w.dilation_w, p.pad_top,
        p.pad_left, p.OH * w.stride_h, p.OW * w.stride_w, w.R * w.dilation_h, w.S * w.dilation_w}) {
    if (value >= INT_MAX / 4) why = "the CUDA kernels take sizes below 2^29";
  }
  if (why != nullptr) return CudaVariant::none;
  return hopper_takes(call, device) ? CudaVariant::sm90a : CudaVariant::sm80;
}

const char* cuda_basis_conv2d(const CudaBasisConv2d& call, const CudaDevice& device, void* stream) {
  const BasisConv2dParams& p = call.params;
  if (p.N == 0 || p.OH == 0 || p.OW == 0 || p.weights.K == 0) return nullptr;
  const char* reason;
  switch (cuda_variant(call, device, &reason)) {
    case CudaVariant::sm80:
      return cuda_basis_conv2d_sm80(call, device, stream);
#ifndef BASISCONV_WITHOUT_SM90A
    case CudaVariant::sm90a:
      return cuda_basis_conv2d_sm90a(call, device, stream);
#endif
    default:
      return reason;
  }
}

}  // namespace basisconv
