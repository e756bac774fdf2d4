// What the C functions of the ops share, by which a program of AOTInductor or of torch.compile's C++ wrapper calls a
// kernel directly: no dispatcher, no boxed arguments, no copy of the op's schema. Included by csrc/ops/*.cpp alone;
// LibTorch stable ABI only.
//
// Such a program declares the functions by names and types that follow from the schema, as
// basisconv_kernels/core/serving.py writes them: Tensor AtenTensorHandle, Tensor? a pointer to one, int[] a pointer and
// a length, bool int32_t, str? a pointer to a pointer, the result last. All is lent to us but the result.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <optional>
#include <string>
#include <utility>
#include <vector>

// Visible to programs that are loaded later.
#define BASISCONV_SHIM extern "C" __attribute__((visibility("default"))) AOTITorchError

namespace basisconv::shim {

inline torch::stable::Tensor of(AtenTensorHandle lent) {
  AtenTensorHandle own = nullptr;
  STD_TORCH_CHECK(aoti_torch_new_tensor_handle(lent, &own) == AOTI_TORCH_SUCCESS, "basisconv: no handle of a tensor");
  return torch::stable::Tensor(own);
}

inline std::optional<torch::stable::Tensor> of(const AtenTensorHandle* lent) {
  if (lent == nullptr) return std::nullopt;
  return of(*lent);
}

inline std::vector<int64_t> of(const int64_t* values, int64_t count) { return {values, values + count}; }

inline std::optional<std::string> of(const char* const* text) {
  if (text == nullptr) return std::nullopt;
  return std::string(*text);
}

// Hands out the tensor that `compute` returns. A program learns of an error as such, its words go to stderr.
template <typename Compute>
AOTITorchError answer(AtenTensorHandle* result, Compute&& compute) noexcept {
  try {
    const torch::stable::Tensor made = std::forward<Compute>(compute)();
    return aoti_torch_new_tensor_handle(made.get(), result);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
  } catch (...) {
    std::fputs("basisconv: an unknown error\n", stderr);
  }
  return AOTI_TORCH_FAILURE;
}

}  // namespace basisconv::shim
