// The kernels that are compiled once per instruction set, and the choice of the set that runs on this machine.
#pragma once

#include "attention_kernels.h"
#include "panel_kernels.h"
#include "tile_kernels.h"

namespace alignpro {

struct CpuKernels {
  const char* instructions;
  bool vectorised;  // by hand, not only where the compiler can
  AttentionKernels attention;
  PanelKernels panels;
  TileKernels tiles;
};

// Follows PyTorch's choice of the instruction set, which ATEN_CPU_CAPABILITY overrides.
const CpuKernels& cpu_kernels();

}  // namespace alignpro
