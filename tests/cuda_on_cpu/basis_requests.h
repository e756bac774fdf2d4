// Calls of basis_conv2d as Python states them, for the modules of its kernels and of tucker_conv2d's.
#pragma once
#include "../../csrc/cuda/basis_conv2d.h"
#include "requests.h"

namespace requests {

inline basisconv::BasisConv2dWeights weights(const pybind11::dict& from) {
  basisconv::BasisConv2dWeights w{};
  w.C = number(from, "C");
  w.Q = number(from, "Q");
  w.K = number(from, "K");
  w.R = number(from, "R");
  w.S = number(from, "S");
  std::tie(w.stride_h, w.stride_w) = pair(from, "stride");
  std::tie(w.dilation_h, w.dilation_w) = pair(from, "dilation");
  w.groups = number(from, "groups");
  w.mixing_groups = number(from, "mixing_groups");
  w.dtype = from["dtype"].cast<std::string>() == "bfloat16" ? basisconv::DType::bf16 : basisconv::DType::f16;
  w.precise = from["precise"].cast<bool>();
  return w;
}

inline basisconv::CudaBasisConv2d call(const pybind11::dict& from) {
  basisconv::CudaBasisConv2d c{};
  basisconv::BasisConv2dParams& p = c.params;
  p.weights = weights(from);
  fill_sizes(p, from);
  p.input = address<>(from, "input");
  const auto strides = from["input_stride"].cast<std::vector<int64_t>>();
  p.input_stride_n = strides.at(0);
  p.input_stride_c = strides.at(1);
  p.input_stride_h = strides.at(2);
  p.input_stride_w = strides.at(3);
  p.packed = address<>(from, "packed");
  p.residual = address<>(from, "residual");
  p.output = const_cast<void*>(address<>(from, "output"));
  p.maps = const_cast<void*>(address<>(from, "maps"));
  p.channels_last = from["channels_last"].cast<bool>();
  p.activation = static_cast<basisconv::Activation>(number(from, "activation"));
  c.bias = address<>(from, "bias");
  return c;
}

inline basisconv::CudaPack pack_of(const pybind11::dict& from) {
  basisconv::CudaPack pack{};
  pack.weights = weights(from);
  pack.basis_weight = address<>(from, "basis_weight");
  pack.coefficients = address<>(from, "coefficients");
  const auto basis = from["basis_stride"].cast<std::vector<int64_t>>();
  const auto mixing = from["coefficients_stride"].cast<std::vector<int64_t>>();
  for (int i = 0; i < 4; ++i) pack.basis_stride[i] = basis.at(i);
  for (int i = 0; i < 2; ++i) pack.coefficients_stride[i] = mixing.at(i);
  pack.packed = const_cast<void*>(address<>(from, "packed"));
  return pack;
}

}  // namespace requests
