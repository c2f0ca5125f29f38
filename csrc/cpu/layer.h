// What a decoder layer computes of its rows beside attention, in float32: products with weights in panels of kPanel outputs,
// norms, rotations and gates. Compiled once for each instruction set and chosen at run time.
//
// A row's results are a function of that row alone, in an order of additions that nothing else changes: they are the same
// bits in every batch.
#pragma once

#include <cstdint>

namespace alignpro {

constexpr int64_t kPanel = 32;  // outputs, a multiple of twice every instruction set's lanes

struct LayerKernels {
  // out = x panel, or that added to it: x (rows, depth), its rows `stride` apart; panel (depth, kPanel); out (rows, kPanel),
  // its rows `out_stride` apart.
  void (*multiply)(const float* x, int64_t stride, int64_t rows, const float* panel, int64_t depth, float* out,
                   int64_t out_stride, bool add);
  // The same of x^T, for x (depth, rows).
  void (*multiply_transposed)(const float* x, int64_t stride, int64_t rows, const float* panel, int64_t depth, float* out,
                              int64_t out_stride, bool add);
  // A panel (inputs, kPanel) of weights (outputs, inputs) whose rows are `stride` apart; zeros beyond the outputs.
  void (*pack)(const float* weight, int64_t stride, int64_t outputs, int64_t inputs, float* panel);
  // out = x / sqrt(mean(x^2) + eps) (weight + offset), for a row of `dim`; out may be x.
  void (*normalise)(const float* x, const float* weight, int64_t dim, float eps, float offset, float* out);
  // Rotary position embedding in place, of the first `dim` elements of a head: pairs are half of them apart.
  void (*rotate)(float* x, const float* cos, const float* sin, int64_t dim);
  // gate = silu(gate) up
  void (*gate)(float* gate, const float* up, int64_t count);
};

extern const LayerKernels layer_kernels_generic;
#if defined(__x86_64__)
extern const LayerKernels layer_kernels_avx2;
extern const LayerKernels layer_kernels_avx512;
#endif

}  // namespace alignpro
