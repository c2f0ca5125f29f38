#include "isa_generic.h"
#include "tiles_impl.h"

namespace alignpro {
extern const TileKernels tile_kernels_generic = {"generic", statistics, gradient, sample};
}
