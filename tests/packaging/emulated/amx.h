// The eight tile registers of the matrix unit as arrays: what the kernels use of AMX, for processors without it.
// Reading a tile touches exactly its 16 rows of 64 bytes; using one that nobody configured ends the program.
#pragma once

namespace emulated {

struct Tiles {
  static constexpr int kRows = 16, kRowBytes = 64;
  uint8_t config[64];  // palette 0: not configured
  float at[8][kRows][kRowBytes / 4];

  float (*tile(int i)) [kRowBytes / 4] {
    uint16_t row_bytes;
    memcpy(&row_bytes, config + 16 + 2 * i, 2);
    if (config[0] != 1 || row_bytes != kRowBytes || config[48 + i] != kRows) abort();  // only whole tiles are emulated
    return at[i];
  } void configure(const void* from) {
    memcpy(config, from, sizeof(config));
    memset(at, 0, sizeof(at));
  }
  void zero(int i) { memset(tile(i), 0, sizeof(at[i])); }
  void load(int i, const void* from, int64_t stride) {
    float (*to)[kRowBytes / 4] = tile(i);
    for (int r = 0; r < kRows; r++) memcpy(to[r], static_cast<const char*>(from) + r * stride, kRowBytes);
  }
  void store(int i, void* to, int64_t stride) {
    float (*from)[kRowBytes / 4] = tile(i);
    for (int r = 0; r < kRows; r++) memcpy(static_cast<char*>(to) + r * stride, from[r], kRowBytes);
  }
  // sums[m][n] += Σ over quadruples of a[m][quadruple]·b[quadruple][n], whole numbers that wrap, of bytes with signs.
  void multiply_bytes(int sums, int a, int b) {
    for (int m = 0; m < kRows; m++) {
      for (int n = 0; n < kRowBytes / 4; n++) {
        uint32_t sum;
        memcpy(&sum, &tile(sums)[m][n], 4);
        for (int quadruple = 0; quadruple < kRowBytes / 4; quadruple++) {
          int8_t left[4], right[4];
          memcpy(left, &tile(a)[m][quadruple], 4);
          memcpy(right, &tile(b)[quadruple][n], 4);
          for (int i = 0; i < 4; i++) sum += static_cast<uint32_t>(left[i] * right[i]);
        }
        memcpy(&tile(sums)[m][n], &sum, 4);
      }
    }
  }
  // sums[m][n] += Σ over pairs of a[m][pair]·b[pair][n], both of a pair's bfloat16 products.
  void multiply(int sums, int a, int b) {
    float (*to)[kRowBytes / 4] = tile(sums);
    for (int m = 0; m < kRows; m++) {
      for (int pair = 0; pair < kRowBytes / 4; pair++) {
        float left[2];
        halves(tile(a)[m][pair], left);
        for (int n = 0; n < kRowBytes / 4; n++) {
          float right[2];
          halves(tile(b)[pair][n], right);
          to[m][n] += left[0] * right[0];
          to[m][n] += left[1] * right[1];
        }
      }
    }
  }

 private:
  static void halves(float pair, float* out) {
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    const uint32_t low = bits << 16, high = bits & 0xffff0000u;
    memcpy(out, &low, 4);
    memcpy(out + 1, &high, 4);
  }
};

inline thread_local Tiles tiles{};

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig(from) emulated::tiles.configure(from)
#define _tile_storeconfig(to) memcpy(to, emulated::tiles.config, 64)
#define _tile_release() memset(emulated::tiles.config, 0, 64)
#define _tile_zero(i) emulated::tiles.zero(i)
#define _tile_loadd(i, from, stride) emulated::tiles.load(i, from, stride)
#define _tile_stored(i, to, stride) emulated::tiles.store(i, to, stride)
#define _tile_dpbf16ps(sums, a, b) emulated::tiles.multiply(sums, a, b)
#define _tile_dpbssd(sums, a, b) emulated::tiles.multiply_bytes(sums, a, b)
