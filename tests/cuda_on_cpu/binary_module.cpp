// The CUDA kernels of binary_conv2d and bitpack, run on the CPU, as a Python module of the tests. Tensors come as
// addresses. It is compiled as one with what it binds.
#include "../../csrc/cuda/binary_conv2d_sm90a.h"
#include "../../csrc/cuda/bitpack.h"
#include "requests.h"

namespace py = pybind11;
using namespace basisconv;
using namespace requests;

namespace {

BinaryConv2dWeights weights(const py::dict& from) {
  return {number(from, "C"), number(from, "K"), number(from, "R"), number(from, "S"), number(from, "groups")};
}

CudaFactor factor(const py::dict& from, const char* name) {
  const auto [values, type] = from[name].cast<std::pair<uintptr_t, int>>();
  return {reinterpret_cast<const void*>(values), static_cast<FactorType>(type)};
}

CudaBinaryConv2d call(const py::dict& from) {
  CudaBinaryConv2d c{};
  BinaryConv2dParams& p = c.params;
  p.weights = weights(from);
  fill_sizes(p, from);
  std::tie(p.stride_h, p.stride_w) = pair(from, "stride");
  std::tie(p.dilation_h, p.dilation_w) = pair(from, "dilation");
  p.planes = static_cast<int32_t>(number(from, "planes"));
  p.padding_value = static_cast<int32_t>(number(from, "padding_value"));
  p.codes = from["codes"].cast<bool>();
  p.input_type = BinaryInput::packed;
  p.input = address<void>(from, "input");
  p.packed = address<void>(from, "packed");
  p.activation = static_cast<BinaryActivation>(number(from, "activation"));
  p.output_type = static_cast<BinaryOutput>(number(from, "output_type"));
  p.output = const_cast<void*>(address<void>(from, "output"));
  p.channels_last = from["channels_last"].cast<bool>();
  c.scale = factor(from, "scale");
  c.bias = factor(from, "bias");
  c.pixel_scale = factor(from, "pixel_scale");
  c.threshold = address<int32_t>(from, "threshold");
  c.flip = address<bool>(from, "flip");
  return c;
}

py::object words_or_none(const char* wrong) { return wrong ? py::object(py::str(wrong)) : py::object(py::none()); }

}  // namespace

PYBIND11_MODULE(MODULE_NAME, m) {
  m.def("set_order", [](int order) { cuda_on_cpu::order = static_cast<cuda_on_cpu::Order>(order); });
  m.def("bitpack", [](const py::dict& from) {
    CudaBitpack c{};
    BitpackParams& p = c.params;
    const auto size = from["size"].cast<std::vector<int64_t>>(), stride = from["stride"].cast<std::vector<int64_t>>();
    p.N = size.at(0), p.C = size.at(1), p.H = size.at(2), p.W = size.at(3);
    p.stride_n = stride.at(0), p.stride_c = stride.at(1), p.stride_h = stride.at(2), p.stride_w = stride.at(3);
    p.planes = static_cast<int32_t>(number(from, "planes"));
    p.codes = from["codes"].cast<bool>();
    p.type = static_cast<BitpackType>(number(from, "type"));
    p.input = address<void>(from, "input");
    p.threshold = address<void>(from, "threshold");
    p.output = const_cast<uint32_t*>(address<uint32_t>(from, "output"));
    c.flip = address<bool>(from, "flip");
    return words_or_none(cuda_bitpack(c, nullptr));
  });
  m.def("packed_bytes", [](const py::dict& from) { return cuda_binary_packed_bytes(weights(from)); });
  m.def("packs_output", [](const py::dict& from) { return cuda_binary_packs_output(weights(from)); });
  m.def("pack", [](const py::dict& from) {
    return words_or_none(cuda_binary_pack(weights(from), address<uint32_t>(from, "words"),
                                          const_cast<void*>(address<void>(from, "packed")), nullptr));
  });
  m.def("reason", [](const py::dict& from) { return words_or_none(cuda_binary_reason(call(from), device(from))); });
  m.def("quotient", [](int numerator, int by) { return cuda::binary::Divisor::of(by).of_quotient(numerator); });
  // The plan of sm_90a's kernel: filters and warpgroups of a block, rounds, blocks, bytes, whether with
  // slabs; None where sm_80's runs.
  m.def("hopper_plan", [](const py::dict& from) -> py::object {
    const cuda::binary::Problem problem = cuda::binary::problem_of(call(from));
    if (!cuda::binary::hopper_takes(problem, device(from))) return py::none();
    const cuda::binary::HopperPlan plan = cuda::binary::hopper_plan(problem, device(from));
    if (plan.bytes == 0) return py::none();
    return py::make_tuple(plan.columns, plan.warpgroups, plan.rounds, plan.grid() * plan.blocks, plan.bytes,
                          plan.slabs > 0);
  });
  // What went wrong, or None, and (8x8 matrices read, bank conflicts). `plan`: with that plan of sm_90a's kernel.
  m.def("run", [](const py::dict& from) {
    using namespace cuda::binary;
    cuda_on_cpu::counters = {};
    const char* wrong = nullptr;
    if (from.contains("plan")) {
      const auto [columns, warpgroups, slabs] = from["plan"].cast<std::tuple<int, int, bool>>();
      const Problem problem = problem_of(call(from));
      const HopperPlan plan = hopper_plan_of(problem, device(from), columns, warpgroups, slabs);
      const auto kernel = plan.slabs > 0 ? run_sm90a_slabs : run_sm90a;
      wrong = !hopper_takes(problem, device(from)) || plan.bytes == 0 ? "no such plan" : kernel(problem, plan, nullptr);
    } else {
      wrong = cuda_binary_conv2d(call(from), device(from), nullptr);
    }
    return std::make_tuple(words_or_none(wrong), cuda_on_cpu::counters.matrices, cuda_on_cpu::counters.conflicts);
  });
#ifdef PLANTED
  m.def("plant", [](int fault) { planted = fault; });
#endif
}
