// The CPU kernels of stacked_binary_conv2d on seeded geometries against plain loops, in one program without torch or
// Python; compiled by test_stacked_without_torch.py, once with the instructions of AVX-512 and AMX emulated.
//
// All values are whole numbers, small or few of them, so that float sums are exact in any order and every bit is
// compared. Arrays are as long as the contract says: a sanitizer sees what is read beside them. Usage: program ISA SEED
// GEOMETRIES. Exit status 1 and a line on stderr at the first difference, 3 where the processor lacks the instruction
// set.
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../../csrc/cpu/stacked_binary_conv2d.h"

using namespace basisconv;

namespace {

struct Random {
  std::mt19937 bits;
  int64_t between(int64_t least, int64_t most) { return least + static_cast<int64_t>(bits() % (most - least + 1)); }
  bool coin() { return (bits() & 1) != 0; }
};

struct Geometry {
  StackedBinaryConv2dParams p{};
  bool input_channels_last = false;
  std::vector<float> bank, scale, bias;
  std::vector<int64_t> index;

  std::string words() const {
    std::ostringstream s;
    const StackedBinaryWeights& w = p.weights;
    s << "N" << p.N << " C" << w.C << " K" << w.K << " n" << w.n << " splits" << w.splits << " groups" << w.groups
      << " " << w.R << "x" << w.S << " @" << p.H << "x" << p.W << " stride " << p.stride_h << "," << p.stride_w
      << " dilation " << p.dilation_h << "," << p.dilation_w << " pad " << p.pad_top << "," << p.pad_left << " mode "
      << static_cast<int>(p.mode) << " dtype " << static_cast<int>(p.dtype) << " planes " << p.planes
      << (p.channels_last ? " channels_last" : "") << " activation " << static_cast<int>(p.activation);
    return s.str();
  }
};

Geometry draw(Random& r) {
  Geometry g;
  StackedBinaryConv2dParams& p = g.p;
  StackedBinaryWeights& w = p.weights;
  w.groups = r.between(0, 3) == 0 ? r.between(2, 3) : 1;
  w.splits = r.between(1, 4);
  const int64_t lows[] = {1, 2, 3, 4, 5, 8, 16, 17, 31, 33, 40, 64, 70};
  w.C = w.groups * w.splits * lows[r.between(0, 12)];
  w.n = r.between(0, 2) == 0 ? r.between(17, 70) : r.between(1, 20);
  w.K = w.groups * (r.between(0, 2) == 0 ? r.between(17, 150) : r.between(1, 20));
  w.R = r.between(1, 4);
  w.S = r.between(1, 4);
  p.stride_h = r.between(1, 3);
  p.stride_w = r.between(1, 3);
  p.dilation_h = r.between(1, 2);
  p.dilation_w = r.between(1, 3);
  p.pad_top = r.between(0, 4);
  p.pad_left = r.between(0, 4);
  const int64_t bottom = r.between(0, 4), right = r.between(0, 4);
  p.N = r.between(1, 2);
  const int64_t reach_h = (w.R - 1) * p.dilation_h + 1, reach_w = (w.S - 1) * p.dilation_w + 1;
  p.H = std::max<int64_t>(1, reach_h - p.pad_top - bottom) + r.between(0, 5);
  p.W = std::max<int64_t>(1, reach_w - p.pad_left - right) + r.between(0, 24);
  p.OH = (p.H + p.pad_top + bottom - reach_h) / p.stride_h + 1;
  p.OW = (p.W + p.pad_left + right - reach_w) / p.stride_w + 1;
  p.mode = static_cast<StackedMode>(r.between(0, 3));
  const bool packed = p.mode == StackedMode::packed_signs || p.mode == StackedMode::packed_codes;
  p.planes = !packed ? 0 : p.mode == StackedMode::packed_signs ? 1 : r.between(1, 4);
  p.dtype = packed ? DType::f32 : static_cast<DType>(r.between(0, 2));
  g.input_channels_last = r.coin();
  p.channels_last = packed || g.input_channels_last;
  p.activation = static_cast<Activation>(r.between(0, 2));
  for (int64_t i = 0; i < w.n * (w.C / w.groups / w.splits) * w.R * w.S; i++) g.bank.push_back(r.coin() ? 1 : -1);
  for (int64_t i = 0; i < w.K * w.splits; i++) g.index.push_back(r.between(0, w.n - 1));
  for (int64_t k = 0; k < w.K; k++) g.scale.push_back(static_cast<float>(r.between(-2, 2)));
  for (int64_t k = 0; k < w.K; k++) g.bias.push_back(static_cast<float>(r.between(-9, 9)));
  return g;
}

template <typename T>
T rounded(float value) {
  T out;
  from_float(value, &out);
  return out;
}

// The op as loops. values: what enters the sums, [N, C, H, W].
template <typename T>
bool compare(const Geometry& g, const std::vector<float>& values, const std::vector<T>& got) {
  const StackedBinaryConv2dParams& p = g.p;
  const StackedBinaryWeights& w = p.weights;
  const int64_t low = w.C / w.groups / w.splits, outputs = w.K / w.groups;
  for (int64_t n = 0; n < p.N; n++) {
    for (int64_t k = 0; k < w.K; k++) {
      for (int64_t y = 0; y < p.OH; y++) {
        for (int64_t x = 0; x < p.OW; x++) {
          double sum = 0;
          for (int64_t i = 0; i < w.splits; i++) {
            const float* filter = g.bank.data() + g.index[k * w.splits + i] * low * w.R * w.S;
            for (int64_t c = 0; c < low; c++) {
              for (int64_t r = 0; r < w.R; r++) {
                for (int64_t s = 0; s < w.S; s++) {
                  const int64_t in_y = y * p.stride_h + r * p.dilation_h - p.pad_top;
                  const int64_t in_x = x * p.stride_w + s * p.dilation_w - p.pad_left;
                  if (in_y < 0 || in_y >= p.H || in_x < 0 || in_x >= p.W) continue;
                  const int64_t channel = (k / outputs * w.splits + i) * low + c;
                  sum += filter[(c * w.R + r) * w.S + s] * values[((n * w.C + channel) * p.H + in_y) * p.W + in_x];
                }
              }
            }
          }
          double out = sum * g.scale[k] + g.bias[k];
          if (p.activation != Activation::none) out = std::max(out, 0.0);
          if (p.activation == Activation::relu6) out = std::min(out, 6.0);
          const T expected = rounded<T>(static_cast<float>(out));
          const int64_t at =
              p.channels_last ? ((n * p.OH + y) * p.OW + x) * w.K + k : ((n * w.K + k) * p.OH + y) * p.OW + x;
          if (to_float(got[at]) != to_float(expected)) {
            std::cerr << "expected " << to_float(expected) << ", got " << to_float(got[at]) << " at [" << n << ", " << k
                      << ", " << y << ", " << x << "]: " << g.words() << "\n";
            return false;
          }
        }
      }
    }
  }
  return true;
}

CpuStackedBinaryConv2d kernels_of(Isa isa, const StackedPack& pack) {
  if constexpr (kWidestIsa >= Isa::amx) {
    if (pack.matrix) return cpu_stacked_binary_conv2d_amx();
  }
  if constexpr (kWidestIsa >= Isa::avx512) {
    if (isa >= Isa::avx512) return cpu_stacked_binary_conv2d_avx512();
  }
  if constexpr (kWidestIsa >= Isa::avx2) {
    if (isa == Isa::avx2) return cpu_stacked_binary_conv2d_avx2();
  }
  return cpu_stacked_binary_conv2d_base();
}

template <typename T>
bool check(Geometry& g, Random& r, Isa isa) {
  StackedBinaryConv2dParams& p = g.p;
  const StackedBinaryWeights& w = p.weights;
  const int64_t pixels = p.H * p.W;
  std::vector<float> values(p.N * w.C * pixels);
  std::vector<T> real(p.planes == 0 ? values.size() : 0);
  const int64_t words_of = (w.C + 31) / 32;
  std::vector<uint32_t> bits(p.planes * p.N * pixels * words_of, 0);
  const bool last = g.input_channels_last;
  // Now and then one channel of each pixel alone is not zero, and has as many bits as float or float16 can add up.
  const bool long_numbers = r.between(0, 2) == 0 && p.dtype != DType::bf16;
  const int64_t longest = p.dtype == DType::f32 ? (1 << 19) - 1 : (1 << 11) - 1;
  std::vector<int64_t> only(p.N * pixels);
  for (int64_t& channel : only) channel = r.between(0, w.C - 1);
  for (int64_t n = 0; n < p.N; n++) {
    for (int64_t c = 0; c < w.C; c++) {
      for (int64_t i = 0; i < pixels; i++) {
        float& value = values[(n * w.C + c) * pixels + i];
        if (p.planes > 0) {
          const int64_t code = r.between(0, (1 << p.planes) - 1);
          for (int64_t b = 0; b < p.planes; b++) {
            bits[((n * p.planes + b) * pixels + i) * words_of + c / 32] |= static_cast<uint32_t>(code >> b & 1)
                                                                           << (c % 32);
          }
          value = static_cast<float>(p.mode == StackedMode::packed_signs ? 2 * code - 1 : code);
        } else {
          value = static_cast<float>(r.between(-8, 8));
          if (long_numbers) value = static_cast<float>(only[n * pixels + i] == c ? r.between(-longest, longest) : 0);
          real[last ? (n * pixels + i) * w.C + c : (n * w.C + c) * pixels + i] = rounded<T>(value);
          if (p.mode == StackedMode::signs) value = value >= 0 ? 1.0f : -1.0f;
        }
      }
    }
  }
  p.input = p.planes > 0 ? static_cast<const void*>(bits.data()) : real.data();
  p.input_stride_n = w.C * pixels;
  p.input_stride_c = last ? 1 : pixels;
  p.input_stride_h = last ? p.W * w.C : p.W;
  p.input_stride_w = last ? w.C : 1;
  p.scale = g.scale.data();
  p.bias = g.bias.data();
  const StackedPack matrix = stacked_matrix_pack(w, isa), pack = matrix.matrix ? matrix : stacked_pack(w, isa);
  const CpuStackedBinaryConv2d kernels = kernels_of(isa, pack);
  std::vector<uint32_t> packed(pack.words_size + pack.rows_size);
  kernels.pack(w, pack, g.bank.data(), g.index.data(), packed.data());
  p.packed = packed.data();
  std::vector<T> output(p.N * w.K * p.OH * p.OW);
  if (!output.empty()) std::memset(static_cast<void*>(output.data()), 0xff, output.size() * sizeof(T));
  p.output = output.data();
  const StackedPlan plan = stacked_plan(p, pack);
  const size_t bytes = plan.scratch() * sizeof(float);
  void* scratch = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  std::memset(scratch, 0xff, bytes);
  const int64_t units = p.N * p.OH, middle = r.between(0, units);  // as two threads would share them
  kernels.run(p, plan, static_cast<float*>(scratch), 0, middle);
  kernels.run(p, plan, static_cast<float*>(scratch), middle, units);
  std::free(scratch);
  return compare(g, values, output);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return 2;
  const std::string name = arguments[1];
  Isa isa = Isa::base;
  for (Isa known : {Isa::avx2, Isa::avx512, Isa::amx}) {
    if (name == isa_name(known)) isa = known;
  }
#if !defined(BASISCONV_EMULATED)
  if (isa > isa_of_processor()) {
    std::cerr << "this processor has no " << name << "\n";
    return 3;
  }
#endif
  Random random{std::mt19937(static_cast<uint32_t>(std::atoi(arguments[2])))};
  const int64_t geometries = std::atoll(arguments[3]);
  for (int64_t i = 0; i < geometries; i++) {
    Geometry g = draw(random);
    const bool right = g.p.dtype == DType::f32    ? check<float>(g, random, isa)
                       : g.p.dtype == DType::bf16 ? check<bf16>(g, random, isa)
                                                  : check<f16>(g, random, isa);
    if (!right) return 1;
  }
  std::cout << isa_name(isa) << " " << geometries << " geometries\n";
  return 0;
}
