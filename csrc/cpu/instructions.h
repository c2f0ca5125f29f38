// The choice of the instruction set whose kernels run on this machine.
#pragma once

#include <ATen/Version.h>

#include <string>

namespace alignpro {

enum class Instructions { kGeneric, kAvx2, kAvx512 };

inline Instructions instructions() {
#if defined(__x86_64__)
  static const Instructions chosen = [] {
    // Follows PyTorch's choice, which ATEN_CPU_CAPABILITY overrides.
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512" && __builtin_cpu_supports("avx512dq")) return Instructions::kAvx512;
    if (capability == "AVX512" || capability == "AVX2") return Instructions::kAvx2;
    return Instructions::kGeneric;
  }();
  return chosen;
#else
  return Instructions::kGeneric;
#endif
}

}  // namespace alignpro
