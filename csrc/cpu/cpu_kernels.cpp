#include "cpu_kernels.h"

#include <ATen/Version.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <string>

namespace alignpro {

extern const CpuKernels cpu_kernels_generic;
#if defined(__x86_64__)
extern const CpuKernels cpu_kernels_avx2;
extern const CpuKernels cpu_kernels_avx512;
extern const PanelKernels panel_kernels_avx512_bf16;
extern const PanelKernels panel_kernels_amx;
bool may_use_amx();
#elif defined(__aarch64__)
extern const CpuKernels cpu_kernels_neon;
#endif

namespace {

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

const CpuKernels& in_float32() {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512" && __builtin_cpu_supports("avx512dq")) return cpu_kernels_avx512;
  if (capability == "AVX512" || capability == "AVX2") return cpu_kernels_avx2;
#elif defined(__aarch64__)
  // PyTorch has no name for NEON, which it always uses.
  if (variable("ATEN_CPU_CAPABILITY") != "default") return cpu_kernels_neon;
#endif
  return cpu_kernels_generic;
}

// Whether the products in bfloat16 of both agree, up to rounding in float32, on one small problem.
bool agree(const PanelKernels& a, const PanelKernels& b) {
  constexpr int64_t rows = 21, depth = 78;
  alignas(64) std::array<float, rows * depth> x;
  alignas(64) std::array<uint16_t, depth * kPanel> weights;
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::sin(0.37f * static_cast<float>(i));
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = static_cast<uint16_t>(0x3E00 + (i * 37 % 509) + (i % 3 == 0 ? 0x8000 : 0));
  const auto products = [&](const PanelKernels& kernels) {
    std::array<float, 2 * rows * kPanel> out{};
    std::array<uint16_t, rows * depth> rounded;
    kernels.multiply_rounded(x.data(), depth, rows, weights.data(), depth, out.data(), kPanel, false, nullptr);
    kernels.round_rows(x.data(), depth, rows, depth, rounded.data());
    kernels.dot_rounded(rounded.data(), rows, weights.data(), kPanel, depth, out.data() + rows * kPanel, kPanel);
    return out;
  };
  const auto of_a = products(a), of_b = products(b);
  for (size_t i = 0; i < of_a.size(); ++i) {
    if (!(std::abs(of_a[i] - of_b[i]) <= 1e-4f)) return false;
  }
  return true;
}

CpuKernels rounding() {
  CpuKernels kernels = in_float32();
  kernels.rounds = true;
#if defined(__x86_64__)
  if (&in_float32() == &cpu_kernels_avx512 && __builtin_cpu_supports("avx512bf16") &&
      agree(panel_kernels_avx512_bf16, kernels.panels)) {
    kernels.instructions = "avx512_bf16";
    kernels.panels.multiply_rounded = panel_kernels_avx512_bf16.multiply_rounded;
    kernels.panels.round_rows = panel_kernels_avx512_bf16.round_rows;
    kernels.panels.dot_rounded = panel_kernels_avx512_bf16.dot_rounded;
    if (may_use_amx() && agree(panel_kernels_amx, kernels.panels)) {
      kernels.instructions = "amx";
      kernels.panels.multiply_rounded = panel_kernels_amx.multiply_rounded;
    }
  }
#endif
  return kernels;
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels chosen = variable("ALIGNPRO_CPU_BFLOAT16") == "rounded" ? rounding() : in_float32();
  return chosen;
}

TORCH_LIBRARY_FRAGMENT(alignpro, m) {
  m.def("cpu_instructions() -> str", [] { return std::string(cpu_kernels().instructions); });
  m.def("cpu_rounds() -> bool", [] { return cpu_kernels().rounds; });
}

}  // namespace alignpro
