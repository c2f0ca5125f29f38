// The kernels that are compiled once per instruction set, and the choice of the set that runs on this machine.
#pragma once

#include "attention_kernels.h"
#include "panel_kernels.h"
#include "tile_kernels.h"

namespace alignpro {

struct CpuKernels {
  const char* instructions;
  bool vectorised;  // by hand, not only where the compiler can
  bool rounds;      // rows, before products with weights in bfloat16: what `multiply_rounded` and `dot_rounded` are for
  AttentionKernels attention;
  PanelKernels panels;
  TileKernels tiles;
};

// Follows PyTorch's choice of the instruction set, which ATEN_CPU_CAPABILITY overrides. ALIGNPRO_CPU_BFLOAT16=rounded asks for
// rows in bfloat16.
const CpuKernels& cpu_kernels();

}  // namespace alignpro
