// What packed weights begin with: a number that says what they were made for.
#pragma once
#include <cstdint>
#include <initializer_list>

namespace basisconv::cuda {

// FNV-1a over the bytes of these numbers, the lowest first.
inline uint64_t fnv1a(std::initializer_list<int64_t> values) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (const int64_t value : values) {
    for (int byte = 0; byte < 8; ++byte) {
      hash = (hash ^ (static_cast<uint64_t>(value) >> 8 * byte & 0xFF)) * 0x100000001b3ull;
    }
  }
  return hash;
}

}  // namespace basisconv::cuda
