#if defined(__x86_64__)
#include "isa_avx2.h"
#include "layer_impl.h"

namespace alignpro {
extern const LayerKernels layer_kernels_avx2 = {multiply<false>, multiply<true>, pack, normalise, rotate, gate};
}

#include "isa_end.h"
#endif
