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
};
BinaryClasses binary_classes(int64_t outputs, int64_t stride, int64_t pad, int64_t dilation, int64_t taps,
                             int64_t size);

// The table of the contract, from the counts of the packed weights. `table` is [rows][columns][groups * padded].
void binary_table(const BinaryConv2dParams& params, const BinaryPack& pack, BinaryRaw raw, const BinaryClasses& rows,
                  const BinaryClasses& columns, const int32_t* counts, int32_t* table);
// Turn it into limits: bit = (raw <= limit) ^ flip is v >= threshold, or v <= threshold for flipped outputs.
// `threshold` and `flip` are [groups * padded].
void binary_limits(const BinaryConv2dParams& params, const BinaryPack& pack, int64_t classes, const int32_t* threshold,
                   const int32_t* flip, int32_t* table);

}  // namespace basisconv
