#if defined(__x86_64__)
#include "isa_avx2.h"
#include "attention_impl.h"

namespace alignpro {
extern const AttentionKernels attention_kernels_avx2 = {scratch, attend, merge, widen};
}

#include "isa_end.h"
#endif
