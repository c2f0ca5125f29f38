// The row-wise parts of a decoder layer (everything but attention), in float32: products with weights in panels of kPanel
// outputs, norms, rotations and gates. Compiled once per instruction set; the version is chosen at run time.
//
// Weights may be stored in bfloat16, as uint16_t. They are widened in registers, which is exact: products with them have the
// bits of products with the same weights in float32. Or the rows are in bfloat16 as well (`NarrowRows`) and pairs of elements are
// multiplied, for which some processors have an instruction; elsewhere it is computed in float32, in the same order. In a panel,
// the elements of two inputs alternate, so that one load serves both: input k of output j is at (k / 2, j, k % 2), and the number
// of inputs is even.
//
// A row's results depend only on that row, with a fixed order of additions: they have the same bits in every batch.
#pragma once

#include <cstdint>

namespace alignpro {

constexpr int64_t kPanel = 32;  // outputs, a multiple of twice every instruction set's lanes

// Rows (rows, depth) in bfloat16: `first` are rounded, and `second` is what rounding took away, rounded as well. Without the
// second part (null) a row has 8 significant bits, with it 16.
struct NarrowRows {
  const uint16_t* first;
  const uint16_t* second;
  int64_t stride;
  NarrowRows at(int64_t row, int64_t column) const {
    const int64_t offset = row * stride + column;
    return {first + offset, second == nullptr ? nullptr : second + offset, stride};
  }
};

struct PanelKernels {
  // out = x panel, or out += x panel with `add`: x (rows, depth) with row stride `stride`; panel (depth, kPanel); out (rows,
  // kPanel) with row stride `out_stride`. Meanwhile, loads a part of `next` into the cache, unless it is null: a panel that is
  // multiplied afterwards.
  void (*multiply)(const float* x, int64_t stride, int64_t rows, const float* panel, int64_t depth, float* out,
                   int64_t out_stride, bool add, const float* next);
  // The same with a panel in bfloat16, for an even depth.
  void (*multiply_bfloat16)(const float* x, int64_t stride, int64_t rows, const uint16_t* panel, int64_t depth, float* out,
                            int64_t out_stride, bool add, const uint16_t* next);
  // The same with x in bfloat16, for an even depth. A sum over more inputs than `narrow_depth` should be made in parts.
  void (*multiply_narrow)(const NarrowRows& x, int64_t rows, const uint16_t* panel, int64_t depth, float* out, int64_t out_stride,
                          bool add, const uint16_t* next);
  int64_t narrow_depth;
  // The same as `multiply` with x^T, for x (depth, rows).
  void (*multiply_transposed)(const float* x, int64_t stride, int64_t rows, const float* panel, int64_t depth, float* out,
                              int64_t out_stride, bool add, const float* next);
  // out (rows, rank) = scale x a^T: x (rows, depth); a (rank, depth), which is not packed.
  void (*project)(const float* x, int64_t rows, const float* a, int64_t rank, int64_t depth, float scale, float* out);
  // out (rows, outputs) = x w^T: x (rows, depth) with row stride `stride`; w (outputs, depth) in bfloat16, which is not packed.
  void (*dot_bfloat16)(const float* x, int64_t stride, int64_t rows, const uint16_t* w, int64_t outputs, int64_t depth, float* out,
                       int64_t out_stride);
  // first, second (rows, depth) = the parts of x as `NarrowRows` has them: x (rows, depth) with row stride `stride`. Without `second`
  // (null), the first one only. What is not finite is so in the first part alone.
  void (*narrow_rows)(const float* x, int64_t stride, int64_t rows, int64_t depth, uint16_t* first, uint16_t* second);
  // out (rows, outputs) = x w^T: x (rows, depth) as `pack_dots` makes it, and w (outputs, depth) in bfloat16, which is not packed.
  void (*dot_narrow)(const NarrowRows& x, int64_t rows, const uint16_t* w, int64_t outputs, int64_t depth, float* out,
                     int64_t out_stride);
  bool dots_of_many;  // whether `dot_narrow` is as fast as packing w, however many rows there are
  // Makes one part of the rows (rows, depth) for `dot_narrow`. It takes the memory of `dot_rows` rows.
  void (*pack_dots)(const uint16_t* x, int64_t rows, int64_t depth, uint16_t* to);
  int64_t (*dot_rows)(int64_t rows);
  // Packs weights (outputs, inputs) with row stride `stride` into a panel (inputs, kPanel), zero-padded beyond the outputs.
  // Two elements in bfloat16 are packed as one.
  void (*pack)(const float* weight, int64_t stride, int64_t outputs, int64_t inputs, float* panel);
  // out = x / sqrt(mean(x^2) + eps) (weight + offset), for a row of `dim` elements; out may alias x.
  void (*rms_norm)(const float* x, const float* weight, int64_t dim, float eps, float offset, float* out);
  // Applies the rotary position embedding in place to the first `dim` elements of a head; pairs are dim / 2 apart.
  void (*rotate)(float* x, const float* cos, const float* sin, int64_t dim);
  // gate = silu(gate) up
  void (*gate)(float* gate, const float* up, int64_t count);
};

}  // namespace alignpro
