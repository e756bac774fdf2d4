// The CUDA kernel of ternary_conv2d, run on the CPU, as a Python module of the tests. Tensors come as addresses. It is
// compiled as one with what it binds.
#include "../../csrc/cuda/ternary_conv2d_problem.h"
#include "requests.h"

namespace py = pybind11;
using namespace basisconv;
using namespace requests;

namespace {

CudaTernaryWeights weights(const py::dict& from) {
  return {number(from, "C"), number(from, "K"), number(from, "R"), number(from, "S")};
}

CudaTernaryFactor factor(const py::dict& from, const char* name) {
  const auto [values, one, is_float] = from[name].cast<std::tuple<uintptr_t, bool, bool>>();
  return {reinterpret_cast<const void*>(values), one, is_float};
}

CudaTernaryConv2d call(const py::dict& from) {
  CudaTernaryConv2d c{};
  c.weights = weights(from);
  const auto dtype = from["dtype"].cast<std::string>();
  c.dtype = dtype == "bfloat16" ? DType::bf16 : dtype == "float16" ? DType::f16 : DType::f32;
  fill_sizes(c, from);
  std::tie(c.stride_h, c.stride_w) = pair(from, "stride");
  std::tie(c.dilation_h, c.dilation_w) = pair(from, "dilation");
  c.input = address<void>(from, "input");
  std::tie(c.input_stride_n, c.input_stride_h, c.input_stride_w) =
      from["input_stride"].cast<std::tuple<int64_t, int64_t, int64_t>>();
  c.packed = address<void>(from, "packed");
  c.scale = factor(from, "scale");
  c.bias = factor(from, "bias");
  c.activation = static_cast<Activation>(number(from, "activation"));
  c.output = const_cast<void*>(address<void>(from, "output"));
  return c;
}

py::object words_or_none(const char* wrong) { return wrong ? py::object(py::str(wrong)) : py::object(py::none()); }

py::dict described(const cuda::TernaryPlan& plan, const cuda::Problem& p, const CudaDevice& device) {
  py::dict made;
  made["columns_each"] = plan.columns_each;
  made["split_filters"] = plan.split_filters;
  made["parts"] = plan.parts;
  made["resident"] = plan.resident;
  made["halo_stages"] = plan.halo_stages;
  made["filter_stages"] = plan.filter_stages;
  made["bytes"] = plan.bytes;
  made["grid"] = cuda::ternary_grid(p, plan, device);
  made["clocks"] = cuda::ternary_clocks(p, plan, device);
  return made;
}

}  // namespace

PYBIND11_MODULE(MODULE_NAME, m) {
  m.def("set_order", [](int order) { cuda_on_cpu::order = static_cast<cuda_on_cpu::Order>(order); });
  m.def("packed_bytes", [](const py::dict& from) { return cuda_ternary_packed_bytes(weights(from)); });
  m.def("pack", [](const py::dict& from) {
    return words_or_none(cuda_ternary_pack(weights(from), address<uint32_t>(from, "words"),
                                           static_cast<int>(number(from, "planes")),
                                           const_cast<void*>(address<void>(from, "packed")), nullptr));
  });
  m.def("reason", [](const py::dict& from) { return words_or_none(cuda_ternary_reason(call(from), device(from))); });
  m.def("plan", [](const py::dict& from) {
    const cuda::Problem p = cuda::ternary_problem_of(call(from)).problem;
    return described(cuda::ternary_plan(p, device(from)), p, device(from));
  });
  // What went wrong, or None, and (8x8 matrices read, bank conflicts).
  m.def("run", [](const py::dict& from) {
    cuda_on_cpu::counters = {};
    const char* wrong = cuda_ternary_conv2d(call(from), device(from), nullptr);
    return std::make_tuple(words_or_none(wrong), cuda_on_cpu::counters.matrices, cuda_on_cpu::counters.conflicts);
  });
  // The same by a plan of a kind, whichever is the quickest.
  m.def("run_by", [](const py::dict& from, bool split_filters, int columns_each) {
    const CudaTernaryConv2d c = call(from);
    const cuda::TernaryProblem s = cuda::ternary_problem_of(c);
    const cuda::TernaryPlan plan =
        cuda::ternary_plan_of(s.problem, device(from).shared_bytes, split_filters, columns_each);
    if (plan.bytes == 0) return words_or_none("does not fit");
    return words_or_none(cuda::ternary_conv2d_on_hopper(s, c.dtype, plan, device(from), nullptr));
  });
#ifdef PLANTED
  m.def("plant", [](int fault) { planted = fault; });
#endif
}
