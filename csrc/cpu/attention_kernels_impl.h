// The attention kernels, written once in terms of the vector lanes of `Isa`. See cpu_kernels_impl.h.
//
// Products are computed in tiles of 4, 2 or 1 rows, with the lanes along the head dimension. For the scores, a tile has
// `width` (row, key) pairs and ends in one reduction of that many sums. The order of additions for a pair is the same in
// every tile, whatever other rows and keys the tile contains.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>

#include "attention_kernels.h"
#include "exponential.h"

namespace alignpro {
namespace {

constexpr int kRowTile = 4;
constexpr int64_t kScoreStride = kKeyBlock + kLanes;  // a tile may write past the last key

inline float upcast(uint16_t x, Element element) {
  return element == Element::kBFloat16 ? static_cast<float>(c10::BFloat16(x, c10::BFloat16::from_bits()))
                                       : static_cast<float>(c10::Half(x, c10::Half::from_bits()));
}

void upcast_row(const void* from, Element element, float* to, int64_t count, int64_t stride) {
  int64_t i = 0;
  if (element == Element::kFloat) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
    i = count;
  } else {
    const uint16_t* bits = static_cast<const uint16_t*>(from);
    if (element == Element::kBFloat16) {
      for (; i + Isa::width <= count; i += Isa::width) Isa::store(to + i, Isa::load_bfloat16(bits + i));
    } else {
      for (; i + Isa::width <= count; i += Isa::width) Isa::store(to + i, Isa::load_half(bits + i));
    }
    for (; i < count; ++i) to[i] = upcast(bits[i], element);
  }
  for (; i < stride; ++i) to[i] = 0;
}

// Pointers to a block's keys or values, indexed relative to the block: entries [first, last), then the last one repeated.
class BlockRows {
 public:
  // `wide` is a buffer (kKeyBlock, stride) for entries that cannot be read directly as whole vectors of floats.
  BlockRows(const HeadKeys& keys, int64_t begin, int64_t first, int64_t last, int64_t stride, float* wide)
      : keys_(keys), first_(first), last_(last), stride_(stride), wide_(wide),
        direct_(keys.element == Element::kFloat && keys.head_dim % Isa::width == 0) {
    int64_t page = (begin + first) / keys.page_size, slot = (begin + first) % keys.page_size;
    for (int64_t j = first; j < last;) {
      const char* key = keys.pages + keys.table[page++] * keys.page_stride + slot * keys.slot_stride;
      const int64_t end = std::min(last, j + keys.page_size - slot);
      for (; j < end; ++j, key += keys.slot_stride) from_[j] = key;
      slot = 0;
    }
  }

  const float* const* keys() { return read(0); }
  const float* const* values() { return read(keys_.value_offset); }

 private:
  const float* const* read(int64_t offset) {
    for (int64_t j = first_; j < last_; ++j) {
      if (direct_) {
        at_[j] = reinterpret_cast<const float*>(from_[j] + offset);
      } else {
        upcast_row(from_[j] + offset, keys_.element, wide_ + j * stride_, keys_.head_dim, stride_);
        at_[j] = wide_ + j * stride_;
      }
    }
    for (int64_t j = last_; j < last_ + Isa::width; ++j) at_[j] = at_[last_ - 1];
    return at_;
  }

  const HeadKeys& keys_;
  int64_t first_, last_, stride_;
  float* wide_;
  bool direct_;
  const char* from_[kKeyBlock];
  const float* at_[kKeyBlock + kLanes];
};

// Computes the scores of R rows and keys [first, last), and of a few keys beyond, into s (R, kScoreStride).
template <int R>
void score_tile(const float* const* keys, int64_t first, int64_t last, const float* query, int64_t dim, int64_t stride,
                float* s) {
  constexpr int K = Isa::width / R;
  for (int64_t j = first; j < last; j += K) {
    F sums[Isa::width];
    for (int i = 0; i < Isa::width; ++i) sums[i] = Isa::set(0);
    const float* key[K];
    for (int k = 0; k < K; ++k) key[k] = keys[j + k];
    for (int64_t d = 0; d < dim; d += Isa::width) {
      F q[R];
      for (int r = 0; r < R; ++r) q[r] = Isa::load(query + r * stride + d);
      for (int k = 0; k < K; ++k) {
        const F x = Isa::load(key[k] + d);
        for (int r = 0; r < R; ++r) sums[r * K + k] = Isa::fma(q[r], x, sums[r * K + k]);
      }
    }
    const F total = Isa::sums(sums);
    if constexpr (R == 1) {
      Isa::store(s + j, total);
    } else {
      alignas(64) float pairs[Isa::width];
      Isa::store(pairs, total);
      for (int r = 0; r < R; ++r) std::memcpy(s + r * kScoreStride + j, pairs + r * K, K * sizeof(float));
    }
  }
}

// Adds p[r, j] value[j] over the keys [first, last), for R rows and V vectors along the head dimension.
template <int R, int V>
void value_columns(const float* const* values, int64_t first, int64_t last, const float* p, float* o, int64_t stride,
                   int64_t d) {
  F sums[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sums[r][v] = Isa::load(o + r * stride + d + v * Isa::width);
  }
  for (int64_t j = first; j < last; ++j) {
    F x[V];
    for (int v = 0; v < V; ++v) x[v] = Isa::load(values[j] + d + v * Isa::width);
    for (int r = 0; r < R; ++r) {
      const F weight = Isa::set(p[r * kScoreStride + j]);
      for (int v = 0; v < V; ++v) sums[r][v] = Isa::fma(weight, x[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) Isa::store(o + r * stride + d + v * Isa::width, sums[r][v]);
  }
}

template <int R, int V = Isa::accumulators / R>
void value_tile(const float* const* values, int64_t first, int64_t last, const float* p, float* o, int64_t dim, int64_t stride,
                int64_t d = 0) {
  if (first >= last) return;
  for (; d + V * Isa::width <= dim; d += V * Isa::width) value_columns<R, V>(values, first, last, p, o, stride, d);
  if constexpr (V > 1) {
    if (d < dim) value_tile<R, V / 2>(values, first, last, p, o, dim, stride, d);
  }
}

// The keys of a block that the rows see, relative to the start of the block.
struct VisibleKeys {
  const int64_t* first;
  const int64_t* last;
  int64_t begin, end;
  int64_t from(int64_t r) const { return std::clamp(first[r], begin, end) - begin; }
  int64_t to(int64_t r) const { return std::max(std::clamp(last[r], begin, end) - begin, from(r)); }
};

template <int R>
void score_rows(const float* const* keys, const VisibleKeys& seen, int64_t row, const AttentionQueries& rows, int64_t dim,
                float* s) {
  int64_t first = kKeyBlock, last = 0;
  for (int64_t r = row; r < row + R; ++r) {
    if (seen.from(r) == seen.to(r)) continue;
    first = std::min(first, seen.from(r));
    last = std::max(last, seen.to(r));
  }
  score_tile<R>(keys, first, last, rows.query + row * rows.stride, dim, rows.stride, s + row * kScoreStride);
}

// Keys that only some of the rows see are processed row by row: 0 times a non-finite value would be NaN.
template <int R>
void value_rows(const float* const* values, const VisibleKeys& seen, int64_t row, const SoftmaxState& sums, int64_t dim,
                int64_t stride, const float* p) {
  int64_t first = 0, last = kKeyBlock;
  for (int64_t r = row; r < row + R; ++r) {
    first = std::max(first, seen.from(r));
    last = std::min(last, seen.to(r));
  }
  const auto one = [&](int64_t r, int64_t from, int64_t to) {
    value_tile<1>(values, from, to, p + r * kScoreStride, sums.o + r * stride, dim, stride);
  };
  if (first >= last) {
    for (int64_t r = row; r < row + R; ++r) one(r, seen.from(r), seen.to(r));
    return;
  }
  for (int64_t r = row; r < row + R; ++r) one(r, seen.from(r), first);
  value_tile<R>(values, first, last, p + row * kScoreStride, sums.o + row * stride, dim, stride);
  for (int64_t r = row; r < row + R; ++r) one(r, last, seen.to(r));
}

// Turns scores into e^(score - m), 0 for unseen keys. Writes each row's e^(m - m') to `rescale` (count) and updates l.
void online_softmax(const VisibleKeys& seen, const AttentionQueries& rows, const SoftmaxState& sums, float* s, float* rescale,
                    float* added) {
  const F scale = Isa::set(rows.scale);
  for (int64_t r = 0; r < rows.count; ++r, s += kScoreStride) {
    const int64_t from = seen.from(r), to = seen.to(r);
    rescale[r] = added[r] = 0;
    if (from == to) continue;
    const int64_t begin = from / Isa::width * Isa::width, end = (to + Isa::width - 1) / Isa::width * Isa::width;
    for (int64_t j = begin; j < end; j += Isa::width) {
      const F x = Isa::mul(Isa::load(s + j), scale);
      Isa::store(s + j, rows.softcap == 0 ? x : cap(x, rows.softcap));
    }
    for (int64_t j = begin; j < from; ++j) s[j] = -kInfinity;
    for (int64_t j = to; j < end; ++j) s[j] = -kInfinity;
    F top = Isa::set(sums.m[r]);
    for (int64_t j = begin; j < end; j += Isa::width) top = Isa::max(top, Isa::load(s + j));
    const float largest = Isa::largest(top);
    const F m = Isa::set(finite(largest));
    F sum = Isa::set(0);
    for (int64_t j = begin; j < end; j += Isa::width) {
      const F e = exponential(Isa::sub(Isa::load(s + j), m));
      Isa::store(s + j, e);
      sum = Isa::add(sum, e);
    }
    rescale[r] = sums.m[r] - finite(largest);
    added[r] = Isa::sum(sum);
    sums.m[r] = largest;
  }
  for (int64_t r = 0; r < rows.count; r += Isa::width) Isa::store(rescale + r, exponential(Isa::load(rescale + r)));
  // An explicit fma, so that there is exactly one rounding however the compiler schedules it.
  for (int64_t r = 0; r < rows.count; ++r) sums.l[r] = __builtin_fmaf(sums.l[r], rescale[r], added[r]);
}

void rescale_rows(const SoftmaxState& sums, int64_t count, int64_t stride, const float* rescale) {
  for (int64_t r = 0; r < count; ++r) {
    if (rescale[r] == 1) continue;
    const F by = Isa::set(rescale[r]);
    float* o = sums.o + r * stride;
    for (int64_t d = 0; d < stride; d += Isa::width) Isa::store(o + d, Isa::mul(Isa::load(o + d), by));
  }
}

void merge(const SoftmaxState& into, const SoftmaxState& from, int64_t count, int64_t stride) {
  for (int64_t r = 0; r < count; ++r) {
    if (from.l[r] == 0) continue;
    const float m = into.m[r] > from.m[r] ? into.m[r] : from.m[r];
    const F a = into.l[r] == 0 ? Isa::set(0) : exponential(Isa::set(into.m[r] - m));
    const F b = exponential(Isa::set(from.m[r] - m));
    float* o = into.o + r * stride;
    const float* p = from.o + r * stride;
    for (int64_t d = 0; d < stride; d += Isa::width) {
      Isa::store(o + d, Isa::fma(a, Isa::load(o + d), Isa::mul(b, Isa::load(p + d))));
    }
    // All lanes are equal.
    into.l[r] = Isa::largest(Isa::fma(a, Isa::set(into.l[r]), Isa::mul(b, Isa::set(from.l[r]))));
    into.m[r] = m;
  }
}

int64_t padded_rows(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

int64_t scratch(int64_t count, int64_t stride) {
  return padded_rows(count) * (kScoreStride + 2) + kKeyBlock * stride;
}

void attend(const HeadKeys& keys, const AttentionQueries& rows, const SoftmaxState& sums, int64_t begin, int64_t end,
            float* space) {
  const int64_t dim = (keys.head_dim + Isa::width - 1) / Isa::width * Isa::width;
  float* wide = space;
  float* rescale = wide + kKeyBlock * rows.stride;
  float* added = rescale + padded_rows(rows.count);
  float* s = added + padded_rows(rows.count);
  std::fill(rescale, added, 0.0f);
  for (; begin < end; begin += kKeyBlock) {
    const VisibleKeys seen{rows.first, rows.last, begin, std::min(begin + kKeyBlock, end)};
    int64_t first = kKeyBlock, last = 0;
    for (int64_t r = 0; r < rows.count; ++r) {
      if (seen.from(r) == seen.to(r)) continue;
      first = std::min(first, seen.from(r));
      last = std::max(last, seen.to(r));
    }
    if (first >= last) continue;
    BlockRows entries(keys, begin, first, last, rows.stride, wide);
    const float* const* at = entries.keys();
    int64_t r = 0;
    for (; r + kRowTile <= rows.count; r += kRowTile) score_rows<kRowTile>(at, seen, r, rows, dim, s);
    for (; r + 2 <= rows.count; r += 2) score_rows<2>(at, seen, r, rows, dim, s);
    if (r < rows.count) score_rows<1>(at, seen, r, rows, dim, s);

    online_softmax(seen, rows, sums, s, rescale, added);
    rescale_rows(sums, rows.count, rows.stride, rescale);

    at = entries.values();
    for (r = 0; r + kRowTile <= rows.count; r += kRowTile) value_rows<kRowTile>(at, seen, r, sums, dim, rows.stride, s);
    for (; r + 2 <= rows.count; r += 2) value_rows<2>(at, seen, r, sums, dim, rows.stride, s);
    if (r < rows.count) value_rows<1>(at, seen, r, sums, dim, rows.stride, s);
  }
}

constexpr AttentionKernels kAttentionKernels = {scratch, attend, merge, upcast_row};

}  // namespace
}  // namespace alignpro
