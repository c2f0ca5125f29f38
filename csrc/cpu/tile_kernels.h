// Statistics, gradient and sampling of one tile of logits (rows by columns of the vocabulary) while it is in the cache.
// Plain C++ without ATen, compiled once per instruction set; the version is chosen at run time.
#pragma once

#include <cstdint>

namespace alignpro {

// How logits u = W h become z = softcap tanh((u + bias) / softcap) / tau.
struct LogitsTile {
  int64_t rows;
  int64_t columns;             // of the vocabulary; a row of the tile has `stride` elements
  int64_t stride;              // a multiple of 16
  float softcap;               // 0 for none
  const float* inverse_tau;    // (rows), or null for 1
};

// Statistics of each row over the columns of a tile: m = max z, s = sum e^(z-m), a = sum e^(z-m) (z-m). With a reference,
// whose logits are w, also m_r and s_r likewise, and b = sum e^(z-m) ((z-m) - (w-m_r)). Each is (rows).
struct Partials {
  float* m;
  float* s;
  float* a;
  float* m_r;
  float* s_r;
  float* b;
};

// Inputs of the gradient; each is (rows of the chunk). dz = alpha (delta - p) - eta p (log p + H)
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

// The best entry of each row so far, by noisy logit; ties go to the lower index.
struct Best {
  float* noisy;
  float* logit;
  int64_t* index;
};

struct TileKernels {
  // Turns u into z in place (columns beyond the vocabulary become -inf) and computes the sums. `reference` may be null.
  void (*statistics)(float* logits, float* reference, const LogitsTile&, const float* bias, const float* reference_bias,
                     const Partials&);
  // Writes the gradient of rows active[0..rows) of the chunk (null: 0..rows) to `du`, (rows, stride), contiguously.
  // `shape.inverse_tau` and the upstream inputs are indexed by the chunk's rows; target (chunk) is relative to the tile's
  // first column. Adds column sums to `bias_gradient` unless it is null.
  void (*gradient)(const float* logits, const float* reference, const LogitsTile&, const int64_t* active, const int64_t* target,
                   const Upstream&, float* du, float* bias_gradient);
  // Samples by Gumbel-max among the columns, which start at vocabulary index `first`; greedy rows get no noise.
  void (*sample)(float* logits, const LogitsTile&, const float* bias, const int64_t* seeds, const bool* greedy, int64_t first,
                 const Partials&, const Best&);
};

}  // namespace alignpro
