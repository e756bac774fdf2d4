// cp.async: poison at issue, delivery at the wait that a kernel cannot do without. A thread sees another's copies only
// after that one waited and a barrier, as on hardware; a kernel that reads too early reads NaN.
#pragma once
#include <deque>

#include "fibers.h"

namespace cuda_on_cpu {

struct Copy {
  void* to;
  const void* from;
  int bytes;
};
struct Copies {
  std::vector<Copy> open;                // issued, not yet committed
  std::deque<std::vector<Copy>> groups;  // committed, not yet waited for
};
inline std::vector<Copies> copies;

inline const bool copies_are_cleared = [] {
  at_block_start.push_back([] { copies.assign(block.fibers.size(), Copies{}); });
  return true;
}();

}  // namespace cuda_on_cpu

namespace basisconv::cuda {

inline void cp_async16(void* to, const void* from, int bytes) {
  using namespace cuda_on_cpu;
  shared_offset(to, 16, 16, "cp_async16");
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("cp_async16: global address is misaligned");
  if (bytes < 0 || bytes > 16) fail("cp_async16: bytes must be 0..16");
  memset(to, 0xFF, 16);
  copies[block.self].open.push_back({to, from, bytes});
}
inline void cp_async_commit() {
  cuda_on_cpu::Copies& mine = cuda_on_cpu::copies[cuda_on_cpu::block.self];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}
template <int newest>
void cp_async_wait() {
  auto& groups = cuda_on_cpu::copies[cuda_on_cpu::block.self].groups;
  for (; groups.size() > newest; groups.pop_front()) {
    for (const cuda_on_cpu::Copy& copy : groups.front()) {
      memset(copy.to, 0, 16);
      memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

}  // namespace basisconv::cuda
