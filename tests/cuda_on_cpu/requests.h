// What Python says of a call, a dict of numbers and addresses, as both modules of the tests read it.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <utility>

#include "../../csrc/cuda/facts.h"

namespace requests {

inline int64_t number(const pybind11::dict& from, const char* name) { return from[name].cast<int64_t>(); }
inline std::pair<int64_t, int64_t> pair(const pybind11::dict& from, const char* name) {
  return from[name].cast<std::pair<int64_t, int64_t>>();
}
template <class T = void>
const T* address(const pybind11::dict& from, const char* name) {
  return reinterpret_cast<const T*>(from[name].cast<uintptr_t>());
}

inline basisconv::CudaDevice device(const pybind11::dict& from) {
  return {static_cast<int>(number(from, "capability")), static_cast<int>(number(from, "shared_bytes")),
          static_cast<int>(number(from, "multiprocessors"))};
}

// Batch, maps and what pads them on top and on the left.
template <class Params>
void fill_sizes(Params& p, const pybind11::dict& from) {
  p.N = number(from, "N");
  p.H = number(from, "H");
  p.W = number(from, "W");
  p.OH = number(from, "OH");
  p.OW = number(from, "OW");
  p.pad_top = number(from, "pad_top");
  p.pad_left = number(from, "pad_left");
}

}  // namespace requests
