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
#include <limits>

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

// Weights that are multiplied next, in lines of 64 bytes: 32 lines for each 32 inputs.
//
// The processor loads too few lines ahead by itself, and a tile that waits for memory keeps what follows from beginning. So lines
// are requested three steps ahead and brought into L1 two steps ahead, which takes little more than reading them.
struct LinesAhead {
  const uint16_t* from;  // the weights of the first step
  int64_t line, step;    // elements from a line to the next one, and from a step to the next one
  int64_t steps;         // of these weights
  const uint16_t* next;  // the weights after them, laid out alike, or null
  const uint16_t* at(int64_t index) const {
    if (index < steps) return from + index * step;
    return next == nullptr || index - steps >= steps ? nullptr : next + (index - steps) * step;
  }
  void load(int64_t present) const {
    if (from == nullptr) return;
    const uint16_t *wanted = at(present + 3), *needed = at(present + 2);
    for (int64_t i = 0; wanted != nullptr && i < kBlockRows; ++i) __builtin_prefetch(wanted + i * line, 0, 2);
    for (int64_t i = 0; needed != nullptr && i < kBlockRows; ++i) static_cast<void>(static_cast<const volatile uint16_t*>(needed)[i * line]);
  }
};

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
                    int64_t stride, const LinesAhead& ahead) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (MoreRows) {
    _tile_zero(2);
    _tile_zero(3);
  }
  int64_t k = 0;
  for (; k + kTileInputs <= depth; k += kTileInputs) {
    const int64_t of_panel = k * kPanel;
    ahead.load(k / kTileInputs);
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
                           float* products, int64_t stride, const LinesAhead& ahead) {
  const auto multiply = count > kTileRows ? multiply_block<true> : multiply_block<false>;
  tiles.configure(count);
  multiply(x, count, panel, depth, products, stride, ahead);
}

// As `PanelKernels::multiply_narrow`.
void multiply_amx(const NarrowRows& x, int64_t rows, const uint16_t* panel, int64_t depth, float* out, int64_t out_stride, bool add,
                  const uint16_t* next) {
  alignas(64) float products[kBlockRows * kPanel];
  TileRows tiles;
  LinesAhead ahead{panel, kTileInputs, kTileInputs * kPanel, depth / kTileInputs, next};
  for (int64_t first = 0; first < rows; first += kBlockRows, out += kBlockRows * out_stride) {
    const int64_t count = std::min(kBlockRows, rows - first);
    float* to = add ? products : out;
    multiply_block(tiles, x.at(first, 0), count, {panel, nullptr}, depth, to, add ? kPanel : out_stride, ahead);
    ahead.from = nullptr;  // the panel is in the cache
    if (!add) continue;
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

// As `PanelKernels::dot_rows`: whole panels.
int64_t dot_rows_amx(int64_t rows) { return (rows + kPanel - 1) / kPanel * kPanel; }

// As `PanelKernels::pack_dots`: panels of kPanel rows, one after another.
void pack_dots_amx(const uint16_t* x, int64_t rows, int64_t depth, uint16_t* to) {
  for (int64_t row = 0; row < rows; row += kPanel) {
    // Two elements are packed as one.
    pack(reinterpret_cast<const float*>(x + row * depth), depth / 2, std::min(kPanel, rows - row), depth / 2,
         reinterpret_cast<float*>(to + row * depth));
  }
}

// As `PanelKernels::dot_narrow`. For a block of the weight's rows, all panels of states are read.
void dot_amx(const NarrowRows& x, int64_t rows, const uint16_t* w, int64_t outputs, int64_t depth, float* out, int64_t out_stride) {
  alignas(64) float products[kBlockRows * kPanel];
  TileRows tiles;
  for (int64_t j = 0; j < outputs; j += kBlockRows) {
    const int64_t count = std::min(kBlockRows, outputs - j);
    const uint16_t* weights = w + j * depth;
    // With the first panel, all lines of the block and the first ones of the next one, if they are whole blocks.
    const uint16_t* next = j + 2 * kBlockRows <= outputs && rows <= kPanel ? weights + kBlockRows * depth : nullptr;
    LinesAhead ahead{count == kBlockRows ? weights : nullptr, depth, kTileInputs, depth / kTileInputs, next};
    for (int64_t row = 0; row < rows; row += kPanel) {
      const NarrowPanels panels{x.first + row * depth, x.second == nullptr ? nullptr : x.second + row * depth};
      multiply_block(tiles, {weights, nullptr, depth}, count, panels, depth, products, kPanel, ahead);
      ahead.from = nullptr;
      store_transposed(products, count, std::min(kPanel, rows - row), out + row * out_stride + j, out_stride);
    }
  }
}

constexpr PanelKernels with_amx() {
  PanelKernels kernels = kPanelKernels;
  kernels.multiply_narrow = multiply_amx;
  kernels.narrow_depth = std::numeric_limits<int64_t>::max();  // a block's sums stay in tiles
  kernels.dot_narrow = dot_amx;
  kernels.dots_of_many = true;
  kernels.pack_dots = pack_dots_amx;
  kernels.dot_rows = dot_rows_amx;
  return kernels;
}

constexpr PanelKernels kAmxKernels = with_amx();

}  // namespace
}  // namespace alignpro
