// Products in bfloat16 by AMX, where the processor has it and the kernel lets the process use it.
#if defined(__x86_64__)
#define ALIGNPRO_AVX512_BF16
#define ALIGNPRO_AMX
#include "isa_avx512.h"

#include "panel_kernels_impl.h"

#include "amx_multiply.h"

namespace alignpro {
// Initialised by the compiler: nothing here may run on a processor without these instructions.
extern constinit const PanelKernels panel_kernels_amx = kAmxKernels;
}  // namespace alignpro

#include "isa_end.h"

#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace alignpro {

bool may_use_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned bfloat16 = 1u << 22, tiles = 1u << 24;  // of leaf 7 in edx
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bfloat16) == 0 || (d & tiles) == 0) return false;
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

}  // namespace alignpro
#endif
