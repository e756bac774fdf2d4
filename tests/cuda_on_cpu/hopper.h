// mbarriers, bulk and tensor-map copies and wgmma, as late as a kernel allows: a copy is poison from issue on and is
// delivered by the thread that needs its mbarrier's phase to end; a wgmma runs at wgmma_wait, its accumulators are NaN
// until then, and its A registers must still be what they were.
//
// The copy engine and wgmma see shared memory through another proxy than ordinary loads and stores. `async_view` is
// that view: copies write to it, stores reach it with the next fence_proxy_async, of any thread (on hardware only of
// the one that stored: there this file is milder).
#pragma once
#include <limits>

#include "../../csrc/cuda/encoders.h"
#include "async.h"
#include "warp.h"

namespace cuda_on_cpu {

constexpr int kWarpgroup = 128;

struct BulkCopy {
  char* to;
  const char* from;                       // bytes as they lie, or null and
  basisconv::cuda::TensorMapRequest map;  // the box of a map: a copy, since the thread that issued it may have ended
  long bytes;
  int at[4];
};
struct Mbarrier {
  int count, pending;     // arrivals
  long expected, issued;  // bytes
  int phase;
  std::vector<BulkCopy> copies;
  std::vector<int> waiting;
};
inline std::map<const void*, Mbarrier> mbarriers;

struct Wgmma {
  float* d;  // of single bits: whole numbers, which only memcpy looks at
  int n, row_bytes, k;
  const uint32_t* a;
  uint32_t a_at_issue[4];
  const char* tile;
  float (*decode)(uint32_t);  // null for single bits
  bool columns = false;       // of 16 bytes, one behind the other, in place of swizzled rows
};
struct WgmmaThread {
  std::vector<Wgmma> open;
  std::deque<std::vector<Wgmma>> groups;
  std::map<float*, std::vector<float>> sums;  // what the accumulators really hold
  bool fenced = false;

  bool uses(const float* d) const {
    const auto is = [d](const Wgmma& w) { return w.d == d; };
    for (const auto& group : groups) {
      if (std::any_of(group.begin(), group.end(), is)) return true;
    }
    return std::any_of(open.begin(), open.end(), is);
  }
};
inline std::vector<WgmmaThread> wgmma_threads;
inline std::vector<int> wgmma_arrived;  // a warpgroup each
inline std::vector<char> async_view;

inline const bool hopper_is_cleared = [] {
  at_block_start.push_back([] {
    mbarriers.clear();
    wgmma_threads.assign(block.fibers.size(), WgmmaThread{});
    wgmma_arrived.assign(block.fibers.size() / kWarpgroup, 0);
    async_view.assign(block.fibers.size() / block.threads * shared_pitch, static_cast<char>(0xFF));
  });
  return true;
}();

inline Mbarrier& mbarrier(const uint64_t* bar) {
  const auto found = mbarriers.find(bar);
  if (found == mbarriers.end()) fail("an mbarrier is used before bar_init");
  return found->second;
}

inline void write_both(char* to, const void* from, size_t bytes) {
  memcpy(to, from, bytes);
  memcpy(&async_view[to - shared_of_cluster], from, bytes);
}

inline void deliver(const BulkCopy& copy) {
  if (copy.from != nullptr) return write_both(copy.to, copy.from, copy.bytes);
  constexpr int row_bytes = 128;
  const basisconv::cuda::TensorMapRequest& map = copy.map;
  uint32_t row = 0;
  for (uint32_t i3 = 0; i3 < map.box[3]; ++i3) {
    for (uint32_t i2 = 0; i2 < map.box[2]; ++i2) {
      for (uint32_t i1 = 0; i1 < map.box[1]; ++i1, ++row) {
        for (uint32_t i0 = 0; i0 < map.box[0]; ++i0) {
          const int64_t at[4] = {copy.at[0] + int64_t{i0}, copy.at[1] + int64_t{i1}, copy.at[2] + int64_t{i2},
                                 copy.at[3] + int64_t{i3}};
          bool inside = true;
          int64_t offset = at[0] * 2;
          for (int d = 0; d < 4; ++d) inside = inside && at[d] >= 0 && at[d] < static_cast<int64_t>(map.size[d]);
          for (int d = 1; d < 4; ++d) offset += at[d] * static_cast<int64_t>(map.stride[d - 1]);
          const uint16_t zero = 0;
          char* to = copy.to + basisconv::cuda::swizzled(row * row_bytes + i0 * 2, row_bytes);
          write_both(to, inside ? static_cast<const char*>(map.base) + offset : static_cast<const void*>(&zero), 2);
        }
      }
    }
  }
}

// Ends the phase if nothing is missing. It is tried only by who depends on it: the latest moment there is.
inline bool complete(Mbarrier& bar) {
  if (bar.pending > 0 || bar.issued != bar.expected) return false;
  for (const BulkCopy& copy : bar.copies) deliver(copy);
  bar.copies.clear();
  bar.pending = bar.count;
  bar.expected = bar.issued = 0;
  ++bar.phase;
  return true;
}
inline void wake_waiting(Mbarrier& bar) {
  for (const int thread : bar.waiting) block.wake(thread);
  bar.waiting.clear();
}

inline void arrive(uint64_t* at, int bytes) {
  Mbarrier& bar = mbarrier(at);
  complete(bar);
  if (bar.pending == 0) fail("more arrivals at an mbarrier than its count");
  --bar.pending;
  bar.expected += bytes;
  wake_waiting(bar);
}

inline void issue(uint64_t* at, const BulkCopy& copy) {
  memset(copy.to, 0xFF, copy.bytes);
  memset(&async_view[copy.to - shared_of_cluster], 0xFF, copy.bytes);
  Mbarrier& bar = mbarrier(at);
  bar.copies.push_back(copy);
  bar.issued += copy.bytes;
  wake_waiting(bar);
}

// One wgmma of single bits, of a whole warpgroup whose first thread is `first`.
inline void run_wgmma_bits(int first, size_t group, size_t index) {
  const Wgmma& w = wgmma_threads[first].groups[group][index];
  constexpr int words = 8;
  std::vector<uint32_t> b(static_cast<size_t>(w.n) * words);
  for (size_t i = 0; i < b.size(); ++i) {
    const uint32_t row = static_cast<uint32_t>(i) / words, word = static_cast<uint32_t>(i) % words;
    const uint32_t offset = w.columns ? (word / 4 * w.n + row) * 16 + word % 4 * 4
                                      : basisconv::cuda::swizzled(static_cast<uint32_t>(i) * 4, w.row_bytes);
    memcpy(&b[i], &async_view[w.tile - shared_of_cluster + offset], 4);
  }
  for (int warp = first; warp < first + kWarpgroup; warp += kWarp) {
    uint32_t a[16][words];
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < words; ++k) {
        a[i][k] = wgmma_threads[warp + i % 8 * 4 + k % 4].groups[group][index].a_at_issue[i / 8 + k / 4 * 2];
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      WgmmaThread& thread = wgmma_threads[warp + lane];
      std::vector<float>& sums = thread.sums[thread.groups[group][index].d];
      for (int i = 0; i < w.n / 2; ++i) {
        const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        int sum;
        memcpy(&sum, &sums[i], 4);
        for (int k = 0; k < words; ++k) sum += __builtin_popcount(a[row][k] & b[column * words + k]);
        memcpy(&sums[i], &sum, 4);
      }
    }
  }
}

// One wgmma of a whole warpgroup whose first thread is `first`.
inline void run_wgmma(int first, size_t group, size_t index) {
  const Wgmma& w = wgmma_threads[first].groups[group][index];
  if (w.decode == nullptr) return run_wgmma_bits(first, group, index);
  std::vector<float> b(static_cast<size_t>(w.n) * 16);
  for (int j = 0; j < w.n; ++j) {
    for (int k = 0; k < 16; ++k) {
      const uint32_t offset = basisconv::cuda::swizzled(j * w.row_bytes + w.k * 32 + k * 2, w.row_bytes);
      uint16_t bits;
      memcpy(&bits, &async_view[w.tile - shared_of_cluster + offset], 2);
      b[j * 16 + k] = w.decode(bits);
    }
  }
  for (int warp = first; warp < first + kWarpgroup; warp += kWarp) {
    float a[16][16], *d[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) {
      WgmmaThread& thread = wgmma_threads[warp + lane];
      const Wgmma& mine = thread.groups[group][index];
      d[lane] = thread.sums[mine.d].data();
      for (int r = 0; r < 8; ++r) {
        const int row = lane / 4 + r / 2 % 2 * 8, column = lane % 4 * 2 + r / 4 * 8 + r % 2;
        a[row][column] = mine.decode(mine.a_at_issue[r / 2] >> 16 * (r % 2) & 0xFFFF);
      }
    }
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < w.n; ++j) {
        float& sum = d[i % 8 * 4 + j % 8 / 2][j / 8 * 4 + i / 8 * 2 + j % 2];
        for (int k = 0; k < 16; ++k) sum += a[i][k] * b[j * 16 + k];
      }
    }
  }
}

inline void finish_wgmma(WgmmaThread& mine, size_t groups) {
  for (size_t g = 0; g < groups; ++g) {
    for (const Wgmma& w : mine.groups.front()) {
      if (memcmp(w.a, w.a_at_issue, sizeof w.a_at_issue)) fail("A registers of a wgmma changed before wgmma_wait");
    }
    mine.groups.pop_front();
  }
  for (auto held = mine.sums.begin(); held != mine.sums.end();) {
    if (mine.uses(held->first)) {
      ++held;
      continue;
    }
    memcpy(held->first, held->second.data(), held->second.size() * sizeof(float));
    held = mine.sums.erase(held);
  }
}

inline void wait_wgmma(size_t newest) {
  const int first = block.self / kWarpgroup * kWarpgroup;
  if (wgmma_arrived.empty()) fail("wgmma needs four warps");
  if (++wgmma_arrived[first / kWarpgroup] < kWarpgroup) return wait_for("wgmma_wait");
  wgmma_arrived[first / kWarpgroup] = 0;
  for (int thread = first; thread < first + kWarpgroup; ++thread) block.wake(thread);
  const size_t groups = wgmma_threads[first].groups.size(), run = groups > newest ? groups - newest : 0;
  for (int thread = first; thread < first + kWarpgroup; ++thread) {
    if (wgmma_threads[thread].groups.size() != groups) fail("threads of a warpgroup issued different wgmma groups");
  }
  for (size_t g = 0; g < run; ++g) {
    for (size_t i = 0; i < wgmma_threads[first].groups[g].size(); ++i) run_wgmma(first, g, i);
  }
  for (int thread = first; thread < first + kWarpgroup; ++thread) finish_wgmma(wgmma_threads[thread], run);
}

}  // namespace cuda_on_cpu

namespace basisconv::cuda {

using TensorMap = TensorMapRequest;
inline const char* encode(const TensorMapRequest& request, TensorMap& map) {
  map = request;
  return reason_against(request);
}

inline void bar_init(uint64_t* bar, int count) {
  cuda_on_cpu::shared_offset(bar, 8, 8, "bar_init");
  cuda_on_cpu::mbarriers[bar] = {count, count, 0, 0, 0, {}, {}};
}
inline void bar_init_fence() {}

inline void previous_kernel_done() {}

// All threads of a cluster that have not returned.
inline void cluster_sync() {
  using namespace cuda_on_cpu;
  meet("cluster_sync", block.at_barrier.back(), 0, static_cast<int>(block.fibers.size()));
}
template <class P>
P* beside(P* p, int rank) {
  using namespace cuda_on_cpu;
  if (rank < 0 || rank >= static_cast<int>(block.fibers.size()) / block.threads) fail("beside: no such block");
  if (block.live_in[rank] == 0) fail("beside: the block has ended");
  const size_t offset = shared_offset(p, sizeof(P), alignof(P), "beside");
  return reinterpret_cast<P*>(shared_of_cluster + rank * shared_pitch + offset);
}
inline void bar_arrive_beside(uint64_t* bar, int rank) { cuda_on_cpu::arrive(beside(bar, rank), 0); }
inline void bar_arrive(uint64_t* bar) { cuda_on_cpu::arrive(bar, 0); }
inline void bar_arrive_expect(uint64_t* bar, int bytes) { cuda_on_cpu::arrive(bar, bytes); }
inline void bar_wait(uint64_t* at, int parity) {
  cuda_on_cpu::Mbarrier& bar = cuda_on_cpu::mbarrier(at);
  while ((bar.phase & 1) == parity) {
    if (cuda_on_cpu::complete(bar)) {
      cuda_on_cpu::wake_waiting(bar);
      continue;
    }
    bar.waiting.push_back(cuda_on_cpu::block.self);
    cuda_on_cpu::wait_for("an mbarrier");
  }
}

inline void bar_wait_cluster(uint64_t* at, int parity) { bar_wait(at, parity); }

inline void bulk_load(void* to, const void* from, int bytes, uint64_t* bar) {
  cuda_on_cpu::shared_offset(to, bytes, 16, "bulk_load");
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) cuda_on_cpu::fail("bulk_load: no multiple of 16");
  cuda_on_cpu::issue(bar, {static_cast<char*>(to), static_cast<const char*>(from), {}, bytes, {}});
}
inline void prefetch(const void* from, int bytes) {
  if (bytes <= 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    cuda_on_cpu::fail("prefetch: no multiple of 16");
  }
  volatile const char* memory = static_cast<const char*>(from);  // a sanitizer sees what lies outside
  (void)memory[0], (void)memory[bytes - 1];
}
inline void tensor_load(void* to, const TensorMap& map, int c0, int c1, int c2, int c3, uint64_t* bar) {
  const long bytes = 2l * map.box[0] * map.box[1] * map.box[2] * map.box[3];
  cuda_on_cpu::shared_offset(to, bytes, 1024, "tensor_load");
  cuda_on_cpu::issue(bar, {static_cast<char*>(to), nullptr, map, bytes, {c0, c1, c2, c3}});
}
inline void fence_proxy_async() {
  using namespace cuda_on_cpu;
  memcpy(&async_view[shared - shared_of_cluster], shared, shared_bytes);
}

template <int registers>
void keep_registers() {}
template <int registers>
void take_registers() {}

template <int steps>
void wgmma_operands(uint32_t (&)[steps][4]) {}
inline void wgmma_fence() { cuda_on_cpu::wgmma_threads[cuda_on_cpu::block.self].fenced = true; }
inline void wgmma_commit() {
  cuda_on_cpu::WgmmaThread& mine = cuda_on_cpu::wgmma_threads[cuda_on_cpu::block.self];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
  mine.fenced = false;
}
template <int newest>
void wgmma_wait() {
  cuda_on_cpu::wait_wgmma(newest);
}
// `d` stands for N / 2 accumulators of 4 bytes.
inline void issue_wgmma(const cuda_on_cpu::Wgmma& w) {
  using namespace cuda_on_cpu;
  WgmmaThread& mine = wgmma_threads[block.self];
  shared_offset(w.tile, static_cast<size_t>(w.n) * w.row_bytes, w.columns ? 16 : w.row_bytes * 8, "wgmma");
  if (!mine.fenced) fail("wgmma without wgmma_fence since the last commit");
  if (block.self % kWarpgroup == 0 &&
      memcmp(w.tile, &async_view[w.tile - shared_of_cluster], static_cast<size_t>(w.n) * w.row_bytes) != 0) {
    fail("wgmma: stores to its tile that no fence_proxy_async has published");
  }
  if (w.k * 32 >= w.row_bytes) fail("wgmma: the column block lies outside the tile's rows");
  if (mine.sums.count(w.d) == 0) {
    std::vector<float>& sums = mine.sums[w.d];
    sums.resize(w.n / 2);
    memcpy(sums.data(), w.d, sums.size() * sizeof(float));
  }
  const std::vector<float> unknown(w.n / 2, std::numeric_limits<float>::quiet_NaN());
  memcpy(w.d, unknown.data(), unknown.size() * sizeof(float));
  mine.open.push_back(w);
}
template <class T, int N, int row_bytes>
void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], const void* tile, int k) {
  issue_wgmma(
      {d, N, row_bytes, k, a, {a[0], a[1], a[2], a[3]}, static_cast<const char*>(tile), cuda_on_cpu::decode<T>});
}
template <int N, bool columns = false>
void wgmma_rs_bits(int (&d)[N / 2], const uint32_t (&a)[4], const void* tiles, int number) {
  const char* tile = static_cast<const char*>(tiles) + number * N * 32;
  issue_wgmma({reinterpret_cast<float*>(d), N, 32, 0, a, {a[0], a[1], a[2], a[3]}, tile, nullptr, columns});
}

}  // namespace basisconv::cuda
