// The CPU kernels of binary_conv2d on seeded geometries against plain loops, in one program without torch or Python:
// for instruction sets that this processor lacks (emulated), and for reads and writes that no sanitizer sees. Compiled
// by test_binary_without_torch.py.
//
// Every array that a kernel gets ends or begins at a page that may not be touched. Whole numbers and bits are compared;
// floats are multiples of halves, exact in any order. Usage: binary_without_torch SEED GEOMETRIES. Exit status 1 and
// a line on stderr at the first difference or touch.
#include <signal.h>

#include <algorithm>
#include <iostream>
#include <sstream>
#include <string>

#include "../../csrc/cpu/binary_conv2d.h"
#include "../../csrc/cpu/binary_conv2d_table.h"
#include "fenced.h"

// The names of one set's functions, whichever was compiled.
#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)

using namespace basisconv;

namespace {

std::string current;  // the geometry under test, for the handler of a touched page

void touched(int) {
  const char text[] = "touched memory beside an array: ";
  (void)!write(2, text, sizeof(text) - 1);
  (void)!write(2, current.data(), current.size());
  _exit(1);
}

constexpr Isa kIsa = Isa::BASISCONV_TESTED;
const CpuBinaryConv2d kernels = JOIN(cpu_binary_conv2d_, BASISCONV_TESTED)();

BinaryConv2dParams draw(Random& random, int64_t& bottom, int64_t& right) {
  BinaryConv2dParams p{};
  BinaryConv2dWeights& w = p.weights;
  w.groups = random.coin() ? 1 : random.between(1, 3);
  w.C = w.groups * (random.between(0, 9) == 0 ? random.between(250, 700) : random.between(1, 70));
  w.K = w.groups * random.between(1, 70);
  w.R = random.between(1, 4);
  w.S = random.between(1, 4);
  p.stride_h = random.between(1, 3);
  p.stride_w = random.between(1, 3);
  p.dilation_h = random.between(1, 3);
  p.dilation_w = random.coin() ? 1 : random.between(1, 3);
  p.pad_top = random.between(0, 5);
  p.pad_left = random.between(0, 5);
  bottom = random.between(0, 5);
  right = random.between(0, 5);
  const int64_t reach_h = (w.R - 1) * p.dilation_h + 1, reach_w = (w.S - 1) * p.dilation_w + 1;
  p.N = random.between(1, 2);
  p.H = std::max<int64_t>(1, reach_h - p.pad_top - bottom) + random.between(0, 7);
  p.W = std::max<int64_t>(1, reach_w - p.pad_left - right) + random.between(0, 9);
  p.OH = (p.H + p.pad_top + bottom - reach_h) / p.stride_h + 1;
  p.OW = (p.W + p.pad_left + right - reach_w) / p.stride_w + 1;
  p.codes = random.between(0, 3) == 0;
  p.planes = p.codes ? static_cast<int32_t>(random.between(1, 4)) : 1;
  p.padding_value = p.codes ? 0 : static_cast<int32_t>(random.between(-1, 1));
  p.input_type = p.codes || random.coin() ? BinaryInput::packed : BinaryInput::f32;
  p.output_type = static_cast<BinaryOutput>(random.between(0, 2));
  p.channels_last = random.coin();
  p.activation = static_cast<BinaryActivation>(random.between(0, 2));
  return p;
}

bool check(Random random) {
  int64_t bottom, right;
  BinaryConv2dParams p = draw(random, bottom, right);
  const BinaryConv2dWeights& w = p.weights;
  const int64_t channels = w.C / w.groups, filters = w.K / w.groups, words = words_for(w.C);
  const int64_t threads = random.between(1, 3);
  std::ostringstream said;
  said << isa_name(kIsa) << " N" << p.N << " C" << w.C << " H" << p.H << " W" << p.W << " K" << w.K << " " << w.R << "x"
       << w.S << " stride " << p.stride_h << "," << p.stride_w << " dilation " << p.dilation_h << "," << p.dilation_w
       << " padding " << p.pad_top << "," << bottom << "," << p.pad_left << "," << right << " with " << p.padding_value
       << " groups " << w.groups << " planes " << p.planes << (p.codes ? " codes" : " signs") << " input "
       << static_cast<int>(p.input_type) << " output " << static_cast<int>(p.output_type) << " channels_last "
       << p.channels_last << " threads " << threads << "\n";
  current = said.str();

  // Operands as whole numbers, and as what the kernel reads.
  const int64_t pixels = p.N * p.H * p.W;
  std::vector<int32_t> image(pixels * w.C), signs(w.K * channels * w.R * w.S);
  for (int32_t& value : image) {
    value = p.codes ? static_cast<int32_t>(random.between(0, (1 << p.planes) - 1)) : random.coin() ? 1 : -1;
  }
  for (int32_t& value : signs) value = random.coin() ? 1 : -1;
  const auto pixel = [&](int64_t n, int64_t c, int64_t y, int64_t x) {
    return image[((n * p.H + y) * p.W + x) * w.C + c];
  };
  std::vector<uint32_t> packed_image(p.N * p.planes * p.H * p.W * words, 0u);
  std::vector<float> real(pixels * w.C);
  const bool nhwc = random.coin();
  p.input_stride_c = nhwc ? 1 : p.H * p.W;
  p.input_stride_w = nhwc ? w.C : 1;
  p.input_stride_h = p.W * p.input_stride_w;
  p.input_stride_n = p.H * p.W * w.C;
  for (int64_t i = 0; i < pixels * w.C; i++) {
    const int64_t c = i % w.C, x = i / w.C % p.W, y = i / w.C / p.W % p.H, n = i / w.C / p.W / p.H;
    const uint32_t code = static_cast<uint32_t>(p.codes ? pixel(n, c, y, x) : pixel(n, c, y, x) > 0);
    for (int32_t b = 0; b < p.planes; b++) {
      packed_image[(((n * p.planes + b) * p.H + y) * p.W + x) * words + c / 32] |= ((code >> b) & 1u) << (c % 32);
    }
    real[n * p.input_stride_n + c * p.input_stride_c + y * p.input_stride_h + x * p.input_stride_w] =
        static_cast<float>(pixel(n, c, y, x)) * (random.coin() ? 0.5f : 1e-30f);
  }
  std::vector<uint32_t> sign_words(w.K * w.R * w.S * words_for(channels), 0u);
  for (int64_t i = 0; i < static_cast<int64_t>(signs.size()); i++) {
    const int64_t t = i % (w.R * w.S), c = i / (w.R * w.S) % channels, k = i / (w.R * w.S) / channels;
    sign_words[(k * w.R * w.S + t) * words_for(channels) + c / 32] |= static_cast<uint32_t>(signs[i] > 0) << (c % 32);
  }

  // The sums by plain loops.
  std::vector<int32_t> sums(p.N * p.OH * p.OW * w.K);
  for (int64_t i = 0; i < static_cast<int64_t>(sums.size()); i++) {
    const int64_t k = i % w.K, x = i / w.K % p.OW, y = i / w.K / p.OW % p.OH, n = i / w.K / p.OW / p.OH;
    int32_t total = 0;
    for (int64_t c = 0; c < channels; c++) {
      for (int64_t r = 0; r < w.R; r++) {
        for (int64_t s = 0; s < w.S; s++) {
          const int64_t row = y * p.stride_h + r * p.dilation_h - p.pad_top;
          const int64_t column = x * p.stride_w + s * p.dilation_w - p.pad_left;
          const bool inside = row >= 0 && row < p.H && column >= 0 && column < p.W;
          const int32_t a = inside ? pixel(n, k / filters * channels + c, row, column) : p.padding_value;
          total += a * signs[((k * channels + c) * w.R + r) * w.S + s];
        }
      }
    }
    sums[i] = total;
  }

  // The epilogue's numbers, and what is expected.
  const BinaryPack pack = binary_pack(w, kIsa);
  // Of products whatever their size: small geometries would be counted.
  const BinaryPlan plan =
      kIsa == Isa::amx ? binary_products_plan(p, pack, threads) : binary_plan(p, pack, kIsa, threads);
  std::vector<float> scale(w.K), bias(w.K), pixel_scale(p.N * p.OH * p.OW);
  for (float& value : scale) value = static_cast<float>(random.between(-4, 4)) * 0.5f;
  for (float& value : bias) value = static_cast<float>(random.between(-9, 9)) * 0.5f;
  for (float& value : pixel_scale) value = static_cast<float>(random.between(0, 3));
  std::vector<int32_t> threshold(w.groups * pack.padded, 0), flip(w.groups * pack.padded, 0);
  for (int64_t k = 0; k < w.K; k++) {
    const int64_t at = k / filters * pack.padded + k % filters;
    const int64_t kind = random.between(0, 9);
    threshold[at] = kind == 0   ? INT32_MIN
                    : kind == 1 ? INT32_MAX
                                : sums[k] + static_cast<int32_t>(random.between(-2, 2));
    flip[at] = random.coin() ? -1 : 0;
  }
  const int64_t output_words = words_for(w.K);
  const bool bits = p.output_type == BinaryOutput::packed, floats = p.output_type == BinaryOutput::f32;
  std::vector<uint32_t> expected(bits ? p.N * p.OH * p.OW * output_words : sums.size(), 0u);
  for (int64_t i = 0; i < static_cast<int64_t>(sums.size()); i++) {
    const int64_t k = i % w.K, at = k / filters * pack.padded + k % filters, spot = i / w.K;
    if (bits) {
      const bool bit = flip[at] != 0 ? sums[i] <= threshold[at] : sums[i] >= threshold[at];
      expected[spot * output_words + k / 32] |= static_cast<uint32_t>(bit) << (k % 32);
      continue;
    }
    const int64_t n = spot / (p.OH * p.OW), within = spot % (p.OH * p.OW);
    const int64_t to = p.channels_last ? i : (n * w.K + k) * p.OH * p.OW + within;
    if (floats) {
      float value = static_cast<float>(sums[i]) * scale[k] * pixel_scale[spot] + bias[k];
      if (p.activation != BinaryActivation::none) value = value < 0.0f ? 0.0f : value;
      if (p.activation == BinaryActivation::relu6) value = value > 6.0f ? 6.0f : value;
      if (value == 0.0f) value = 0.0f;
      std::memcpy(&expected[to], &value, 4);
    } else {
      expected[to] = static_cast<uint32_t>(sums[i]);
    }
  }

  const bool behind = random.coin();
  Fenced<uint32_t> fenced_words(packed_image, behind), fenced_signs(sign_words, behind);
  Fenced<float> fenced_real(real, behind), fenced_scale(scale, behind), fenced_bias(bias, behind);
  Fenced<float> fenced_pixel(pixel_scale, behind);
  Fenced<uint8_t> packed(std::vector<uint8_t>(pack.counts_bytes + pack.bits_bytes, 0), behind);
  Fenced<uint32_t> output(static_cast<int64_t>(expected.size()), behind);
  kernels.pack(w, pack, fenced_signs.data(), reinterpret_cast<int32_t*>(packed.data()),
               packed.data() + pack.counts_bytes);
  p.packed = packed.data();
  p.input = p.input_type == BinaryInput::packed ? static_cast<const void*>(fenced_words.data()) : fenced_real.data();
  p.output = output.data();
  p.scale = fenced_scale.data();
  p.bias = fenced_bias.data();
  p.pixel_scale = fenced_pixel.data();
  BinaryBorders borders = binary_borders(p, plan, static_cast<const int32_t*>(p.packed));
  p.factor = borders.factor;
  const int64_t classes = borders.rows.count() * borders.columns.count();
  if (bits) binary_limits(p, pack, classes, threshold.data(), flip.data(), borders.table.data());
  Fenced<int32_t> fenced_table(borders.table, behind), fenced_flip(flip, behind);
  p.table = fenced_table.data();
  p.flip = fenced_flip.data();
  p.row_class = borders.rows.of.data();
  p.column_class = borders.columns.of.data();
  p.column_classes = borders.columns.count();

  const int64_t share = (plan.units + threads - 1) / threads;
  for (int64_t begin = 0; begin < plan.units; begin += share) {
    Fenced<uint8_t> scratch(plan.scratch_bytes, behind);
    kernels.run(p, plan, scratch.data(), begin, std::min(begin + share, plan.units));
  }
  for (size_t i = 0; i < expected.size(); i++) {
    uint32_t got = output.data()[i];
    if (floats && got == 0x80000000u) got = 0;  // -0 and 0 are equal
    if (got == expected[i]) continue;
    std::cerr << "output[" << i << "] of " << expected.size() << ": got " << static_cast<int32_t>(got) << ", expected "
              << static_cast<int32_t>(expected[i]) << ", " << current;
    return false;
  }
  if (output.untouched_beside()) return true;
  std::cerr << "written beside the output, " << current;
  return false;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  signal(SIGSEGV, touched);
  signal(SIGBUS, touched);
  isa_of_processor();  // asks for the matrix unit's registers
  const unsigned seed = static_cast<unsigned>(std::strtoul(arguments[1], nullptr, 10));
  const unsigned geometries = static_cast<unsigned>(std::strtoul(arguments[2], nullptr, 10));
  for (unsigned i = 0; i < geometries; i++) {
    if (!check(Random{std::mt19937(seed + i)})) return 1;
  }
  std::cout << isa_name(kIsa) << " " << geometries << " geometries\n";
  return 0;
}
