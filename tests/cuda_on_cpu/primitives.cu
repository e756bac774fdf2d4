// Small kernels for the tests of the execution itself: each primitive against its definition, and one way to break each
// rule that the execution watches over. `fault` is 0 where nothing is broken.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/cuda/hopper.h"

using namespace basisconv;
using namespace basisconv::cuda;

namespace {

// Writes a word a lane and primitive.
__global__ void primitives_kernel(const uint32_t* input, uint32_t* output) {
  const int lane = threadIdx.x;
  uint32_t* tile = reinterpret_cast<uint32_t*>(shared_memory());  // 32 rows of 16 bytes
  for (int i = 0; i < 4; ++i) tile[lane * 4 + i] = input[lane * 4 + i];
  __syncthreads();
  output[lane] = __shfl_xor_sync(~0u, input[lane], 5);
  output[32 + lane] = __shfl_sync(~0u, input[lane], 3);
  output[64 + lane] = __ballot_sync(~0u, input[lane] & 1);
  uint32_t a[4];
  ldmatrix_x4(a, tile + lane * 4);
  for (int i = 0; i < 4; ++i) output[96 + i * 32 + lane] = a[i];
  int count[4] = {1, 2, 3, 4};
  mma_m16n8k256_and_popc(count, a, a[0], a[2]);
  for (int i = 0; i < 4; ++i) output[224 + i * 32 + lane] = static_cast<uint32_t>(count[i]);
}

// output[16, 8] (float) = a[16, 16] . b[8, 16]^T, both by ldmatrix; in TF32 where the elements are floats.
template <class T>
__global__ void product_kernel(const T* a, const T* b, float* output) {
  T* tile = reinterpret_cast<T*>(shared_memory());  // four 8x8 matrices of a, then two of b and two of nothing
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 512; i += 32) {
    const int matrix = i / 64, row = i / 8 % 8, column = i % 8;
    const int r = row + matrix % 2 * 8, c = column + matrix / 2 % 2 * 8;
    tile[i] = matrix < 4 ? a[r * 16 + c] : matrix % 2 == 0 ? b[row * 16 + c] : T{0};
  }
  __syncwarp();
  uint32_t left[4], right[4];
  ldmatrix_x4(left, tile + lane * 8);
  ldmatrix_x4(right, tile + 256 + lane * 8);
  float c[4] = {};
  mma_m16n8k16<T>(c, left, right[0], right[2]);
  for (int i = 0; i < 4; ++i) output[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = c[i];
}
__global__ void tf32_kernel(const float* a, const float* b, float* output) {  // a[16, 8], b[8, 8]
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const float left[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
  float c[4] = {};
  mma_m16n8k8_tf32(c, left, b[g * 8 + t], b[g * 8 + t + 4]);
  for (int i = 0; i < 4; ++i) output[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = c[i];
}

enum Fault {
  right,
  no_barrier,
  no_wait,
  not_committed,
  wrong_lane,
  one_lane_stays_away,
  another_operation,
  barrier_not_by_all,
  misaligned,
  outside,
  unwritten,
  stale,
};

// 64 threads reverse 64 words: each copies its own 16 bytes and reads another's.
__global__ void reverse_kernel(const uint32_t* input, uint32_t* output, int fault) {
  const int i = threadIdx.x, lane = i % 32;
  char* mine = shared_memory() + i * 16;
  if (fault == stale) *reinterpret_cast<uint32_t*>(mine) = input[63 - i];
  if (fault == stale) warp_reuses(shared_memory() + i / 32 * 512, 512);
  cp_async16(fault == misaligned ? mine + 4 : fault == outside ? mine + 1024 : mine, input + i * 4, 16);
  if (fault == stale) return void(output[i] = *reinterpret_cast<uint32_t*>(mine));
  if (fault != not_committed) cp_async_commit();
  if (fault != no_wait) cp_async_wait<0>();
  if (fault == barrier_not_by_all && i == 5) return;
  if (fault != no_barrier) __syncthreads();
  uint32_t word = *reinterpret_cast<const uint32_t*>(shared_memory() + (63 - i) * 16);
  if (fault == one_lane_stays_away && lane == 7) return;
  if (fault == another_operation && lane == 7) {
    __syncwarp();
  } else {
    word = __shfl_sync(~0u, word, fault == wrong_lane ? lane ^ 1 : lane);
  }
  if (fault == unwritten && i == 63) return;
  output[i] = word;
}

enum HopperFault {
  hopper_right,
  no_fence_of_wgmma,
  read_before_wait,
  a_changed,
  no_wait_for_bytes,
  wrong_bytes,
  no_barrier_after_init,
  arrived_twice,
  no_proxy_fence,
  wrong_swizzle,
  wrong_phase,
  not_initialised,
};

// d[64, 32] = a[64, 64] . b[32, 64]^T by a warpgroup. a comes by tensor map and ldmatrix, b by ordinary stores if
// `stored`, else by a bulk copy of its swizzled image.
__global__ void wgmma_kernel(const __grid_constant__ TensorMap map, const bf16* b, float* d, bool stored, int fault) {
  char* a_tile = shared_memory();
  char* b_tile = a_tile + 8192;
  uint64_t* bars = reinterpret_cast<uint64_t*>(b_tile + 4096);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  if (thread == 0 && fault != not_initialised) {
    bar_init(bars, 1);
    bar_init_fence();
  }
  if (fault != no_barrier_after_init) __syncthreads();
  if (thread == 0) {
    bar_arrive_expect(bars, 8192 + (stored ? 0 : 4096) + (fault == wrong_bytes ? 16 : 0));
    if (fault == arrived_twice) bar_arrive(bars);
    tensor_load(a_tile, map, 0, 0, 0, 0, bars);
    if (!stored) bulk_load(b_tile, b, 4096, bars);
  }
  if (stored) {
    for (int i = thread; i < 32 * 64; i += 128) {
      const uint32_t offset = static_cast<uint32_t>(i * 2);
      *reinterpret_cast<bf16*>(b_tile + (fault == wrong_swizzle ? offset : swizzled(offset, 128))) = b[i];
    }
    if (fault != no_proxy_fence) fence_proxy_async();
    __syncthreads();
  }
  if (fault != no_wait_for_bytes) bar_wait(bars, fault == wrong_phase ? 1 : 0);
  float sum[16] = {};
  uint32_t a[4][4];
  if (fault != no_fence_of_wgmma) wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    const uint32_t row = warp * 16 + lane % 16;
    ldmatrix_x4(a[k], a_tile + swizzled(row * 128 + lane / 16 * 16 + k * 32, 128));
    wgmma_rs<bf16, 32, 128>(sum, a[k], b_tile, k);
  }
  wgmma_commit();
  if (fault == a_changed) a[2][1] ^= 1;
  if (fault != read_before_wait) wgmma_wait<0>();
  for (int i = 0; i < 16; ++i) {
    d[(warp * 16 + lane / 4 + i / 2 % 2 * 8) * 32 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sum[i];
  }
}

// Each block of a cluster writes a word a thread into the memory of the next one, and tells it.
enum { cluster_right, no_cluster_sync, no_wait_for_the_other, no_such_block, ends_early };
__global__ void cluster_kernel(const uint32_t* input, uint32_t* output, int blocks, int fault) {
  uint32_t* memory = reinterpret_cast<uint32_t*>(shared_memory());
  uint64_t* bar = reinterpret_cast<uint64_t*>(memory + 32);
  if (threadIdx.x == 0) {
    bar_init(bar, 1);
    bar_init_fence();
  }
  if (fault != no_cluster_sync) cluster_sync();
  if (fault == ends_early && blockIdx.x == 0) return;
  const int rank = static_cast<int>(blockIdx.x) % blocks, at = static_cast<int>(blockIdx.x * 32 + threadIdx.x);
  const int next = fault == no_such_block ? blocks : (rank + 1) % blocks;
  *beside(memory + threadIdx.x, next) = input[at];
  __syncwarp();
  if (threadIdx.x == 0) bar_arrive_beside(bar, next);
  if (fault != no_wait_for_the_other) bar_wait_cluster(bar, 0);
  output[at] = memory[threadIdx.x];
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_primitives(pybind11::module_& m) {
  const dim3 one{1, 1, 1}, warp{32, 1, 1};
  m.def("primitives", [=](uintptr_t input, uintptr_t output) {
    return launch(primitives_kernel, one, warp, 512, nullptr, at<const uint32_t>(input), at<uint32_t>(output));
  });
  m.def("product", [=](const std::string& dtype, uintptr_t a, uintptr_t b, uintptr_t c) {
    if (dtype == "tf32") {
      return launch(tf32_kernel, one, warp, 0, nullptr, at<const float>(a), at<const float>(b), at<float>(c));
    }
    if (dtype == "bfloat16") {
      return launch(product_kernel<bf16>, one, warp, 1024, nullptr, at<const bf16>(a), at<const bf16>(b), at<float>(c));
    }
    return launch(product_kernel<f16>, one, warp, 1024, nullptr, at<const f16>(a), at<const f16>(b), at<float>(c));
  });
  m.def("reverse", [=](uintptr_t input, uintptr_t output, int fault) {
    return launch(reverse_kernel, one, dim3{64, 1, 1}, 1024, nullptr, at<const uint32_t>(input), at<uint32_t>(output),
                  fault);
  });
  m.def("cluster", [=](uintptr_t input, uintptr_t output, unsigned grid, int blocks, int fault) {
    return launch_clusters(cluster_kernel, dim3{grid, 1, 1}, blocks, warp, 256, nullptr, at<const uint32_t>(input),
                           at<uint32_t>(output), blocks, fault);
  });
  m.def("wgmma", [=](uintptr_t a, uintptr_t b, uintptr_t d, bool stored, int fault) {
    TensorMap map;
    const char* wrong = encode(image_map(at<const void>(a), true, 1, 1, 64, 64, 4096, 4096, 64, 1, 64), map);
    if (wrong != nullptr) return wrong;
    return launch(wgmma_kernel, one, dim3{128, 1, 1}, 8192 + 4096 + 64, nullptr, map, at<const bf16>(b), at<float>(d),
                  stored, fault);
  });
}

}  // namespace
