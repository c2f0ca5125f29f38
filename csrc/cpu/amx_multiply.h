// Products of rows and weights in bfloat16 by AMX, in blocks of 32 by 32: tiles of 16 rows of 64 bytes, which are 32 inputs of a
// row, or 16 outputs in float32. A panel has the layout that a tile of weights needs: pairs of inputs in rows of outputs.
//
// The head's weight is not packed. Its rows take the place of the rows there, and the states are packed into panels: a panel of
// states is much smaller than the weight, and what is transposed afterwards is a block of logits.
//
// Included after panel_kernels_impl.h.
#pragma once

#include <algorithm>
#include <cstdint>

namespace alignpro {
namespace {

// As the processor reads it: the bytes of a row, and the number of rows, of each tile.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[8] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t more_reserved[16] = {};
  uint8_t rows[8] = {16, 16, 16, 16, 16, 16, 16, 16};
  uint8_t still_more_reserved[8] = {};
};
static_assert(sizeof(TileShapes) == 64);

constexpr int64_t kTileRows = 16, kTileInputs = 32, kBlockRows = 2 * kTileRows;
constexpr int64_t kBytesOfPanel = 2 * kPanel * sizeof(uint16_t), kBytesOfProducts = kPanel * sizeof(float);  // of a row
static_assert(kPanel == 32);

// Panels whose products with the same rows are added.
struct NarrowPanels {
  const uint16_t* first;
  const uint16_t* second;  // or null
};

// Tiles 0 to 3 are sums: 0 and 1 of the first 16 rows, 2 and 3 of the others. Tiles 4 and 5 are of rows, 6 and 7 of a panel.
template <bool MoreRows>
__attribute__((always_inline)) inline void add_loaded_products() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (MoreRows) {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

template <bool MoreRows>
__attribute__((always_inline)) inline void load_rows(const uint16_t* x, int64_t stride) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(uint16_t));
  _tile_loadd(4, x, bytes);
  if constexpr (MoreRows) _tile_loadd(5, x + kTileRows * stride, bytes);
}

__attribute__((always_inline)) inline void load_panel(const uint16_t* panel) {
  _tile_loadd(6, panel, kBytesOfPanel);
  _tile_loadd(7, panel + kPanel, kBytesOfPanel);
}

// Adds the products of 32 inputs.
template <bool MoreRows>
__attribute__((always_inline)) inline void add_products(const NarrowRows& x, const NarrowPanels& panel) {
  load_panel(panel.first);
  load_rows<MoreRows>(x.first, x.stride);
  add_loaded_products<MoreRows>();
  if (panel.second != nullptr) {
    load_panel(panel.second);
    add_loaded_products<MoreRows>();
  }
  if (x.second != nullptr) {
    load_rows<MoreRows>(x.second, x.stride);
    add_loaded_products<MoreRows>();
  }
}

// Copies what is left of `count` rows and of a panel after whole tiles of inputs, and fills up with zeros.
struct LastInputs {
  alignas(64) uint16_t first[kBlockRows * kTileInputs], second[kBlockRows * kTileInputs];
  alignas(64) uint16_t panel[kTileInputs * kPanel], second_panel[kTileInputs * kPanel];
  static void copy(const uint16_t* from, int64_t stride, int64_t rows, int64_t count, int64_t width, uint16_t* to) {
    std::fill_n(to, rows * width, uint16_t{0});
    for (int64_t r = 0; r < rows; ++r) std::copy_n(from + r * stride, count, to + r * width);
  }
  NarrowRows rows(const NarrowRows& x, int64_t count, int64_t inputs) {
    copy(x.first, x.stride, count, inputs, kTileInputs, first);
    if (x.second != nullptr) copy(x.second, x.stride, count, inputs, kTileInputs, second);
    return {first, x.second == nullptr ? nullptr : second, kTileInputs};
  }
  NarrowPanels panels(const NarrowPanels& from, int64_t inputs) {
    const auto padded = [&](const uint16_t* part, uint16_t* to) {
      std::fill_n(std::copy_n(part, inputs * kPanel, to), (kTileInputs - inputs) * kPanel, uint16_t{0});
      return to;
    };
    return {padded(from.first, panel), from.second == nullptr ? nullptr : padded(from.second, second_panel)};
  }
};

// Tiles of fewer rows, for the last ones, do not read memory behind the last row. Configuring takes as long as many products.
class TileRows {
 public:
  ~TileRows() { _tile_release(); }
  // For up to 32 rows of a block.
  void configure(int64_t count) {
    if (count == count_) return;
    count_ = count;
    TileShapes shapes;
    const int64_t more = std::max<int64_t>(1, count - kTileRows);  // a tile of no rows would be an error
    for (const int tile : {0, 1, 4}) shapes.rows[tile] = static_cast<uint8_t>(std::min(count, kTileRows));
    for (const int tile : {2, 3, 5}) shapes.rows[tile] = static_cast<uint8_t>(more);
    _tile_loadconfig(&shapes);
  }

 private:
  int64_t count_ = 0;
};

// products (count, kPanel) = x panel, for as many rows as tiles are configured for: more than 16 with MoreRows.
template <bool MoreRows>
void multiply_block(const NarrowRows& x, int64_t count, const NarrowPanels& panel, int64_t depth, float* products,
                    int64_t stride) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (MoreRows) {
    _tile_zero(2);
    _tile_zero(3);
  }
  int64_t k = 0;
  for (; k + kTileInputs <= depth; k += kTileInputs) {
    const int64_t of_panel = k * kPanel;
    add_products<MoreRows>(x.at(0, k), {panel.first + of_panel, panel.second == nullptr ? nullptr : panel.second + of_panel});
  }
  if (k < depth) {
    LastInputs last;
    const int64_t of_panel = k * kPanel;
    const NarrowPanels rest{panel.first + of_panel, panel.second == nullptr ? nullptr : panel.second + of_panel};
    add_products<MoreRows>(last.rows(x.at(0, k), count, depth - k), last.panels(rest, depth - k));
  }
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  _tile_stored(0, products, bytes);
  _tile_stored(1, products + kTileRows, bytes);
  if constexpr (MoreRows) {
    _tile_stored(2, products + kTileRows * stride, bytes);
    _tile_stored(3, products + kTileRows * stride + kTileRows, bytes);
  }
}

inline void multiply_block(TileRows& tiles, const NarrowRows& x, int64_t count, const NarrowPanels& panel, int64_t depth,
                           float* products, int64_t stride) {
  const auto multiply = count > kTileRows ? multiply_block<true> : multiply_block<false>;
  tiles.configure(count);
  multiply(x, count, panel, depth, products, stride);
}

// As `PanelKernels::multiply_narrow`. Nothing is loaded ahead: the processor does that better, and requests for memory would have
// tiles wait.
void multiply_amx(const NarrowRows& x, int64_t rows, const uint16_t* panel, int64_t depth, float* out, int64_t out_stride, bool add,
                  const uint16_t*) {
  alignas(64) float products[kBlockRows * kPanel];
  TileRows tiles;
  for (int64_t first = 0; first < rows; first += kBlockRows, out += kBlockRows * out_stride) {
    const int64_t count = std::min(kBlockRows, rows - first);
    if (!add) {
      multiply_block(tiles, x.at(first, 0), count, {panel, nullptr}, depth, out, out_stride);
      continue;
    }
    multiply_block(tiles, x.at(first, 0), count, {panel, nullptr}, depth, products, kPanel);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t j = 0; j < kPanel; ++j) out[r * out_stride + j] += products[r * kPanel + j];
    }
  }
}

// out (columns, rows) with row stride `stride` = the transpose of products (rows, kPanel)
inline void store_transposed(const float* products, int64_t rows, int64_t columns, float* out, int64_t stride) {
  int64_t j = 0;
#if defined(__x86_64__)
  for (; j + 4 <= columns; j += 4) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      const float* from = products + r * kPanel + j;
      __m128 a = _mm_load_ps(from), b = _mm_load_ps(from + kPanel), c = _mm_load_ps(from + 2 * kPanel), d = _mm_load_ps(from + 3 * kPanel);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      float* to = out + j * stride + r;
      _mm_storeu_ps(to, a);
      _mm_storeu_ps(to + stride, b);
      _mm_storeu_ps(to + 2 * stride, c);
      _mm_storeu_ps(to + 3 * stride, d);
    }
    for (; r < rows; ++r) {
      for (int64_t i = j; i < j + 4; ++i) out[i * stride + r] = products[r * kPanel + i];
    }
  }
#endif
  for (; j < columns; ++j) {
    for (int64_t r = 0; r < rows; ++r) out[j * stride + r] = products[r * kPanel + j];
  }
}

// Packs up to kPanel rows into a panel, zero-padded beyond them.
inline void pack_narrow(const uint16_t* rows, int64_t stride, int64_t count, int64_t depth, uint16_t* panel) {
  for (int64_t k = 0; k < depth; k += 2, panel += 2 * kPanel) {
    for (int64_t j = 0; j < count; ++j) std::copy_n(rows + j * stride + k, 2, panel + 2 * j);
    std::fill_n(panel + 2 * count, 2 * (kPanel - count), uint16_t{0});
  }
}

// As `PanelKernels::dot_narrow`.
void dot_amx(const NarrowRows& x, int64_t rows, const uint16_t* w, int64_t outputs, int64_t depth, float* out, int64_t out_stride) {
  alignas(64) float products[kBlockRows * kPanel];
  TileRows tiles;
  thread_local std::vector<uint16_t> memory;
  const int64_t of_panel = depth * kPanel;
  if (static_cast<int64_t>(memory.size()) < 2 * of_panel) memory.resize(static_cast<size_t>(2 * of_panel));
  for (int64_t row = 0; row < rows; row += kPanel, out += kPanel * out_stride) {
    const int64_t columns = std::min(kPanel, rows - row);
    const NarrowRows from = x.at(row, 0);
    uint16_t *panel = memory.data(), *second = from.second == nullptr ? nullptr : panel + of_panel;
    pack_narrow(from.first, from.stride, columns, depth, panel);
    if (second != nullptr) pack_narrow(from.second, from.stride, columns, depth, second);
    for (int64_t j = 0; j < outputs; j += kBlockRows) {
      const int64_t count = std::min(kBlockRows, outputs - j);
      multiply_block(tiles, {w + j * depth, nullptr, depth}, count, {panel, second}, depth, products, kPanel);
      store_transposed(products, count, columns, out + j, out_stride);
    }
  }
}

}  // namespace
}  // namespace alignpro
