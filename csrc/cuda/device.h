// What a kernel may use of the machine, each by one name.
//
//   nvcc         each name is one instruction, or the CUDA built-in of that name;
//   any other    tests/cuda_on_cpu runs it: the threads of a block are fibers, each name a plain function.
//
// So a kernel holds no asm, no <<<>>> and no `extern __shared__`, and one source is proven on a processor and runs on a
// GPU. What only Hopper has stands in hopper.h. docs/cuda_on_cpu.md tells what such a proof is worth.
#pragma once
#include <cstdint>

#include "../common/dtype.h"

#ifndef __CUDACC__
#include <cuda_on_cpu.h>
#else

#define BASISCONV_DEVICE __device__ __forceinline__
#define BASISCONV_EITHER __host__ __device__ __forceinline__

namespace basisconv::cuda {

using Stream = cudaStream_t;

// --- launch ----------------------------------------------------------------------------------------------------------

inline cudaError_t allow_shared(const void* function, int64_t bytes) {
  constexpr int64_t without_asking = 48 * 1024;
  if (bytes <= without_asking) return cudaSuccess;
  return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

// Null when launched on the stream, else CUDA's words. Asks nothing of the device, so a graph may capture it. `blocks`
// of the grid after the other along x are a cluster. For compute capability 9.0 and later, and for kernels that call
// previous_kernel_done: they may begin while the kernel ahead of them on the stream is still running.
template <class... P, class... A>
const char* launch_clusters(void (*kernel)(P...), dim3 grid, int blocks, dim3 block, int64_t shared_bytes,
                            Stream stream, A... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = allow_shared(function, shared_bytes);
  void* pointers[] = {&arguments...};
  if (error == cudaSuccess) {
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = blocks;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = block;
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = attributes, config.numAttrs = 2;
    error = cudaLaunchKernelExC(&config, function, pointers);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
template <class... P, class... A>
const char* launch(void (*kernel)(P...), dim3 grid, dim3 block, int64_t shared_bytes, Stream stream, A... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = allow_shared(function, shared_bytes);
  void* pointers[] = {&arguments...};
  if (error == cudaSuccess) error = cudaLaunchKernel(function, grid, block, pointers, shared_bytes, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Dynamic shared memory, aligned to 1024 bytes.
BASISCONV_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}
BASISCONV_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// From here on the warp uses these bytes for something else; whole warps call it. Nothing to do on a GPU.
BASISCONV_DEVICE void warp_reuses(void*, int) {}

// --- 16-bit numbers --------------------------------------------------------------------------------------------------

// Two floats, each rounded once to nearest even; `low` is the one at the lower address.
template <class T>
BASISCONV_DEVICE uint32_t round2(float low, float high) {
  uint32_t word;
  if constexpr (__is_same(T, bf16)) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}
// The larger and the smaller of two such pairs, each of its own; NaN where either is.
#define BASISCONV_PAIRWISE(name, instruction)                               \
  template <class T>                                                        \
  BASISCONV_DEVICE uint32_t name(uint32_t a, uint32_t b) {                  \
    uint32_t word;                                                          \
    if constexpr (__is_same(T, bf16)) {                                     \
      asm(instruction ".bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b)); \
    } else {                                                                \
      asm(instruction ".f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));  \
    }                                                                       \
    return word;                                                            \
  }
BASISCONV_PAIRWISE(max2, "max.NaN")
BASISCONV_PAIRWISE(min2, "min.NaN")
#undef BASISCONV_PAIRWISE

template <class T>
BASISCONV_DEVICE float widen(T value) {
  if constexpr (__is_same(T, bf16)) return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}
BASISCONV_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
BASISCONV_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

// --- copies behind the threads' back ---------------------------------------------------------------------------------

// `bytes` (0..16) of global memory, zeros behind them, into 16 bytes of shared memory; all addresses are multiples
// of 16.
BASISCONV_DEVICE void cp_async16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
BASISCONV_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `newest` groups of this thread are under way.
template <int newest>
BASISCONV_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}

// --- matrices of a warp ----------------------------------------------------------------------------------------------
// Lane l = 4g + t. An 8x8 matrix of 16-bit elements in a register: row g, columns 2t and 2t + 1.

// Four matrices; lane 8m + i brings the address of row i of matrix m, a multiple of 16.
BASISCONV_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same, each matrix transposed: lane 4g + t has rows 2t and 2t + 1 of column g.
BASISCONV_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c[16, 8] += a[16, 16] . b[8, 16]^T. a: (g, 2t..), (g+8, 2t..), (g, 2t+8..), (g+8, 2t+8..); b: (g, 2t..), (g, 2t+8..);
// c: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
template <class T>
BASISCONV_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (__is_same(T, bf16)) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// c[16, 8] += a[16, 8] . b[8, 8]^T in TF32: floats whose 13 low bits are zero. a: (g, t), (g+8, t), (g, t+4), (g+8,
// t+4); b: (g, t), (g, t+4); c as above.
BASISCONV_DEVICE void mma_m16n8k8_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(bits_of(a[0])), "r"(bits_of(a[1])), "r"(bits_of(a[2])), "r"(bits_of(a[3])), "r"(bits_of(b0)),
        "r"(bits_of(b1)));
}

// c[16, 8] += popcount(a[16, 256] AND b[8, 256]) over single bits, 32 a word; words lie as 16-bit pairs do above.
BASISCONV_DEVICE void mma_m16n8k256_and_popc(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace basisconv::cuda
#endif
