// The CUDA kernels of basis_conv2d, run on the CPU, as a Python module of the tests. Tensors come as addresses. It is
// compiled as one with what it binds: the kernels, and primitives.cu or planted faults.
#include "../../csrc/cuda/basis_conv2d_sm90a.h"
#include "basis_requests.h"

namespace py = pybind11;
using namespace basisconv;
using namespace requests;

namespace {

// The plan of a call: the chosen one, or of the `form` asked for (filters shared out, blocks of a tile, blocks of a
// multiprocessor, images of a tile).
cuda::HopperPlan plan_of(const py::dict& from) {
  const cuda::Problem p = cuda::problem_of(call(from));
  const CudaDevice on = device(from);
  if (!from.contains("form")) return cuda::hopper_plan(p, on);
  const auto form = from["form"].cast<std::vector<int>>();
  return cuda::hopper_plan_of(p, on.shared_bytes, {form.at(0) != 0, form.at(1), form.at(2), form.at(3)});
}

}  // namespace

PYBIND11_MODULE(MODULE_NAME, m) {
  m.def("set_order", [](int order) { cuda_on_cpu::order = static_cast<cuda_on_cpu::Order>(order); });
  m.def("packed_bytes", [](const py::dict& from) { return cuda_packed_bytes(weights(from)); });
  m.def("pack", [](const py::dict& from) { return cuda_pack(pack_of(from), nullptr); });
  m.def("variant", [](const py::dict& from) {
    const char* reason = nullptr;
    const CudaVariant chosen = cuda_variant(call(from), device(from), &reason);
    const char* names[] = {"none", "sm80", "sm90a"};
    return std::make_pair(std::string(names[static_cast<int>(chosen)]), std::string(reason ? reason : ""));
  });
  m.def("hopper_plan", [](const py::dict& from) {
    const cuda::HopperPlan plan = plan_of(from);
    py::dict facts;
    facts["bytes"] = plan.bytes;
    facts["shared_out"] = plan.shared_out;
    facts["blocks"] = plan.blocks;
    facts["lent"] = plan.lent;
    facts["per_sm"] = plan.per_sm;
    facts["images"] = plan.images;
    if (plan.bytes != 0) {
      const cuda::Problem p = cuda::problem_of(call(from));
      const int64_t grid = cuda::hopper_grid(p, plan, device(from));
      facts["grid"] = grid;
      facts["ahead"] = cuda::hopper_ahead(p, plan, grid);
    }
    facts["basis_stages"] = plan.basis_stages;
    facts["halo_stages"] = plan.halo_stages;
    facts["basis_resident"] = plan.basis_resident;
    facts["mixing_resident"] = plan.mixing_resident;
    return facts;
  });
  m.def("image_map", [](uintptr_t base, bool is_bf16, const std::vector<int64_t>& size,
                        const std::vector<int64_t>& strides, int rows, int columns) {
    const cuda::TensorMapRequest map =
        cuda::image_map(reinterpret_cast<const void*>(base), is_bf16, size.at(0), size.at(1), size.at(2), size.at(3),
                        strides.at(0), strides.at(1), strides.at(2), rows, columns);
    const char* reason = cuda::reason_against(map);
    return std::make_tuple(std::vector<uint64_t>(map.size, map.size + 4),
                           std::vector<uint64_t>(map.stride, map.stride + 3),
                           std::vector<uint32_t>(map.box, map.box + 4), std::string(reason ? reason : ""));
  });
  m.def("wgmma_descriptor", &cuda::wgmma_descriptor);
  m.def("wgmma_descriptor_of_columns", &cuda::wgmma_descriptor_of_columns);
  m.def("swizzled", &cuda::swizzled);
  // Runs one variant, or the chosen one for ""; what went wrong, or None, and (8x8 matrices read, bank conflicts).
  m.def("run", [](const std::string& variant, const py::dict& from) {
    cuda_on_cpu::counters = {};
    const auto run = variant == "sm80" ? cuda_basis_conv2d_sm80 : cuda_basis_conv2d;
    const char* wrong = variant == "sm90a"
                            ? cuda_basis_conv2d_sm90a_by(call(from), plan_of(from), device(from), nullptr)
                            : run(call(from), device(from), nullptr);
    return std::make_tuple(wrong ? py::object(py::str(wrong)) : py::object(py::none()), cuda_on_cpu::counters.matrices,
                           cuda_on_cpu::counters.conflicts);
  });
#ifdef PLANTED
  m.def("plant", [](int fault) { planted = fault; });
#else
  bind_primitives(m);
#endif
}
