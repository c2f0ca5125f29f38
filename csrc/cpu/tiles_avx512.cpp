#if defined(__x86_64__)
#include "isa_avx512.h"
#include "tiles_impl.h"

namespace alignpro {
extern const TileKernels tile_kernels_avx512 = {"avx512", statistics, gradient, sample};
}

#include "isa_end.h"
#endif
