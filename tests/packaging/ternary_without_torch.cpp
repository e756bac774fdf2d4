// The CPU kernels of ternary_conv2d on seeded geometries against plain loops, in one program without torch or Python:
// for compilers and instruction sets that are not at hand, and for reads and writes that no sanitizer sees. Compiled by
// test_ternary_without_torch.py. Values are whole numbers, so every bit is compared; every array that a kernel gets
// ends or begins at a page that may not be touched, and scratch holds NaN. Usage: ternary_without_torch ISA SEED
// GEOMETRIES. Exit status 1 and a line on stderr at the first difference or touch.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <iostream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../../csrc/cpu/ternary_conv2d.h"

using namespace basisconv;

namespace {

std::string current;  // the geometry under test, for the handler of a touched page

void touched(int) {
  const char text[] = "touched memory beside an array: ";
  (void)!write(2, text, sizeof(text) - 1);
  (void)!write(2, current.data(), current.size());
  _exit(1);
}

// Bytes with a forbidden page right behind them, or right before; all bytes in reach are 0xff.
class Fenced {
 public:
  Fenced(size_t bytes, bool behind) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t open = (bytes + page - 1) / page * page;
    whole_ = open + 2 * page;
    at_ = static_cast<char*>(mmap(nullptr, whole_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (at_ == MAP_FAILED) std::abort();
    if (open > 0 && mprotect(at_ + page, open, PROT_READ | PROT_WRITE) != 0) std::abort();
    if (open > 0) std::memset(at_ + page, 0xff, open);
    data_ = at_ + page + (behind ? open - bytes : 0);
  }
  Fenced(const Fenced&) = delete;
  ~Fenced() { munmap(at_, whole_); }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  char *at_, *data_;
  size_t whole_;
};

struct Random {
  std::mt19937_64 bits;
  int64_t between(int64_t least, int64_t most) {
    return least + static_cast<int64_t>(bits() % static_cast<uint64_t>(most - least + 1));
  }
  bool coin() { return (bits() & 1) != 0; }
};

// On the matrix unit, two halves as two threads would run them.
void multiply([[maybe_unused]] const TernaryConv2dParams& p, [[maybe_unused]] const TernaryPack& pack,
              [[maybe_unused]] bool behind) {
#if defined(TERNARY_AMX)
  const StackedBinaryConv2dParams stacked = ternary_as_stacked(p, pack);
  const StackedPlan plan = ternary_tiles_plan(p, pack);
  const Fenced scratch((plan.scratch() * 4 + 63) / 64 * 64, behind);
  const int64_t units = p.N * p.OH;
  cpu_ternary_conv2d_amx(stacked, plan, p.negative_scale, scratch.as<float>(), units / 2, units);
  cpu_ternary_conv2d_amx(stacked, plan, p.negative_scale, scratch.as<float>(), 0, units / 2);
#endif
}

// A row behind the tiles that points elsewhere, and a list that begins behind its end.
bool damage_is_missed(const TernaryConv2dWeights& w, const std::vector<char>& good) {
  const TernaryPack pack = ternary_pack(w);
  std::vector<char> bad = good;
  const int32_t nowhere = static_cast<int32_t>(pack.tiles.slices * pack.tiles.slots);
  if (pack.tiles.rows_size > 0) {
    std::memcpy(bad.data() + pack.tiles_at + (pack.tiles.size() - 1) * 4, &nowhere, 4);
  }
  std::memset(bad.data() + pack.starts_at, 0x7f, 4);
  const bool missed =
      ternary_lists_fit(w, bad.data()) || (pack.tiles.rows_size > 0 && ternary_tiles_fit(w, bad.data()));
  if (missed) std::cerr << "damage was not seen: " << current;
  return missed;
}

template <typename T>
bool agrees(Random& random, const CpuTernaryConv2d& kernels, DType dtype, bool packed_input = false) {
  constexpr int64_t kChannels[] = {1, 2, 3, 8, 17, 33, 70};
  TernaryConv2dParams p{};
  TernaryConv2dWeights& w = p.weights;
  p.dtype = dtype;
  w.groups = random.coin() ? 1 : random.between(1, 3);
  const int64_t channels = kChannels[random.between(0, 6)];
  const int64_t outputs = random.between(0, 3) == 0 ? random.between(17, 50) : random.between(1, 19);
  w.C = w.groups * channels;
  w.K = w.groups * outputs;
  w.R = random.between(1, 4);
  w.S = random.between(1, 4);
  p.stride_h = random.between(1, 3);
  p.stride_w = random.between(1, 3);
  p.dilation_h = random.between(1, 3);
  p.dilation_w = random.between(1, 3);
  p.pad_top = random.between(0, 3);
  p.pad_left = random.between(0, 3);
  const int64_t bottom = random.between(0, 3), right = random.between(0, 3);
  const int64_t reach_h = (w.R - 1) * p.dilation_h + 1, reach_w = (w.S - 1) * p.dilation_w + 1;
  p.N = random.between(1, 2);
  p.H = std::max<int64_t>(1, reach_h - p.pad_top - bottom) + random.between(0, 8);
  p.W = std::max<int64_t>(1, reach_w - p.pad_left - right) + random.between(0, 40);
  p.OH = (p.H + p.pad_top + bottom - reach_h) / p.stride_h + 1;
  p.OW = (p.W + p.pad_left + right - reach_w) / p.stride_w + 1;
  p.channels_last = random.coin();
  p.activation = static_cast<Activation>(random.between(0, 2));
  if (packed_input) {
    p.channels_last = true;
    p.bit_planes = random.between(1, 4);
    p.signs = p.bit_planes == 1 && random.coin();
  }
  const bool two = random.coin(), behind = random.coin();
  const int64_t threads = random.between(1, 4), density = random.between(0, 10);

  std::ostringstream text;
  text << "N" << p.N << " " << w.C << "->" << w.K << " groups " << w.groups << " " << w.R << "x" << w.S << " @" << p.H
       << "x" << p.W << " stride " << p.stride_h << "," << p.stride_w << " dilation " << p.dilation_h << ","
       << p.dilation_w << " padding " << p.pad_top << "," << bottom << "," << p.pad_left << "," << right
       << (p.channels_last ? " channels_last" : "") << (two ? " two scales" : "") << " bit planes " << p.bit_planes
       << " density " << density << "\n";
  current = text.str();

  const int64_t words = (channels + 31) / 32, planes_count = w.K * 2 * w.R * w.S * words;
  std::vector<int32_t> planes(planes_count, 0);
  std::vector<int> weight(w.K * channels * w.R * w.S, 0);
  for (int64_t k = 0; k < w.K; k++) {
    for (int64_t c = 0; c < channels; c++) {
      for (int64_t t = 0; t < w.R * w.S; t++) {
        if (random.between(1, 10) > density) continue;
        const bool minus = random.coin();
        weight[(k * channels + c) * w.R * w.S + t] = minus ? -1 : 1;
        planes[((k * 2 + minus) * w.R * w.S + t) * words + c / 32] |= static_cast<int32_t>(1u << (c % 32));
      }
    }
  }
  const Fenced input(p.N * w.C * p.H * p.W * sizeof(T), behind);
  const Fenced output(p.N * w.K * p.OH * p.OW * sizeof(T), behind);
  std::vector<int> image(p.N * w.C * p.H * p.W);
  p.input_stride_n = w.C * p.H * p.W;
  p.input_stride_c = p.channels_last ? 1 : p.H * p.W;
  p.input_stride_h = p.channels_last ? p.W * w.C : p.W;
  p.input_stride_w = p.channels_last ? w.C : 1;
  for (int64_t n = 0; n < p.N; n++) {
    for (int64_t c = 0; c < w.C; c++) {
      for (int64_t y = 0; y < p.H; y++) {
        for (int64_t x = 0; x < p.W; x++) {
          const int value = static_cast<int>(random.between(-8, 8));
          image[((n * w.C + c) * p.H + y) * p.W + x] = value;
          from_float(static_cast<float>(value), input.as<T>() + n * p.input_stride_n + c * p.input_stride_c +
                                                    y * p.input_stride_h + x * p.input_stride_w);
        }
      }
    }
  }
  const int64_t input_words = (w.C + 31) / 32;
  const Fenced bits(packed_input ? p.N * p.bit_planes * p.H * p.W * input_words * 4 : 0, behind);
  if (packed_input) {
    int32_t* words_at = bits.as<int32_t>();
    std::memset(words_at, 0, p.N * p.bit_planes * p.H * p.W * input_words * 4);
    for (int64_t n = 0; n < p.N; n++) {
      for (int64_t c = 0; c < w.C; c++) {
        for (int64_t pixel = 0; pixel < p.H * p.W; pixel++) {
          int code = 0;
          for (int64_t b = 0; b < p.bit_planes; b++) {
            const bool set = random.coin();
            code |= set << b;
            const int64_t at = ((n * p.bit_planes + b) * p.H * p.W + pixel) * input_words + c / 32;
            if (set) words_at[at] |= static_cast<int32_t>(1u << (c % 32));
          }
          image[(n * w.C + c) * p.H * p.W + pixel] = p.signs ? 2 * code - 1 : code;
        }
      }
    }
    p.words = words_at;
  }
  const Fenced scale(w.K * 4, behind), negative(w.K * 4, behind), bias(w.K * 4, behind);
  for (int64_t k = 0; k < w.K; k++) {
    scale.as<float>()[k] = static_cast<float>(random.between(-3, 3));
    negative.as<float>()[k] = static_cast<float>(random.between(-3, 3));
    bias.as<float>()[k] = static_cast<float>(random.between(-9, 9));
  }
  std::vector<char> lists(ternary_most_packed_bytes(w));
  lists.resize(ternary_pack(w).bytes(ternary_pack_planes(w, planes.data(), lists.data())));
  if (!ternary_packed_fits(w, lists.data(), static_cast<int64_t>(lists.size())) ||
      !ternary_lists_fit(w, lists.data()) || !ternary_tiles_fit(w, lists.data())) {
    std::cerr << "packed lists do not fit: " << current;
    return false;
  }
  if (damage_is_missed(w, lists)) return false;
  const Fenced packed((lists.size() + 7) / 8 * 8, behind);
  std::memcpy(packed.as<char>(), lists.data(), lists.size());

  p.input = packed_input ? nullptr : input.as<T>();
  p.output = output.as<T>();
  p.packed = packed.as<char>();
  p.scale = scale.as<float>();
  p.negative_scale = two ? negative.as<float>() : nullptr;
  p.bias = bias.as<float>();
  const TernaryPlan plan = ternary_plan(p, packed_input ? 2 * kernels.width : kernels.width, threads);
  if (packed_input && !ternary_sums_fit(p)) return true;
  std::vector<int32_t> distances(plan.pack.chunk_taps);
  ternary_offsets(p, plan, distances.data());
  const Fenced scratch((plan.scratch() * 4 + 63) / 64 * 64, behind);
  if (kernels.run == nullptr && plan.pack.tiles.words_size > 0) {
    multiply(p, plan.pack, behind);
  } else {
    const auto run = kernels.run == nullptr ? cpu_ternary_conv2d_base().run : kernels.run;
    const int64_t half = plan.units / 2;
    run(p, plan, distances.data(), scratch.as<float>(), half, plan.units);
    run(p, plan, distances.data(), scratch.as<float>(), 0, half);
  }

  for (int64_t n = 0; n < p.N; n++) {
    for (int64_t k = 0; k < w.K; k++) {
      for (int64_t y = 0; y < p.OH; y++) {
        for (int64_t x = 0; x < p.OW; x++) {
          int64_t sums[2] = {0, 0};
          for (int64_t c = 0; c < channels; c++) {
            for (int64_t r = 0; r < w.R; r++) {
              for (int64_t s = 0; s < w.S; s++) {
                const int t = weight[((k * channels + c) * w.R + r) * w.S + s];
                const int64_t row = y * p.stride_h + r * p.dilation_h - p.pad_top;
                const int64_t column = x * p.stride_w + s * p.dilation_w - p.pad_left;
                if (t == 0 || row < 0 || row >= p.H || column < 0 || column >= p.W) continue;
                sums[t < 0] += image[((n * w.C + k / outputs * channels + c) * p.H + row) * p.W + column];
              }
            }
          }
          const float minus = two ? p.negative_scale[k] : p.scale[k];
          float value = p.scale[k] * static_cast<float>(sums[0]) - minus * static_cast<float>(sums[1]) + p.bias[k];
          if (p.activation != Activation::none && value < 0) value = 0;
          if (p.activation == Activation::relu6 && value > 6) value = 6;
          T expected;
          from_float(value, &expected);
          const int64_t at =
              p.channels_last ? ((n * p.OH + y) * p.OW + x) * w.K + k : ((n * w.K + k) * p.OH + y) * p.OW + x;
          if (to_float(output.as<T>()[at]) != to_float(expected)) {
            std::cerr << "n " << n << " k " << k << " y " << y << " x " << x << ": got " << to_float(output.as<T>()[at])
                      << ", expected " << to_float(expected) << ": " << current;
            return false;
          }
        }
      }
    }
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return 2;
  signal(SIGSEGV, touched);
  signal(SIGBUS, touched);
  const std::string isa = arguments[1];
  CpuTernaryConv2d kernels = cpu_ternary_conv2d_base();
#if defined(TERNARY_AVX2)
  if (isa == "avx2") kernels = cpu_ternary_conv2d_avx2();
#endif
#if defined(TERNARY_AVX512)
  if (isa == "avx512") kernels = cpu_ternary_conv2d_avx512();
#endif
#if defined(TERNARY_AMX)
  if (isa == "amx") kernels.run = nullptr;  // tiles; the base's lists where there are none
#endif
  Random random{std::mt19937_64(std::strtoull(arguments[2], nullptr, 10))};
  const int64_t geometries = std::atoll(arguments[3]);
  for (int64_t i = 0; i < geometries; i++) {
    const bool good = i % 4 == 0   ? agrees<float>(random, kernels, DType::f32)
                      : i % 4 == 1 ? agrees<bf16>(random, kernels, DType::bf16)
                      : i % 4 == 2 ? agrees<f16>(random, kernels, DType::f16)
                                   : agrees<float>(random, kernels, DType::f32, true);
    if (!good) return 1;
  }
  std::cout << isa << " " << geometries << " geometries\n";
}
