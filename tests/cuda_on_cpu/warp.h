// What the 32 lanes of a warp do together. Each lane brings its operands and waits; the last to come computes the
// results of all. Lanes that come to different operations are reported, lanes that do not come show as a deadlock.
#pragma once
#include <algorithm>
#include <cmath>

#include "../../csrc/common/dtype.h"
#include "fibers.h"

namespace cuda_on_cpu {

struct WarpState {
  const void* in[kWarp];
  void* out[kWarp];
  const void* operation = nullptr;
  uint32_t arrived = 0;
};
inline std::vector<WarpState> warps;

// Wavefronts of ldmatrix beyond one for each 8x8 matrix: what shared memory's 32 banks serialise.
struct Counters {
  long matrices = 0, conflicts = 0;
};
inline Counters counters;

inline const bool warps_are_cleared = [] {
  at_block_start.push_back([] { warps.assign(block.fibers.size() / kWarp, WarpState{}); });
  return true;
}();

// `operation(in, out)` has the operands and the results of all lanes; both lie in the waiting fibers' own stacks.
template <class In, class Out>
void together(const char* name, const In& in, Out& out, void (*operation)(const In* const*, Out* const*)) {
  WarpState& warp = warps[block.self / kWarp];
  const int lane = block.self % kWarp;
  const void* id = reinterpret_cast<const void*>(operation);
  if (warp.arrived != 0 && warp.operation != id) fail(std::string(name) + ": other lanes are at another operation");
  warp.operation = id;
  warp.in[lane] = &in;
  warp.out[lane] = &out;
  warp.arrived |= 1u << lane;
  if (warp.arrived != ~0u) return wait_for(name);
  operation(reinterpret_cast<const In* const*>(warp.in), reinterpret_cast<Out* const*>(warp.out));
  warp.arrived = 0;
  block.ready[block.self / kWarp] = ~0u;
}

struct Nothing {};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
template <class T>
float decode(uint32_t bits) {
  return basisconv::to_float(T{static_cast<uint16_t>(bits)});
}
struct Pair {
  float low, high;
};
template <class T>
Pair decode2(uint32_t word) {
  return {decode<T>(word & 0xFFFF), decode<T>(word >> 16)};
}

// a[16][8 words], b[8][8 words] and c[16][8] from the registers of the lanes, as device.h states them; `add` joins a
// word of each to the sum.
template <class Word, class C>
struct MmaIn {
  Word a[4], b[2];
  C c[4];
};
template <class C>
struct MmaOut {
  C c[4];
};
template <int words, class Word, class C, class Add>
void mma(const MmaIn<Word, C>* const* in, MmaOut<C>* const* out, Add add) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      const int owner = i % 8 * 4 + j / 2, slot = i / 8 * 2 + j % 2;
      C sum = in[owner]->c[slot];
      for (int k = 0; k < words; ++k) {
        sum = add(sum, in[i % 8 * 4 + k % 4]->a[i / 8 + k / 4 * 2], in[j * 4 + k % 4]->b[k / 4]);
      }
      out[owner]->c[slot] = sum;
    }
  }
}

inline void count_conflicts(const char* const (&rows)[8]) {
  int hits[8] = {}, worst = 0;
  for (int i = 0; i < 8; ++i) {
    const bool seen = std::find(rows, rows + i, rows[i]) != rows + i;  // one wavefront serves equal addresses
    if (!seen) worst = std::max(worst, ++hits[(rows[i] - shared) / 16 % 8]);
  }
  counters.matrices += 1;
  counters.conflicts += worst - 1;
}

}  // namespace cuda_on_cpu

inline void __syncwarp() {
  using namespace cuda_on_cpu;
  Nothing out;
  together<Nothing, Nothing>("__syncwarp", Nothing{}, out, [](const Nothing* const*, Nothing* const*) {});
}
template <class T>
T __shfl_sync(uint32_t, T value, int from) {
  struct In {
    T value;
    int from;
  };
  T out{};
  cuda_on_cpu::together<In, T>("__shfl_sync", {value, from}, out, [](const In* const* in, T* const* out) {
    for (int i = 0; i < cuda_on_cpu::kWarp; ++i) *out[i] = in[in[i]->from & (cuda_on_cpu::kWarp - 1)]->value;
  });
  return out;
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int flip) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % cuda_on_cpu::kWarp) ^ flip);
}
inline uint32_t __ballot_sync(uint32_t, int predicate) {
  uint32_t out = 0;
  cuda_on_cpu::together<int, uint32_t>("__ballot_sync", predicate, out, [](const int* const* in, uint32_t* const* out) {
    uint32_t bits = 0;
    for (int i = 0; i < cuda_on_cpu::kWarp; ++i) bits |= static_cast<uint32_t>(*in[i] != 0) << i;
    for (int i = 0; i < cuda_on_cpu::kWarp; ++i) *out[i] = bits;
  });
  return out;
}
inline int __popc(uint32_t value) { return __builtin_popcount(value); }
// Four of the eight bytes of two words, each by a hexadecimal digit of the selector.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(both >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return out;
}

namespace basisconv::cuda {

inline uint32_t bits_of(float value) { return cuda_on_cpu::bits_of(value); }
inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
template <class T>
uint32_t round2(float low, float high) {
  T first, second;
  from_float(low, &first);
  from_float(high, &second);
  return first.bits | static_cast<uint32_t>(second.bits) << 16;
}
// Of 16-bit numbers two and two; NaN where either is.
template <class T, class Choose>
uint32_t chosen2(uint32_t a, uint32_t b, Choose choose) {
  const cuda_on_cpu::Pair x = cuda_on_cpu::decode2<T>(a), y = cuda_on_cpu::decode2<T>(b);
  const auto one = [choose](float v, float w) { return std::isnan(v) ? v : std::isnan(w) ? w : choose(v, w); };
  return round2<T>(one(x.low, y.low), one(x.high, y.high));
}
template <class T>
uint32_t max2(uint32_t a, uint32_t b) {
  return chosen2<T>(a, b, [](float v, float w) { return std::max(v, w); });
}
template <class T>
uint32_t min2(uint32_t a, uint32_t b) {
  return chosen2<T>(a, b, [](float v, float w) { return std::min(v, w); });
}
template <class T>
float widen(T value) {
  return to_float(value);
}

// The first lane to be woken would poison what another has written already, so all wait for it.
inline void warp_reuses(void* p, int bytes) {
  using namespace cuda_on_cpu;
  shared_offset(p, bytes, 1, "warp_reuses");
  struct In {
    void* p;
    int bytes;
  };
  Nothing out;
  together<In, Nothing>("warp_reuses", {p, bytes}, out, [](const In* const* in, Nothing* const*) {
    for (int lane = 0; lane < kWarp; ++lane) {
      if (in[lane]->p != in[0]->p) fail("warp_reuses: lanes name different memory");
    }
    memset(in[0]->p, 0xFF, in[0]->bytes);
  });
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  using namespace cuda_on_cpu;
  using In = const char*;
  struct Out {
    uint32_t r[4];
  } out;
  shared_offset(row, 16, 16, "ldmatrix");
  together<In, Out>("ldmatrix", static_cast<In>(row), out, [](const In* const* in, Out* const* out) {
    for (int m = 0; m < 4; ++m) {
      const char* rows[8];
      for (int i = 0; i < 8; ++i) rows[i] = *in[m * 8 + i];
      count_conflicts(rows);
      for (int lane = 0; lane < kWarp; ++lane) memcpy(&out[lane]->r[m], rows[lane / 4] + lane % 4 * 4, 4);
    }
  });
  memcpy(r, out.r, sizeof r);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  using namespace cuda_on_cpu;
  using In = const char*;
  struct Out {
    uint32_t r[4];
  } out;
  shared_offset(row, 16, 16, "ldmatrix");
  together<In, Out>("ldmatrix transposed", static_cast<In>(row), out, [](const In* const* in, Out* const* out) {
    for (int m = 0; m < 4; ++m) {
      const char* rows[8];
      for (int i = 0; i < 8; ++i) rows[i] = *in[m * 8 + i];
      count_conflicts(rows);
      for (int lane = 0; lane < kWarp; ++lane) {
        for (int i = 0; i < 2; ++i) {
          memcpy(reinterpret_cast<char*>(&out[lane]->r[m]) + i * 2, rows[lane % 4 * 2 + i] + lane / 4 * 2, 2);
        }
      }
    }
  });
  memcpy(r, out.r, sizeof r);
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace cuda_on_cpu;
  using In = MmaIn<Pair, float>;
  const In in{{decode2<T>(a[0]), decode2<T>(a[1]), decode2<T>(a[2]), decode2<T>(a[3])},
              {decode2<T>(b0), decode2<T>(b1)},
              {c[0], c[1], c[2], c[3]}};
  MmaOut<float> out;
  together<In, MmaOut<float>>("mma", in, out, [](const In* const* in, MmaOut<float>* const* out) {
    mma<8>(in, out, [](float sum, Pair x, Pair y) { return sum + x.low * y.low + x.high * y.high; });
  });
  memcpy(c, out.c, sizeof c);
}

inline void mma_m16n8k8_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
  using namespace cuda_on_cpu;
  using In = MmaIn<float, float>;
  constexpr uint32_t ignored = 0x1FFF;
  for (const float value : {a[0], a[1], a[2], a[3], b0, b1}) {
    if (bits_of(value) & ignored && !std::isnan(value)) fail("mma_m16n8k8_tf32: an operand is no TF32 number");
  }
  const In in{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  MmaOut<float> out;
  together<In, MmaOut<float>>("mma_tf32", in, out, [](const In* const* in, MmaOut<float>* const* out) {
    // Eight values of one float each: the words of a row are k = t and t + 4, as in the 16-bit form.
    mma<8>(in, out, [](float sum, float x, float y) { return sum + x * y; });
  });
  memcpy(c, out.c, sizeof c);
}

inline void mma_m16n8k256_and_popc(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace cuda_on_cpu;
  using In = MmaIn<uint32_t, int>;
  const In in{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  MmaOut<int> out;
  together<In, MmaOut<int>>("mma_popc", in, out, [](const In* const* in, MmaOut<int>* const* out) {
    mma<8>(in, out, [](int sum, uint32_t x, uint32_t y) { return sum + __builtin_popcount(x & y); });
  });
  memcpy(c, out.c, sizeof c);
}

}  // namespace basisconv::cuda
