#include "isa_generic.h"
#include "layer_impl.h"

namespace alignpro {
extern const LayerKernels layer_kernels_generic = {multiply<false>, multiply<true>, pack, normalise, rotate, gate};
}
