// Memory for the logits in flight, which outlives a call: what a call gives back, the next one takes.
//
// Fresh memory costs a fault a page and zeros that nobody reads, a quarter of a policy loss's time. PyTorch keeps memory
// of GPUs for the same reason, and none on the CPU. One block is kept, of at most kMostKept bytes, and while nobody uses
// it the system may take its pages back (MADV_FREE). Without Linux nothing is kept.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace alignpro {

constexpr int64_t kMostKept = int64_t{256} << 20;

// float32 of these sizes, uninitialised, in large pages where there are any.
at::Tensor workspace(at::IntArrayRef sizes);

// Free the block that is kept, unless a call has it.
void release_workspace();

}  // namespace alignpro
