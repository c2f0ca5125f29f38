// Eight lanes with AVX2, FMA and F16C. All code up to isa_end.h is compiled for these.
#pragma once

#include "shared_includes.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "gumbel.h"

namespace alignpro {
namespace {

struct Isa {
  static constexpr int width = 8;
  static constexpr int accumulators = 8;  // leaves enough registers for the operands
  static constexpr int product_rows = 6;   // by two vectors, likewise
  using F = __m256;
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F set(float v) { return _mm256_set1_ps(v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }  // returns b if either is NaN
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F scale(F a, F n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent));
  }
  static F zero_where_less(F a, F x, F bound) { return _mm256_andnot_ps(_mm256_cmp_ps(x, bound, _CMP_LT_OQ), a); }
  static unsigned greater(F a, F b) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
  }
  static float sum(F a) {
    __m128 r = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    r = _mm_add_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
  }
  static float largest(F a) {
    __m128 r = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    r = _mm_max_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_max_ss(r, _mm_movehdup_ps(r)));
  }
  // Lane i is the sum over the lanes of a[i], in the same order for all i.
  static F sums(const F* a) {
    F quads[2];  // 128-bit part p of quads[k]: the sums over part p of a[4 k], a[4 k + 1], a[4 k + 2], a[4 k + 3]
    for (int k = 0; k < 2; ++k) {
      const F even = halves(a[4 * k], a[4 * k + 1]), odd = halves(a[4 * k + 2], a[4 * k + 3]);
      const __m256d x = _mm256_castps_pd(even), y = _mm256_castps_pd(odd);
      quads[k] = add(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
    }
    return add(_mm256_permute2f128_ps(quads[0], quads[1], 0x20), _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
  }
  static F load_bfloat16(const uint16_t* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  // The even and the odd ones of 2 width elements. A mask for the odd ones would take a register that the sums need.
  static F load_even_bfloat16(const uint16_t* p) { return first_of(load_pairs(p)); }
  static F load_odd_bfloat16(const uint16_t* p) { return second_of(load_pairs(p)); }
  static void store_bfloat16(uint16_t* p, F v) {
    const __m256i x = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
    const __m256i even = _mm256_add_epi32(_mm256_add_epi32(x, _mm256_set1_epi32(0x7FFF)), odd);  // ties to even
    const __m256i quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(even), _mm256_castsi256_ps(quiet), nan)), 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
  }
  // Pairs of elements in bfloat16, two of each lane.
  using P = __m256i;
  static P load_pairs(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static P repeat_pair(const uint16_t* p) {
    int both;
    std::memcpy(&both, p, sizeof both);
    return _mm256_set1_epi32(both);
  }
  // c + a b, summed over each lane's pair: the second element first, as vdpbf16ps has it.
  static F dot_pairs(P a, P b, F c) { return fma(first_of(a), first_of(b), fma(second_of(a), second_of(b), c)); }
  static F load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F noise_complement(uint64_t seed, int64_t first) {
    const __m256i low = complement(seed, first), high = complement(seed, first + 4);
    // The low halves of eight 64-bit lanes, in order.
    const __m256i both = _mm256_castps_si256(
        _mm256_shuffle_ps(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high), _MM_SHUFFLE(2, 0, 2, 0)));
    return _mm256_cvtepi32_ps(_mm256_permute4x64_epi64(both, _MM_SHUFFLE(3, 1, 2, 0)));
  }
  static F bits(F a) { return _mm256_cvtepi32_ps(_mm256_castps_si256(a)); }

 private:
  static F first_of(P a) { return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)); }
  static F second_of(P a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_srli_epi32(a, 16), 16)); }
  static F halves(F a, F b) { return add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); }
  static __m256i multiply(__m256i a, uint64_t constant) {
    const __m256i b = _mm256_set1_epi64x(static_cast<int64_t>(constant));
    const __m256i low = _mm256_mul_epu32(a, b);
    const __m256i cross = _mm256_add_epi64(_mm256_mul_epu32(_mm256_srli_epi64(a, 32), b),
                                           _mm256_mul_epu32(a, _mm256_srli_epi64(b, 32)));
    return _mm256_add_epi64(low, _mm256_slli_epi64(cross, 32));
  }
  static __m256i complement(uint64_t seed, int64_t first) {
    const uint64_t start = seed + (static_cast<uint64_t>(first) + 1) * kGamma;
    __m256i z = _mm256_add_epi64(
        _mm256_set1_epi64x(static_cast<int64_t>(start)),
        _mm256_set_epi64x(static_cast<int64_t>(3 * kGamma), static_cast<int64_t>(2 * kGamma),
                          static_cast<int64_t>(kGamma), 0));
    z = multiply(_mm256_xor_si256(z, _mm256_srli_epi64(z, 30)), kMix1);
    z = multiply(_mm256_xor_si256(z, _mm256_srli_epi64(z, 27)), kMix2);
    z = _mm256_xor_si256(z, _mm256_srli_epi64(z, 31));
    return _mm256_srli_epi64(_mm256_xor_si256(z, _mm256_set1_epi64x(-1)), 33);
  }
};

}  // namespace
}  // namespace alignpro
