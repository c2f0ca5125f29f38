// All kernels, compiled for the instruction set of the isa_*.h included before. Included by cpu_kernels_*.cpp only.
#pragma once

#include "attention_kernels_impl.h"
#include "cpu_kernels.h"
#include "panel_kernels_impl.h"
#include "tile_kernels_impl.h"
