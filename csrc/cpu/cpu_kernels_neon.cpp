#if defined(__aarch64__)
#include "isa_neon.h"

#include "cpu_kernels_impl.h"

namespace alignpro {
extern const CpuKernels cpu_kernels_neon = {"neon", true, 0, kAttentionKernels, kPanelKernels, kTileKernels};
}
#endif
