// bitpack on CUDA: maps of any strides to words.
//
// A block takes (part of) one row of one image. Where channels lie side by side in pieces of 16 bytes, a thread makes
// the byte of eight channels from one or two such loads; else a word of 32 numbers, with neighbouring threads on
// neighbouring pixels where those lie side by side.
//
// Tests: tests/cuda_on_cpu/test_binary_conv2d.py (no GPU), tests/ops/test_bitpack.py.
#include "bitpack.h"

#include <climits>

#include "device.h"

namespace basisconv::cuda {
namespace {

constexpr int kBitpackThreads = 128;
constexpr int kMostPlanes = 4;
constexpr int kTurns = 4;

struct BitpackProblem {
  const void* input;
  int64_t stride_n, stride_c, stride_h, stride_w;  // elements
  const void* threshold;                           // or null
  const bool* flip;
  uint32_t* output;
  int C, H, W, words, planes;
  bool codes, pixels_first;  // neighbouring threads have neighbouring pixels
};

BASISCONV_DEVICE float value_of(float x) { return x; }
BASISCONV_DEVICE float value_of(bf16 x) { return widen(x); }
BASISCONV_DEVICE float value_of(f16 x) { return widen(x); }
BASISCONV_DEVICE int value_of(int x) { return x; }

// Half to even; NaN and what is below zero are 0. Adding 2^23 moves the integer into the low bits.
BASISCONV_DEVICE uint32_t code_of(float x, int most) {
  const float wide = static_cast<float>(most), inside = x > 0.0f ? (x < wide ? x : wide) : 0.0f;
  return bits_of(inside + 8388608.0f) & 15u;
}
BASISCONV_DEVICE uint32_t code_of(int x, int most) { return static_cast<uint32_t>(x > 0 ? (x < most ? x : most) : 0); }

// The bits of one number, plane b at bit b.
template <class T>
BASISCONV_DEVICE uint32_t bits_of_number(const BitpackProblem& p, T number, int c) {
  const auto x = value_of(number);
  using Value = decltype(value_of(number));
  if (p.codes) return code_of(x, (1 << p.planes) - 1);
  if (p.threshold == nullptr) return x >= Value{0};
  const Value bound = static_cast<const Value*>(p.threshold)[c];
  return p.flip[c] ? x <= bound : x >= bound;
}

// Which of eight 16-bit floats are no numbers from zero on, a bit each. Two and two in a word: a magnitude carries into
// the place of the sign where it is not zero, or where it is beyond infinity's.
template <class T>
BASISCONV_DEVICE uint32_t below_zero(const uint4& eight) {
  constexpr uint32_t signs = 0x80008000u, nan = __is_same(T, bf16) ? 0x007F007Fu : 0x03FF03FFu;
  const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
  uint32_t found = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t magnitude = words[i] & ~signs;
    found = found >> 2 | (((words[i] & (magnitude + ~signs)) | (magnitude + nan)) & signs);
  }
  return (found >> 9 & 0x55) | (found >> 24 & 0xAA);
}

struct Row {
  int64_t input, output;  // elements before the row of the first plane; words
  int64_t plane;          // words
};
BASISCONV_DEVICE Row row_of(const BitpackProblem& p) {
  const int n = static_cast<int>(blockIdx.x) / p.H, y = static_cast<int>(blockIdx.x) % p.H;
  const int64_t line = static_cast<int64_t>(p.W) * p.words, plane = p.H * line;
  return {n * p.stride_n + y * p.stride_h, n * p.planes * plane + y * line, plane};
}

// Eight channels of a pixel a thread and turn: C is a multiple of 8, and every pixel begins at a multiple of 16 bytes.
// The loads of `kTurns` turns are under way at once: memory is far away, and little is done with what comes.
template <class T, int most_planes>
__global__ void __launch_bounds__(kBitpackThreads) bitpack_bytes(const BitpackProblem p) {
  constexpr int pieces = sizeof(T) / 2;
  const Row row = row_of(p);
  const int bytes = p.words * 4, all = p.W * bytes, step = gridDim.y * kBitpackThreads;
  for (int first = blockIdx.y * kBitpackThreads + threadIdx.x; first < all; first += kTurns * step) {
    union {
      uint4 loaded[pieces];
      T numbers[8];
    } eight[kTurns];
    int channel[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int i = first + turn * step, x = i / bytes, c = i % bytes * 8;
      channel[turn] = c;
#pragma unroll
      for (int j = 0; j < pieces; ++j) eight[turn].loaded[j] = uint4{0, 0, 0, 0};
      if (i >= all || c >= p.C) continue;
      const T* from = static_cast<const T*>(p.input) + row.input + x * p.stride_w + c;
#pragma unroll
      for (int j = 0; j < pieces; ++j) eight[turn].loaded[j] = reinterpret_cast<const uint4*>(from)[j];
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int i = first + turn * step, c = channel[turn];
      if (i >= all) break;
      uint32_t found[most_planes] = {};
      if (sizeof(T) == 2 && most_planes == 1 && !p.codes && p.threshold == nullptr) {
        if (c < p.C) found[0] = below_zero<T>(eight[turn].loaded[0]) ^ 0xFF;
      } else if (c < p.C) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint32_t bits = bits_of_number(p, eight[turn].numbers[j], c + j);
#pragma unroll
          for (int plane = 0; plane < most_planes; ++plane) found[plane] |= (bits >> plane & 1) << j;
        }
      }
#pragma unroll
      for (int plane = 0; plane < most_planes; ++plane) {
        if (plane >= p.planes) break;
        reinterpret_cast<uint8_t*>(p.output + row.output + plane * row.plane)[i] = static_cast<uint8_t>(found[plane]);
      }
    }
  }
}

// One word a thread, of any layout.
template <class T, int most_planes>
__global__ void __launch_bounds__(kBitpackThreads) bitpack_words(const BitpackProblem p) {
  const Row row = row_of(p);
  const int all = p.W * p.words;
  for (int i = blockIdx.y * kBitpackThreads + threadIdx.x; i < all; i += gridDim.y * kBitpackThreads) {
    const int x = p.pixels_first ? i % p.W : i / p.words, word = p.pixels_first ? i / p.W : i % p.words;
    const int first = word * 32, count = min(32, p.C - first);
    const T* from = static_cast<const T*>(p.input) + row.input + x * p.stride_w + first * p.stride_c;
    uint32_t found[most_planes] = {};
    for (int c = 0; c < count; ++c) {
      const uint32_t bits = bits_of_number(p, from[c * p.stride_c], first + c);
#pragma unroll
      for (int plane = 0; plane < most_planes; ++plane) found[plane] |= (bits >> plane & 1) << c;
    }
#pragma unroll
    for (int plane = 0; plane < most_planes; ++plane) {
      if (plane < p.planes) p.output[row.output + plane * row.plane + x * p.words + word] = found[plane];
    }
  }
}

template <class T>
const char* launch_bitpack(const CudaBitpack& call, Stream stream) {
  const BitpackParams& params = call.params;
  BitpackProblem p{};
  p.input = params.input;
  p.stride_n = params.stride_n, p.stride_c = params.stride_c, p.stride_h = params.stride_h;
  p.stride_w = params.stride_w;
  p.threshold = params.threshold;
  p.flip = call.flip;
  p.output = params.output;
  p.C = static_cast<int>(params.C), p.H = static_cast<int>(params.H), p.W = static_cast<int>(params.W);
  p.words = static_cast<int>(words_for(params.C));
  p.planes = params.planes;
  p.codes = params.codes;
  p.pixels_first = p.stride_w == 1 && p.stride_c != 1;
  constexpr int64_t piece = 16 / sizeof(T);
  const bool whole = p.stride_c == 1 && p.C % 8 == 0 && p.stride_n % piece == 0 && p.stride_h % piece == 0 &&
                     p.stride_w % piece == 0 && reinterpret_cast<uintptr_t>(p.input) % 16 == 0;
  constexpr int64_t most = 65535, few = 1024;  // blocks of a row; of all
  const int64_t items = params.W * p.words * (whole ? 4 : 1);
  const auto blocks_of = [&](int64_t each) { return (items + kBitpackThreads * each - 1) / (kBitpackThreads * each); };
  int64_t each = kTurns;  // items of a thread
  while (each > 1 && params.N * params.H * blocks_of(each) < few) each /= 2;
  const int64_t blocks = blocks_of(each);
  const dim3 grid{static_cast<unsigned>(params.N * params.H), static_cast<unsigned>(blocks < most ? blocks : most), 1};
  const auto kernel = p.planes == 1 ? (whole ? bitpack_bytes<T, 1> : bitpack_words<T, 1>)
                                    : (whole ? bitpack_bytes<T, kMostPlanes> : bitpack_words<T, kMostPlanes>);
  return launch(kernel, grid, dim3{kBitpackThreads, 1, 1}, 0, stream, p);
}

}  // namespace
}  // namespace basisconv::cuda

namespace basisconv {

const char* cuda_bitpack(const CudaBitpack& call, void* stream) {
  const BitpackParams& p = call.params;
  if (p.N == 0 || p.H == 0 || p.W == 0) return nullptr;
  if (p.W * words_for(p.C) >= INT_MAX / 8 || p.H >= INT_MAX / 4 || p.C >= INT_MAX / 4) return "a row is too long";
  if (p.N * p.H > INT_MAX) return "more than 2^31 rows; split the batch";
  const auto on = static_cast<cuda::Stream>(stream);
  switch (p.type) {
    case BitpackType::f32:
      return cuda::launch_bitpack<float>(call, on);
    case BitpackType::bf16:
      return cuda::launch_bitpack<bf16>(call, on);
    case BitpackType::f16:
      return cuda::launch_bitpack<f16>(call, on);
    default:
      return cuda::launch_bitpack<int>(call, on);
  }
}

}  // namespace basisconv
