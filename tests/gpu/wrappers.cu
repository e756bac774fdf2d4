// Each wrapper of csrc/cuda/device.h and hopper.h alone, in the smallest kernel that shows its result. nvcc compiles
// this for the device; any other compiler, with tests/cuda_on_cpu, for the tests of the tests. C functions: null, or an
// error.
#include <cstdlib>
#include <cstring>

#include "../../csrc/cuda/hopper.h"

using namespace basisconv;
using namespace basisconv::cuda;

#ifdef __CUDACC__
template <class F>
const char* guarded(F run) {
  return run();
}
#else
template <class F>
const char* guarded(F run) {
  try {
    return run();
  } catch (const std::exception& report) {
    return strdup(report.what());
  }
}
#endif

namespace {

const dim3 one{1, 1, 1}, warp{32, 1, 1}, warpgroup{128, 1, 1};

// --- of every device -------------------------------------------------------------------------------------------------

__global__ void lanes_kernel(const uint32_t* input, uint32_t* output) {
  const int lane = threadIdx.x;
  output[lane] = __shfl_xor_sync(~0u, input[lane], 5);
  output[32 + lane] = __shfl_sync(~0u, input[lane], 3);
  output[64 + lane] = __ballot_sync(~0u, input[lane] & 1);
  output[96 + lane] = static_cast<uint32_t>(__popc(input[lane]));
  output[128 + lane] = __byte_perm(input[lane], input[lane ^ 1], 0x6240 ^ (lane % 8 * 0x1111));
}

// 16 bytes a lane, of which lane l copies l % 17; the rest must be zero.
__global__ void cp_async_kernel(const char* input, uint32_t* output) {
  char* mine = shared_memory() + threadIdx.x * 16;
  for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(mine)[i] = ~0u;
  cp_async16(mine, input + threadIdx.x * 16, threadIdx.x % 17);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) output[threadIdx.x * 4 + i] = reinterpret_cast<uint32_t*>(mine)[i];
}

template <class T>
__global__ void numbers_kernel(const float* input, uint32_t* words, float* wide) {
  const int i = threadIdx.x;
  words[i] = round2<T>(input[2 * i], input[2 * i + 1]);
  wide[2 * i] = widen(T{static_cast<uint16_t>(words[i] & 0xFFFF)});
  wide[2 * i + 1] = widen(T{static_cast<uint16_t>(words[i] >> 16)});
}

// Pairs of 16-bit numbers, word by word.
template <class T>
__global__ void extremes_kernel(const uint32_t* a, const uint32_t* b, uint32_t* larger, uint32_t* smaller) {
  const int i = threadIdx.x;
  larger[i] = max2<T>(a[i], b[i]);
  smaller[i] = min2<T>(a[i], b[i]);
}

template <bool transposed>
__global__ void ldmatrix_kernel(const uint32_t* input, uint32_t* output) {
  uint32_t* tile = reinterpret_cast<uint32_t*>(shared_memory());
  for (int i = 0; i < 4; ++i) tile[threadIdx.x * 4 + i] = input[threadIdx.x * 4 + i];
  __syncthreads();
  uint32_t r[4];
  if constexpr (transposed) {
    ldmatrix_x4_trans(r, tile + threadIdx.x * 4);
  } else {
    ldmatrix_x4(r, tile + threadIdx.x * 4);
  }
  for (int i = 0; i < 4; ++i) output[i * 32 + threadIdx.x] = r[i];
}

// Two neighbouring 16-bit elements of a matrix with rows of `pitch`, as a register holds them.
template <class T>
BASISCONV_DEVICE uint32_t both(const T* from, int row, int column, int pitch) {
  uint32_t word = 0;
  for (int i = 0; i < 2; ++i) word |= static_cast<uint32_t>(from[row * pitch + column + i].bits) << 16 * i;
  return word;
}

// c[16, 8] += a[16, 16] . b[8, 16]^T
template <class T>
__global__ void mma_kernel(const T* a, const T* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint32_t left[4] = {both(a, g, 2 * t, 16), both(a, g + 8, 2 * t, 16), both(a, g, 2 * t + 8, 16),
                            both(a, g + 8, 2 * t + 8, 16)};
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(g + i / 2 * 8) * 8 + t * 2 + i % 2];
  mma_m16n8k16<T>(sum, left, both(b, g, 2 * t, 16), both(b, g, 2 * t + 8, 16));
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = sum[i];
}
// a[16, 8], b[8, 8] in TF32
__global__ void tf32_kernel(const float* a, const float* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const float left[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(g + i / 2 * 8) * 8 + t * 2 + i % 2];
  mma_m16n8k8_tf32(sum, left, b[g * 8 + t], b[g * 8 + t + 4]);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = sum[i];
}
// a[16, 8 words], b[8, 8 words] of single bits
__global__ void bits_kernel(const uint32_t* a, const uint32_t* b, int* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint32_t left[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
  int sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(g + i / 2 * 8) * 8 + t * 2 + i % 2];
  mma_m16n8k256_and_popc(sum, left, b[g * 8 + t], b[g * 8 + t + 4]);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = sum[i];
}

// --- of Hopper -------------------------------------------------------------------------------------------------------

// Twice each block of a cluster writes a word a thread into the memory of the next one and tells it; in between that
// one says that it has read.
__global__ void __launch_bounds__(384, 1) cluster_kernel(const uint32_t* input, uint32_t* output, int blocks) {
  uint32_t* memory = reinterpret_cast<uint32_t*>(shared_memory());
  uint64_t *written = reinterpret_cast<uint64_t*>(memory + 128), *read = written + 1;
  if (threadIdx.x == 0) {
    bar_init(written, 4);
    bar_init(read, 4);
    bar_init_fence();
  }
  cluster_sync();
  previous_kernel_done();
  if (threadIdx.x >= 256) return keep_registers<40>();
  take_registers<232>();
  if (threadIdx.x >= 128) return;
  const int rank = static_cast<int>(blockIdx.x) % blocks, next = (rank + 1) % blocks;
  for (int round = 0; round < 2; ++round) {
    const int at = (round * blocks + rank) * 128 + threadIdx.x;
    if (round == 1) bar_wait_cluster(read, 0);
    *beside(memory + threadIdx.x, next) = input[at];
    __syncwarp();
    if (threadIdx.x % 32 == 0) bar_arrive_beside(written, next);
    bar_wait_cluster(written, round);
    output[at] = memory[threadIdx.x];
    __syncwarp();
    if (threadIdx.x % 32 == 0) bar_arrive_beside(read, (rank + blocks - 1) % blocks);
  }
  bar_wait_cluster(read, 1);  // nobody may reach for a block that has ended
}

// Three phases of one barrier: 2 KB each time, one thread announces and issues, all 128 wait. All of it was prefetched.
__global__ void bulk_kernel(const char* input, uint32_t* output) {
  char* to = shared_memory();
  uint64_t* bar = reinterpret_cast<uint64_t*>(to + 2048);
  if (threadIdx.x == 0) {
    bar_init(bar, 1);
    bar_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) prefetch(input, 3 * 2048);
  for (int phase = 0; phase < 3; ++phase) {
    if (threadIdx.x == 0) {
      bar_arrive_expect(bar, 2048);
      bulk_load(to, input + phase * 2048, 1024, bar);
      bulk_load(to + 1024, input + phase * 2048 + 1024, 1024, bar);
    }
    bar_wait(bar, phase % 2);
    for (int i = threadIdx.x; i < 512; i += 128) output[phase * 512 + i] = reinterpret_cast<uint32_t*>(to)[i];
    __syncthreads();
  }
}

// The bytes that a box of a tensor map becomes in shared memory.
__global__ void box_kernel(const __grid_constant__ TensorMap map, uint32_t* output, int bytes, int c, int x, int y,
                           int n) {
  char* to = shared_memory();
  uint64_t* bar = reinterpret_cast<uint64_t*>(to + bytes);
  if (threadIdx.x == 0) {
    bar_init(bar, 1);
    bar_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    bar_arrive_expect(bar, bytes);
    tensor_load(to, map, c, x, y, n, bar);
  }
  bar_wait(bar, 0);
  for (int i = threadIdx.x; i < bytes / 4; i += 128) output[i] = reinterpret_cast<uint32_t*>(to)[i];
}

// d[64, N] = d + a[64, depth] . b[N, depth]^T with rows of b of `row_bytes`, so depth = row_bytes / 2. b comes as the
// swizzled image by a bulk copy, or plainly by ordinary stores and a fence.
template <class T, int N, int row_bytes>
__global__ void wgmma_kernel(const T* a, const T* b, float* d, bool stored) {
  constexpr int depth = row_bytes / 2, bytes = N * row_bytes;
  char* tile = shared_memory();
  uint64_t* bar = reinterpret_cast<uint64_t*>(tile + bytes);
  const int thread = threadIdx.x, lane = thread % 32, row = thread / 32 * 16 + lane / 4, t = lane % 4;
  if (thread == 0) {
    bar_init(bar, 1);
    bar_init_fence();
  }
  __syncthreads();
  if (stored) {
    for (int i = thread; i < N * depth; i += 128) *reinterpret_cast<T*>(tile + swizzled(i * 2, row_bytes)) = b[i];
    fence_proxy_async();
    __syncthreads();
  } else {
    if (thread == 0) {
      bar_arrive_expect(bar, bytes);
      bulk_load(tile, b, bytes, bar);
    }
    bar_wait(bar, 0);
  }
  float sum[N / 2];
  for (int i = 0; i < N / 2; ++i) sum[i] = d[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + t * 2 + i % 2];
  uint32_t left[depth / 16][4];
#pragma unroll
  for (int k = 0; k < depth / 16; ++k) {
    left[k][0] = both(a, row, k * 16 + 2 * t, depth);
    left[k][1] = both(a, row + 8, k * 16 + 2 * t, depth);
    left[k][2] = both(a, row, k * 16 + 2 * t + 8, depth);
    left[k][3] = both(a, row + 8, k * 16 + 2 * t + 8, depth);
  }
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < depth / 16; ++k) wgmma_rs<T, N, row_bytes>(sum, left[k], tile, k);
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) d[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + t * 2 + i % 2] = sum[i];
}

// d[64, N] += popcount(a[64, 512] AND b[N, 512]): single bits, a tile of b for each 256 of them, in swizzled rows or in
// columns of 16 bytes.
template <int N, bool columns>
__global__ void wgmma_bits_kernel(const uint32_t* a, const uint32_t* b, int* d) {
  constexpr int words = 8, row_bytes = words * 4, tiles = 2, all = words * tiles;
  char* memory = shared_memory();
  const int thread = threadIdx.x, lane = thread % 32, row = thread / 32 * 16 + lane / 4, t = lane % 4;
  for (int i = thread; i < N * all; i += 128) {
    const int row = i / all, word = i % words, tile = i / words % tiles;
    const uint32_t at =
        columns ? (word / 4 * N + row) * 16 + word % 4 * 4 : swizzled(row * row_bytes + word * 4, row_bytes);
    *reinterpret_cast<uint32_t*>(memory + tile * N * row_bytes + at) = b[i];
  }
  fence_proxy_async();
  __syncthreads();
  int sum[N / 2];
  for (int i = 0; i < N / 2; ++i) sum[i] = d[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + t * 2 + i % 2];
  uint32_t left[tiles][4];
#pragma unroll
  for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
    for (int r = 0; r < 4; ++r) left[tile][r] = a[(row + r % 2 * 8) * all + tile * words + r / 2 * 4 + t];
  }
  wgmma_fence();
#pragma unroll
  for (int tile = 0; tile < tiles; ++tile) wgmma_rs_bits<N, columns>(sum, left[tile], memory, tile);
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) d[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + t * 2 + i % 2] = sum[i];
}

template <bool columns>
const char* wgmma_bits_of(int n, const uint32_t* a, const uint32_t* b, int* d) {
  const auto kernel = n == 32   ? wgmma_bits_kernel<32, columns>
                      : n == 64 ? wgmma_bits_kernel<64, columns>
                                : wgmma_bits_kernel<128, columns>;
  return launch(kernel, one, warpgroup, n * 64, nullptr, a, b, d);
}

template <class T, int N>
const char* wgmma_rows(int row_bytes, const T* a, const T* b, float* d, bool stored) {
  const int bytes = N * row_bytes + 64;
  if (row_bytes == 32) return launch(wgmma_kernel<T, N, 32>, one, warpgroup, bytes, nullptr, a, b, d, stored);
  if (row_bytes == 64) return launch(wgmma_kernel<T, N, 64>, one, warpgroup, bytes, nullptr, a, b, d, stored);
  return launch(wgmma_kernel<T, N, 128>, one, warpgroup, bytes, nullptr, a, b, d, stored);
}
template <class T>
const char* wgmma_of(int n, int row_bytes, const void* a, const void* b, float* d, bool stored) {
  const T *left = static_cast<const T*>(a), *right = static_cast<const T*>(b);
  if (n == 16) return wgmma_rows<T, 16>(row_bytes, left, right, d, stored);
  if (n == 32) return wgmma_rows<T, 32>(row_bytes, left, right, d, stored);
  if (n == 64) return wgmma_rows<T, 64>(row_bytes, left, right, d, stored);
  return wgmma_rows<T, 128>(row_bytes, left, right, d, stored);
}

}  // namespace

#define BASISCONV_TEST extern "C" __attribute__((visibility("default"))) const char*

BASISCONV_TEST lanes(const uint32_t* input, uint32_t* output) {
  return guarded([&] { return launch(lanes_kernel, one, warp, 0, nullptr, input, output); });
}
BASISCONV_TEST cp_async(const char* input, uint32_t* output) {
  return guarded([&] { return launch(cp_async_kernel, one, warp, 512, nullptr, input, output); });
}
BASISCONV_TEST numbers(int is_bf16, const float* input, uint32_t* words, float* wide) {
  return guarded([&] {
    return launch(is_bf16 ? numbers_kernel<bf16> : numbers_kernel<f16>, one, warp, 0, nullptr, input, words, wide);
  });
}
BASISCONV_TEST extremes(int is_bf16, const uint32_t* a, const uint32_t* b, uint32_t* larger, uint32_t* smaller) {
  return guarded([&] {
    return launch(is_bf16 ? extremes_kernel<bf16> : extremes_kernel<f16>, one, warp, 0, nullptr, a, b, larger, smaller);
  });
}
BASISCONV_TEST cluster(int blocks, const uint32_t* input, uint32_t* output) {
  const dim3 grid{static_cast<unsigned>(blocks), 1, 1}, block{384, 1, 1};
  return guarded(
      [&] { return launch_clusters(cluster_kernel, grid, blocks, block, 1024, nullptr, input, output, blocks); });
}
BASISCONV_TEST matrices(const uint32_t* input, uint32_t* output) {
  return guarded([&] { return launch(ldmatrix_kernel<false>, one, warp, 512, nullptr, input, output); });
}
BASISCONV_TEST matrices_transposed(const uint32_t* input, uint32_t* output) {
  return guarded([&] { return launch(ldmatrix_kernel<true>, one, warp, 512, nullptr, input, output); });
}
BASISCONV_TEST mma_bf16(const bf16* a, const bf16* b, float* c) {
  return guarded([&] { return launch(mma_kernel<bf16>, one, warp, 0, nullptr, a, b, c); });
}
BASISCONV_TEST mma_f16(const f16* a, const f16* b, float* c) {
  return guarded([&] { return launch(mma_kernel<f16>, one, warp, 0, nullptr, a, b, c); });
}
BASISCONV_TEST mma_tf32(const float* a, const float* b, float* c) {
  return guarded([&] { return launch(tf32_kernel, one, warp, 0, nullptr, a, b, c); });
}
BASISCONV_TEST mma_bits(const uint32_t* a, const uint32_t* b, int* c) {
  return guarded([&] { return launch(bits_kernel, one, warp, 0, nullptr, a, b, c); });
}
BASISCONV_TEST bulk(const char* input, uint32_t* output) {
  return guarded([&] { return launch(bulk_kernel, one, warpgroup, 2048 + 64, nullptr, input, output); });
}
// An image [N, H, W, C], dense; a box of `rows` x `columns` x 64 from (n, y, x, c).
BASISCONV_TEST box(int is_bf16, const void* image, int N, int H, int W, int C, int rows, int columns, int n, int y,
                   int x, int c, uint32_t* output) {
  return guarded([&]() -> const char* {
    TensorMap map;
    const auto wide = static_cast<int64_t>(C) * W;
    if (const char* wrong = encode(image_map(image, is_bf16, N, H, W, C, wide * H, wide, C, rows, columns), map)) {
      return wrong;
    }
    const int bytes = rows * columns * 128;
    return launch(box_kernel, one, warpgroup, bytes + 64, nullptr, map, output, bytes, c, x, y, n);
  });
}
BASISCONV_TEST wgmma(int is_bf16, int n, int row_bytes, int stored, const void* a, const void* b, float* d) {
  return guarded([&] {
    return is_bf16 ? wgmma_of<bf16>(n, row_bytes, a, b, d, stored) : wgmma_of<f16>(n, row_bytes, a, b, d, stored);
  });
}
BASISCONV_TEST wgmma_bits(int n, int columns, const uint32_t* a, const uint32_t* b, int* d) {
  return guarded([&] { return columns ? wgmma_bits_of<true>(n, a, b, d) : wgmma_bits_of<false>(n, a, b, d); });
}
