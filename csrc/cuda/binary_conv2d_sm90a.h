// The plan of the sm_90a kernel of binary_conv2d: which calls it takes, how many filters and pixels a block has, what
// it holds of the image. Pure functions of the sizes, tested without a device.
#pragma once
#include "binary_conv2d_problem.h"

namespace basisconv::cuda::binary {

// A quotient of a number below 2^31 by a multiplication: inverse / 2^(32 + shift) is above 1 / by by less than
// 1 / (by * 2^31).
struct Divisor {
  int by, shift;
  uint32_t inverse;

  BASISCONV_EITHER static Divisor of(int by) {
    int bits = 1;
    while (bits < 31 && 1 << bits < by) ++bits;
    const uint64_t one = uint64_t{1} << (31 + bits);
    return {by, bits - 1, static_cast<uint32_t>((one + static_cast<uint64_t>(by) - 1) / static_cast<uint64_t>(by))};
  }
  BASISCONV_EITHER int of_quotient(int numerator) const {
    if (by == 1) return numerator;
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(numerator)) * inverse >> 32) >> shift;
  }
};

// A block has 64 * warpgroups pixels, one behind the other through the batch, and `columns` filters. Of the image it
// holds a band: whole rows with their padding, counted on from image to image, `image_rows` each.
struct HopperPlan {
  static constexpr int tile_pixels = 64;  // of a warpgroup
  // Warpgroups that the registers of a multiprocessor are enough for, and of one block.
  BASISCONV_EITHER static constexpr int most_at_once(int columns) { return columns == 128 ? 4 : columns == 64 ? 5 : 6; }
  BASISCONV_EITHER static constexpr int most_of_a_block(int columns) {
    return columns == 32 ? 3 : most_at_once(columns);
  }
  // The same of the kernel with slabs, which has twice the sums: too many for 128 columns. Of one block too.
  BASISCONV_EITHER static constexpr int most_with_slabs(int columns) { return columns == 128 ? 0 : 3; }

  int columns, warpgroups, blocks;  // blocks: of filters
  bool pairs;                       // at most 64 channels: signs and their complement are one unit, a step has two taps
  int units, taps, steps;           // units of a pixel's signs
  int slabs;                        // of two units: binary_conv2d_sm90a_slabs.cu's; 0: the other kernel's
  int jump_h, jump_w;               // from one output's window to the next, in the band
  int step_h, step_w;               // from one pixel of the band to the next, in the image
  int down, right;                  // from tap to tap, in the band
  int rows;                         // of the band
  Divisor width, image_rows;        // pixels of the band's rows; its rows of an image
  Divisor parts, by_units;          // 32 units each, of a row
  Divisor image, line;              // outputs
  int tiles, rounds, per_sm;
  int bytes;  // of shared memory; 0 where the kernel cannot run

  BASISCONV_EITHER int pixels() const { return tile_pixels * warpgroups; }
  BASISCONV_EITHER int filter_bytes() const { return steps * columns * (slabs > 0 ? 1 : 2) * kUnitBytes; }
  BASISCONV_EITHER int plane_bytes() const { return rows * width.by * kUnitBytes; }
  BASISCONV_EITHER int planes() const { return pairs ? 1 : 2 * (slabs > 0 ? slabs : units); }
  BASISCONV_EITHER int constants_offset() const { return filter_bytes() + planes() * plane_bytes(); }
  BASISCONV_EITHER int grid() const { return static_cast<int>(ceil_div(tiles, rounds)); }
};

// Where the pixels of a tile begin: counted through the batch; image, outputs of the image that come before, their
// line.
struct Start {
  int number, n, before, line;

  BASISCONV_DEVICE Start(const HopperPlan& plan, int tile) {
    number = tile * plan.pixels();
    n = plan.image.of_quotient(number);
    before = number - n * plan.image.by;
    line = plan.line.of_quotient(before);
  }
};

// Of which line of which image a row of a tile's band is, or of none.
struct Line {
  int n, y;

  BASISCONV_DEVICE Line(const Problem& p, const HopperPlan& plan, const Start& start, int row) {
    const int line = start.line * plan.jump_h + row, images = plan.image_rows.of_quotient(line);
    n = start.n + images;
    y = (line - images * plan.image_rows.by) * plan.step_h - p.pad_top;
  }
  BASISCONV_DEVICE bool inside(const Problem& p) const {
    return n < p.N && static_cast<unsigned>(y) < static_cast<unsigned>(p.H);
  }
  BASISCONV_DEVICE const uint32_t* pixels(const Problem& p) const {
    return p.input + (static_cast<int64_t>(n) * p.H + y) * p.W * p.words;
  }
};

// Whether the kernel's way is one for this call; the plan says whether its memory is enough. Sums of signs over an even
// number of channels are even without a padding that counts.
inline bool hopper_takes(const Problem& p, const CudaDevice& device) {
#ifdef BASISCONV_WITHOUT_SM90A
  return false;
#endif
  const bool nine = p.R == 3 && p.S == 3, one = p.R == 1 && p.S == 1;
  if (device.capability != 90 || (!nine && !one)) return false;  // sm_90a code runs on 9.0 alone
  if (p.codes || p.planes != 1 || p.groups != 1 || p.C % 2 != 0) return false;
  if (p.K <= kFewFilters || (p.words != 2 && !p.input_in_16_bytes)) return false;
  if (reinterpret_cast<uintptr_t>(p.input) % 8 != 0) return false;
  if (p.output_type != BinaryOutput::packed && !p.output_in_16_bytes) return false;
  const int64_t all = int64_t{p.OH} * p.OW * p.N, rows = int64_t{p.OH} * p.stride_h + p.R * p.dilation_h;
  return rows < 1 << 28 && all < int64_t{1} << 30 && int64_t{p.C} * p.R * p.S < 1 << 22;
}

inline HopperPlan hopper_plan_of(const Problem& p, const CudaDevice& device, int columns, int warpgroups, bool slabs) {
  HopperPlan plan{};
  plan.columns = columns;
  plan.warpgroups = warpgroups;
  plan.blocks = static_cast<int>(ceil_div(p.K, columns));
  plan.pairs = p.words == 2;
  plan.units = plan.pairs ? 1 : p.words / kUnitWords;
  plan.taps = p.R * p.S;
  plan.slabs = slabs ? p.slabs : 0;
  plan.steps = slabs ? plan.taps * 2 * p.slabs : plan.pairs ? (plan.taps + 1) / 2 : plan.taps * plan.units;
  // Of a 1x1 filter's strides the band holds only what is used.
  const bool one = plan.taps == 1;
  plan.jump_h = one ? 1 : p.stride_h, plan.jump_w = one ? 1 : p.stride_w;
  plan.step_h = one ? p.stride_h : 1, plan.step_w = one ? p.stride_w : 1;
  plan.down = p.dilation_h, plan.right = p.dilation_w;
  const int64_t width = (p.OW - 1) * int64_t{plan.jump_w} + (p.S - 1) * int64_t{p.dilation_w} + 1;
  const int64_t height = (p.OH - 1) * int64_t{plan.jump_h} + (p.R - 1) * int64_t{p.dilation_h} + 1;
  const int64_t image = int64_t{p.OH} * p.OW, last = plan.pixels() - 1;
  // Lines of outputs that a block may touch, and how often it may go on to the next image.
  const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const int64_t lines = least(ceil_div(last, p.OW) + 1, int64_t{p.N} * p.OH);
  const int64_t crossings = least(ceil_div(last, image), p.N - 1);
  const int64_t window = (p.R - 1) * int64_t{p.dilation_h} + 1;
  const int64_t more = window > plan.jump_h ? window - plan.jump_h : 0;
  const int64_t rows = (lines - 1) * plan.jump_h + crossings * more + window;
  constexpr int constants = 2 * 4, barrier = 8;
  const int64_t filters = int64_t{plan.steps} * columns * (slabs ? 1 : 2) * kUnitBytes;
  const int64_t bytes =
      filters + plan.planes() * rows * width * kUnitBytes + columns * constants + plan.slabs * barrier;
  const int most = slabs ? HopperPlan::most_with_slabs(columns) : HopperPlan::most_at_once(columns);
  if (bytes > device.shared_bytes || warpgroups > most) return plan;
  plan.rows = static_cast<int>(rows);
  plan.width = Divisor::of(static_cast<int>(width));
  plan.image_rows = Divisor::of(static_cast<int>(height));
  plan.image = Divisor::of(static_cast<int>(image));
  plan.line = Divisor::of(p.OW);
  plan.by_units = Divisor::of(plan.units);
  plan.parts = Divisor::of(static_cast<int>(ceil_div(width * plan.units, 32)));
  constexpr int reserved = 1024;  // of every block
  const int by_memory = static_cast<int>((device.shared_bytes + reserved) / (bytes + reserved));
  const int by_registers = most / warpgroups;
  plan.per_sm = by_memory < by_registers ? by_memory : by_registers;
  plan.tiles = static_cast<int>(ceil_div(image * p.N, plan.pixels()));
  const int slots = device.multiprocessors * plan.per_sm / plan.blocks;
  plan.rounds = static_cast<int>(ceil_div(plan.tiles, slots > 0 ? slots : 1));
  plan.bytes = static_cast<int>(bytes);
  return plan;
}

// Clocks of a call, by rates that were measured on an H200, rounded: a step of 64 pixels alone, and beside others,
// where shared memory moves 84 bytes a clock, 2 KB of pixels and 32 bytes a filter; the outputs of 64 pixels; filters
// until products can begin, of slabs the first alone, else in turns of four loads a thread; what a round waits for.
inline int64_t hopper_clocks(const HopperPlan& plan, const CudaDevice& device) {
  const int columns = plan.columns;
  const int alone = columns == 128 ? 72 : columns == 64 ? 54 : 45, step = (2048 + 32 * columns) / 84;
  const int64_t blocks = ceil_div(int64_t{plan.grid()} * plan.blocks, device.multiprocessors);
  const int64_t at_once = blocks * plan.warpgroups;
  const int64_t together = at_once * step * plan.steps, chain = int64_t{alone} * plan.steps;
  const int64_t turns = ceil_div(int64_t{plan.steps} * columns, 128 * plan.warpgroups * 4);
  const int64_t landing = plan.filter_bytes() / (plan.slabs > 0 ? plan.slabs : 2) * blocks / 40;
  const int64_t filters = landing + (plan.slabs > 0 ? 0 : (turns - 1) * 1500);
  return filters + plan.rounds * (1500 + (together > chain ? together : chain) + at_once * (100 + columns * 5 / 2));
}

// The quickest plan by that count; `bytes` is 0 where none fits.
inline HopperPlan hopper_plan(const Problem& p, const CudaDevice& device) {
  HopperPlan best{};
  for (const bool slabs : {true, false}) {
    if (slabs && p.slab_units == 1) continue;
    for (int columns = 128; columns >= 32; columns /= 2) {
      if (columns / 2 >= p.K) continue;
      for (int warpgroups = 1; warpgroups <= HopperPlan::most_of_a_block(columns); ++warpgroups) {
        const HopperPlan plan = hopper_plan_of(p, device, columns, warpgroups, slabs);
        if (plan.bytes == 0) continue;
        if (best.bytes == 0 || hopper_clocks(plan, device) < hopper_clocks(best, device)) best = plan;
      }
    }
  }
  return best;
}

const char* run_sm90a(const Problem& problem, const HopperPlan& plan, Stream stream);
const char* run_sm90a_slabs(const Problem& problem, const HopperPlan& plan, Stream stream);

}  // namespace basisconv::cuda::binary
