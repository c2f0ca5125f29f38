// Eight lanes in two registers of NEON, which every aarch64 processor has.
#pragma once

#include <arm_neon.h>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "gumbel.h"

namespace alignpro {
namespace {

struct Isa {
  static constexpr int width = 8;
  static constexpr int accumulators = 8;  // leaves enough registers for the operands
  static constexpr int product_rows = 6;   // by two vectors, likewise
  using F = float32x4x2_t;
  template <typename Op>
  static F halves(Op op) {
    return {op(0), op(1)};
  }
  static F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static void store(float* p, F v) {
    vst1q_f32(p, v.val[0]);
    vst1q_f32(p + 4, v.val[1]);
  }
  static F set(float v) { return {vdupq_n_f32(v), vdupq_n_f32(v)}; }
  static F add(F a, F b) { return halves([&](int i) { return vaddq_f32(a.val[i], b.val[i]); }); }
  static F sub(F a, F b) { return halves([&](int i) { return vsubq_f32(a.val[i], b.val[i]); }); }
  static F mul(F a, F b) { return halves([&](int i) { return vmulq_f32(a.val[i], b.val[i]); }); }
  static F div(F a, F b) { return halves([&](int i) { return vdivq_f32(a.val[i], b.val[i]); }); }
  static F fma(F a, F b, F c) { return halves([&](int i) { return vfmaq_f32(c.val[i], a.val[i], b.val[i]); }); }
  // As on x86, returns b if either is NaN.
  static F max(F a, F b) { return halves([&](int i) { return vbslq_f32(vcgtq_f32(a.val[i], b.val[i]), a.val[i], b.val[i]); }); }
  static F min(F a, F b) { return halves([&](int i) { return vbslq_f32(vcltq_f32(a.val[i], b.val[i]), a.val[i], b.val[i]); }); }
  static F round(F a) { return halves([&](int i) { return vrndnq_f32(a.val[i]); }); }
  static F scale(F a, F n) {
    return halves([&](int i) {
      const int32x4_t exponent = vshlq_n_s32(vcvtnq_s32_f32(n.val[i]), 23);
      return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a.val[i]), exponent));
    });
  }
  static F zero_where_less(F a, F x, F bound) {
    return halves([&](int i) { return vbslq_f32(vcltq_f32(x.val[i], bound.val[i]), vdupq_n_f32(0), a.val[i]); });
  }
  static unsigned greater(F a, F b) {
    const uint32x4_t bit = {1, 2, 4, 8};
    const unsigned low = vaddvq_u32(vandq_u32(vcgtq_f32(a.val[0], b.val[0]), bit));
    return low | vaddvq_u32(vandq_u32(vcgtq_f32(a.val[1], b.val[1]), bit)) << 4;
  }
  static float sum(F a) { return vaddvq_f32(vaddq_f32(a.val[0], a.val[1])); }
  static float largest(F a) {
    const float32x4_t both = vbslq_f32(vcgtq_f32(a.val[1], a.val[0]), a.val[1], a.val[0]);
    float x[4], r;
    vst1q_f32(x, both);
    r = x[0];
    for (int i = 1; i < 4; ++i) r = x[i] > r ? x[i] : r;
    return r;
  }
  // Lane i is the sum over the lanes of a[i], in the same order for all i.
  static F sums(const F* a) { return {four_sums(a), four_sums(a + 4)}; }
  static F load_bfloat16(const uint16_t* p) {
    const uint16x8_t x = vld1q_u16(p);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(x), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(x, 16))};
  }
  // The even and the odd ones of 2 width elements.
  static F load_even_bfloat16(const uint16_t* p) { return first_of(load_pairs(p)); }
  static F load_odd_bfloat16(const uint16_t* p) { return second_of(load_pairs(p)); }
  static void store_bfloat16(uint16_t* p, F v) {
    uint16x4_t high[2];
    for (int i = 0; i < 2; ++i) {
      const uint32x4_t x = vreinterpretq_u32_f32(v.val[i]), odd = vandq_u32(vshrq_n_u32(x, 16), vdupq_n_u32(1));
      const uint32x4_t even = vaddq_u32(vaddq_u32(x, vdupq_n_u32(0x7FFF)), odd);  // ties to even
      const uint32x4_t number = vceqq_f32(v.val[i], v.val[i]);
      high[i] = vshrn_n_u32(vbslq_u32(number, even, vorrq_u32(x, vdupq_n_u32(0x400000))), 16);
    }
    vst1q_u16(p, vcombine_u16(high[0], high[1]));
  }
  // Pairs of elements in bfloat16, two of each lane.
  using P = uint32x4x2_t;
  static P load_pairs(const uint16_t* p) { return {vreinterpretq_u32_u16(vld1q_u16(p)), vreinterpretq_u32_u16(vld1q_u16(p + 8))}; }
  static P repeat_pair(const uint16_t* p) {
    uint32_t both;
    std::memcpy(&both, p, sizeof both);
    return {vdupq_n_u32(both), vdupq_n_u32(both)};
  }
  // c + a b, summed over each lane's pair: the second element first.
  static F dot_pairs(P a, P b, F c) { return fma(first_of(a), first_of(b), fma(second_of(a), second_of(b), c)); }
  static F load_half(const uint16_t* p) {
    return halves([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
  }
  // The top 31 bits of the complement of each lane's hash, as floats.
  static F noise_complement(uint64_t seed, int64_t first) {
    uint32_t top[8];
    for (int i = 0; i < 8; ++i) top[i] = static_cast<uint32_t>(~splitmix64(seed, first + i) >> 33);
    return {vcvtq_f32_u32(vld1q_u32(top)), vcvtq_f32_u32(vld1q_u32(top + 4))};
  }
  static F bits(F a) { return halves([&](int i) { return vcvtq_f32_s32(vreinterpretq_s32_f32(a.val[i])); }); }

 private:
  static F first_of(P a) { return halves([&](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(a.val[i], 16)); }); }
  static F second_of(P a) {
    return halves([&](int i) { return vreinterpretq_f32_u32(vandq_u32(a.val[i], vdupq_n_u32(0xFFFF0000u))); });
  }
  static float32x4_t four_sums(const F* a) {
    const auto both = [&](int i) { return vaddq_f32(a[i].val[0], a[i].val[1]); };
    return vpaddq_f32(vpaddq_f32(both(0), both(1)), vpaddq_f32(both(2), both(3)));
  }
};

}  // namespace
}  // namespace alignpro
