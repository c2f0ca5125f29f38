// AMX in plain C++, for programs that run without it: what amx_multiply.h uses, as Intel's manual describes it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <c10/util/BFloat16.h>

namespace emulated {

struct Tile {
  int rows = 0, bytes = 0;
  unsigned char data[16][64] = {};
};

inline Tile tiles[8];
inline bool configured = false;

inline void require(bool holds) {
  if (!holds) std::abort();
}

inline float value(const Tile& tile, int row, int element) {
  uint16_t bits;
  std::memcpy(&bits, tile.data[row] + 2 * element, sizeof bits);
  return static_cast<float>(c10::BFloat16(bits, c10::BFloat16::from_bits()));
}

}  // namespace emulated

inline void _tile_loadconfig(const void* from) {
  const unsigned char* config = static_cast<const unsigned char*>(from);
  emulated::require(config[0] == 1 && config[1] == 0);
  for (int i = 0; i < 8; ++i) {
    uint16_t bytes;
    std::memcpy(&bytes, config + 16 + 2 * i, sizeof bytes);
    emulated::require(bytes <= 64 && bytes % 4 == 0 && config[48 + i] <= 16);
    emulated::tiles[i] = {};
    emulated::tiles[i].rows = config[48 + i];
    emulated::tiles[i].bytes = bytes;
  }
  emulated::configured = true;
}

inline void _tile_release() { emulated::configured = false; }

inline void _tile_zero(int tile) {
  emulated::require(emulated::configured);
  std::memset(emulated::tiles[tile].data, 0, sizeof emulated::tiles[tile].data);
}

inline void _tile_loadd(int tile, const void* from, int64_t stride) {
  emulated::require(emulated::configured);
  emulated::Tile& to = emulated::tiles[tile];
  std::memset(to.data, 0, sizeof to.data);
  for (int r = 0; r < to.rows; ++r) {
    std::memcpy(to.data[r], static_cast<const unsigned char*>(from) + r * stride, static_cast<size_t>(to.bytes));
  }
}

inline void _tile_stored(int tile, void* to, int64_t stride) {
  const emulated::Tile& from = emulated::tiles[tile];
  for (int r = 0; r < from.rows; ++r) {
    std::memcpy(static_cast<unsigned char*>(to) + r * stride, from.data[r], static_cast<size_t>(from.bytes));
  }
}

// c (m, n) += a (m, 2 k) b (k, n) for pairs of elements.
inline void _tile_dpbf16ps(int c, int a, int b) {
  emulated::Tile &sums = emulated::tiles[c], &left = emulated::tiles[a], &right = emulated::tiles[b];
  emulated::require(emulated::configured && left.bytes / 4 == right.rows && sums.bytes == right.bytes && sums.rows == left.rows);
  for (int m = 0; m < sums.rows; ++m) {
    for (int k = 0; k < right.rows; ++k) {
      for (int n = 0; n < sums.bytes / 4; ++n) {
        float sum;
        std::memcpy(&sum, sums.data[m] + 4 * n, sizeof sum);
        for (int i = 0; i < 2; ++i) sum += emulated::value(left, m, 2 * k + i) * emulated::value(right, k, 2 * n + i);
        std::memcpy(sums.data[m] + 4 * n, &sum, sizeof sum);
      }
    }
  }
}
