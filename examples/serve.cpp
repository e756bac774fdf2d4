// Runs a network that AOTInductor compiled ahead of time, without Python: docs/serving.md builds and calls it.
//
//   serve NETWORK.pt2 LIBRARY.so INPUT OUTPUT [REPEAT]
//
// NETWORK.pt2 is what torch._inductor.aoti_compile_and_package wrote, LIBRARY.so the native library of the package,
// whose ops the network calls. INPUT and OUTPUT are one float32 tensor each: the number of sizes and the sizes as
// little-endian int64, then the values, row-major.

#include <dlfcn.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

namespace {

at::Tensor read_tensor(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  int64_t rank = 0;
  stream.read(reinterpret_cast<char*>(&rank), sizeof(rank));
  if (!stream || rank < 0 || rank > 16) {
    throw std::runtime_error(path + ": no tensor file");
  }
  std::vector<int64_t> sizes(static_cast<size_t>(rank));
  stream.read(reinterpret_cast<char*>(sizes.data()), rank * static_cast<int64_t>(sizeof(int64_t)));
  at::Tensor tensor = at::empty(sizes, at::kFloat);
  stream.read(static_cast<char*>(tensor.data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
  if (!stream) {
    throw std::runtime_error(path + ": shorter than its sizes say");
  }
  return tensor;
}

void write_tensor(const std::string& path, const at::Tensor& given) {
  const at::Tensor tensor = given.to(at::kCPU, at::kFloat).contiguous();
  std::ofstream stream(path, std::ios::binary);
  const int64_t rank = tensor.dim();
  stream.write(reinterpret_cast<const char*>(&rank), sizeof(rank));
  stream.write(reinterpret_cast<const char*>(tensor.sizes().data()), rank * static_cast<int64_t>(sizeof(int64_t)));
  stream.write(static_cast<const char*>(tensor.data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
  if (!stream) {
    throw std::runtime_error(path + ": cannot be written");
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 5) {
    std::fprintf(stderr, "usage: serve NETWORK.pt2 LIBRARY.so INPUT OUTPUT [REPEAT]\n");
    return 2;
  }
  // The library registers its ops as it is loaded. It is a Python module too: RTLD_LAZY, because the functions of
  // Python that its other entry point calls are never needed here.
  if (dlopen(arguments[2], RTLD_LAZY | RTLD_GLOBAL) == nullptr) {
    std::fprintf(stderr, "serve: %s\n", dlerror());
    return 1;
  }
  try {
    torch::inductor::AOTIModelPackageLoader network(arguments[1]);
    const at::Tensor input = read_tensor(arguments[3]);
    std::vector<at::Tensor> outputs = network.run({input});
    const int repeat = count > 5 ? std::atoi(arguments[5]) : 0;
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < repeat; ++i) {
      outputs = network.run({input});
    }
    if (repeat > 0) {
      const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;
      std::printf("%.4f ms a call\n", taken.count() / repeat);
    }
    write_tensor(arguments[4], outputs.at(0));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "serve: %s\n", error.what());
    return 1;
  }
  return 0;
}
