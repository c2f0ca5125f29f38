#if defined(__x86_64__)
// Standard headers first, outside the target: what they inline is shared with code that must run on any machine.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#endif

#include "isa_avx512.h"
#include "layer_impl.h"

namespace alignpro {
extern const LayerKernels layer_kernels_avx512 = {multiply<false>, multiply<true>, pack, normalise, rotate, gate};
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
