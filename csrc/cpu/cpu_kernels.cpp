#include "cpu_kernels.h"

#include <ATen/Version.h>
#include <torch/library.h>

#include <string>

namespace alignpro {

extern const CpuKernels cpu_kernels_generic;
#if defined(__x86_64__)
extern const CpuKernels cpu_kernels_avx2;
extern const CpuKernels cpu_kernels_avx512;
#endif

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = []() -> const CpuKernels& {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512" && __builtin_cpu_supports("avx512dq")) return cpu_kernels_avx512;
    if (capability == "AVX512" || capability == "AVX2") return cpu_kernels_avx2;
#endif
    return cpu_kernels_generic;
  }();
  return chosen;
}

TORCH_LIBRARY_FRAGMENT(alignpro, m) {
  m.def("cpu_instructions() -> str", [] { return std::string(cpu_kernels().instructions); });
}

}  // namespace alignpro
