// The product of rows that are rounded to bfloat16 with a panel in bfloat16, by AMX: tiles of 16 rows, 32 inputs and 16 outputs.
// A panel has the layout that a tile of weights needs: pairs of inputs in rows of outputs. Included after panel_kernels_impl.h.
#pragma once

#include <algorithm>
#include <cstdint>

namespace alignpro {
namespace {

// As the processor reads it: the bytes of a row, and the number of rows, of each tile.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[8] = {};
  uint8_t more_reserved[16] = {};
  uint8_t rows[8] = {};
  uint8_t still_more_reserved[8] = {};
};
static_assert(sizeof(TileShapes) == 64);

constexpr int64_t kTileRows = 16, kTileInputs = 32;

// As `PanelKernels::multiply_rounded`.
void multiply_amx(const float* x, int64_t stride, int64_t rows, const uint16_t* panel, int64_t depth, float* out, int64_t out_stride,
                  bool add, const uint16_t* next) {
  static_assert(kPanel == 32);
  alignas(64) uint16_t rounded[kTileRows * kMaxRoundedDepth];
  alignas(64) float products[kTileRows * kPanel];
  constexpr int64_t of_product = kPanel * sizeof(float), of_weights = 2 * kPanel * sizeof(uint16_t);  // bytes of a row
  const int64_t whole = depth / kTileInputs * kTileInputs, rest = depth - whole, of_row = depth * static_cast<int64_t>(sizeof(uint16_t));
  for (int64_t first = 0; first < rows; first += kTileRows, x += kTileRows * stride, out += kTileRows * out_stride) {
    const int64_t count = std::min(kTileRows, rows - first);
    for (int64_t r = 0; r < count; ++r) round_row(x + r * stride, depth, rounded + r * depth);
    // Tiles 0 and 1 are sums, 2 is of rows, 3 and 4 of weights, and 5, 6 and 7 likewise for what is left of the inputs.
    TileShapes shapes;
    for (int tile = 0; tile < 8; ++tile) {
      const bool of_rows = tile == 2 || tile == 5, sums = tile < 2, last = tile >= 5;
      if (last && rest == 0) continue;
      const int64_t inputs = last ? rest : kTileInputs;
      shapes.rows[tile] = static_cast<uint8_t>(sums || of_rows ? count : inputs / 2);
      shapes.bytes[tile] = static_cast<uint16_t>(of_rows ? 2 * inputs : 64);
    }
    _tile_loadconfig(&shapes);
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t k = 0; k < whole; k += kTileInputs) {
      _tile_loadd(2, rounded + k, of_row);
      _tile_loadd(3, panel + k * kPanel, of_weights);
      _tile_loadd(4, panel + k * kPanel + kPanel, of_weights);
      _tile_dpbf16ps(0, 2, 3);
      _tile_dpbf16ps(1, 2, 4);
      if (next != nullptr && first == 0) {
        for (int64_t i = k; i < k + kTileInputs; ++i) __builtin_prefetch(next + i * kPanel, 0, 2);
      }
    }
    if (rest != 0) {
      _tile_loadd(5, rounded + whole, of_row);
      _tile_loadd(6, panel + whole * kPanel, of_weights);
      _tile_loadd(7, panel + whole * kPanel + kPanel, of_weights);
      _tile_dpbf16ps(0, 5, 6);
      _tile_dpbf16ps(1, 5, 7);
    }
    _tile_stored(0, products, of_product);
    _tile_stored(1, products + kPanel / 2, of_product);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t j = 0; j < kPanel; ++j) {
        float& to = out[r * out_stride + j];
        to = add ? to + products[r * kPanel + j] : products[r * kPanel + j];
      }
    }
  }
  _tile_release();
}

}  // namespace
}  // namespace alignpro
