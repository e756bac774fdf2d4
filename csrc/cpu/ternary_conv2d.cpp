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

// --- the input, as floats, a channel a plane ------------------------------------------------------------------------

void fill_zeros(float* out, int64_t count) {
  if (count > 0) memset(out, 0, static_cast<size_t>(count) * sizeof(float));
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

template <typename T>
void load_chunk(const TernaryConv2dParams& p, const TernaryPlan& plan, const Strip& s, int64_t channel,
                int64_t channels, float* to) {
  const T* image = static_cast<const T*>(p.input) + s.n * p.input_stride_n + channel * p.input_stride_c;
  for (int64_t ph = 0; ph < plan.phases_h; ph++) {
    for (int64_t pw = 0; pw < plan.phases_w; pw++) {
      float* phase = to + (ph * plan.phases_w + pw) * plan.input_rows * plan.pitch;
      const int64_t left = s.column * p.stride_w + pw - p.pad_left;
      int64_t begin, end;
      inside(left, p.stride_w, p.W, plan.pitch, &begin, &end);
      const int64_t step = p.stride_w * p.input_stride_w;
      for (int64_t j = 0; j < plan.input_rows; j++) {
        const int64_t y = (s.row + j) * p.stride_h + ph - p.pad_top;
        float* row = phase + j * plan.pitch;
        const bool outside = y < 0 || y >= p.H;
        const int64_t from = outside ? plan.pitch : begin, until = outside ? plan.pitch : end;
        for (int64_t c = 0; c < channels; c++) {
          fill_zeros(row + c * plan.plane, from);
          fill_zeros(row + c * plan.plane + until, plan.pitch - until);
        }
        if (from == until) continue;
        const T* pixels = image + y * p.input_stride_h + (left + from * p.stride_w) * p.input_stride_w;
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
  fill_zeros(to + channels * plan.plane, plan.line);
}

// --- the sums -------------------------------------------------------------------------------------------------------

// sums[V registers] += (or -=) what lies at each entry's distance. Few registers would wait for each other's additions:
// then U entries have sums of their own, added up at the end.
template <int V, int U, bool kSubtract>
BASISCONV_INLINE void add_list(const float* base, const int32_t* offsets, const uint16_t* entries, int64_t count,
                               Vec::Reg* sums) {
  const auto one = [&](int64_t i, Vec::Reg* into) BASISCONV_LAMBDA {
    const float* from = base + offsets[entries[i]];
    BASISCONV_UNROLL for (int v = 0; v < V; v++) {
      const Vec::Reg x = Vec::load(from + v * kWidth);
      into[v] = kSubtract ? Vec::sub(into[v], x) : Vec::add(into[v], x);
    }
  };
  int64_t i = 0;
  if constexpr (U > 1) {
    if (count >= U) {
      Vec::Reg more[(U - 1) * V];
      BASISCONV_UNROLL for (int v = 0; v < (U - 1) * V; v++) more[v] = Vec::zero();
      for (; i + U <= count; i += U) {
        one(i, sums);
        BASISCONV_UNROLL for (int u = 1; u < U; u++) one(i + u, more + (u - 1) * V);
      }
      BASISCONV_UNROLL for (int u = 1; u < U; u++) {
        BASISCONV_UNROLL for (int v = 0; v < V; v++) sums[v] = Vec::add(sums[v], more[(u - 1) * V + v]);
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
template <int V, int U, bool kTwo>
BASISCONV_NOINLINE void add_block(const Lists& lists, const float* base, int64_t filters, int64_t line, bool first,
                                  float* sums, float* negative_sums) {
  for (int64_t k = 0; k < filters; k++) {
    const uint32_t* at = lists.starts + 2 * k;
    Vec::Reg held[V];
    const auto load = [&](const float* from) BASISCONV_LAMBDA {
      BASISCONV_UNROLL for (int v = 0; v < V; v++) held[v] = first ? Vec::zero() : Vec::load(from + v * kWidth);
    };
    const auto store = [&](float* to) BASISCONV_LAMBDA {
      BASISCONV_UNROLL for (int v = 0; v < V; v++) Vec::store(to + v * kWidth, held[v]);
    };
    load(sums + k * line);
    add_list<V, U, false>(base, lists.offsets, lists.entries + at[0], at[1] - at[0], held);
    if constexpr (kTwo) {
      store(sums + k * line);
      load(negative_sums + k * line);
    }
    add_list<V, U, !kTwo>(base, lists.offsets, lists.entries + at[1], at[2] - at[1], held);
    store((kTwo ? negative_sums : sums) + k * line);
  }
}

using AddBlock = void (*)(const Lists&, const float*, int64_t, int64_t, bool, float*, float*);

template <bool kTwo>
AddBlock add_block_of(int64_t vectors) {
  static constexpr AddBlock kBlocks[kTernaryMostVectors] = {
      add_block<1, 4, kTwo>, add_block<2, 4, kTwo>, add_block<3, 3, kTwo>, add_block<4, 2, kTwo>,
      add_block<5, 2, kTwo>, add_block<6, 1, kTwo>, add_block<7, 1, kTwo>, add_block<8, 1, kTwo>,
  };
  return kBlocks[vectors - 1];
}

// --- scale, bias, activation, and the result ------------------------------------------------------------------------

struct Epilogue {
  const TernaryConv2dParams& p;

  BASISCONV_INLINE Vec::Reg operator()(int64_t k, const float* sums, const float* negative_sums) const {
    Vec::Reg out = Vec::fma(Vec::load(sums), Vec::set1(p.scale[k]), Vec::set1(p.bias[k]));
    if (p.negative_scale != nullptr) {
      out = Vec::fma(Vec::load(negative_sums), Vec::set1(-p.negative_scale[k]), out);
    }
    if (p.activation != Activation::none) out = Vec::max(Vec::zero(), out);
    if (p.activation == Activation::relu6) out = Vec::min(Vec::set1(6.0f), out);
    return out;
  }
};

template <typename T>
void store_planar(const TernaryConv2dParams& p, const TernaryPlan& plan, const Strip& s, const float* sums,
                  const float* negative_sums) {
  const Epilogue finish{p};
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

template <typename T>
void store_channels_last(const TernaryConv2dParams& p, const TernaryPlan& plan, const Strip& s, const float* sums,
                         const float* negative_sums) {
  const Epilogue finish{p};
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

template <typename T>
void run_as(const TernaryConv2dParams& p, const TernaryPlan& plan, const int32_t* offsets, float* scratch,
            int64_t begin, int64_t end) {
  const TernaryPack& pack = plan.pack;
  const int64_t channels = p.weights.C / p.weights.groups;
  const uint32_t* starts = reinterpret_cast<const uint32_t*>(p.packed + pack.starts_at);
  const uint16_t* entries = reinterpret_cast<const uint16_t*>(p.packed + pack.entries_at);
  const bool two = p.negative_scale != nullptr;
  const AddBlock add = two ? add_block_of<true>(plan.vectors) : add_block_of<false>(plan.vectors);
  const int64_t block = plan.vectors * kWidth;
  float* sums = scratch + plan.input_floats;
  for (int64_t unit = begin; unit < end; unit++) {
    const Strip s = strip_of(p, plan, unit);
    float* negative_sums = two ? sums + s.filters * plan.line : sums;
    for (int64_t chunk = 0; chunk < pack.chunks; chunk++) {
      const int64_t first = chunk * pack.chunk;
      const int64_t many = channels - first < pack.chunk ? channels - first : pack.chunk;
      load_chunk<T>(p, plan, s, s.group * channels + first, many, scratch);
      const Lists lists{starts + (chunk * p.weights.K + s.filter) * 2, entries, offsets};
      for (int64_t at = 0; at < plan.line; at += block) {
        add(lists, scratch + at, s.filters, plan.line, chunk == 0, sums + at, negative_sums + at);
      }
    }
    if (p.channels_last) {
      store_channels_last<T>(p, plan, s, sums, negative_sums);
    } else {
      store_planar<T>(p, plan, s, sums, negative_sums);
    }
  }
}

void run(const TernaryConv2dParams& p, const TernaryPlan& plan, const int32_t* offsets, float* scratch, int64_t begin,
         int64_t end) {
  switch (p.dtype) {
    case DType::f32:
      return run_as<float>(p, plan, offsets, scratch, begin, end);
    case DType::bf16:
      return run_as<bf16>(p, plan, offsets, scratch, begin, end);
    case DType::f16:
      return run_as<f16>(p, plan, offsets, scratch, begin, end);
  }
}

}  // namespace
}  // namespace BASISCONV_ISA

CpuTernaryConv2d BASISCONV_JOIN(cpu_ternary_conv2d_, BASISCONV_ISA)() {
  return {BASISCONV_ISA::kWidth, BASISCONV_ISA::run};
}

}  // namespace basisconv
