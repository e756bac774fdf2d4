// Rates of one GPU, each of one thing, for make gpu-probe: `probe NAME` prints one JSON object. Free of torch; it uses
// the wrappers of csrc/cuda as the kernels do. probe_wgmma.h is written by probe_source.py: wgmma for every N.
#include <cooperative_groups.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/cuda/hopper.h"
#include "probe_wgmma.h"

namespace cg = cooperative_groups;
using namespace basisconv;
using namespace basisconv::cuda;

namespace {

void must(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}
void must(const char* wrong) {
  if (wrong == nullptr) return;
  std::fprintf(stderr, "%s\n", wrong);
  std::exit(1);
}

int attribute(cudaDeviceAttr which) {
  int value = 0;
  must(cudaDeviceGetAttribute(&value, which, 0));
  return value;
}

// Microseconds of `run`, the least of a few after a warm-up.
template <class F>
float microseconds(F run) {
  cudaEvent_t from, to;
  must(cudaEventCreate(&from));
  must(cudaEventCreate(&to));
  float least = 1e30f;
  for (int i = 0; i < 6; ++i) {
    must(cudaEventRecord(from));
    run();
    must(cudaEventRecord(to));
    must(cudaEventSynchronize(to));
    float ms = 0;
    must(cudaEventElapsedTime(&ms, from, to));
    if (i > 0 && ms < least) least = ms;
  }
  must(cudaGetLastError());
  return least * 1e3f;
}

template <class T>
T* allocated(int64_t count) {
  void* memory = nullptr;
  must(cudaMalloc(&memory, count * sizeof(T)));
  must(cudaMemset(memory, 0x3B, count * sizeof(T)));  // some number in every format, never zeros
  return static_cast<T*>(memory);
}

// --- matrix instructions ---------------------------------------------------------------------------------------------

constexpr int kIssues = 2048;

// A warpgroup issues wgmma after wgmma on one tile of shared memory; A from registers, from shared memory, or from
// registers that ldmatrix fills before each.
template <class W, int way>  // 0 RS, 1 SS, 2 RS fed by ldmatrix
__global__ void __launch_bounds__(128) wgmma_rate(int* sink) {
  char* memory = shared_memory();
  for (int i = threadIdx.x * 4; i < 64 * 1024; i += 512) *reinterpret_cast<int*>(memory + i) = 0x3C013C01;
  fence_proxy_async();
  __syncthreads();
  typename W::Sum d[W::N / 2] = {};
  uint32_t a[2][4] = {{1, 2, 3, 4}, {5, 6, 7, 8}};
  const uint64_t tile = wgmma_descriptor(shared_address(memory), 128);
  const uint64_t left = wgmma_descriptor(shared_address(memory) + 32 * 1024, 128);
#pragma unroll 1
  for (int i = 0; i < kIssues; i += 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (way == 2) ldmatrix_x4(a[half], memory + 32 * 1024 + threadIdx.x * 16 + (i & 6) * 2048);
      wgmma_fence();
      if constexpr (way == 1) {
        W::ss(d, left, tile);
      } else {
        W::rs(d, a[half], tile);
      }
      wgmma_commit();
      wgmma_wait<1>();
    }
  }
  wgmma_wait<0>();
  int any = 0;
  for (auto value : d) any |= static_cast<int>(value);
  if (any == 0x7FFFFFFF) *sink = any;
}

template <class W, int way>
void print_wgmma(bool& first) {
  int* sink = allocated<int>(1);
  const int cores = attribute(cudaDevAttrMultiProcessorCount);
  const auto time = [&](int blocks) {
    return microseconds([&] { must(launch(wgmma_rate<W, way>, dim3(blocks), dim3(128), 66 * 1024, nullptr, sink)); });
  };
  const double one = time(1), grid = time(3 * cores);
  const double work = 2.0 * 64 * W::N * W::depth * kIssues;
  std::printf("%s\"%s n%d %s\": {\"ns_each_alone\": %.2f, \"tera_ops_grid\": %.2f}", first ? "" : ", ", W::name, W::N,
              way == 0   ? "rs"
              : way == 1 ? "ss"
                         : "rs_ldmatrix",
              one * 1e3 / kIssues, work * 3 * cores / grid * 1e-6);
  first = false;
  must(cudaFree(sink));
}

__global__ void __launch_bounds__(128) bmma_rate(int* sink) {
  int c[8][4] = {};
  const uint32_t a[4] = {threadIdx.x, 0x55u, 0xAAAAu, ~0u};
#pragma unroll 1
  for (int i = 0; i < kIssues / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) mma_m16n8k256_and_popc(c[j], a, threadIdx.x + i, ~0u);
  }
  int any = 0;
  for (auto& row : c) any |= row[0] | row[1] | row[2] | row[3];
  if (any == 0x7FFFFFFF) *sink = any;
}
__global__ void __launch_bounds__(256) popc_rate(int* sink, uint32_t mask) {
  int sum[8] = {};
  uint32_t word = threadIdx.x * 2654435761u;
#pragma unroll 1
  for (int i = 0; i < kIssues / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j] += __popc((word + j * 77) & mask);
    word = word * 3 + 1;
  }
  int any = 0;
  for (int value : sum) any ^= value;
  if (any == 0x7FFFFFFF) *sink = any;
}
void bits() {
  int* sink = allocated<int>(1);
  const int cores = attribute(cudaDevAttrMultiProcessorCount), blocks = 8 * cores;
  const double bmma = microseconds([&] { must(launch(bmma_rate, dim3(blocks), dim3(128), 0, nullptr, sink)); });
  const double popc =
      microseconds([&] { must(launch(popc_rate, dim3(blocks), dim3(256), 0, nullptr, sink, 0xFFFFu)); });
  std::printf("{\"bmma_tera_ops\": %.2f, \"popc_tera_bits\": %.3f}\n",
              2.0 * 16 * 8 * 256 * kIssues * 4 * blocks / bmma * 1e-6,
              2.0 * 32 * kIssues * 256.0 * blocks / popc * 1e-6);
}

// --- launches --------------------------------------------------------------------------------------------------------

__global__ void nothing() {}

void graph_nodes() {
  constexpr int nodes = 200;
  cudaStream_t stream;
  must(cudaStreamCreate(&stream));
  cudaGraph_t graph;
  must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < nodes; ++i) must(launch(nothing, dim3(1), dim3(32), 0, stream));
  must(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t ready;
  must(cudaGraphInstantiate(&ready, graph, 0));
  const double graphed = microseconds([&] { must(cudaGraphLaunch(ready, nullptr)); });
  const double eager = microseconds([&] {
    for (int i = 0; i < nodes; ++i) must(launch(nothing, dim3(1), dim3(32), 0, static_cast<Stream>(nullptr)));
  });
  std::printf("{\"us_a_graph_node\": %.3f, \"us_a_launch\": %.3f}\n", graphed / nodes, eager / nodes);
}

// --- second-level cache ----------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(512) read_again(const uint4* from, int64_t count, int times, int* sink) {
  uint32_t any = 0;
  for (int t = 0; t < times; ++t) {
    for (int64_t i = blockIdx.x * 512ll + threadIdx.x; i < count; i += gridDim.x * 512ll * 4) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t at = i + j * gridDim.x * 512ll;
        if (at < count) {
          const uint4 v = __ldcg(from + at);
          any |= v.x ^ v.y ^ v.z ^ v.w;
        }
      }
    }
  }
  if (any == 0x12345678u) *sink = 1;
}
void cache() {
  int* sink = allocated<int>(1);
  const int cores = attribute(cudaDevAttrMultiProcessorCount), times = 20;
  std::printf("{\"l2_bytes\": %d", attribute(cudaDevAttrL2CacheSize));
  for (const int mb : {10, 20, 30, 40, 50, 60, 100, 200}) {
    const int64_t count = mb * 1000000ll / 16;
    uint4* memory = allocated<uint4>(count);
    const double us = microseconds(
        [&] { must(launch(read_again, dim3(4 * cores), dim3(512), 0, nullptr, memory, count, times, sink)); });
    std::printf(", \"tb_per_s_%d_mb\": %.3f", mb, count * 16.0 * times / us * 1e-6);
    must(cudaFree(memory));
  }
  std::printf("}\n");
}

// --- loads of tiles --------------------------------------------------------------------------------------------------

constexpr int kSide = 56, kImages = 32, kRows = 16, kColumns = 8, kStages = 4;

// Each block walks over tiles of 16 x 8 pixels x 64 channels of an image that the cache holds: the halo of 18 x 10
// pixels at once, nine shifted boxes of 16 x 8, or the halo by cp.async.
template <int way>
__global__ void __launch_bounds__(128) tiles(const __grid_constant__ TensorMap map, const bf16* image, int number) {
  char* memory = shared_memory();
  uint64_t* bars = reinterpret_cast<uint64_t*>(memory + kStages * 24 * 1024);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) bar_init(bars + i, 1);
    bar_init_fence();
  }
  __syncthreads();
  constexpr int loads = way == 1 ? 9 : 1;
  int issued = 0;
  for (int tile = blockIdx.x; tile < number; tile += gridDim.x) {
    const int n = tile % kImages, y = tile / kImages * 5 % (kSide - kRows), x = tile / kImages * 3 % (kSide - kColumns);
    if constexpr (way == 2) {
      char* to = memory + issued % kStages * 24 * 1024;
      for (int i = threadIdx.x; i < 18 * 10 * 8; i += 128) {
        const int pixel = i / 8, row = y + pixel / 10 - 1, column = x + pixel % 10 - 1;
        const bool inside = row >= 0 && row < kSide && column >= 0 && column < kSide;
        const bf16* from =
            image + ((static_cast<int64_t>(n) * kSide + (inside ? row : 0)) * kSide + (inside ? column : 0)) * 64 +
            i % 8 * 8;
        cp_async16(to + swizzled(i * 16, 128), from, inside ? 16 : 0);
      }
      cp_async_commit();
      cp_async_wait<kStages - 1>();
      ++issued;
    } else if (threadIdx.x == 0) {
      for (int load = 0; load < loads; ++load, ++issued) {
        uint64_t* bar = bars + issued % kStages;
        if (issued >= kStages) bar_wait(bar, (issued / kStages - 1) % 2);
        bar_arrive_expect(bar, way == 1 ? 16 * 8 * 128 : 18 * 10 * 128);
        const int r = way == 1 ? load / 3 : 0, s = way == 1 ? load % 3 : 0;
        tensor_load(memory + issued % kStages * 24 * 1024, map, 0, x - 1 + s, y - 1 + r, n, bar);
      }
    }
  }
  if constexpr (way == 2) {
    cp_async_wait<0>();
  } else if (threadIdx.x == 0) {
    for (int i = issued < kStages ? 0 : issued - kStages; i < issued; ++i)
      bar_wait(bars + i % kStages, i / kStages % 2);
  }
}
template <int way>
double tile_rate(const bf16* image) {
  TensorMap map;
  const int rows = way == 1 ? kRows : kRows + 2, columns = way == 1 ? kColumns : kColumns + 2;
  must(encode(image_map(image, true, kImages, kSide, kSide, 64, kSide * kSide * 64, kSide * 64, 64, rows, columns),
              map));
  const int cores = attribute(cudaDevAttrMultiProcessorCount), number = cores * 400;
  const double us = microseconds([&] {
    must(launch(tiles<way>, dim3(2 * cores), dim3(128), kStages * 24 * 1024 + 64, nullptr, map, image, number));
  });
  return number / us;
}
void boxes() {
  const bf16* image = allocated<bf16>(int64_t{kImages} * kSide * kSide * 64);
  const double halo = tile_rate<0>(image), nine = tile_rate<1>(image), copies = tile_rate<2>(image);
  const double bytes = 18 * 10 * 128, nine_bytes = 9 * 16 * 8 * 128;
  std::printf(
      "{\"tiles_per_us\": {\"halo_box\": %.2f, \"nine_boxes\": %.2f, \"cp_async_halo\": %.2f}, "
      "\"tb_per_s\": {\"halo_box\": %.3f, \"nine_boxes\": %.3f, \"cp_async_halo\": %.3f}}\n",
      halo, nine, copies, halo * bytes * 1e-6, nine * nine_bytes * 1e-6, copies * bytes * 1e-6);
}

// --- clusters --------------------------------------------------------------------------------------------------------

// Partial sums of 32 KB a block: each block adds up its part over all blocks of the cluster, through their shared
// memory.
__global__ void __launch_bounds__(256) reduce_scatter(int rounds, float* sink) {
  float* mine = reinterpret_cast<float*>(shared_memory());
  cg::cluster_group cluster = cg::this_cluster();
  const int ranks = cluster.num_blocks(), rank = cluster.block_rank(), count = 8192, part = count / ranks;
  for (int i = threadIdx.x; i < count; i += 256) mine[i] = 1.0f;
  float sum = 0;
  for (int round = 0; round < rounds; ++round) {
    cluster.sync();
    for (int i = threadIdx.x; i < part; i += 256) {
      for (int other = 0; other < ranks; ++other) {
        sum += cluster.map_shared_rank(mine, (rank + other) % ranks)[rank * part + i];
      }
    }
    cluster.sync();
  }
  if (sum == -1.0f) *sink = sum;
}
void clusters() {
  float* sink = allocated<float>(1);
  const int bytes = 32 * 1024, rounds = 64;
  must(cudaFuncSetAttribute(reduce_scatter, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  std::printf("{");
  for (const int size : {1, 2, 4, 8, 16}) {
    cudaLaunchAttribute of[1];
    of[0].id = cudaLaunchAttributeClusterDimension;
    of[0].val.clusterDim.x = size;
    of[0].val.clusterDim.y = of[0].val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.blockDim = dim3(256);
    config.dynamicSmemBytes = bytes;
    config.attrs = of;
    config.numAttrs = 1;
    config.gridDim = dim3(size);
    int most = 0;
    const cudaError_t able = cudaOccupancyMaxActiveClusters(&most, reduce_scatter, &config);
    std::printf("%s\"%d\": {\"most_active\": %d", size == 1 ? "" : ", ", size, able == cudaSuccess ? most : -1);
    if (able == cudaSuccess && most > 0) {
      const double one = microseconds([&] { must(cudaLaunchKernelEx(&config, reduce_scatter, rounds, sink)); });
      const double none = microseconds([&] { must(cudaLaunchKernelEx(&config, reduce_scatter, 0, sink)); });
      config.gridDim = dim3(size * most);
      const double all = microseconds([&] { must(cudaLaunchKernelEx(&config, reduce_scatter, rounds, sink)); });
      std::printf(", \"us_launch\": %.2f, \"us_a_round\": %.3f, \"us_a_round_full\": %.3f", none, (one - none) / rounds,
                  (all - none) / rounds);
    } else {
      static_cast<void>(cudaGetLastError());
    }
    std::printf("}");
  }
  std::printf("}\n");
}

}  // namespace

int main(int count, char** words) {
  const std::string name = count > 1 ? words[1] : "";
  if (name == "bits") return bits(), 0;
  if (name == "graph_nodes") return graph_nodes(), 0;
  if (name == "cache") return cache(), 0;
  if (name == "boxes") return boxes(), 0;
  if (name == "clusters") return clusters(), 0;
  if (name.rfind("wgmma_", 0) == 0) return print_all_wgmma(name.substr(6)) ? 0 : 2;
  std::fprintf(stderr, "probe: bits, graph_nodes, cache, boxes, clusters, wgmma_b1 or wgmma_bf16, got '%s'\n",
               name.c_str());
  return 2;
}
