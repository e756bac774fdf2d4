// Torch ops that have no gradient of their own refuse tensors that need one, instead of losing it. Included by
// csrc/ops/*.cpp alone; LibTorch stable ABI only.
//
// The check stands in the kernel: registered for the Autograd key it would be Python in the path of every compiled or
// exported program. For that key the ops are registered as falling through (basisconv_kernels/core/autograd.py), so a
// kernel sees its caller's gradient mode.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstddef>
#include <optional>
#include <utility>

namespace basisconv {

// Where gradients are recorded. The stable ABI cannot ask a tensor whether it requires one, but an alias that autograd
// has recorded is no leaf.
inline bool needs_gradient(const torch::stable::Tensor& t) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 1> stack{from(t)};
  STD_TORCH_CHECK(torch_call_dispatcher("aten::alias", "", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
                  "basisconv: no alias of an argument");
  stack[0] = from(to<torch::stable::Tensor>(stack[0]));
  STD_TORCH_CHECK(torch_call_dispatcher("aten::is_leaf", "", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
                  "basisconv: an argument does not say whether it is a leaf");
  return !to<bool>(stack[0]);
}

inline bool needs_gradient(const std::optional<torch::stable::Tensor>& t) { return t && needs_gradient(*t); }

template <typename Other>
bool needs_gradient(const Other&) {
  return false;
}

// A text as a template argument.
template <size_t N>
struct Text {
  constexpr Text(const char (&text)[N]) {
    for (size_t i = 0; i < N; ++i) value[i] = text[i];
  }
  char value[N];
};

// `call` is `function` for the torch op `raw` that serves the public function `op`, after the check.
template <Text raw, Text op, auto function>
struct WithoutGradient;

template <Text raw, Text op, typename Result, typename... Arguments, Result (*function)(Arguments...)>
struct WithoutGradient<raw, op, function> {
  static Result call(Arguments... arguments) {
    STD_TORCH_CHECK(!aoti_torch_grad_mode_is_enabled() || !(needs_gradient(arguments) || ...), "torch.ops.basisconv.",
                    raw.value, " has no gradient of its own: for training call basisconv_kernels.", op.value,
                    ", for inference (an exported program, say) run it under torch.no_grad()");
    return function(std::forward<Arguments>(arguments)...);
  }
};

}  // namespace basisconv

// As TORCH_BOX; BASISCONV_BOX where the torch op carries the name of its public function.
#define BASISCONV_BOX_FOR(raw, op, ...) TORCH_BOX((&basisconv::WithoutGradient<raw, op, __VA_ARGS__>::call))
#define BASISCONV_BOX(op, ...) BASISCONV_BOX_FOR(op, op, __VA_ARGS__)
