// Sixteen lanes with AVX-512 (F, DQ, VL, BW), and the arithmetic of AVX512_BF16 if ALIGNPRO_AVX512_BF16 is defined. All code up
// to isa_end.h is compiled for these, and may use AMX if ALIGNPRO_AMX is defined.
#pragma once

#include "shared_includes.h"

#if defined(__clang__) && defined(ALIGNPRO_AMX)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,amx-tile,amx-bf16,avx2,fma"))), apply_to = function)
#elif defined(__clang__) && defined(ALIGNPRO_AVX512_BF16)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,avx2,fma"))), apply_to = function)
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#if defined(ALIGNPRO_AMX)
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,amx-tile,amx-bf16,avx2,fma")
#elif defined(ALIGNPRO_AVX512_BF16)
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,avx2,fma")
#else
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#endif
#endif

#include "gumbel.h"

namespace alignpro {
namespace {

struct Isa {
  static constexpr int width = 16;
  static constexpr int accumulators = 16;  // leaves enough registers for the operands
  static constexpr int product_rows = 12;   // by two vectors, likewise
  using F = __m512;
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F set(float v) { return _mm512_set1_ps(v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }  // returns b if either is NaN
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F scale(F a, F n) { return _mm512_scalef_ps(a, n); }
  static F zero_where_less(F a, F x, F bound) {
    return _mm512_mask_mov_ps(a, _mm512_cmp_ps_mask(x, bound, _CMP_LT_OQ), _mm512_setzero_ps());
  }
  static unsigned greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }
  static float largest(F a) { return _mm512_reduce_max_ps(a); }
  // Lane i is the sum over the lanes of a[i], in the same order for all i.
  static F sums(const F* a) {
    F quads[4];  // 128-bit part p of quads[k]: the sums over part p of a[4 k], a[4 k + 1], a[4 k + 2], a[4 k + 3]
    for (int k = 0; k < 4; ++k) {
      const F even = halves(a[4 * k], a[4 * k + 1]), odd = halves(a[4 * k + 2], a[4 * k + 3]);
      const __m512d x = _mm512_castps_pd(even), y = _mm512_castps_pd(odd);
      quads[k] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    return parts(parts(quads[0], quads[1]), parts(quads[2], quads[3]));
  }
  static F load_bfloat16(const uint16_t* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  // The even and the odd ones of 2 width elements.
  static F load_even_bfloat16(const uint16_t* p) { return first_of(load_pairs(p)); }
  static F load_odd_bfloat16(const uint16_t* p) { return second_of(load_pairs(p)); }
  static void store_bfloat16(uint16_t* p, F v) {
#if defined(ALIGNPRO_AVX512_BF16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
#else
    const __m512i x = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    const __m512i even = _mm512_add_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(0x7FFF)), odd);  // ties to even
    const __m512i quiet = _mm512_or_si512(x, _mm512_set1_epi32(0x400000));
    const __m512i high = _mm512_mask_mov_epi32(even, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(high, 16)));
#endif
  }
  // Pairs of elements in bfloat16, two of each lane.
  using P = __m512i;
  static P load_pairs(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static P repeat_pair(const uint16_t* p) {
    int both;
    std::memcpy(&both, p, sizeof both);
    return _mm512_set1_epi32(both);
  }
  // c + a b, summed over each lane's pair: the second element first.
  static F dot_pairs(P a, P b, F c) {
#if defined(ALIGNPRO_AVX512_BF16)
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
    return fma(first_of(a), first_of(b), fma(second_of(a), second_of(b), c));
#endif
  }
  static F load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F noise_complement(uint64_t seed, int64_t first) {
    const __m256i low = complement(seed, first), high = complement(seed, first + 8);
    return _mm512_cvtepi32_ps(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  }
  static F bits(F a) { return _mm512_cvtepi32_ps(_mm512_castps_si512(a)); }

 private:
  static F first_of(P a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
  static F second_of(P a) { return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)))); }
  static F halves(F a, F b) { return add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
  static F parts(F a, F b) {
    return add(_mm512_shuffle_f32x4(a, b, _MM_SHUFFLE(2, 0, 2, 0)), _mm512_shuffle_f32x4(a, b, _MM_SHUFFLE(3, 1, 3, 1)));
  }
  static __m256i complement(uint64_t seed, int64_t first) {
    const uint64_t start = seed + (static_cast<uint64_t>(first) + 1) * kGamma;
    const __m512i lanes = _mm512_set_epi64(
        static_cast<int64_t>(7 * kGamma), static_cast<int64_t>(6 * kGamma), static_cast<int64_t>(5 * kGamma),
        static_cast<int64_t>(4 * kGamma), static_cast<int64_t>(3 * kGamma), static_cast<int64_t>(2 * kGamma),
        static_cast<int64_t>(kGamma), 0);
    __m512i z = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(start)), lanes);
    z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 30)), _mm512_set1_epi64(static_cast<int64_t>(kMix1)));
    z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 27)), _mm512_set1_epi64(static_cast<int64_t>(kMix2)));
    z = _mm512_xor_si512(z, _mm512_srli_epi64(z, 31));
    return _mm512_cvtepi64_epi32(_mm512_srli_epi64(_mm512_xor_si512(z, _mm512_set1_epi64(-1)), 33));
  }
};

}  // namespace
}  // namespace alignpro
