// The threads of a block as fibers on one thread of the machine; the blocks of a grid run one after another, those of a
// cluster together, the last first where the order is reversed.
//
// One fiber runs until it has to wait, then the first, the last or a random one that can go on (`Order`). That is
// further apart than hardware lets threads drift, so what depends on a missing barrier differs between the orders.
// Shared memory starts as 0xFF bytes: NaN in every float type, all ones in bit kernels.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(begin, bytes) ((void)0)
#endif

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define BASISCONV_DEVICE inline
#define BASISCONV_EITHER inline

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
using std::max;
using std::min;
inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // the first two are set whenever a fiber gets its turn

namespace cuda_on_cpu {

enum class Order : int { forward, reversed, shuffled };
inline Order order = Order::forward;  // the one in which fibers get their turn

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;
// How far below a live frame an abandoned one may have reached: what the address sanitizer is told to forget.
constexpr size_t kForgottenBytes = 32 * 1024;

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started = false;
};

// What is running: a block, or the blocks of a cluster, whose threads are numbered on. `ready` has a word a warp and a
// bit a lane.
struct Block {
  std::vector<Fiber> fibers;
  std::vector<uint32_t> ready;
  std::map<std::string, int> waiting;   // for what, and how many
  int self = 0, live = 0, threads = 0;  // of these, in one block
  std::vector<int> at_barrier;          // a block each, and the cluster last
  std::vector<int> live_in;             // threads, a block each
  std::function<void()> body;
  std::string error;
  jmp_buf done;
  uint32_t random = 1;

  bool can_run(int thread) const { return ready[thread / kWarp] >> thread % kWarp & 1; }
  void wake(int thread) { ready[thread / kWarp] |= 1u << thread % kWarp; }
  void put_to_sleep(int thread) { ready[thread / kWarp] &= ~(1u << thread % kWarp); }
};
inline Block block;
inline std::vector<void (*)()> at_block_start;  // the other files clear their state here
inline std::vector<std::unique_ptr<char[]>> stacks;
// Shared memory of the block whose turn it is, and that of the first block of its cluster.
inline char *shared = nullptr, *shared_of_cluster = nullptr;
inline size_t shared_bytes = 0, shared_pitch = 0;  // of a block, and from one to the next
inline unsigned first_block = 0;

inline uint32_t random_number() {
  block.random = block.random * 1664525u + 1013904223u;
  return block.random >> 8;
}

// The thread whose turn it is; -1 where all wait.
inline int next_thread() {
  const int warps = static_cast<int>(block.ready.size());
  const int first = order == Order::shuffled ? static_cast<int>(random_number() % warps) : 0;
  for (int i = 0; i < warps; ++i) {
    const int warp = order == Order::reversed ? warps - 1 - i : (first + i) % warps;
    uint32_t lanes = block.ready[warp];
    if (lanes == 0) continue;
    if (order == Order::reversed) return warp * kWarp + kWarp - 1 - __builtin_clz(lanes);
    if (order == Order::shuffled) {
      for (int skip = random_number() % __builtin_popcount(lanes); skip > 0; --skip) lanes &= lanes - 1;
    }
    return warp * kWarp + __builtin_ctz(lanes);
  }
  return -1;
}

inline void run_next();

inline void fiber_main() {
  block.body();
  block.put_to_sleep(block.self);
  --block.live_in[block.self / block.threads];
  if (--block.live == 0) _longjmp(block.done, 1);
  run_next();
}

inline std::string deadlock() {
  std::string text = "deadlock: " + std::to_string(block.live) + " threads live";
  for (const auto& [what, threads] : block.waiting) {
    if (threads > 0) text += ", " + std::to_string(threads) + " wait for " + what;
  }
  return text;
}

inline void run_next() {
  const int next = next_thread();
  if (next < 0) {
    if (block.error.empty()) block.error = deadlock();
    _longjmp(block.done, 1);
  }
  block.self = next;
  threadIdx.x = next % block.threads;
  blockIdx.x = first_block + next / block.threads;
  shared = shared_of_cluster + next / block.threads * shared_pitch;
  Fiber& fiber = block.fibers[next];
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// A jump abandons the frames below it without their epilogues; the sanitizer must forget them.
__attribute__((noinline)) inline void forget_abandoned_frames() {
  ASAN_UNPOISON_MEMORY_REGION(static_cast<char*>(__builtin_frame_address(0)) - kForgottenBytes, kForgottenBytes);
}

// Until another thread wakes this one. `what` names the reason in a report of a deadlock.
inline void wait_for(const char* what) {
  block.put_to_sleep(block.self);
  int& waiting = block.waiting[what];
  ++waiting;
  if (!_setjmp(block.fibers[block.self].resume)) run_next();
  forget_abandoned_frames();
  --waiting;
}

// The kernel broke a rule of the hardware: the launch ends with this report.
[[noreturn]] inline void fail(const std::string& why) {
  block.error = why + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(block.self) + ")";
  _longjmp(block.done, 1);
}

inline void run_blocks(int blocks) {
  const int threads = blocks * block.threads;
  block.fibers.assign(threads, Fiber{});
  block.ready.assign(threads / kWarp, ~0u);
  block.waiting.clear();
  block.live = threads;
  block.at_barrier.assign(blocks + 1, 0);
  block.live_in.assign(blocks, block.threads);
  block.error.clear();
  while (stacks.size() < static_cast<size_t>(threads)) stacks.emplace_back(new char[kStackBytes]);
  for (int i = 0; i < threads; ++i) {
    ucontext_t& context = block.fibers[i].start;
    ASAN_UNPOISON_MEMORY_REGION(stacks[i].get(), kStackBytes);
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[i].get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
  }
  for (auto* clear : at_block_start) clear();
  if (!_setjmp(block.done)) run_next();
  forget_abandoned_frames();
  if (!block.error.empty()) throw std::runtime_error(block.error);
}

// Where a kernel touches shared memory through a function of these files, it must be inside and aligned.
inline size_t shared_offset(const void* p, size_t bytes, size_t alignment, const char* what) {
  const size_t offset = static_cast<const char*>(p) - shared;
  if (offset % alignment != 0) fail(std::string(what) + ": shared memory address is misaligned");
  if (offset > shared_bytes || bytes > shared_bytes - offset) fail(std::string(what) + ": outside shared memory");
  return offset;
}

}  // namespace cuda_on_cpu

namespace cuda_on_cpu {

// Threads `first` to `last` wait for each other; the last to come goes on at once.
inline void meet(const char* name, int& at_barrier, int first, int last) {
  if (++at_barrier < last - first) return wait_for(name);
  at_barrier = 0;
  for (int thread = first; thread < last; ++thread) block.wake(thread);
}

}  // namespace cuda_on_cpu

// Every thread of the block must come here, also those that would have returned.
inline void __syncthreads() {
  cuda_on_cpu::Block& block = cuda_on_cpu::block;
  const int rank = block.self / block.threads;
  cuda_on_cpu::meet("__syncthreads", block.at_barrier[rank], rank * block.threads, (rank + 1) * block.threads);
}

namespace basisconv::cuda {

using Stream = void*;

template <class... P, class... A>
const char* launch_clusters(void (*kernel)(P...), dim3 grid, int blocks, dim3 threads, int64_t bytes, Stream,
                            A... arguments) {
  using namespace cuda_on_cpu;
  if (threads.x % kWarp != 0 || threads.x == 0) return "the threads of a block must be whole warps";
  if (blocks < 1 || blocks > 8 || grid.x % blocks != 0) return "a grid must be whole clusters of at most eight blocks";
  // The end of shared memory is the end of its allocation, where the address sanitizer stands guard.
  constexpr size_t alignment = 1024;
  shared_bytes = static_cast<size_t>(bytes);
  shared_pitch = (shared_bytes + alignment - 1) / alignment * alignment;
  const size_t all = (blocks - 1) * shared_pitch + shared_bytes;
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, all + 1) != 0) return "no memory for shared memory";
  const std::unique_ptr<void, void (*)(void*)> owner(memory, free);
  shared = shared_of_cluster = static_cast<char*>(memory);
  block.threads = static_cast<int>(threads.x);
  gridDim = grid;
  blockDim = threads;
  block.random = 1;
  block.body = [&] { kernel(arguments...); };
  const uint64_t clusters = uint64_t{grid.x} / blocks * grid.y * grid.z, across = grid.x / blocks;
  for (uint64_t i = 0; i < clusters; ++i) {
    const uint64_t at = order == Order::reversed ? clusters - 1 - i : i;
    first_block = static_cast<unsigned>(at % across * blocks);
    blockIdx = {first_block, static_cast<unsigned>(at / across % grid.y), static_cast<unsigned>(at / across / grid.y)};
    memset(shared_of_cluster, 0xFF, all);
    run_blocks(blocks);
  }
  return nullptr;
}

template <class... P, class... A>
const char* launch(void (*kernel)(P...), dim3 grid, dim3 threads, int64_t bytes, Stream stream, A... arguments) {
  return launch_clusters(kernel, grid, 1, threads, bytes, stream, arguments...);
}

inline char* shared_memory() { return cuda_on_cpu::shared; }

}  // namespace basisconv::cuda
