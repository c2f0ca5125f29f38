// The kernels that are compiled once per instruction set, and the choice of the set that runs on this machine.
#pragma once

#include "attention_kernels.h"
#include "panel_kernels.h"
#include "tile_kernels.h"

namespace alignpro {

struct CpuKernels {
  const char* instructions;
  bool vectorised;  // by hand, not only where the compiler can
  int parts;        // in bfloat16 of rows that are multiplied by weights in bfloat16, 1 or 2; or 0: the weights are widened
  AttentionKernels attention;
  PanelKernels panels;
  TileKernels tiles;
};

// Follows PyTorch's choice of the instruction set, which ATEN_CPU_CAPABILITY overrides. ALIGNPRO_CPU_BFLOAT16 chooses the parts:
// widened (0), rounded (1) or split (2); without it, 2 where AMX multiplies them, and 0 elsewhere.
const CpuKernels& cpu_kernels();

}  // namespace alignpro
