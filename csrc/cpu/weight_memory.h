// Memory of packed weights, in large pages.
//
// A decode step reads all weights once. In pages of 4 KiB, of which the processor's loads ahead do not cross the borders, it reads
// them at little more than half the speed. A matrix is often smaller than a large page, so several share one.
#pragma once

#include <ATen/core/Tensor.h>

namespace alignpro {

// Returns an uninitialised tensor on the CPU.
at::Tensor weight_memory(at::IntArrayRef sizes, at::ScalarType dtype);

}  // namespace alignpro
