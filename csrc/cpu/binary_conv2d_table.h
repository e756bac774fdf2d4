// The tables that carry everything about borders, padding values and thresholds: pure functions, compiled once.
#pragma once
#include <vector>

#include "binary_conv2d_plan.h"

namespace basisconv {

// The taps of an axis that lie inside the image: lo..hi, none if lo > hi (then 0 and -1). A class is a pair that
// occurs.
struct BinaryClasses {
  std::vector<int32_t> of;      // class of each output row or column
  std::vector<int32_t> lo, hi;  // of each class
  int64_t count() const { return static_cast<int64_t>(lo.size()); }
};

// The factor and the table of the contract for what a plan counts or multiplies, from the counts of the packed weights.
struct BinaryBorders {
  BinaryClasses rows, columns;
  int32_t factor;
  std::vector<int32_t> table;  // [rows][columns][groups * padded]
};
BinaryBorders binary_borders(const BinaryConv2dParams& params, const BinaryPlan& plan, const int32_t* counts);
// Turn a table into limits: bit = (raw <= limit) ^ flip is v >= threshold, or v <= threshold for flipped outputs.
// `threshold` and `flip` are [groups * padded].
void binary_limits(const BinaryConv2dParams& params, const BinaryPack& pack, int64_t classes, const int32_t* threshold,
                   const int32_t* flip, int32_t* table);

}  // namespace basisconv
