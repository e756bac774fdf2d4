// Outputs of the sm_90a kernel of binary_conv2d: from the accumulators of a warpgroup to memory, without a detour.
//
// The columns of the products are in an order in which a lane has eight neighbouring filters of a pixel: numbers leave
// in pieces of 16 bytes, four lanes side by side; bits, collected as bytes, change places in four lanes and leave as
// words.
#pragma once
#include "binary_conv2d_sm90a.h"
#include "binary_conv2d_store.h"

namespace basisconv::cuda::binary {

constexpr int32_t kUnreachable = 1 << 30;  // no sum is

// What belongs to the filters of a block: scale and bias as float bits; or for bits the sum / 2 from which on they are
// set, and in `second` a word for each 32 with the filters that are flipped.
template <int N>
BASISCONV_DEVICE void load_constants(const Problem& p, uint32_t* first_of, uint32_t* second_of, int first) {
  if (threadIdx.x >= N) return;
  const int i = threadIdx.x, k = first + i;
  const bool real = k < p.K, good = *p.tag == p.expected_tag;
  if (p.output_type == BinaryOutput::packed) {
    const bool given = p.threshold != nullptr && real;
    const int bound = given ? p.threshold[k] : 0;
    const bool flipped = given && p.flip[k] && good;
    first_of[i] = real && good ? (bound >> 1) + (flipped ? 1 : bound & 1) : kUnreachable;
    const uint32_t word = __ballot_sync(~0u, flipped);
    if (i % 32 == 0) second_of[i / 32] = word;
  } else {
    const float scale = real && p.scale.values != nullptr ? number(p.scale, k) : 1.0f;
    first_of[i] = good ? bits_of(scale) : 0x7FC00000u;
    second_of[i] = bits_of(real && p.bias.values != nullptr ? number(p.bias, k) : 0.0f);
  }
}

// A lane's two pixels: counted through the batch, and half the sum of no agreement.
struct Pixels {
  int number[2], half[2];
};

// Eight numbers of a lane.
BASISCONV_DEVICE void eight(const uint32_t* from, uint32_t (&to)[8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 four = reinterpret_cast<const uint4*>(from)[i];
    to[4 * i] = four.x, to[4 * i + 1] = four.y, to[4 * i + 2] = four.z, to[4 * i + 3] = four.w;
  }
}

// The accumulator of filter e of eight in the q-th 32, for the first or the second pixel.
BASISCONV_DEVICE constexpr int accumulator(int q, int e, int pixel) { return (q * 4 + e / 2) * 4 + pixel * 2 + e % 2; }

// Byte t of each of four lanes' words to lane t, the lanes' bytes in their order.
BASISCONV_DEVICE uint32_t exchanged(uint32_t word) {
  const int lane = threadIdx.x;
  const uint32_t two = __byte_perm(word, __shfl_xor_sync(~0u, word, 2), lane & 2 ? 0x3276 : 0x5410);
  return __byte_perm(two, __shfl_xor_sync(~0u, two, 1), lane & 1 ? 0x3715 : 0x6240);
}

template <int N>
BASISCONV_DEVICE void store_bits(const Problem& p, const int (&d)[N / 2], const Pixels& pixels, int all, int first,
                                 const uint32_t* bounds, const uint32_t* flips) {
  constexpr int words = N / 32;
  const int t = threadIdx.x % 4;
  uint32_t found[2] = {};  // byte q: filters 8 t .. 8 t + 7 of the q-th 32; a set bit is one below its bound
#pragma unroll
  for (int q = words - 1; q >= 0; --q) {
    uint32_t bound[8];
    eight(bounds + q * 32 + t * 8, bound);
#pragma unroll
    for (int e = 7; e >= 0; --e) {
#pragma unroll
      for (int pixel = 0; pixel < 2; ++pixel) {
        const int above = d[accumulator(q, e, pixel)] - static_cast<int>(bound[e]) - pixels.half[pixel];
        found[pixel] = found[pixel] << 1 | static_cast<uint32_t>(above) >> 31;
      }
    }
  }
  const int of_pixel = (p.K + 31) / 32, word = first / 32 + t % words;
  uint32_t* output = static_cast<uint32_t*>(p.output) + word;
  const uint32_t flip = ~flips[t % words];
  if constexpr (words == 4) {
#pragma unroll
    for (int pixel = 0; pixel < 2; ++pixel) {
      const uint32_t bits = exchanged(found[pixel]) ^ flip;
      if (pixels.number[pixel] < all && word < of_pixel) output[int64_t{pixels.number[pixel]} * of_pixel] = bits;
    }
  } else {  // both pixels at once: lane t has word t % words of pixel t / words
    const uint32_t bits = exchanged(found[0] | found[1] << 8 * words) ^ flip;
    const int number = t / words & 1 ? pixels.number[1] : pixels.number[0];
    if (t < 2 * words && number < all && word < of_pixel) output[int64_t{number} * of_pixel] = bits;
  }
}

// v as a float: halves are added to a float whose last bit is 1, as whole numbers, and its own value is taken off
// again.
BASISCONV_DEVICE float sum_of(int agreed, int half) {
  constexpr int32_t float_bits = 0x4B400000;  // 1.5 * 2^23
  return float_of(static_cast<uint32_t>(agreed + (float_bits - half))) * 2.0f - 25165824.0f;
}

// Numbers of 4 or 2 bytes; a lane has eight neighbours. `scaled`: each pixel has a factor.
template <int N, class T, bool scaled>
BASISCONV_DEVICE void store_numbers(const Problem& p, const int (&d)[N / 2], const Pixels& pixels, int all, int first,
                                    const uint32_t* scales, const uint32_t* biases) {
  const int own = threadIdx.x % 4 * 8;
  const bool good = !__is_same(T, int32_t) || *p.tag == p.expected_tag;
  [[maybe_unused]] float factor[2] = {1.0f, 1.0f};
#pragma unroll
  for (int pixel = 0; scaled && pixel < 2; ++pixel) {
    if (pixels.number[pixel] < all) factor[pixel] = number(p.pixel_scale, pixels.number[pixel]);
  }
#pragma unroll
  for (int q = 0; q < N / 32; ++q) {
    const int k = first + q * 32 + own;
    [[maybe_unused]] uint32_t scale[8], bias[8];
    if constexpr (!__is_same(T, int32_t)) {
      eight(scales + q * 32 + own, scale);
      eight(biases + q * 32 + own, bias);
    }
#pragma unroll
    for (int pixel = 0; pixel < 2; ++pixel) {
      constexpr int count = sizeof(T) * 2;
      uint32_t words[count];
      [[maybe_unused]] float values[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int agreed = d[accumulator(q, e, pixel)];
        if constexpr (__is_same(T, int32_t)) {
          words[e] = static_cast<uint32_t>(good ? agreed * 2 - pixels.half[pixel] * 2 : kNoSum);
        } else {
          values[e] = sum_of(agreed, pixels.half[pixel]);
          if constexpr (scaled) values[e] *= factor[pixel];
          values[e] = values[e] * float_of(scale[e]) + float_of(bias[e]);
        }
      }
      if constexpr (__is_same(T, float)) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (p.activation != BinaryActivation::none) values[e] = values[e] <= 0.0f ? 0.0f : values[e];
          if (p.activation == BinaryActivation::relu6) values[e] = values[e] > 6.0f ? 6.0f : values[e];
          words[e] = bits_of(values[e]);
        }
      } else if constexpr (sizeof(T) == 2) {
        const uint32_t six = round2<T>(6.0f, 6.0f);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          words[e] = round2<T>(values[2 * e], values[2 * e + 1]);
          if (p.activation != BinaryActivation::none) words[e] = max2<T>(words[e], 0);
          if (p.activation == BinaryActivation::relu6) words[e] = min2<T>(words[e], six);
        }
      }
      if (pixels.number[pixel] >= all) continue;
      uint4* to = reinterpret_cast<uint4*>(static_cast<T*>(p.output) + int64_t{pixels.number[pixel]} * p.K + k);
#pragma unroll
      for (int i = 0; i < count / 4; ++i) {
        if (k + i * 4 < p.K) to[i] = uint4{words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
      }
    }
  }
}

template <int N, class T>
BASISCONV_DEVICE void store_floats(const Problem& p, const int (&d)[N / 2], const Pixels& pixels, int all, int first,
                                   const uint32_t* scales, const uint32_t* biases) {
  if (p.pixel_scale.values != nullptr) return store_numbers<N, T, true>(p, d, pixels, all, first, scales, biases);
  store_numbers<N, T, false>(p, d, pixels, all, first, scales, biases);
}

template <int N>
BASISCONV_DEVICE void store(const Problem& p, const int (&d)[N / 2], const Pixels& pixels, int all, int first,
                            const uint32_t* a, const uint32_t* b) {
  switch (p.output_type) {
    case BinaryOutput::packed:
      return store_bits<N>(p, d, pixels, all, first, a, b);
    case BinaryOutput::i32:
      return store_numbers<N, int32_t, false>(p, d, pixels, all, first, a, b);
    case BinaryOutput::f32:
      return store_floats<N, float>(p, d, pixels, all, first, a, b);
    case BinaryOutput::bf16:
      return store_floats<N, bf16>(p, d, pixels, all, first, a, b);
    case BinaryOutput::f16:
      return store_floats<N, f16>(p, d, pixels, all, first, a, b);
  }
}

}  // namespace basisconv::cuda::binary
