// ternary_conv2d on the CPU: sums without a multiplication. Compiled once per instruction set (BASISCONV_ISA).
//
// A register holds neighbouring pixels of one channel, so a weight of +1 or -1 is one load and one addition for all of
// them, and a weight of 0 is nothing at all: the work is that of the weights which are there. A dense float convolution
// does as much per instruction, for every weight; so this wins by 1/density. float32, bfloat16 and float16 tensors of
// any strides; arithmetic in float. Chunks of channels keep the input in the first-level cache, and the filters' sums
// wait in the second-level cache between chunks.
// Test: tests/ops/test_ternary_conv2d.py. Bench: python -m bench run --op ternary_conv2d.
#include "ternary_conv2d.h"

#include "simd.h"

#define BASISCONV_JOIN2(a, b) a##b
#define BASISCONV_JOIN(a, b) BASISCONV_JOIN2(a, b)

namespace basisconv {
namespace BASISCONV_ISA {
namespace {

// What is added: floats, or 16-bit whole numbers where the activations are packed, twice as many in a register.
struct Floats : Vec {
  using Element = float;
  static BASISCONV_INLINE Reg widen(const float* p) { return load(p); }
};

struct Shorts {
  using Element = int16_t;
  static constexpr int kWidth = 2 * Vec::kWidth;
#if defined(BASISCONV_AVX512)
  using Reg = __m512i;
  static BASISCONV_INLINE Reg zero() { return _mm512_setzero_si512(); }
  static BASISCONV_INLINE Reg load(const int16_t* p) { return _mm512_loadu_si512(p); }
  static BASISCONV_INLINE void store(int16_t* p, Reg v) { _mm512_storeu_si512(p, v); }
  static BASISCONV_INLINE Reg add(Reg a, Reg b) { return _mm512_add_epi16(a, b); }
  static BASISCONV_INLINE Reg sub(Reg a, Reg b) { return _mm512_sub_epi16(a, b); }
  static BASISCONV_INLINE Vec::Reg widen(const int16_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  }
#elif defined(BASISCONV_AVX2)
  using Reg = __m256i;
  static BASISCONV_INLINE Reg zero() { return _mm256_setzero_si256(); }
  static BASISCONV_INLINE Reg load(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static BASISCONV_INLINE void store(int16_t* p, Reg v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static BASISCONV_INLINE Reg add(Reg a, Reg b) { return _mm256_add_epi16(a, b); }
  static BASISCONV_INLINE Reg sub(Reg a, Reg b) { return _mm256_sub_epi16(a, b); }
  static BASISCONV_INLINE Vec::Reg widen(const int16_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
#else
  typedef int16_t Reg __attribute__((vector_size(16)));
  static BASISCONV_INLINE Reg zero() { return Reg{}; }
  static BASISCONV_INLINE Reg load(const int16_t* p) {
    Reg v;
    memcpy(&v, p, 16);
    return v;
  }
  static BASISCONV_INLINE void store(int16_t* p, Reg v) { memcpy(p, &v, 16); }
  static BASISCONV_INLINE Reg add(Reg a, Reg b) { return a + b; }
  static BASISCONV_INLINE Reg sub(Reg a, Reg b) { return a - b; }
  static BASISCONV_INLINE Vec::Reg widen(const int16_t* p) {
    return Vec::Reg{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
                    static_cast<float>(p[3])};
  }
#endif
};

struct Strip {
  int64_t n, group, row, rows, column, columns;  // of the output
  int64_t filter, filters;                       // of all K
};

Strip strip_of(const TernaryConv2dParams& p, const TernaryPlan& plan, int64_t unit) {
  const int64_t per_group = p.weights.K / p.weights.groups;
  Strip s{};
  const int64_t part = unit % plan.filter_parts;
  unit /= plan.filter_parts;
  s.group = unit % p.weights.groups;
  unit /= p.weights.groups;
  s.column = unit % plan.column_strips * plan.columns;
  unit /= plan.column_strips;
  s.row = unit % plan.row_strips * plan.rows;
  s.n = unit / plan.row_strips;
  s.rows = p.OH - s.row < plan.rows ? p.OH - s.row : plan.rows;
  s.columns = p.OW - s.column < plan.columns ? p.OW - s.column : plan.columns;
  const int64_t first = per_group * part / plan.filter_parts, last = per_group * (part + 1) / plan.filter_parts;
  s.filter = s.group * per_group + first;
  s.filters = last - first;
  return s;
}

// --- the input, a channel a plane ------------------------------------------------------------------------

template <typename T>
void fill_zeros(T* out, int64_t count) {
  if (count > 0) memset(out, 0, static_cast<size_t>(count) * sizeof(T));
}

// The pixels i with 0 <= first + i * step < size, of 0 <= i < count.
void inside(int64_t first, int64_t step, int64_t size, int64_t count, int64_t* begin, int64_t* end) {
  *begin = first < 0 ? (-first + step - 1) / step : 0;
  *end = first < size ? (size - first + step - 1) / step : 0;
  if (*begin > count) *begin = count;
  if (*end > count) *end = count;
  if (*end < *begin) *end = *begin;
}

template <typename T>
void copy_pixels(const T* from, int64_t step, int64_t count, float* to) {
  int64_t i = 0;
  if (step == 1) {
    for (; i + kWidth <= count; i += kWidth) Vec::store(to + i, Vec::load(from + i));
  }
  for (; i < count; i++) to[i] = to_float(from[i * step]);
}

// Channels side by side: squares of kWidth pixels and kWidth channels are turned around in registers.
template <typename T>
void turn_pixels(const T* from, int64_t step, int64_t pixels, int64_t channels, float* to, int64_t plane) {
  Vec::Reg block[kWidth];
  for (int64_t c = 0; c < channels; c += kWidth) {
    const int64_t many = channels - c < kWidth ? channels - c : kWidth;
    int64_t i = 0;
    for (; i + kWidth <= pixels; i += kWidth) {
      BASISCONV_UNROLL for (int j = 0; j < kWidth; j++) {
        const T* pixel = from + (i + j) * step + c;
        block[j] = many == kWidth ? Vec::load(pixel) : Vec::load_n(pixel, many);
      }
      transpose(block);
      for (int64_t j = 0; j < many; j++) Vec::store(to + (c + j) * plane + i, block[j]);
    }
    for (; i < pixels; i++) {
      for (int64_t j = 0; j < many; j++) to[(c + j) * plane + i] = to_float(from[i * step + c + j]);
    }
  }
}

// Bits as numbers; `channel` is the first of all.
void unpack_pixels(const TernaryConv2dParams& p, int64_t n, int64_t y, int64_t x, int64_t step, int64_t pixels,
                   int64_t channel, int64_t channels, int16_t* to, int64_t plane) {
  const int64_t words = (p.weights.C + 31) / 32;
  for (int64_t i = 0; i < pixels; i++) {
    const int32_t* pixel = p.words + ((n * p.bit_planes * p.H + y) * p.W + x + i * step) * words;
    for (int64_t c = 0; c < channels; c++) {
      const int64_t at = channel + c;
      int value = 0;
      for (int64_t b = 0; b < p.bit_planes; b++) {
        const uint32_t word = static_cast<uint32_t>(pixel[b * p.H * p.W * words + at / 32]);
        value |= static_cast<int>(word >> (at % 32) & 1u) << b;
      }
      to[c * plane + i] = static_cast<int16_t>(p.signs ? 2 * value - 1 : value);
    }
  }
}

template <typename T, typename Element>
void load_chunk(const TernaryConv2dParams& p, const TernaryPlan& plan, const Strip& s, int64_t channel,
                int64_t channels, Element* to) {
  for (int64_t ph = 0; ph < plan.phases_h; ph++) {
    for (int64_t pw = 0; pw < plan.phases_w; pw++) {
      Element* phase = to + (ph * plan.phases_w + pw) * plan.input_rows * plan.pitch;
      const int64_t left = s.column * p.stride_w + pw - p.pad_left;
      int64_t begin, end;
      inside(left, p.stride_w, p.W, plan.pitch, &begin, &end);
      const int64_t step = p.stride_w * p.input_stride_w;
      for (int64_t j = 0; j < plan.input_rows; j++) {
        const int64_t y = (s.row + j) * p.stride_h + ph - p.pad_top;
        Element* row = phase + j * plan.pitch;
        const bool outside = y < 0 || y >= p.H;
        const int64_t from = outside ? plan.pitch : begin, until = outside ? plan.pitch : end;
        for (int64_t c = 0; c < channels; c++) {
          fill_zeros(row + c * plan.plane, from);
          fill_zeros(row + c * plan.plane + until, plan.pitch - until);
        }
        if (from == until) continue;
        const int64_t x = left + from * p.stride_w;
        if constexpr (sizeof(Element) == 2) {
          unpack_pixels(p, s.n, y, x, p.stride_w, until - from, channel, channels, row + from, plan.plane);
        } else {
          const T* image = static_cast<const T*>(p.input) + s.n * p.input_stride_n + channel * p.input_stride_c;
          const T* pixels = image + y * p.input_stride_h + x * p.input_stride_w;
          if (p.input_stride_c == 1 && p.input_stride_w != 1) {
            turn_pixels(pixels, step, until - from, channels, row + from, plan.plane);
          } else {
            for (int64_t c = 0; c < channels; c++) {
              copy_pixels(pixels + c * p.input_stride_c, step, until - from, row + c * plan.plane + from);
            }
          }
        }
      }
    }
  }
  fill_zeros(to + channels * plan.plane, plan.line);
}

// --- the sums -------------------------------------------------------------------------------------------------------

// sums[V registers] += (or -=) what lies at each entry's distance. Few registers would wait for each other's additions:
// then U entries have sums of their own, added up at the end.
template <typename A, int V, int U, bool kSubtract>
BASISCONV_INLINE void add_list(const typename A::Element* base, const int32_t* offsets, const uint16_t* entries,
                               int64_t count, typename A::Reg* sums) {
  const auto one = [&](int64_t i, typename A::Reg* into) BASISCONV_LAMBDA {
    const typename A::Element* from = base + offsets[entries[i]];
    BASISCONV_UNROLL for (int v = 0; v < V; v++) {
      const typename A::Reg x = A::load(from + v * A::kWidth);
      into[v] = kSubtract ? A::sub(into[v], x) : A::add(into[v], x);
    }
  };
  int64_t i = 0;
  if constexpr (U > 1) {
    if (count >= U) {
      typename A::Reg more[(U - 1) * V];
      BASISCONV_UNROLL for (int v = 0; v < (U - 1) * V; v++) more[v] = A::zero();
      for (; i + U <= count; i += U) {
        one(i, sums);
        BASISCONV_UNROLL for (int u = 1; u < U; u++) one(i + u, more + (u - 1) * V);
      }
      BASISCONV_UNROLL for (int u = 1; u < U; u++) {
        BASISCONV_UNROLL for (int v = 0; v < V; v++) sums[v] = A::add(sums[v], more[(u - 1) * V + v]);
      }
    }
  }
  for (; i < count; i++) one(i, sums);
}

struct Lists {
  const uint32_t* starts;  // of the chunk's first filter
  const uint16_t* entries;
  const int32_t* offsets;
};

// One block of V registers of pixels, all filters of the strip. With two scales the sums of the -1 weights lie apart.
template <typename A, int V, int U, bool kTwo>
BASISCONV_NOINLINE void add_block(const Lists& lists, const typename A::Element* base, int64_t filters, int64_t line,
                                  bool first, typename A::Element* sums, typename A::Element* negative_sums) {
  for (int64_t k = 0; k < filters; k++) {
    const uint32_t* at = lists.starts + 2 * k;
    typename A::Reg held[V];
    const auto load = [&](const typename A::Element* from) BASISCONV_LAMBDA {
      BASISCONV_UNROLL for (int v = 0; v < V; v++) held[v] = first ? A::zero() : A::load(from + v * A::kWidth);
    };
    const auto store = [&](typename A::Element* to) BASISCONV_LAMBDA {
      BASISCONV_UNROLL for (int v = 0; v < V; v++) A::store(to + v * A::kWidth, held[v]);
    };
    load(sums + k * line);
    add_list<A, V, U, false>(base, lists.offsets, lists.entries + at[0], at[1] - at[0], held);
    if constexpr (kTwo) {
      store(sums + k * line);
      load(negative_sums + k * line);
    }
    add_list<A, V, U, !kTwo>(base, lists.offsets, lists.entries + at[1], at[2] - at[1], held);
    store((kTwo ? negative_sums : sums) + k * line);
  }
}

template <typename E>
using AddBlock = void (*)(const Lists&, const E*, int64_t, int64_t, bool, E*, E*);

template <typename A, bool kTwo>
AddBlock<typename A::Element> add_block_of(int64_t vectors) {
  static constexpr AddBlock<typename A::Element> kBlocks[kTernaryMostVectors] = {
      add_block<A, 1, 4, kTwo>, add_block<A, 2, 4, kTwo>, add_block<A, 3, 3, kTwo>, add_block<A, 4, 2, kTwo>,
      add_block<A, 5, 2, kTwo>, add_block<A, 6, 1, kTwo>, add_block<A, 7, 1, kTwo>, add_block<A, 8, 1, kTwo>,
  };
  return kBlocks[vectors - 1];
}

// --- scale, bias, activation, and the result ------------------------------------------------------------------------

template <typename A>
struct Epilogue {
  const TernaryConv2dParams& p;

  using E = typename A::Element;

  BASISCONV_INLINE Vec::Reg operator()(int64_t k, const E* sums, const E* negative_sums) const {
    Vec::Reg out = Vec::fma(A::widen(sums), Vec::set1(p.scale[k]), Vec::set1(p.bias[k]));
    if (p.negative_scale != nullptr) {
      out = Vec::fma(A::widen(negative_sums), Vec::set1(-p.negative_scale[k]), out);
    }
    if (p.activation != Activation::none) out = Vec::max(Vec::zero(), out);
    if (p.activation == Activation::relu6) out = Vec::min(Vec::set1(6.0f), out);
    return out;
  }
};

template <typename T, typename A>
void store_planar(const TernaryConv2dParams& p, const TernaryPlan& plan, const Strip& s,
                  const typename A::Element* sums, const typename A::Element* negative_sums) {
  const Epilogue<A> finish{p};
  for (int64_t k = 0; k < s.filters; k++) {
    T* map = static_cast<T*>(p.output) + (s.n * p.weights.K + s.filter + k) * p.OH * p.OW;
    for (int64_t y = 0; y < s.rows; y++) {
      T* out = map + (s.row + y) * p.OW + s.column;
      const int64_t at = k * plan.line + y * plan.pitch;
      int64_t x = 0;
      for (; x + kWidth <= s.columns; x += kWidth) {
        Vec::store(out + x, finish(s.filter + k, sums + at + x, negative_sums + at + x));
      }
      if (x < s.columns) {
        Vec::store_n(out + x, finish(s.filter + k, sums + at + x, negative_sums + at + x), s.columns - x);
      }
    }
  }
}

template <typename T, typename A>
void store_channels_last(const TernaryConv2dParams& p, const TernaryPlan& plan, const Strip& s,
                         const typename A::Element* sums, const typename A::Element* negative_sums) {
  const Epilogue<A> finish{p};
  Vec::Reg block[kWidth];
  for (int64_t y = 0; y < s.rows; y++) {
    T* row = static_cast<T*>(p.output) + ((s.n * p.OH + s.row + y) * p.OW + s.column) * p.weights.K + s.filter;
    for (int64_t x = 0; x < s.columns; x += kWidth) {
      const int64_t pixels = s.columns - x < kWidth ? s.columns - x : kWidth;
      for (int64_t k = 0; k < s.filters; k += kWidth) {
        const int64_t many = s.filters - k < kWidth ? s.filters - k : kWidth;
        for (int64_t j = 0; j < kWidth; j++) {
          const int64_t at = (k + j) * plan.line + y * plan.pitch + x;
          block[j] = j < many ? finish(s.filter + k + j, sums + at, negative_sums + at) : Vec::zero();
        }
        transpose(block);
        for (int64_t j = 0; j < pixels; j++) {
          T* out = row + (x + j) * p.weights.K + k;
          many == kWidth ? Vec::store(out, block[j]) : Vec::store_n(out, block[j], many);
        }
      }
    }
  }
}

template <typename T, typename A>
void run_as(const TernaryConv2dParams& p, const TernaryPlan& plan, const int32_t* offsets, float* scratch,
            int64_t begin, int64_t end) {
  const TernaryPack& pack = plan.pack;
  const int64_t channels = p.weights.C / p.weights.groups;
  const uint32_t* starts = reinterpret_cast<const uint32_t*>(p.packed + pack.starts_at);
  const uint16_t* entries = reinterpret_cast<const uint16_t*>(p.packed + pack.entries_at);
  const bool two = p.negative_scale != nullptr;
  const auto add = two ? add_block_of<A, true>(plan.vectors) : add_block_of<A, false>(plan.vectors);
  const int64_t block = plan.vectors * A::kWidth;
  using E = typename A::Element;
  E* input = reinterpret_cast<E*>(scratch);
  E* sums = input + plan.input_floats;
  for (int64_t unit = begin; unit < end; unit++) {
    const Strip s = strip_of(p, plan, unit);
    E* negative_sums = two ? sums + s.filters * plan.line : sums;
    for (int64_t chunk = 0; chunk < pack.chunks; chunk++) {
      const int64_t first = chunk * pack.chunk;
      const int64_t many = channels - first < pack.chunk ? channels - first : pack.chunk;
      load_chunk<T>(p, plan, s, s.group * channels + first, many, input);
      const Lists lists{starts + (chunk * p.weights.K + s.filter) * 2, entries, offsets};
      for (int64_t at = 0; at < plan.line; at += block) {
        add(lists, input + at, s.filters, plan.line, chunk == 0, sums + at, negative_sums + at);
      }
    }
    if (p.channels_last) {
      store_channels_last<T, A>(p, plan, s, sums, negative_sums);
    } else {
      store_planar<T, A>(p, plan, s, sums, negative_sums);
    }
  }
}

void run(const TernaryConv2dParams& p, const TernaryPlan& plan, const int32_t* offsets, float* scratch, int64_t begin,
         int64_t end) {
  if (p.words != nullptr) return run_as<float, Shorts>(p, plan, offsets, scratch, begin, end);
  switch (p.dtype) {
    case DType::f32:
      return run_as<float, Floats>(p, plan, offsets, scratch, begin, end);
    case DType::bf16:
      return run_as<bf16, Floats>(p, plan, offsets, scratch, begin, end);
    case DType::f16:
      return run_as<f16, Floats>(p, plan, offsets, scratch, begin, end);
  }
}

}  // namespace
}  // namespace BASISCONV_ISA

CpuTernaryConv2d BASISCONV_JOIN(cpu_ternary_conv2d_, BASISCONV_ISA)() {
  return {BASISCONV_ISA::kWidth, BASISCONV_ISA::run};
}

}  // namespace basisconv
