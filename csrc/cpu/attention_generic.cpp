#include "isa_generic.h"
#include "attention_impl.h"

namespace alignpro {
extern const AttentionKernels attention_kernels_generic = {scratch, attend, merge, widen};
}
