// Products in bfloat16 by the instruction that AVX512_BF16 has for them.
#if defined(__x86_64__)
#define ALIGNPRO_AVX512_BF16
#include "isa_avx512.h"

#include "panel_kernels_impl.h"

namespace alignpro {
extern const PanelKernels panel_kernels_avx512_bf16 = kPanelKernels;
}

#include "isa_end.h"
#endif
