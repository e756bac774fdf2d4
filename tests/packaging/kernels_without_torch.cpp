// The CPU kernels of basis_conv2d on seeded geometries against plain loops, in one program without torch or Python: for
// compilers and processors that no torch is at hand for. Compiled with BASISCONV_ISA=base by test_portable.py.
//
// All values are small whole numbers, so float sums are exact in any order, Winograd's halves and quarters included:
// what remains is the rounding of z and of the result that the contract names, and every bit is compared. Usage:
// kernels_without_torch SEED GEOMETRIES. Exit status 1 and one line on stderr at the first difference.
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cpu/basis_conv2d.h"

using namespace basisconv;

namespace {

constexpr int64_t kGuard = 64;  // elements before and behind the results that nobody may touch

struct Random {
  std::mt19937 bits;
  int64_t between(int64_t least, int64_t most) { return least + static_cast<int64_t>(bits() % (most - least + 1)); }
  bool coin() { return (bits() & 1) != 0; }
};

template <typename T>
struct TypeOf;
template <>
struct TypeOf<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct TypeOf<bf16> {
  static constexpr DType value = DType::bf16;
};
template <>
struct TypeOf<f16> {
  static constexpr DType value = DType::f16;
};

template <typename T>
T rounded(double value) {
  T out;
  from_float(static_cast<float>(value), &out);
  return out;
}

template <typename T>
std::vector<T> whole_numbers(Random& random, int64_t count, int64_t most) {
  std::vector<T> values(count);
  for (T& value : values) value = rounded<T>(static_cast<double>(random.between(-most, most)));
  return values;
}

template <typename T>
std::vector<float> as_floats(const std::vector<T>& values) {
  std::vector<float> floats;
  for (T value : values) floats.push_back(to_float(value));
  return floats;
}

struct Freed {
  void operator()(void* memory) const { std::free(memory); }
};

// 64-byte aligned floats, filled with NaN: no kernel may rely on what it did not write.
std::unique_ptr<float, Freed> aligned_floats(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * 4 + 63) / 64 * 64 + 64;
  std::unique_ptr<float, Freed> memory(static_cast<float*>(std::aligned_alloc(64, bytes)));
  if (!memory) std::abort();
  for (int64_t i = 0; i < count; i++) memory.get()[i] = std::numeric_limits<float>::quiet_NaN();
  return memory;
}

BasisConv2dParams draw(Random& random, int64_t& pad_bottom, int64_t& pad_right) {
  BasisConv2dParams p{};
  BasisConv2dWeights& w = p.weights;
  constexpr int64_t kChannels[] = {1, 2, 3, 5, 8, 16, 19, 32};
  w.groups = random.coin() ? 1 : random.between(1, 3);
  w.C = w.groups * kChannels[random.between(0, 7)];
  w.Q = w.groups * random.between(1, 20);
  w.mixing_groups = random.coin() ? 1 : w.groups;
  w.K = w.mixing_groups * random.between(1, 37);
  const bool common = random.coin();  // 3x3 without stride and dilation, half of the time: Winograd
  w.R = common ? 3 : random.between(1, 5);
  w.S = common ? 3 : random.between(1, 5);
  w.stride_h = common ? 1 : random.between(1, 3);
  w.stride_w = common ? 1 : random.between(1, 3);
  w.dilation_h = common ? 1 : random.between(1, 3);
  w.dilation_w = common ? 1 : random.between(1, 3);
  w.precise = random.between(0, 3) == 0;
  p.pad_top = random.between(0, 5);
  p.pad_left = random.between(0, 5);
  pad_bottom = random.between(0, 5);
  pad_right = random.between(0, 5);
  const int64_t reach_h = (w.R - 1) * w.dilation_h + 1, reach_w = (w.S - 1) * w.dilation_w + 1;
  p.N = random.between(1, 3);
  p.H = std::max<int64_t>(1, reach_h - p.pad_top - pad_bottom) + random.between(0, 9);
  p.W = std::max<int64_t>(1, reach_w - p.pad_left - pad_right) + random.between(0, 9);
  p.OH = (p.H + p.pad_top + pad_bottom - reach_h) / w.stride_h + 1;
  p.OW = (p.W + p.pad_left + pad_right - reach_w) / w.stride_w + 1;
  p.channels_last = random.coin();
  p.activation = static_cast<Activation>(random.between(0, 2));
  const int64_t gap = random.between(0, 2);  // elements between pixels, or between rows
  if (random.coin()) {
    p.input_stride_c = 1;
    p.input_stride_w = w.C + gap;
    p.input_stride_h = p.W * p.input_stride_w + gap;
    p.input_stride_n = p.H * p.input_stride_h;
  } else {
    p.input_stride_w = 1;
    p.input_stride_h = p.W + gap;
    p.input_stride_c = p.H * p.input_stride_h;
    p.input_stride_n = w.C * p.input_stride_c;
  }
  return p;
}

// Where a result with `channels` maps holds [n, k, y, x].
int64_t at(const BasisConv2dParams& p, int64_t channels, int64_t n, int64_t k, int64_t y, int64_t x) {
  return p.channels_last ? ((n * p.OH + y) * p.OW + x) * channels + k : ((n * channels + k) * p.OH + y) * p.OW + x;
}

// The formula of csrc/ops/basis_conv2d.h, loop by loop; z and the result rounded where the contract rounds them.
template <typename T>
void plain_loops(const BasisConv2dParams& p, const std::vector<T>& input, const std::vector<float>& filters,
                 const std::vector<float>& coefficients, const T* residual, std::vector<T>& output,
                 std::vector<T>& maps) {
  const BasisConv2dWeights& w = p.weights;
  const int64_t channels = w.C / w.groups, per_group = w.Q / w.groups;
  const int64_t mixed = w.Q / w.mixing_groups, outputs = w.K / w.mixing_groups;
  std::vector<double> z(w.Q);
  for (int64_t n = 0; n < p.N; n++) {
    for (int64_t y = 0; y < p.OH; y++) {
      for (int64_t x = 0; x < p.OW; x++) {
        for (int64_t q = 0; q < w.Q; q++) {
          double sum = 0;
          for (int64_t c = 0; c < channels; c++) {
            for (int64_t r = 0; r < w.R; r++) {
              for (int64_t s = 0; s < w.S; s++) {
                const int64_t row = y * w.stride_h + r * w.dilation_h - p.pad_top;
                const int64_t column = x * w.stride_w + s * w.dilation_w - p.pad_left;
                if (row < 0 || row >= p.H || column < 0 || column >= p.W) continue;
                const int64_t channel = q / per_group * channels + c;
                const T pixel = input[n * p.input_stride_n + channel * p.input_stride_c + row * p.input_stride_h +
                                      column * p.input_stride_w];
                sum += static_cast<double>(to_float(pixel)) * filters[((q * channels + c) * w.R + r) * w.S + s];
              }
            }
          }
          const T kept = rounded<T>(sum);
          maps[at(p, w.Q, n, q, y, x)] = kept;
          z[q] = w.precise ? sum : to_float(kept);
        }
        for (int64_t k = 0; k < w.K; k++) {
          double sum = p.bias[k];
          for (int64_t i = 0; i < mixed; i++) sum += coefficients[k * mixed + i] * z[k / outputs * mixed + i];
          const int64_t to = at(p, w.K, n, k, y, x);
          if (residual != nullptr) sum += to_float(residual[to]);
          if (p.activation != Activation::none) sum = std::max(sum, 0.0);
          if (p.activation == Activation::relu6) sum = std::min(sum, 6.0);
          output[to] = rounded<T>(sum);
        }
      }
    }
  }
}

template <typename T>
bool same(const char* what, const std::vector<T>& found, const std::vector<T>& expected, const T guard) {
  const int64_t count = static_cast<int64_t>(expected.size());
  for (int64_t i = 0; i < count + 2 * kGuard; i++) {
    const bool inside = i >= kGuard && i < count + kGuard;
    const float got = to_float(found[i]), wanted = to_float(inside ? expected[i - kGuard] : guard);
    if (got == wanted) continue;
    std::cerr << what << "[" << i - kGuard << "] of " << count << ": got " << got << ", expected " << wanted << "\n";
    return false;
  }
  return true;
}

template <typename T>
bool check(Random random) {
  int64_t pad_bottom, pad_right;
  BasisConv2dParams p = draw(random, pad_bottom, pad_right);
  BasisConv2dWeights& w = p.weights;
  w.dtype = TypeOf<T>::value;
  const int64_t span = (p.N - 1) * p.input_stride_n + (w.C - 1) * p.input_stride_c + (p.H - 1) * p.input_stride_h +
                       (p.W - 1) * p.input_stride_w + 1;
  const std::vector<T> input = whole_numbers<T>(random, span, 2);
  const std::vector<float> filters = whole_numbers<float>(random, w.Q * (w.C / w.groups) * w.R * w.S, 2);
  const std::vector<float> coefficients = whole_numbers<float>(random, w.K * (w.Q / w.mixing_groups), 1);
  const std::vector<float> bias = whole_numbers<float>(random, w.K, 9);
  const std::vector<T> residual = whole_numbers<T>(random, p.N * w.K * p.OH * p.OW, 9);
  p.input = input.data();
  p.bias = bias.data();
  p.residual = random.coin() ? residual.data() : nullptr;

  std::vector<T> expected(p.N * w.K * p.OH * p.OW), expected_maps(p.N * w.Q * p.OH * p.OW);
  plain_loops(p, input, filters, coefficients, static_cast<const T*>(p.residual), expected, expected_maps);

  const T guard = rounded<T>(-97.0);
  std::vector<T> output(expected.size() + 2 * kGuard, guard), maps(expected_maps.size() + 2 * kGuard, guard);
  p.output = output.data() + kGuard;
  const bool keep_maps = random.coin();
  p.maps = keep_maps ? maps.data() + kGuard : nullptr;

  const CpuPack pack = cpu_pack(w, Isa::base);
  const int64_t packed_floats = pack.filters_size + pack.coefficients_size + pack.planar_size;
  const auto packed = aligned_floats(packed_floats);
  const CpuBasisConv2d kernels = cpu_basis_conv2d_base();
  kernels.pack(w, pack, filters.data(), coefficients.data(), packed.get());
  p.packed = packed.get();
  const int64_t threads = random.between(1, 3);
  const CpuPlan plan = cpu_plan(p, pack, threads);
  const int64_t share = (plan.units + threads - 1) / threads;
  for (int64_t begin = 0; begin < plan.units; begin += share) {
    const auto scratch = aligned_floats(plan.scratch());
    kernels.run(p, plan, scratch.get(), begin, std::min(begin + share, plan.units));
  }
  if (same("output", output, expected, guard) && (!keep_maps || same("maps", maps, expected_maps, guard))) return true;
  std::cerr << "dtype " << static_cast<int>(w.dtype) << " N" << p.N << " C" << w.C << " H" << p.H << " W" << p.W << " Q"
            << w.Q << " K" << w.K << " " << w.R << "x" << w.S << " stride " << w.stride_h << "," << w.stride_w
            << " dilation " << w.dilation_h << "," << w.dilation_w << " padding " << p.pad_top << "," << pad_bottom
            << "," << p.pad_left << "," << pad_right << " groups " << w.groups << " mixing_groups " << w.mixing_groups
            << " precise " << w.precise << " channels_last " << p.channels_last << " variant "
            << static_cast<int>(pack.variant) << " threads " << threads << "\n";
  return false;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  const unsigned seed = static_cast<unsigned>(std::strtoul(arguments[1], nullptr, 10));
  const unsigned geometries = static_cast<unsigned>(std::strtoul(arguments[2], nullptr, 10));
  for (unsigned i = 0; i < geometries; i++) {
    const Random random{std::mt19937(seed + i)};
    if (!check<float>(random) || !check<bf16>(random) || !check<f16>(random)) return 1;
  }
  std::cout << geometries << " geometries\n";
  return 0;
}
