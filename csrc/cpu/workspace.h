// Memory for the logits in flight, cached from one call to the next.
//
// Fresh memory costs page faults and zeroing, which take a quarter of the time of a policy loss. PyTorch caches GPU memory
// for the same reason, but not CPU memory. One block of at most kMaxCachedBytes bytes is cached; while it is unused, the system
// may reclaim its pages (MADV_FREE). On systems other than Linux nothing is cached.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace alignpro {

constexpr int64_t kMaxCachedBytes = int64_t{256} << 20;

// Returns an uninitialised float32 tensor, in large pages if available.
at::Tensor workspace(at::IntArrayRef sizes);

// Frees the cached block, unless a call is using it.
void release_workspace();

}  // namespace alignpro
