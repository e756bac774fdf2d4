// What only sm_90a has, each by one name: mbarriers, bulk and tensor-map copies, warpgroup mma with A in registers. See
// device.h for the idea; the bits of descriptors and maps stand in encoders.h.
#pragma once
#include "device.h"
#include "encoders.h"

#ifdef __CUDACC__
#include <cuda.h>

namespace basisconv::cuda {

// --- tensor maps -----------------------------------------------------------------------------------------------------

using TensorMap = CUtensorMap;

// Null on success. The driver's function is asked for at run time: the library loads where there is no driver.
inline const char* encode(const TensorMapRequest& request, TensorMap& map) {
  static const auto encode_tiled = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  if (encode_tiled == nullptr) return "this driver has no cuTensorMapEncodeTiled";
  if (const char* reason = reason_against(request)) return reason;
  cuuint64_t size[4], stride[3];
  cuuint32_t box[4], every[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; ++i) size[i] = request.size[i], box[i] = request.box[i];
  for (int i = 0; i < 3; ++i) stride[i] = request.stride[i];
  const auto type = request.is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result = encode_tiled(&map, type, 4, const_cast<void*>(request.base), size, stride, box, every,
                                       CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                       CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "the driver refuses the tensor map";
}

// --- mbarriers -------------------------------------------------------------------------------------------------------

// A phase ends when `count` threads have arrived and all bytes that they announced are there.
BASISCONV_DEVICE void bar_init(uint64_t* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}
// After the last bar_init, before the barrier of the block that lets the others use them.
BASISCONV_DEVICE void bar_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
BASISCONV_DEVICE void bar_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
BASISCONV_DEVICE void bar_arrive_expect(uint64_t* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
}
// Until the phase of this parity has ended; a fresh barrier counts as having ended a phase of parity 1.
BASISCONV_DEVICE void bar_wait(uint64_t* bar, int parity) {
  uint32_t done;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(shared_address(bar)), "r"(parity)
                 : "memory");
  } while (done == 0);
}

// --- kernels after each other ----------------------------------------------------------------------------------------

// Every thread of a kernel that launch_clusters launched, before it reads or writes global memory: until then the
// kernel ahead of it may be running. The one behind it may begin from here on.
BASISCONV_DEVICE void previous_kernel_done() {
  asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
}

// --- clusters --------------------------------------------------------------------------------------------------------

// All threads of all blocks of a cluster, before one touches another's memory.
BASISCONV_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same place of shared memory in the block of this rank, for ordinary loads and stores.
template <class P>
BASISCONV_DEVICE P* beside(P* p, int rank) {
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
  return reinterpret_cast<P*>(there);
}
BASISCONV_DEVICE void bar_arrive_beside(uint64_t* bar, int rank) {
  asm volatile(
      "{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];}" ::"r"(shared_address(bar)),
      "r"(rank)
      : "memory");
}
// bar_wait for what other blocks of the cluster wrote before they arrived.
BASISCONV_DEVICE void bar_wait_cluster(uint64_t* bar, int parity) {
  uint32_t done;
  do {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(shared_address(bar)), "r"(parity)
        : "memory");
  } while (done == 0);
}

// --- copies ----------------------------------------------------------------------------------------------------------

// `bytes` of global memory as they lie; both addresses and the count are multiples of 16. The barrier counts the bytes.
BASISCONV_DEVICE void bulk_load(void* to, const void* from, int bytes, uint64_t* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(bar))
               : "memory");
}
// `bytes` of global memory come into the second-level cache, where nobody waits for them; a multiple of 16, as `from`.
BASISCONV_DEVICE void prefetch(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
// The box of a tensor map at these coordinates, innermost first; zeros outside, which the barrier counts too. `to` is a
// multiple of 1024: row i of the box lies at 128 i, swizzled.
BASISCONV_DEVICE void tensor_load(void* to, const TensorMap& map, int c0, int c1, int c2, int c3, uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(to)),
      "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(shared_address(bar))
      : "memory");
}
// Makes this thread's ordinary stores to shared memory visible to wgmma and to copies.
BASISCONV_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- registers -------------------------------------------------------------------------------------------------------

// Shares out the registers of a block anew; all four warps of a warpgroup call one of them, once. The kernel's
// __launch_bounds__ must name the blocks of a multiprocessor, and the counts add up to what that leaves a block.
template <int registers>
BASISCONV_DEVICE void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
BASISCONV_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// --- wgmma -----------------------------------------------------------------------------------------------------------
// Four warps together, 128 threads from a multiple of 128 on. Between issue and wait nobody touches d, a and the tile.

BASISCONV_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
BASISCONV_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `newest` committed groups are under way.
template <int newest>
BASISCONV_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(newest) : "memory");
}

// These registers have their values now: no move into them may be scheduled between the wgmma that read them.
template <int steps>
BASISCONV_DEVICE void wgmma_operands(uint32_t (&a)[steps][4]) {
#pragma unroll
  for (int i = 0; i < steps; ++i) {
    asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
  }
}

// Operand lists: the accumulators are %0 .. %(N/2 - 1), then four registers of a, then the descriptor of b.
#define BASISCONV_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define BASISCONV_D8(i) BASISCONV_D4(i), BASISCONV_D4(i + 4)
#define BASISCONV_D16(i) BASISCONV_D8(i), BASISCONV_D8(i + 8)
#define BASISCONV_D32(i) BASISCONV_D16(i), BASISCONV_D16(i + 16)
#define BASISCONV_D64(i) BASISCONV_D32(i), BASISCONV_D32(i + 32)
#define BASISCONV_P8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define BASISCONV_P16 BASISCONV_P8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define BASISCONV_P32 BASISCONV_P16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define BASISCONV_P64                                                                                     \
  BASISCONV_P32                                                                                           \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56," \
  "%57,%58,%59,%60,%61,%62,%63"
#define BASISCONV_WGMMA(n, type, d_places, a_places, d_operands)                                            \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" d_places "}, {" a_places \
               ", 1, 1, 1, 0;"                                                                              \
               : d_operands                                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor))
#define BASISCONV_WGMMA_OF(type)                                                                                \
  if constexpr (N == 16) BASISCONV_WGMMA("16", type, BASISCONV_P8, "%8,%9,%10,%11}, %12", BASISCONV_D8(0));     \
  if constexpr (N == 32) BASISCONV_WGMMA("32", type, BASISCONV_P16, "%16,%17,%18,%19}, %20", BASISCONV_D16(0)); \
  if constexpr (N == 64) BASISCONV_WGMMA("64", type, BASISCONV_P32, "%32,%33,%34,%35}, %36", BASISCONV_D32(0)); \
  if constexpr (N == 128) BASISCONV_WGMMA("128", type, BASISCONV_P64, "%64,%65,%66,%67}, %68", BASISCONV_D64(0))

// d[64, N] += a[64, 16] . b[N, 16]^T. Warp w holds rows 16w.. of a and d, each as mma_m16n8k16 does; eight columns of d
// after the other. b is column block k (of 16 elements) of a swizzled tile of N rows of `row_bytes`.
template <class T, int N, int row_bytes>
BASISCONV_DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], const void* tile, int k) {
  static_assert(N == 16 || N == 32 || N == 64 || N == 128, "add the shape above");
  // 32 bytes further along a row are two units of the address, which shares its 32 bits with a constant alone.
  const uint64_t first = wgmma_descriptor(shared_address(tile), row_bytes);
  const uint64_t descriptor = first >> 32 << 32 | (static_cast<uint32_t>(first) + static_cast<uint32_t>(k) * 2);
  if constexpr (__is_same(T, bf16)) {
    BASISCONV_WGMMA_OF("bf16");
  } else {
    BASISCONV_WGMMA_OF("f16");
  }
}

// Single bits, 32 a word: d[64, N] += popcount(a[64, 256] AND b[N, 256]). a as mma_m16n8k256_and_popc holds it, warp
// for warp; b is the tile of this number among swizzled ones of N rows of 32 bytes, one behind the other.
#define BASISCONV_I4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define BASISCONV_I16(i) BASISCONV_I4(i), BASISCONV_I4(i + 4), BASISCONV_I4(i + 8), BASISCONV_I4(i + 12)
#define BASISCONV_I32(i) BASISCONV_I16(i), BASISCONV_I16(i + 16)
#define BASISCONV_I64(i) BASISCONV_I32(i), BASISCONV_I32(i + 32)
#define BASISCONV_WGMMA_BITS(n, d_places, a_places, d_operands)                                                  \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k256.s32.b1.b1.and.popc {" d_places "}, {" a_places ", 1;" \
               : d_operands                                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor))
// With `columns` it is not swizzled: N times 16 bytes, the first halves of all rows, then as many with the second.
template <int N, bool columns = false>
BASISCONV_DEVICE void wgmma_rs_bits(int (&d)[N / 2], const uint32_t (&a)[4], const void* tiles, int number) {
  static_assert(N == 32 || N == 64 || N == 128, "add the shape above");
  const uint32_t address = shared_address(tiles);
  const uint64_t first = columns ? wgmma_descriptor_of_columns(address, N * 16) : wgmma_descriptor(address, 32);
  const uint64_t descriptor =
      first >> 32 << 32 | (static_cast<uint32_t>(first) + static_cast<uint32_t>(number) * (N * 2));
  if constexpr (N == 32) BASISCONV_WGMMA_BITS("32", BASISCONV_P16, "%16,%17,%18,%19}, %20", BASISCONV_I16(0));
  if constexpr (N == 64) BASISCONV_WGMMA_BITS("64", BASISCONV_P32, "%32,%33,%34,%35}, %36", BASISCONV_I32(0));
  if constexpr (N == 128) BASISCONV_WGMMA_BITS("128", BASISCONV_P64, "%64,%65,%66,%67}, %68", BASISCONV_I64(0));
}

}  // namespace basisconv::cuda
#endif
