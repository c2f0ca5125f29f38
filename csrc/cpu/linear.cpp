// Linear layers with packed weights; see alignpro_kernels/linear.py.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <optional>

#include "panel_products.h"
#include "weight_memory.h"

namespace alignpro {
namespace {

using at::Tensor;

// Packs `width` outputs from `first` on of a weight (K, N), contiguous, into a panel.
template <typename Weight>
void pack_transposed(const Weight* weight, int64_t outputs, int64_t inputs, int64_t first, int64_t width, Weight* panel) {
  constexpr int64_t alternating = sizeof(Weight) == 2 ? 2 : 1;  // inputs, as panel_kernels.h describes
  for (int64_t k = 0; k < inputs; ++k) {
    const Weight* from = weight + k * outputs + first;
    Weight* to = panel + k / alternating * alternating * kPanel + k % alternating;
    for (int64_t j = 0; j < width; ++j) to[j * alternating] = from[j];
    for (int64_t j = width; j < kPanel; ++j) to[j * alternating] = 0;
  }
}

// weight (N, K) float32 or bfloat16, contiguous or transposed -> (ceil(N / kPanel), K, kPanel), zero-padded beyond the last
// output. In bfloat16, K is even.
Tensor pack_weight(const Tensor& weight) {
  const at::AutoDispatchBelowAutograd no_autograd;
  const bool narrow = weight.scalar_type() == at::kBFloat16;
  TORCH_CHECK_VALUE(weight.dim() == 2 && (narrow || weight.scalar_type() == at::kFloat), "weight must be (N, K) float32 or bfloat16");
  const bool transposed = weight.stride(0) == 1 && weight.size(0) > 1;
  const Tensor from = transposed ? weight.t().contiguous() : weight.contiguous();
  const int64_t outputs = weight.size(0), inputs = weight.size(1), panels = ceil_div(outputs, kPanel);
  TORCH_CHECK_VALUE(!narrow || inputs % 2 == 0, "weight is bfloat16 with ", inputs, " inputs: they must be an even number");
  const Tensor packed = weight_memory({panels, inputs, kPanel}, weight.scalar_type());
  at::parallel_for(0, panels, std::max<int64_t>(1, 2 * kGrain / (inputs * kPanel)), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t at = panel * inputs * kPanel, first = panel * kPanel, width = std::min(kPanel, outputs - first);
      if (transposed && narrow) {
        pack_transposed(bfloat16_data(from), outputs, inputs, first, width, static_cast<uint16_t*>(packed.mutable_data_ptr()) + at);
      } else if (transposed) {
        pack_transposed(from.const_data_ptr<float>(), outputs, inputs, first, width, packed.mutable_data_ptr<float>() + at);
      } else {
        const int64_t words = narrow ? inputs / 2 : inputs;  // of four bytes
        const float* source = static_cast<const float*>(from.const_data_ptr()) + first * words;
        cpu_kernels().panels.pack(source, words, width, words, static_cast<float*>(packed.mutable_data_ptr()) + panel * words * kPanel);
      }
    }
  });
  return packed;
}

Tensor result(const Tensor& x, int64_t outputs) {
  auto sizes = x.sizes().vec();
  sizes.back() = outputs;
  return at::empty(sizes, x.options());
}

// Calls work(crew, rows of x) on as many threads as pay off for products with `outputs` outputs.
template <typename Work>
void with_rows(const Tensor& x, const Panels& weight, int64_t outputs, const Work& work) {
  const int64_t rows = x.numel() / weight.inputs;
  const Tensor memory = at::empty({Rows::elements(rows, weight.inputs, weight.narrow != nullptr)}, at::kBFloat16);
  const Rows of_x(x.const_data_ptr<float>(), rows, weight, static_cast<uint16_t*>(memory.mutable_data_ptr()));
  Crew::run(threads_for(rows * weight.inputs * outputs), [&](Crew& crew) {
    for_rows(crew, rows, weight.inputs, [&](int64_t begin, int64_t end) { of_x.prepare(begin, end); });
    work(crew, of_x, rows);
  });
}

// x (..., K), packed, bias (N) -> (..., N)
Tensor packed_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t outputs) {
  const at::AutoDispatchBelowAutograd no_autograd;
  const Tensor from = x.contiguous(), out = result(x, outputs);
  const Tensor added = bias ? bias->contiguous() : Tensor();
  const float* add = bias ? added.const_data_ptr<float>() : nullptr;
  float* to = out.mutable_data_ptr<float>();
  const Panels weight(packed);
  with_rows(from, weight, outputs, [&](Crew& crew, const Rows& of_x, int64_t rows) {
    multiply_biased(crew, of_x, rows, weight, outputs, add, to);
  });
  return out;
}

// x (..., K), packed -> silu(x gate) (x up), (..., N)
Tensor packed_gate(const Tensor& x, const Tensor& gate, const Tensor& up, int64_t outputs) {
  const at::AutoDispatchBelowAutograd no_autograd;
  const Tensor from = x.contiguous(), out = result(x, outputs);
  float* to = out.mutable_data_ptr<float>();
  const Panels gates(gate), ups(up);
  check_gate(gates, ups);
  with_rows(from, gates, 2 * outputs, [&](Crew& crew, const Rows& of_x, int64_t rows) {
    multiply_gated(crew, of_x, rows, gates, ups, outputs, to);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(alignpro, m) {
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def("packed_linear(Tensor x, Tensor packed, Tensor? bias, int outputs) -> Tensor");
  m.def("packed_gate(Tensor x, Tensor gate, Tensor up, int outputs) -> Tensor");
}

TORCH_LIBRARY_IMPL(alignpro, CPU, m) {
  m.impl("pack_weight", &pack_weight);
  m.impl("packed_linear", &packed_linear);
  m.impl("packed_gate", &packed_gate);
}

}  // namespace alignpro
