// What the torch glue of several ops shares. Templates of the tensor type, since torch's headers stay in the .cpp
// files.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace basisconv {

// The layout rule of PyTorch and of core.layout.memory_format: channels_last where each stride reaches past what the
// dimensions before it span, in the order C, W, H, N. Where C is 1 or a map is one pixel both formats describe the same
// memory, and the strides alone say which is meant; where they fit both, NCHW is.
template <typename Tensor>
bool is_channels_last(const Tensor& t) {
  if (t.numel() == 0 || t.stride(1) == 0) return false;
  int64_t span = 0;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (t.stride(dim) < span || (dim == 0 && t.stride(1) == span)) return false;
    span = t.size(dim) * t.stride(dim);
  }
  return true;
}

// A thread's own memory between calls, aligned to 64 bytes; grows to the largest size asked for.
inline void* thread_memory(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local int64_t held = 0;
  if (bytes > held) {
    memory.reset(std::aligned_alloc(64, (static_cast<size_t>(bytes) + 63) / 64 * 64));
    held = memory ? bytes : 0;
    if (memory == nullptr) throw std::bad_alloc();
  }
  return memory.get();
}

}  // namespace basisconv
