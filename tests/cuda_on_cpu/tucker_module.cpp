// The one-pass kernel of tucker_conv2d and the packing of its weights, run on the CPU, as a Python module of the tests.
// Tensors come as addresses. It is compiled as one with what it binds.
#include "../../csrc/cuda/tucker_conv2d_plan.h"
#include "basis_requests.h"

namespace py = pybind11;
using namespace basisconv;
using namespace requests;

namespace basisconv {

// The kernels of basis_conv2d are another module.
const char* cuda_basis_conv2d_sm80(const CudaBasisConv2d&, const CudaDevice&, void*) { return "not in this module"; }
const char* cuda_basis_conv2d_sm90a(const CudaBasisConv2d&, const CudaDevice&, void*) { return "not in this module"; }

}  // namespace basisconv

namespace {

CudaTuckerConv2d chain(const py::dict& from) {
  CudaTuckerConv2d c{};
  c.rest = call(from);
  c.channels = number(from, "channels");
  c.u_in = address<>(from, "u_in");
  std::tie(c.u_in_strides[0], c.u_in_strides[1]) = pair(from, "u_in_stride");
  return c;
}

py::object words_or_none(const char* wrong) { return wrong ? py::object(py::str(wrong)) : py::object(py::none()); }

}  // namespace

PYBIND11_MODULE(MODULE_NAME, m) {
  m.def("set_order", [](int order) { cuda_on_cpu::order = static_cast<cuda_on_cpu::Order>(order); });
  m.def("packed_bytes", [](const py::dict& from) { return cuda_packed_bytes(weights(from)); });
  m.def("pack", [](const py::dict& from) { return words_or_none(cuda_pack(pack_of(from), nullptr)); });
  m.def("reason", [](const py::dict& from) { return words_or_none(cuda_tucker_reason(chain(from), device(from))); });
  m.def("plan", [](const py::dict& from) {
    const CudaTuckerConv2d c = chain(from);
    const cuda::TuckerPlan plan = cuda::tucker_plan(cuda::problem_of(c.rest), cuda::reduction_of(c), device(from));
    py::dict facts;
    facts["bytes"] = plan.bytes;
    facts["ranks"] = plan.ranks;
    facts["tall"] = plan.tall;
    facts["ahead"] = plan.ahead;
    facts["groups"] = plan.groups;
    facts["core_jobs"] = plan.core_jobs;
    facts["core_stages"] = plan.core_stages;
    return facts;
  });
  // What went wrong, or None, and (8x8 matrices read, bank conflicts).
  m.def("run", [](const py::dict& from) {
    cuda_on_cpu::counters = {};
    const char* wrong = cuda_tucker_conv2d(chain(from), device(from), nullptr);
    return std::make_tuple(words_or_none(wrong), cuda_on_cpu::counters.matrices, cuda_on_cpu::counters.conflicts);
  });
#ifdef PLANTED
  m.def("plant", [](int fault) { planted = fault; });
#endif
}
