// The one function of torch that only its CUDA builds have. It is looked up in the library that torch has loaded: this
// library is linked against those of every build alone, and torch loads its own without putting their names in common.
#include "cuda_stream.h"

#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

namespace basisconv {
namespace {

constexpr const char* kLibrary = "libtorch_cuda.so";
constexpr const char* kName = "aoti_torch_get_current_cuda_stream";

using CurrentStream = int32_t (*)(int32_t device_index, void** stream);

CurrentStream look_up() {
  void* torch_cuda = dlopen(kLibrary, RTLD_LAZY | RTLD_NOLOAD);  // never loads one: only what torch has
  void* found = dlsym(torch_cuda != nullptr ? torch_cuda : RTLD_DEFAULT, kName);
  return reinterpret_cast<CurrentStream>(found);
}

}  // namespace

void* current_cuda_stream(int32_t device) {
  static const CurrentStream current = look_up();
  STD_TORCH_CHECK(current != nullptr, "no ", kName, " in ", kLibrary, "; is this torch built with CUDA?");
  void* stream = nullptr;
  STD_TORCH_CHECK(current(device, &stream) == 0, "torch has no current CUDA stream");
  return stream;
}

}  // namespace basisconv
