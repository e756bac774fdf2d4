// The CPU kernels of basis_conv2d on seeded geometries against plain loops, in one program without torch or Python: for
// compilers and processors that no torch is at hand for, and for reads and writes that no sanitizer sees. Compiled by
// test_kernels_without_torch.py.
//
// All values are small whole numbers, so float sums are exact in any order, Winograd's halves and quarters included:
// what remains is the rounding of z and of the result that the contract names, and every bit is compared. Winograd
// tiles of 2x4 divide by what is no power of two; there a share of the largest possible sum is allowed. Every array
// that a kernel gets ends or begins at a page that may not be touched, which also stops masked loads and those of the
// matrix unit, where AddressSanitizer has no eyes; fresh memory holds NaN. Usage: kernels_without_torch ISA SEED
// GEOMETRIES. Exit status 1 and a line on stderr at the first difference or touch, 3 where the processor lacks the
// instruction set, unless BASISCONV_EMULATED says that another one stands in for it.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../../csrc/cpu/basis_conv2d.h"

using namespace basisconv;

namespace {

constexpr double kShare = 0x1p-18;  // of the largest sum, see above

std::string current;  // the geometry under test, for the handler of a touched page

void touched(int) {
  const char text[] = "touched memory beside an array: ";
  (void)!write(2, text, sizeof(text) - 1);
  (void)!write(2, current.data(), current.size());
  _exit(1);
}

// `count` elements with a forbidden page right behind them, or right before; all bytes in reach are 0xff, a NaN.
template <typename T>
class Fenced {
 public:
  Fenced(int64_t count, bool fence_behind) : bytes_(static_cast<size_t>(count) * sizeof(T)) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    open_ = (bytes_ + page - 1) / page * page;
    whole_ = open_ + 2 * page;
    void* memory = mmap(nullptr, whole_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    whole_at_ = static_cast<char*>(memory);
    open_at_ = whole_at_ + page;
    if (open_ > 0 && mprotect(open_at_, open_, PROT_READ | PROT_WRITE) != 0) std::abort();
    if (open_ > 0) std::memset(open_at_, 0xff, open_);
    data_ = fence_behind ? open_at_ + open_ - bytes_ : open_at_;
  }
  Fenced(const std::vector<T>& values, bool fence_behind) : Fenced(static_cast<int64_t>(values.size()), fence_behind) {
    if (bytes_ > 0) std::memcpy(data_, values.data(), bytes_);
  }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  ~Fenced() { munmap(whole_at_, whole_); }

  T* data() { return reinterpret_cast<T*>(data_); }

  // Whether the bytes in reach on the side without a fence are as they were.
  bool untouched_beside() const {
    for (const char* byte = open_at_; byte < open_at_ + open_; byte++) {
      if ((byte < data_ || byte >= data_ + bytes_) && *byte != static_cast<char>(0xff)) return false;
    }
    return true;
  }

 private:
  size_t bytes_, open_, whole_;
  char *whole_at_, *open_at_, *data_;
};

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

BasisConv2dParams draw(Random& random, int64_t& pad_bottom, int64_t& pad_right) {
  BasisConv2dParams p{};
  BasisConv2dWeights& w = p.weights;
  constexpr int64_t kChannels[] = {1, 2, 3, 5, 8, 16, 19, 32, 64, 67};
  w.groups = random.coin() ? 1 : random.between(1, 3);
  w.C = w.groups * kChannels[random.between(0, 9)];
  w.Q = w.groups * random.between(1, 20);
  // Now and then 3x3 filters that are too large to stay near, on a map of few tiles.
  const bool far = random.between(0, 15) == 0;
  if (far) {
    w.groups = random.between(1, 2);
    w.C = w.groups * random.between(280, 300);
    w.Q = w.groups * random.between(61, 80);
  }
  // Or whole blocks of channels on wide maps, which the matrix unit reads where they lie.
  const bool wide = !far && random.between(0, 7) == 0;
  if (wide) {
    w.groups = random.between(1, 2);
    w.C = w.groups * 32 * random.between(1, 4);
    w.Q = w.groups * random.between(1, 40);
  }
  w.mixing_groups = random.coin() ? 1 : w.groups;
  w.K = w.mixing_groups * random.between(1, 37);
  const bool common = random.coin() || far;  // 3x3 with stride 1 or 2, without dilation, half of the time: Winograd
  const int64_t stride = random.between(1, 2);
  w.R = common ? 3 : random.between(1, 5);
  w.S = common ? 3 : random.between(1, 5);
  w.stride_h = common ? stride : random.between(1, 3);
  w.stride_w = common ? stride : random.between(1, 3);
  w.dilation_h = common ? 1 : random.between(1, 3);
  w.dilation_w = common ? 1 : random.between(1, 3);
  if (wide) {
    w.S = 3;
    w.stride_h = w.stride_w = 1;
  }
  w.precise = random.between(0, 3) == 0;
  const int64_t most = far ? 1 : 5, beyond = !far ? 9 : random.between(0, 3) == 0 ? 14 : 3;
  p.pad_top = random.between(0, most);
  p.pad_left = random.between(0, most);
  pad_bottom = random.between(0, most);
  pad_right = random.between(0, most);
  const int64_t reach_h = (w.R - 1) * w.dilation_h + 1, reach_w = (w.S - 1) * w.dilation_w + 1;
  p.N = random.between(1, 3);
  p.H = std::max<int64_t>(1, reach_h - p.pad_top - pad_bottom) + random.between(0, beyond);
  p.W = std::max<int64_t>(1, reach_w - p.pad_left - pad_right) + random.between(0, beyond);
  if (wide) p.W = std::max(p.W, random.between(0, 7) == 0 ? random.between(120, 300) : random.between(16, 40));
  p.OH = (p.H + p.pad_top + pad_bottom - reach_h) / w.stride_h + 1;
  p.OW = (p.W + p.pad_left + pad_right - reach_w) / w.stride_w + 1;
  p.channels_last = random.coin();
  p.activation = static_cast<Activation>(random.between(0, 2));
  const int64_t gap = random.between(0, 2);  // elements between pixels, or between rows
  if (random.coin()) {
    p.input_stride_c = 1;
    p.input_stride_w = w.C + gap;
    p.input_stride_h = p.W * p.input_stride_w + (wide ? 0 : gap);
    p.input_stride_n = p.H * p.input_stride_h;
  } else {
    p.input_stride_w = 1;
    p.input_stride_h = p.W + gap;
    p.input_stride_c = p.H * p.input_stride_h;
    p.input_stride_n = w.C * p.input_stride_c;
  }
  return p;
}

// [Q][C/groups][R][S] → [Q][R][S][C/groups].
std::vector<float> innermost_channels(const BasisConv2dWeights& w, const std::vector<float>& filters) {
  const int64_t channels = w.C / w.groups, taps = w.R * w.S;
  std::vector<float> turned(filters.size());
  for (int64_t q = 0; q < w.Q; q++) {
    for (int64_t c = 0; c < channels; c++) {
      for (int64_t t = 0; t < taps; t++) turned[(q * taps + t) * channels + c] = filters[(q * channels + c) * taps + t];
    }
  }
  return turned;
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
bool same(const char* what, Fenced<T>& found, const std::vector<T>& expected, double allowed) {
  for (size_t i = 0; i < expected.size(); i++) {
    const float got = to_float(found.data()[i]), wanted = to_float(expected[i]);
    if (got == wanted || std::abs(static_cast<double>(got) - wanted) <= allowed) continue;
    std::cerr << what << "[" << i << "] of " << expected.size() << ": got " << got << ", expected " << wanted << ", "
              << current;
    return false;
  }
  if (found.untouched_beside()) return true;
  std::cerr << "written beside " << what << ", " << current;
  return false;
}

CpuBasisConv2d kernels_of(Isa isa) {
  if constexpr (kWidestIsa >= Isa::amx) {
    if (isa == Isa::amx) return cpu_basis_conv2d_amx();
  }
  if constexpr (kWidestIsa >= Isa::avx512_bf16) {
    if (isa == Isa::avx512_bf16) return cpu_basis_conv2d_avx512_bf16();
  }
  if constexpr (kWidestIsa >= Isa::avx512) {
    if (isa == Isa::avx512) return cpu_basis_conv2d_avx512();
  }
  if constexpr (kWidestIsa >= Isa::avx2) {
    if (isa == Isa::avx2) return cpu_basis_conv2d_avx2();
  }
  return cpu_basis_conv2d_base();
}

template <typename T>
bool check(Random random, Isa isa) {
  int64_t pad_bottom, pad_right;
  BasisConv2dParams p = draw(random, pad_bottom, pad_right);
  BasisConv2dWeights& w = p.weights;
  w.dtype = TypeOf<T>::value;
  const CpuPack pack = cpu_pack(w, isa);
  const int64_t threads = random.between(1, 3);
  const Packing packing = random.coin() ? Packing::ahead : Packing::in_call;
  const bool filters_last = random.coin();
  std::ostringstream words;
  words << isa_name(isa) << " dtype " << static_cast<int>(w.dtype) << " N" << p.N << " C" << w.C << " H" << p.H << " W"
        << p.W << " Q" << w.Q << " K" << w.K << " " << w.R << "x" << w.S << " stride " << w.stride_h << ","
        << w.stride_w << " dilation " << w.dilation_h << "," << w.dilation_w << " padding " << p.pad_top << ","
        << pad_bottom << "," << p.pad_left << "," << pad_right << " groups " << w.groups << " mixing_groups "
        << w.mixing_groups << " precise " << w.precise << " channels_last " << p.channels_last << " input strides "
        << p.input_stride_n << "," << p.input_stride_c << "," << p.input_stride_h << "," << p.input_stride_w
        << " variant " << static_cast<int>(pack.variant) << " threads " << threads << " packing "
        << static_cast<int>(packing) << " channels of filters innermost " << filters_last << "\n";
  current = words.str();

  const int64_t span = (p.N - 1) * p.input_stride_n + (w.C - 1) * p.input_stride_c + (p.H - 1) * p.input_stride_h +
                       (p.W - 1) * p.input_stride_w + 1;
  const std::vector<T> input = whole_numbers<T>(random, span, 2);
  const std::vector<float> filters = whole_numbers<float>(random, w.Q * (w.C / w.groups) * w.R * w.S, 2);
  const std::vector<float> coefficients = whole_numbers<float>(random, w.K * (w.Q / w.mixing_groups), 1);
  const std::vector<float> bias = whole_numbers<float>(random, w.K, 9);
  const std::vector<T> residual = whole_numbers<T>(random, p.N * w.K * p.OH * p.OW, 9);
  const bool behind = random.coin(), add = random.coin(), keep_maps = random.coin();

  std::vector<T> expected(p.N * w.K * p.OH * p.OW), expected_maps(p.N * w.Q * p.OH * p.OW);
  p.bias = bias.data();
  plain_loops(p, input, filters, coefficients, add ? residual.data() : nullptr, expected, expected_maps);

  Fenced<T> fenced_input(input, behind), fenced_residual(residual, behind);
  Fenced<float> fenced_filters(filters_last ? innermost_channels(w, filters) : filters, behind);
  Fenced<float> fenced_coefficients(coefficients, behind), fenced_bias(bias, behind);
  Fenced<T> output(static_cast<int64_t>(expected.size()), behind);
  Fenced<T> maps(static_cast<int64_t>(expected_maps.size()), behind);
  const CpuPlan plan = cpu_plan(p, pack, threads, packing);
  Fenced<float> packed(cpu_packed_floats(plan.pack), behind);
  p.input = fenced_input.data();
  p.bias = fenced_bias.data();
  p.residual = add ? fenced_residual.data() : nullptr;
  p.output = output.data();
  p.maps = keep_maps ? maps.data() : nullptr;
  p.packed = packed.data();

  const CpuBasisConv2d kernels = kernels_of(isa_for(w, isa));
  const int64_t channels = w.C / w.groups, taps = w.R * w.S;
  const BasisFilters given{fenced_filters.data(), channels * taps, filters_last ? 1 : taps,
                           filters_last ? channels : 1};
  kernels.pack(w, plan.pack, given, fenced_coefficients.data(), packed.data());
  const int64_t share = (plan.units + threads - 1) / threads;
  for (int64_t begin = 0; begin < plan.units; begin += share) {
    Fenced<float> scratch(plan.scratch(), behind);
    kernels.run(p, plan, scratch.data(), begin, std::min(begin + share, plan.units));
  }
  const bool rounds = pack.variant == CpuVariant::winograd && pack.tile_width == 4;
  const double allowed = rounds ? kShare * 4 * 9 * static_cast<double>(w.C / w.groups) : 0;  // of z
  const double mixed = static_cast<double>(w.Q / w.mixing_groups);
  return same("output", output, expected, allowed * mixed) &&
         (!keep_maps || same("maps", maps, expected_maps, allowed));
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return 2;
  Isa isa = Isa::base;
  for (Isa known : {Isa::avx2, Isa::avx512, Isa::avx512_vpopcntdq, Isa::avx512_bf16, Isa::amx}) {
    if (std::strcmp(arguments[1], isa_name(known)) == 0) isa = known;
  }
#if !defined(BASISCONV_EMULATED)
  if (isa > isa_of_processor()) {
    std::cerr << "this processor has " << isa_name(isa_of_processor()) << "\n";
    return 3;
  }
#endif
  signal(SIGSEGV, touched);
  signal(SIGBUS, touched);
  const unsigned seed = static_cast<unsigned>(std::strtoul(arguments[2], nullptr, 10));
  const unsigned geometries = static_cast<unsigned>(std::strtoul(arguments[3], nullptr, 10));
  for (unsigned i = 0; i < geometries; i++) {
    const Random random{std::mt19937(seed + i)};
    if (!check<float>(random, isa) || !check<bf16>(random, isa) || !check<f16>(random, isa)) return 1;
  }
  std::cout << isa_name(isa) << " " << geometries << " geometries\n";
  return 0;
}
