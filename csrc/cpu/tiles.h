// One tile of logits, some rows by some columns of the vocabulary, while it is in the cache: statistics, gradient, sample.
// Plain C++ without ATen, compiled once for each instruction set and chosen at run time.
#pragma once

#include <cstdint>

namespace alignpro {

// How logits u = W h become z = softcap tanh((u + bias) / softcap) / tau.
struct Shape {
  int64_t rows;
  int64_t columns;             // of the vocabulary; the tile has room for `stride` a row
  int64_t stride;              // a multiple of 16
  float softcap;               // 0 for none
  const float* inverse_tau;    // (rows), or null for 1
};

// Of each row, over the columns of a tile: m = max z, s = sum e^(z-m), a = sum e^(z-m) (z-m); with a reference, whose
// logits are w: m_r, s_r likewise and b = sum e^(z-m) ((z-m) - (w-m_r)). Each is (rows).
struct Partials {
  float* m;
  float* s;
  float* a;
  float* m_r;
  float* s_r;
  float* b;
};

// What the gradient of a row needs; each is (rows of the chunk). dz = alpha (delta - p) - eta p (log p + H)
// + kappa p (log p - log q - KL), then du = dz (1 - tanh^2) / tau. Coefficients may be null, for zero.
struct Upstream {
  const float* m;
  const float* log_s;
  const float* m_r;
  const float* log_s_r;
  const float* entropy;
  const float* kl;
  const float* alpha;
  const float* eta;
  const float* kappa;
};

// The best of each row so far, by noisy logit; ties go to the lower index.
struct Best {
  float* noisy;
  float* logit;
  int64_t* index;
};

struct TileKernels {
  const char* name;
  // Turns u into z in place (columns beyond the vocabulary become -inf) and sums. `reference` may be null.
  void (*statistics)(float* logits, float* reference, const Shape&, const float* bias, const float* reference_bias,
                     const Partials&);
  // Rows active[0..rows) of the chunk (null: 0..rows) into `du`, (rows, stride), one after another; `shape.inverse_tau`
  // and `upstream` go by the chunk's rows. target (chunk) counts from the tile's first column. Adds column sums to
  // `bias_gradient` unless null.
  void (*gradient)(const float* logits, const float* reference, const Shape&, const int64_t* active, const int64_t* target,
                   const Upstream&, float* du, float* bias_gradient);
  // Samples by Gumbel-max among the columns, which begin at `first` of the vocabulary; greedy rows take no noise.
  void (*sample)(float* logits, const Shape&, const float* bias, const int64_t* seeds, const bool* greedy, int64_t first,
                 const Partials&, const Best&);
};

extern const TileKernels tile_kernels_generic;
#if defined(__x86_64__)
extern const TileKernels tile_kernels_avx2;
extern const TileKernels tile_kernels_avx512;
#endif

}  // namespace alignpro
