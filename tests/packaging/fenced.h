// Arrays between pages that may not be touched, and seeded numbers: for programs that test kernels without torch.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

// `count` elements with a forbidden page right behind them, or right before; all bytes in reach are 0xff.
template <typename T>
class Fenced {
 public:
  Fenced(int64_t count, bool fence_behind) : bytes_(static_cast<size_t>(count) * sizeof(T)) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    open_ = (bytes_ + page - 1) / page * page;
    whole_ = open_ + 2 * page;
    void* memory = mmap(nullptr, whole_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    whole_at_ = static_cast<char*>(memory);
    open_at_ = whole_at_ + page;
    if (open_ > 0 && mprotect(open_at_, open_, PROT_READ | PROT_WRITE) != 0) std::abort();
    if (open_ > 0) std::memset(open_at_, 0xff, open_);
    data_ = fence_behind ? open_at_ + open_ - bytes_ : open_at_;
  }
  Fenced(const std::vector<T>& values, bool fence_behind) : Fenced(static_cast<int64_t>(values.size()), fence_behind) {
    if (bytes_ > 0) std::memcpy(data_, values.data(), bytes_);
  }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  ~Fenced() { munmap(whole_at_, whole_); }

  T* data() { return reinterpret_cast<T*>(data_); }

  // Whether the bytes in reach on the side without a fence are as they were.
  bool untouched_beside() const {
    for (const char* byte = open_at_; byte < open_at_ + open_; byte++) {
      if ((byte < data_ || byte >= data_ + bytes_) && *byte != static_cast<char>(0xff)) return false;
    }
    return true;
  }

 private:
  size_t bytes_, open_, whole_;
  char *whole_at_, *open_at_, *data_;
};

struct Random {
  std::mt19937 bits;
  int64_t between(int64_t least, int64_t most) { return least + static_cast<int64_t>(bits() % (most - least + 1)); }
  bool coin() { return (bits() & 1) != 0; }
};
