#if defined(__x86_64__)
#include "isa_avx2.h"
#include "tiles_impl.h"

namespace alignpro {
extern const TileKernels tile_kernels_avx2 = {"avx2", statistics, gradient, sample};
}

#include "isa_end.h"
#endif
