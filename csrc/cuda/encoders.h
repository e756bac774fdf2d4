// The bits and numbers by which Hopper's tensor cores and copy engine are told where things lie. No CPU run can see
// whether they are right, so each is a host function of its own, compared with golden values in
// tests/cuda_on_cpu/test_encoders.py.
//
// All matrices in shared memory are rows of 32, 64 or 128 bytes, K-major: one row a filter or pixel, channels along it.
// They are swizzled, so that eight rows at one column lie in different banks: in units of 16 bytes, the column is XORed
// with the low bits of the row; for rows shorter than 128 bytes, of the 128-byte line that the row lies in.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define BASISCONV_HOST_DEVICE __host__ __device__
#else
#define BASISCONV_HOST_DEVICE
#endif

namespace basisconv::cuda {

// Byte offset in a tile that starts at a multiple of 1024 → the offset at which it lies.
BASISCONV_HOST_DEVICE constexpr uint32_t swizzled(uint32_t offset, int row_bytes) {
  return offset ^ ((offset >> 3) & static_cast<uint32_t>(row_bytes - 16));
}

// The shared-memory operand of wgmma: K-major rows of 32, 64 or 128 bytes with the swizzle of that width.
//   bits 0-13 address / 16 · 16-29 leading offset (without meaning here: 1) · 32-45 bytes between groups of eight rows
//   / 16 · 62-63 swizzle: 1 = 128, 2 = 64, 3 = 32 bytes
BASISCONV_HOST_DEVICE constexpr uint64_t wgmma_descriptor(uint32_t shared_address, int row_bytes) {
  const uint64_t swizzle = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
  const uint64_t eight_rows = static_cast<uint64_t>(row_bytes) * 8 / 16;
  return (static_cast<uint64_t>(shared_address) >> 4 & 0x3FFF) | 1ull << 16 | eight_rows << 32 | swizzle << 62;
}

// The same without a swizzle: two columns of 16 bytes, each with its rows one behind the other, `apart` bytes between
// them.
//   bits 16-29 from column to column / 16 · 32-45 from eight rows to the next eight / 16 · 62-63 0
BASISCONV_HOST_DEVICE constexpr uint64_t wgmma_descriptor_of_columns(uint32_t shared_address, int apart) {
  constexpr uint64_t eight_rows = 8;
  return (static_cast<uint64_t>(shared_address) >> 4 & 0x3FFF) | static_cast<uint64_t>(apart) / 16 << 16 |
         eight_rows << 32;
}

// What cuTensorMapEncodeTiled is asked for: 16-bit elements, rank 4, innermost first, boxes of 64 elements with the
// 128-byte swizzle, zeros outside.
struct TensorMapRequest {
  const void* base;
  bool is_bf16;
  uint64_t size[4];    // elements
  uint64_t stride[3];  // bytes, of dimensions 1..3
  uint32_t box[4];     // elements
};

// The map of a channels_last image [N, H, W, C] with strides in elements, and boxes of 64 channels of `rows` x
// `columns` pixels of so many images.
inline TensorMapRequest image_map(const void* base, bool is_bf16, int64_t N, int64_t H, int64_t W, int64_t C,
                                  int64_t stride_n, int64_t stride_h, int64_t stride_w, int rows, int columns,
                                  int images = 1) {
  TensorMapRequest map{};
  map.base = base;
  map.is_bf16 = is_bf16;
  const int64_t sizes[] = {C, W, H, N}, strides[] = {stride_w, stride_h, stride_n};
  const int boxes[] = {64, columns, rows, images};
  for (int i = 0; i < 4; ++i) map.size[i] = static_cast<uint64_t>(sizes[i]);
  for (int i = 0; i < 3; ++i) map.stride[i] = static_cast<uint64_t>(strides[i]) * 2;
  for (int i = 0; i < 4; ++i) map.box[i] = static_cast<uint32_t>(boxes[i]);
  return map;
}

// Why the copy engine cannot serve a request; null where it can.
inline const char* reason_against(const TensorMapRequest& map) {
  if (reinterpret_cast<uintptr_t>(map.base) % 16 != 0) return "the image does not start at a multiple of 16 bytes";
  for (int i = 0; i < 4; ++i) {
    if (map.size[i] == 0 || map.size[i] > 1ull << 32) return "a side of the image is 0 or above 2^32";
    if (map.box[i] == 0 || map.box[i] > 256) return "a side of the box is not 1..256";
  }
  for (int i = 0; i < 3; ++i) {
    if (map.stride[i] == 0 || map.stride[i] % 16 != 0) return "pixels do not lie multiples of 16 bytes apart";
    if (map.stride[i] >= 1ull << 40) return "a stride of the image is 2^40 bytes or more";
  }
  return nullptr;
}

}  // namespace basisconv::cuda
