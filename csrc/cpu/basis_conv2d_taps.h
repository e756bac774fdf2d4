// Which taps of the kernel the pixels of a tile can read inside the image, for the direct variant.
//
// Rows of the kernel outside the image are left out. Where rows are read in place there is nothing beside the image,
// and columns of the kernel that lie outside for some pixels of a tile run over the others only: the columns that read
// for the same pixels form a group, and the sums of a tile wait in memory from one group to the next. On a 7x7 map a
// 3x3 kernel so saves two columns of 21.
//
// Where taps lie counts from where the first one of the row would lie: rows that are read in place and have the same
// kernel rows inside share their list.
#pragma once
#include "basis_conv2d_plan.h"
#include "basis_conv2d_rows.h"

namespace basisconv {
namespace BASISCONV_ISA {

struct TapGroup {
  int64_t begin, end;      // pixels of the tile
  int64_t first, columns;  // of the kernel, in the order of TileTaps::column
};

// The groups of every tile of an output row. The last group of a tile covers all of its pixels, if need be without
// columns: sums are complete behind it.
class TileTaps {
 public:
  TileTaps(const BasisConv2dParams& params, const CpuPlan& plan, int64_t tile)
      : params_(params),
        plan_(plan),
        tile_(tile),
        most_groups_(params.weights.S + 1),
        tiles_((params.OW + tile - 1) / tile),
        pattern_(new int64_t[tiles_]),
        count_(new int64_t[tiles_]),
        groups_(new TapGroup[tiles_ * most_groups_]),
        column_(new int64_t[tiles_ * params.weights.S]),
        rows_(new RowTaps[plan.rows]) {
    for (int64_t t = 0; t < tiles_; t++) {
      group_columns(t);
      if (patterns_ > 0 && same(patterns_, patterns_ - 1)) {
        pattern_[t] = patterns_ - 1;
      } else {
        pattern_[t] = patterns_++;
      }
    }
    const int64_t taps = patterns_ * params.weights.R * params.weights.S;
    for (int64_t row = 0; row < plan.rows; row++) {
      rows_[row] = {new int64_t[taps], new int64_t[taps], -1, 0, 0};
    }
  }
  ~TileTaps() {
    delete[] pattern_;
    delete[] count_;
    delete[] groups_;
    delete[] column_;
    for (int64_t row = 0; row < plan_.rows; row++) {
      delete[] rows_[row].offset;
      delete[] rows_[row].weight;
    }
    delete[] rows_;
  }
  TileTaps(const TileTaps&) = delete;
  TileTaps& operator=(const TileTaps&) = delete;

  int64_t groups(int64_t tile) const { return count_[pattern_[tile]]; }
  const TapGroup& group(int64_t tile, int64_t i) const { return groups_[pattern_[tile] * most_groups_ + i]; }

  // The taps of a group in row `row` of the pass.
  struct List {
    const int64_t *offset, *weight;
    int64_t taps;
  };
  List taps(int64_t row, int64_t tile, const TapGroup& group) const {
    const RowTaps& r = rows_[row];
    const int64_t at = pattern_[tile] * params_.weights.R * params_.weights.S + group.first * r.kernel_rows;
    return {r.offset + at, r.weight + at, group.columns * r.kernel_rows};
  }
  // Values from the source to where the lists of this row count from.
  int64_t origin(int64_t row) const { return rows_[row].origin; }

  // Makes the lists of row `row` of the pass, which is output row `oy`.
  void fill(const Ring& ring, int64_t row, int64_t oy) {
    const BasisConv2dWeights& w = params_.weights;
    const int64_t tap_weights = plan_.pack.block / plan_.pack.lanes * plan_.pack.vectors * kWidth;
    const int64_t top = oy * w.stride_h - params_.pad_top;
    int64_t first = 0, end = w.R;  // kernel rows inside the image
    while (first < end && top + first * w.dilation_h < 0) first++;
    while (end > first && top + (end - 1) * w.dilation_h >= params_.H) end--;
    RowTaps& list = rows_[row];
    if (plan_.in_place) {
      list.origin = top * params_.input_stride_h - params_.pad_left * params_.input_stride_w;
      if (list.first == first && list.kernel_rows == end - first) return;
    }
    list.first = first;
    list.kernel_rows = end - first;
    for (int64_t pattern = 0; pattern < patterns_; pattern++) {
      int64_t at = pattern * w.R * w.S;
      for (int64_t g = 0; g < count_[pattern]; g++) {
        const TapGroup& group = groups_[pattern * most_groups_ + g];
        for (int64_t r = first; r < end; r++) {
          for (int64_t i = 0; i < group.columns; i++, at++) {
            const int64_t s = column_[pattern * w.S + group.first + i], y = top + r * w.dilation_h;
            list.offset[at] =
                plan_.in_place ? r * w.dilation_h * params_.input_stride_h + s * w.dilation_w * params_.input_stride_w
                               : y % plan_.ring_rows * ring.row_size + ring.column(s * w.dilation_w);
            list.weight[at] = (r * w.S + s) * tap_weights;
          }
        }
      }
    }
  }

 private:
  struct RowTaps {
    int64_t *offset, *weight;  // [patterns][taps]
    int64_t first, kernel_rows, origin;
  };

  // Pixels [begin, end) of tile t for which kernel column s reads inside the image, or finds zeros in the ring.
  void pixels_of(int64_t t, int64_t s, int64_t* begin, int64_t* end) const {
    const BasisConv2dWeights& w = params_.weights;
    const int64_t first = t * tile_, pixels = params_.OW - first < tile_ ? params_.OW - first : tile_;
    *begin = 0;
    *end = pixels;
    if (!plan_.in_place) return;
    const auto column = [&](int64_t pixel) {
      return (first + pixel) * w.stride_w + s * w.dilation_w - params_.pad_left;
    };
    while (*begin < *end && column(*begin) < 0) ++*begin;
    while (*end > *begin && column(*end - 1) >= params_.W) --*end;
  }

  // Writes the groups of tile t behind those of the patterns so far.
  void group_columns(int64_t t) {
    const BasisConv2dWeights& w = params_.weights;
    const int64_t pixels = params_.OW - t * tile_ < tile_ ? params_.OW - t * tile_ : tile_;
    TapGroup* groups = groups_ + patterns_ * most_groups_;
    int64_t* columns = column_ + patterns_ * w.S;
    int64_t count = 0, placed = 0, begin, end, other_begin, other_end;
    const auto place = [&](int64_t from, int64_t to) {
      groups[count] = {from, to, placed, 0};
      for (int64_t s = 0; s < w.S; s++) {
        pixels_of(t, s, &other_begin, &other_end);
        if (other_begin == from && other_end == to) columns[placed + groups[count].columns++] = s;
      }
      placed += groups[count++].columns;
    };
    for (int64_t s = 0; s < w.S; s++) {
      pixels_of(t, s, &begin, &end);
      bool known = begin == end || (begin == 0 && end == pixels);
      for (int64_t g = 0; g < count; g++) known = known || (groups[g].begin == begin && groups[g].end == end);
      if (!known) place(begin, end);
    }
    place(0, pixels);
    count_[patterns_] = count;
  }

  bool same(int64_t a, int64_t b) const {
    if (count_[a] != count_[b]) return false;
    for (int64_t g = 0; g < count_[a]; g++) {
      const TapGroup &one = groups_[a * most_groups_ + g], &other = groups_[b * most_groups_ + g];
      if (one.begin != other.begin || one.end != other.end || one.columns != other.columns) return false;
      for (int64_t i = 0; i < one.columns; i++) {
        const int64_t S = params_.weights.S;
        if (column_[a * S + one.first + i] != column_[b * S + other.first + i]) return false;
      }
    }
    return true;
  }

  const BasisConv2dParams& params_;
  const CpuPlan& plan_;
  const int64_t tile_, most_groups_, tiles_;
  int64_t patterns_ = 0;  // different ones; tiles of the same are neighbours
  int64_t* pattern_;      // of a tile
  int64_t* count_;        // groups of a pattern
  TapGroup* groups_;      // [patterns][S + 1]
  int64_t* column_;       // [patterns][S]
  RowTaps* rows_;         // [rows of a pass]
};

}  // namespace BASISCONV_ISA
}  // namespace basisconv
