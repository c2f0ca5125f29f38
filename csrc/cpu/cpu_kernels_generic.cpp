#include "isa_generic.h"
#include "cpu_kernels_impl.h"

namespace alignpro {
extern const CpuKernels cpu_kernels_generic = {"generic", false, 0, kAttentionKernels, kPanelKernels, kTileKernels};
}
