// The layer kernels, written once in terms of the vector lanes of `Isa`. See cpu_kernels_impl.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "exponential.h"
#include "panel_kernels.h"

namespace alignpro {
namespace {

using P = Isa::P;

// How a panel stores its weights: the number of inputs whose elements alternate, and how a vector of outputs is loaded for one
// of them.
template <typename Weight>
struct Stored;

template <>
struct Stored<float> {
  static constexpr int inputs = 1;
  static F load(const float* panel, int) { return Isa::load(panel); }
};

template <>
struct Stored<uint16_t> {
  static constexpr int inputs = 2;
  static F load(const uint16_t* panel, int input) {
    return input == 0 ? Isa::load_even_bfloat16(panel) : Isa::load_odd_bfloat16(panel);
  }
};

// Memory that the next products will read, of which each step of the present ones loads an equal part.
template <typename Weight>
struct Ahead {
  const Weight* from;  // null for none
  int64_t step;
};

// Multiplies R rows by two vectors of outputs, with all sums in registers.
template <int R, typename Weight, bool Transposed, bool Prefetch>
void multiply_rows(const float* x, int64_t stride, const Weight* panel, int64_t depth, float* out, int64_t out_stride, bool add,
                   Ahead<Weight> ahead) {
  constexpr int inputs = Stored<Weight>::inputs;
  F low[R], high[R];
  for (int r = 0; r < R; ++r) low[r] = high[r] = Isa::set(0);
  for (int64_t k = 0; k < depth; k += inputs, panel += inputs * kPanel) {
    if constexpr (Prefetch) __builtin_prefetch(ahead.from + k * ahead.step, 0, 2);
    for (int i = 0; i < inputs; ++i) {
      // The second input's weights are loaded again: with those of both in registers, there is no room for all sums.
      if (i > 0) asm("" : "+r"(panel));
      const F a = Stored<Weight>::load(panel, i), b = Stored<Weight>::load(panel + inputs * Isa::width, i);
      for (int r = 0; r < R; ++r) {
        const F scale = Isa::set(Transposed ? x[(k + i) * stride + r] : x[r * stride + k + i]);
        low[r] = Isa::fma(scale, a, low[r]);
        high[r] = Isa::fma(scale, b, high[r]);
      }
    }
  }
  for (int r = 0; r < R; ++r, out += out_stride) {
    Isa::store(out, add ? Isa::add(Isa::load(out), low[r]) : low[r]);
    Isa::store(out + Isa::width, add ? Isa::add(Isa::load(out + Isa::width), high[r]) : high[r]);
  }
}

// The same with rows in bfloat16, for panels in bfloat16: each step multiplies pairs of elements.
template <int R, typename Weight, bool Transposed, bool Prefetch>
void multiply_rows(const uint16_t* x, int64_t stride, const Weight* panel, int64_t depth, float* out, int64_t out_stride, bool add,
                   Ahead<Weight> ahead) {
  static_assert(!Transposed);
  F low[R], high[R];
  for (int r = 0; r < R; ++r) low[r] = high[r] = Isa::set(0);
  for (int64_t k = 0; k < depth; k += 2, panel += 2 * kPanel) {
    if constexpr (Prefetch) __builtin_prefetch(ahead.from + k * ahead.step, 0, 2);
    const P a = Isa::load_pairs(panel), b = Isa::load_pairs(panel + 2 * Isa::width);
    for (int r = 0; r < R; ++r) {
      const P pair = Isa::repeat_pair(x + r * stride + k);
      low[r] = Isa::dot_pairs(pair, a, low[r]);
      high[r] = Isa::dot_pairs(pair, b, high[r]);
    }
  }
  for (int r = 0; r < R; ++r, out += out_stride) {
    Isa::store(out, add ? Isa::add(Isa::load(out), low[r]) : low[r]);
    Isa::store(out + Isa::width, add ? Isa::add(Isa::load(out + Isa::width), high[r]) : high[r]);
  }
}

template <typename Input, typename Weight>
using MultiplyRows = void (*)(const Input*, int64_t, const Weight*, int64_t, float*, int64_t, bool, Ahead<Weight>);

template <typename Input, typename Weight, bool Transposed, bool Prefetch, int... R>
constexpr MultiplyRows<Input, Weight> multiply_rows_of(int64_t rows, std::integer_sequence<int, R...>) {
  constexpr MultiplyRows<Input, Weight> all[] = {multiply_rows<R + 1, Weight, Transposed, Prefetch>...};
  return all[rows - 1];
}

// A row in bfloat16: the nearest, or the even one of two; and in `second`, unless it is null, the rest.
inline void narrow_row(const float* x, int64_t depth, uint16_t* first, uint16_t* second) {
  const F zero = Isa::set(0), below = Isa::set(-1);
  int64_t k = 0;
  for (; k + Isa::width <= depth; k += Isa::width) {
    const F value = Isa::load(x + k);
    Isa::store_bfloat16(first + k, value);
    if (second == nullptr) continue;
    const F near = Isa::load_bfloat16(first + k);
    // 0 near is NaN for what is not finite, and the maximum is then the other argument.
    Isa::store_bfloat16(second + k, Isa::zero_where_less(Isa::sub(value, near), Isa::max(Isa::mul(zero, near), below), zero));
  }
  for (; k < depth; ++k) {
    const c10::BFloat16 near(x[k]);
    first[k] = near.x;
    if (second != nullptr) second[k] = c10::BFloat16(std::isfinite(static_cast<float>(near)) ? x[k] - static_cast<float>(near) : 0.0f).x;
  }
}

// Uses blocks of nearly equal numbers of rows, since a block of few rows costs almost as much as one of many.
template <typename Weight, bool Transposed, typename Input = float>
void multiply(const Input* x, int64_t stride, int64_t rows, const Weight* panel, int64_t depth, float* out, int64_t out_stride,
              bool add, const Weight* next) {
  constexpr int64_t most = Isa::product_rows, columns = 2 * Isa::width;
  constexpr auto counts = std::make_integer_sequence<int, most>();
  int64_t blocks = (rows + most - 1) / most;
  // What is read next is loaded during all passes over the panel, or the first few if there are many.
  int64_t passes = next == nullptr ? 0 : std::min(blocks * (kPanel / columns), kPanel / 4);
  Ahead<Weight> ahead{next, passes == 0 ? 0 : (kPanel + passes - 1) / passes};
  for (; blocks > 0; --blocks) {
    const int64_t count = (rows + blocks - 1) / blocks;
    for (int64_t j = 0; j < kPanel; j += columns) {
      const MultiplyRows<Input, Weight> block = passes-- > 0 ? multiply_rows_of<Input, Weight, Transposed, true>(count, counts)
                                                             : multiply_rows_of<Input, Weight, Transposed, false>(count, counts);
      block(x, stride, panel + Stored<Weight>::inputs * j, depth, out + j, out_stride, add, ahead);
      ahead.from += depth * ahead.step;
    }
    rows -= count;
    x += Transposed ? count : count * stride;
    out += count * out_stride;
  }
}

void multiply_narrow(const NarrowRows& x, int64_t rows, const uint16_t* panel, int64_t depth, float* out, int64_t out_stride, bool add,
                     const uint16_t* next) {
  multiply<uint16_t, false>(x.first, x.stride, rows, panel, depth, out, out_stride, add, next);
  if (x.second != nullptr) multiply<uint16_t, false>(x.second, x.stride, rows, panel, depth, out, out_stride, true, nullptr);
}

inline F load_weights(const float* p) { return Isa::load(p); }
inline F load_weights(const uint16_t* p) { return Isa::load_bfloat16(p); }
inline float widen(float weight) { return weight; }
inline float widen(uint16_t weight) { return static_cast<float>(c10::BFloat16(weight, c10::BFloat16::from_bits())); }

// Multiplies R rows of x by C rows of a: sums over lanes, then over what is left of a row.
template <int R, int C, typename Weight>
void project_block(const float* x, int64_t stride, const Weight* a, int64_t depth, float scale, float* out, int64_t out_stride) {
  F sums[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sums[r][c] = Isa::set(0);
  }
  int64_t k = 0;
  for (; k + Isa::width <= depth; k += Isa::width) {
    F from[R];
    for (int r = 0; r < R; ++r) from[r] = Isa::load(x + r * stride + k);
    for (int c = 0; c < C; ++c) {
      const F weight = load_weights(a + c * depth + k);
      for (int r = 0; r < R; ++r) sums[r][c] = Isa::fma(from[r], weight, sums[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      float sum = Isa::sum(sums[r][c]);
      for (int64_t j = k; j < depth; ++j) sum = __builtin_fmaf(x[r * stride + j], widen(a[c * depth + j]), sum);
      out[r * out_stride + c] = scale * sum;
    }
  }
}

template <int R, typename Weight>
void project_rows(const float* x, int64_t stride, const Weight* a, int64_t rank, int64_t depth, float scale, float* out,
                  int64_t out_stride) {
  int64_t c = 0;
  for (; c + 4 <= rank; c += 4) project_block<R, 4>(x, stride, a + c * depth, depth, scale, out + c, out_stride);
  for (; c < rank; ++c) project_block<R, 1>(x, stride, a + c * depth, depth, scale, out + c, out_stride);
}

template <typename Weight>
void project_all(const float* x, int64_t stride, int64_t rows, const Weight* a, int64_t rank, int64_t depth, float scale, float* out,
                 int64_t out_stride) {
  int64_t row = 0;
  for (; row + 3 <= rows; row += 3) {
    project_rows<3>(x + row * stride, stride, a, rank, depth, scale, out + row * out_stride, out_stride);
  }
  for (; row < rows; ++row) {
    project_rows<1>(x + row * stride, stride, a, rank, depth, scale, out + row * out_stride, out_stride);
  }
}

void project(const float* x, int64_t rows, const float* a, int64_t rank, int64_t depth, float scale, float* out) {
  project_all(x, depth, rows, a, rank, depth, scale, out, rank);
}

void dot_bfloat16(const float* x, int64_t stride, int64_t rows, const uint16_t* w, int64_t outputs, int64_t depth, float* out,
                  int64_t out_stride) {
  project_all(x, stride, rows, w, outputs, depth, 1.0f, out, out_stride);
}

// Multiplies a row, of which there is a second part or not, by C rows of w, all in bfloat16.
template <int C>
void dot_narrow_block(const uint16_t* x, const uint16_t* second, const uint16_t* w, int64_t depth, float* out) {
  F sums[C];
  for (int c = 0; c < C; ++c) sums[c] = Isa::set(0);
  int64_t k = 0;
  for (; k + 2 * Isa::width <= depth; k += 2 * Isa::width) {
    const P pairs = Isa::load_pairs(x + k), rest = second == nullptr ? pairs : Isa::load_pairs(second + k);
    for (int c = 0; c < C; ++c) {
      const P weights = Isa::load_pairs(w + c * depth + k);
      sums[c] = Isa::dot_pairs(pairs, weights, sums[c]);
      if (second != nullptr) sums[c] = Isa::dot_pairs(rest, weights, sums[c]);
    }
  }
  for (int c = 0; c < C; ++c) {
    float sum = Isa::sum(sums[c]);
    for (int64_t j = k; j < depth; ++j) {
      sum = __builtin_fmaf(widen(x[j]), widen(w[c * depth + j]), sum);
      if (second != nullptr) sum = __builtin_fmaf(widen(second[j]), widen(w[c * depth + j]), sum);
    }
    out[c] = sum;
  }
}

void dot_narrow(const NarrowRows& x, int64_t rows, const uint16_t* w, int64_t outputs, int64_t depth, float* out, int64_t out_stride) {
  constexpr int64_t columns = 8;
  for (int64_t c = 0, width; c < outputs; c += width) {
    width = c + columns <= outputs ? columns : 1;
    const auto block = width == columns ? dot_narrow_block<columns> : dot_narrow_block<1>;
    for (int64_t r = 0; r < rows; ++r) {
      const NarrowRows row = x.at(r, 0);
      block(row.first, row.second, w + c * depth, depth, out + r * out_stride + c);
    }
  }
}

int64_t dot_rows(int64_t rows) { return rows; }

void pack_dots(const uint16_t* x, int64_t rows, int64_t depth, uint16_t* to) { std::copy_n(x, rows * depth, to); }

void narrow_rows(const float* x, int64_t stride, int64_t rows, int64_t depth, uint16_t* first, uint16_t* second) {
  for (int64_t r = 0; r < rows; ++r) {
    narrow_row(x + r * stride, depth, first + r * depth, second == nullptr ? nullptr : second + r * depth);
  }
}

void pack(const float* weight, int64_t stride, int64_t outputs, int64_t inputs, float* panel) {
  int64_t k = 0;
#if defined(__x86_64__)
  if (outputs == kPanel) {
    for (; k + 4 <= inputs; k += 4) {
      for (int64_t j = 0; j < kPanel; j += 4) {
        const float* from = weight + j * stride + k;
        __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + stride);
        __m128 c = _mm_loadu_ps(from + 2 * stride), d = _mm_loadu_ps(from + 3 * stride);
        _MM_TRANSPOSE4_PS(a, b, c, d);
        float* to = panel + k * kPanel + j;
        _mm_storeu_ps(to, a);
        _mm_storeu_ps(to + kPanel, b);
        _mm_storeu_ps(to + 2 * kPanel, c);
        _mm_storeu_ps(to + 3 * kPanel, d);
      }
    }
  }
#endif
  for (; k < inputs; ++k) {
    for (int64_t j = 0; j < outputs; ++j) panel[k * kPanel + j] = weight[j * stride + k];
    for (int64_t j = outputs; j < kPanel; ++j) panel[k * kPanel + j] = 0;
  }
}

void rms_norm(const float* x, const float* weight, int64_t dim, float eps, float offset, float* out) {
  F squares = Isa::set(0);
  int64_t d = 0;
  for (; d + Isa::width <= dim; d += Isa::width) squares = Isa::fma(Isa::load(x + d), Isa::load(x + d), squares);
  float sum = Isa::sum(squares);
  for (; d < dim; ++d) sum = __builtin_fmaf(x[d], x[d], sum);
  const float by = 1.0f / std::sqrt(sum / static_cast<float>(dim) + eps);
  const F scale = Isa::set(by), more = Isa::set(offset);
  for (d = 0; d + Isa::width <= dim; d += Isa::width) {
    Isa::store(out + d, Isa::mul(Isa::mul(Isa::load(x + d), scale), Isa::add(Isa::load(weight + d), more)));
  }
  for (; d < dim; ++d) out[d] = x[d] * by * (weight[d] + offset);
}

void rotate(float* x, const float* cos, const float* sin, int64_t dim) {
  const int64_t half = dim / 2;
  float* y = x + half;
  int64_t d = 0;
  for (; d + Isa::width <= half; d += Isa::width) {
    const F a = Isa::load(x + d), b = Isa::load(y + d);
    const F minus = Isa::sub(Isa::set(0), Isa::load(sin + d));
    Isa::store(x + d, Isa::fma(b, minus, Isa::mul(a, Isa::load(cos + d))));
    Isa::store(y + d, Isa::fma(a, Isa::load(sin + half + d), Isa::mul(b, Isa::load(cos + half + d))));
  }
  for (; d < half; ++d) {
    const float a = x[d], b = y[d];
    x[d] = __builtin_fmaf(b, -sin[d], a * cos[d]);
    y[d] = __builtin_fmaf(a, sin[half + d], b * cos[half + d]);
  }
}

void gate(float* gate, const float* up, int64_t count) {
  const F one = Isa::set(1), largest = Isa::set(88);
  for (int64_t j = 0; j < count; j += Isa::width) {
    const F g = Isa::load(gate + j);
    const F e = exponential(Isa::min(largest, Isa::sub(Isa::set(0), g)));
    Isa::store(gate + j, Isa::mul(Isa::div(g, Isa::add(one, e)), Isa::load(up + j)));
  }
}

constexpr PanelKernels kPanelKernels = {multiply<float, false>,
                                        multiply<uint16_t, false>,
                                        multiply_narrow,
                                        192,
                                        multiply<float, true>,
                                        project,
                                        dot_bfloat16,
                                        narrow_rows,
                                        dot_narrow,
                                        false,
                                        pack_dots,
                                        dot_rows,
                                        pack,
                                        rms_norm,
                                        rotate,
                                        gate};

}  // namespace
}  // namespace alignpro
