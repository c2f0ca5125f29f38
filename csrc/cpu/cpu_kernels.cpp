#include "cpu_kernels.h"

#include <ATen/Version.h>
#include <torch/library.h>

#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

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
  constexpr int64_t rows = 53, depth = 78;
  std::vector<float> x(rows * depth);
  std::vector<uint16_t> weights(depth * kPanel);
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::sin(0.37f * static_cast<float>(i));
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = static_cast<uint16_t>(0x3E00 + (i * 37 % 509) + (i % 3 == 0 ? 0x8000 : 0));
  const auto products = [&](const PanelKernels& kernels) {
    std::vector<float> out(4 * rows * kPanel);
    std::vector<uint16_t> first(x.size()), second(x.size());
    float* to = out.data();
    kernels.narrow_rows(x.data(), depth, rows, depth, first.data(), second.data());
    for (const uint16_t* rest : {static_cast<const uint16_t*>(nullptr), static_cast<const uint16_t*>(second.data())}) {
      const NarrowRows narrow{first.data(), rest, depth};
      kernels.multiply_narrow(narrow, rows, weights.data(), depth, to, kPanel, false, nullptr);
      const auto of_dots = static_cast<size_t>(kernels.dot_rows(rows) * depth);
      std::vector<uint16_t> packed(of_dots), packed_rest(of_dots);
      kernels.pack_dots(narrow.first, rows, depth, packed.data());
      if (rest != nullptr) kernels.pack_dots(rest, rows, depth, packed_rest.data());
      kernels.dot_narrow({packed.data(), rest == nullptr ? nullptr : packed_rest.data(), depth}, rows, weights.data(), kPanel, depth,
                         to + rows * kPanel, kPanel);
      to += 2 * rows * kPanel;
    }
    return out;
  };
  const auto of_a = products(a), of_b = products(b);
  for (size_t i = 0; i < of_a.size(); ++i) {
    if (!(std::abs(of_a[i] - of_b[i]) <= 1e-4f)) return false;
  }
  return true;
}

// With the processor's own products in bfloat16, where it has them and they agree with the plain ones.
CpuKernels in_bfloat16() {
  CpuKernels kernels = in_float32();
#if defined(__x86_64__)
  if (&in_float32() == &cpu_kernels_avx512 && __builtin_cpu_supports("avx512bf16") &&
      agree(panel_kernels_avx512_bf16, kernels.panels)) {
    const auto take = [&](const char* name, const PanelKernels& from) {
      kernels.instructions = name;
      kernels.panels.multiply_narrow = from.multiply_narrow;
      kernels.panels.narrow_depth = from.narrow_depth;
      kernels.panels.narrow_rows = from.narrow_rows;
      kernels.panels.dot_narrow = from.dot_narrow;
      kernels.panels.dots_of_many = from.dots_of_many;
      kernels.panels.pack_dots = from.pack_dots;
      kernels.panels.dot_rows = from.dot_rows;
    };
    take("avx512_bf16", panel_kernels_avx512_bf16);
    if (may_use_amx() && agree(panel_kernels_amx, kernels.panels)) take("amx", panel_kernels_amx);
  }
#endif
  return kernels;
}

CpuKernels choose() {
  const std::string asked = variable("ALIGNPRO_CPU_BFLOAT16");
  if (asked == "widened") return in_float32();
  CpuKernels kernels = in_bfloat16();
  // AMX multiplies so fast that two parts, which lose next to nothing, take no longer than widening.
  if (asked.empty() && std::string(kernels.instructions) != "amx") return in_float32();
  kernels.parts = asked == "rounded" ? 1 : 2;
  return kernels;
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels chosen = choose();
  return chosen;
}

TORCH_LIBRARY_FRAGMENT(alignpro, m) {
  m.def("cpu_instructions() -> str", [] { return std::string(cpu_kernels().instructions); });
  m.def("cpu_state_parts() -> int", [] { return static_cast<int64_t>(cpu_kernels().parts); });
}

}  // namespace alignpro
