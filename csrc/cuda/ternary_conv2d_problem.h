// The problem of ternary_conv2d as its kernel sees it: one of basis_conv2d without a second stage, scale and bias
// aside.
#pragma once
#include "ternary_conv2d_plan.h"

namespace basisconv::cuda {

// A number for each output, or one for all of them.
struct Factor {
  const void* values;
  int step;
  bool is_float;  // else T

  template <class T>
  BASISCONV_DEVICE float at(int k, float otherwise) const {
    if (values == nullptr) return otherwise;
    const int64_t i = static_cast<int64_t>(k) * step;
    return is_float ? static_cast<const float*>(values)[i] : widen(static_cast<const T*>(values)[i]);
  }
};

struct TernaryProblem {
  Problem problem;  // `basis` are the tiles of filters; bias, residual, maps and mixing are null
  Factor scale, bias;
};

// The problem of a call whose sizes are below 2^29.
TernaryProblem ternary_problem_of(const CudaTernaryConv2d& call);

// Null when launched, else why not.
const char* ternary_conv2d_on_hopper(const TernaryProblem& s, DType dtype, const TernaryPlan& plan,
                                     const CudaDevice& device, Stream stream);

}  // namespace basisconv::cuda
