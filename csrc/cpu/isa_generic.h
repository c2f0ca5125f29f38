// Eight lanes in plain C++, vectorised by the compiler where it can.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstring>

#include "gumbel.h"

namespace alignpro {
namespace {

struct Isa {
  static constexpr int width = 8;
  static constexpr int accumulators = 8;
  static constexpr int product_rows = 4;   // by two vectors
  struct F {
    float x[width];
  };
  template <typename Op>
  static F each(Op op) {
    F r;
    for (int i = 0; i < width; ++i) r.x[i] = op(i);
    return r;
  }
  static F load(const float* p) {
    F r;
    std::memcpy(r.x, p, sizeof r.x);
    return r;
  }
  static void store(float* p, F v) { std::memcpy(p, v.x, sizeof v.x); }
  static F set(float v) { return each([&](int) { return v; }); }
  static F add(F a, F b) { return each([&](int i) { return a.x[i] + b.x[i]; }); }
  static F sub(F a, F b) { return each([&](int i) { return a.x[i] - b.x[i]; }); }
  static F mul(F a, F b) { return each([&](int i) { return a.x[i] * b.x[i]; }); }
  static F div(F a, F b) { return each([&](int i) { return a.x[i] / b.x[i]; }); }
  static F fma(F a, F b, F c) { return each([&](int i) { return a.x[i] * b.x[i] + c.x[i]; }); }
  // As on x86, returns b if either is NaN.
  static F max(F a, F b) { return each([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; }); }
  static F min(F a, F b) { return each([&](int i) { return a.x[i] < b.x[i] ? a.x[i] : b.x[i]; }); }
  static F round(F a) { return each([&](int i) { return std::nearbyint(a.x[i]); }); }
  static F scale(F a, F n) { return each([&](int i) { return std::ldexp(a.x[i], static_cast<int>(n.x[i])); }); }
  static F zero_where_less(F a, F x, F bound) {
    return each([&](int i) { return x.x[i] < bound.x[i] ? 0.0f : a.x[i]; });
  }
  static unsigned greater(F a, F b) {
    unsigned mask = 0;
    for (int i = 0; i < width; ++i) mask |= static_cast<unsigned>(a.x[i] > b.x[i]) << i;
    return mask;
  }
  static float sum(F a) {
    return ((a.x[0] + a.x[4]) + (a.x[2] + a.x[6])) + ((a.x[1] + a.x[5]) + (a.x[3] + a.x[7]));
  }
  static float largest(F a) {
    float r = a.x[0];
    for (int i = 1; i < width; ++i) r = a.x[i] > r ? a.x[i] : r;
    return r;
  }
  // Lane i is the sum over the lanes of a[i], in the same order for all i.
  static F sums(const F* a) { return each([&](int i) { return sum(a[i]); }); }
  static F load_bfloat16(const uint16_t* p) {
    return each([&](int i) { return static_cast<float>(c10::BFloat16(p[i], c10::BFloat16::from_bits())); });
  }
  // The even and the odd ones of 2 width elements.
  static F load_even_bfloat16(const uint16_t* p) {
    return each([&](int i) { return static_cast<float>(c10::BFloat16(p[2 * i], c10::BFloat16::from_bits())); });
  }
  static F load_odd_bfloat16(const uint16_t* p) { return load_even_bfloat16(p + 1); }
  static F load_half(const uint16_t* p) {
    return each([&](int i) { return static_cast<float>(c10::Half(p[i], c10::Half::from_bits())); });
  }
  static void store_bfloat16(uint16_t* p, F v) {
    for (int i = 0; i < width; ++i) p[i] = c10::BFloat16(v.x[i]).x;
  }
  // Pairs of elements in bfloat16, two of each lane.
  struct P {
    uint16_t x[2 * width];
  };
  static P load_pairs(const uint16_t* p) {
    P r;
    std::memcpy(r.x, p, sizeof r.x);
    return r;
  }
  static P repeat_pair(const uint16_t* p) {
    P r;
    for (int i = 0; i < 2 * width; ++i) r.x[i] = p[i % 2];
    return r;
  }
  // c + a b, summed over each lane's pair: the second element first, as vdpbf16ps has it.
  static F dot_pairs(P a, P b, F c) {
    c = fma(load_odd_bfloat16(a.x), load_odd_bfloat16(b.x), c);
    return fma(load_even_bfloat16(a.x), load_even_bfloat16(b.x), c);
  }
  // The top 31 bits of the complement of each lane's hash, as floats.
  static F noise_complement(uint64_t seed, int64_t first) {
    return each([&](int i) { return static_cast<float>(~splitmix64(seed, first + i) >> 33); });
  }
  static F bits(F a) {
    return each([&](int i) {
      int32_t b;
      std::memcpy(&b, &a.x[i], sizeof b);
      return static_cast<float>(b);
    });
  }
};

}  // namespace
}  // namespace alignpro
