#if defined(__x86_64__)
#include "isa_avx512.h"
#include "cpu_kernels_impl.h"

namespace alignpro {
extern const CpuKernels cpu_kernels_avx512 = {"avx512", true, 0, kAttentionKernels, kPanelKernels, kTileKernels};
}

#include "isa_end.h"
#endif
