#if defined(__x86_64__)
#include "isa_avx512.h"
#include "attention_impl.h"

namespace alignpro {
extern const AttentionKernels attention_kernels_avx512 = {scratch, attend, merge, widen};
}

#include "isa_end.h"
#endif
