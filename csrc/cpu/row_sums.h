// The statistics of rows, merged from those of their tiles; see `Partials`.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "tile_kernels.h"

namespace alignpro {
namespace {

// Returns where the sums of a tile from `row` on are stored, in data (3, or 6 with a reference; tiles, rows).
inline Partials partials_at(float* data, int64_t tiles, int64_t rows, bool reference, int64_t tile, int64_t row) {
  const auto at = [&](int64_t which) { return data + (which * tiles + tile) * rows + row; };
  if (!reference) return {at(0), at(1), at(2), nullptr, nullptr, nullptr};
  return {at(0), at(1), at(2), at(3), at(4), at(5)};
}

// Sums over tiles, in float64 and in order.
struct RowSums {
  double m = -std::numeric_limits<double>::infinity(), s = 0, a = 0, m_r = m, s_r = 0, b = 0;
  double log_s() const { return std::log(s); }
  double log_s_r() const { return std::log(s_r); }
  double entropy() const { return log_s() - a / s; }
  double kl() const { return b / s - log_s() + log_s_r(); }
};

// Merges the partial sums (3 or 6, tiles, rows) of one row.
inline RowSums merge_tiles(const float* data, int64_t tiles, int64_t rows, bool reference, int64_t row) {
  const auto value = [&](int64_t which, int64_t tile) { return static_cast<double>(data[(which * tiles + tile) * rows + row]); };
  RowSums r;
  for (int64_t t = 0; t < tiles; ++t) {
    r.m = std::max(r.m, value(0, t));
    if (reference) r.m_r = std::max(r.m_r, value(3, t));
  }
  for (int64_t t = 0; t < tiles; ++t) {
    // A tile with only -inf contributes nothing; its own sums are relative to 0. A NaN shows in s.
    const double shift = value(0, t) - r.m, s = value(1, t);
    const bool empty = value(0, t) == -std::numeric_limits<double>::infinity() && !std::isnan(s);
    const double scale = empty ? 0 : std::exp(shift), d = empty ? 0 : shift;
    r.s += scale * s;
    r.a += scale * (value(2, t) + d * s);
    if (!reference) continue;
    const double shift_r = value(3, t) - r.m_r, s_r = value(4, t);
    const bool empty_r = value(3, t) == -std::numeric_limits<double>::infinity() && !std::isnan(s_r);
    const double d_r = empty_r ? 0 : shift_r;
    r.s_r += empty_r ? 0 : std::exp(shift_r) * s_r;
    r.b += scale * (value(5, t) + (d - d_r) * s);
  }
  return r;
}

}  // namespace
}  // namespace alignpro
