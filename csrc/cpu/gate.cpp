// The gating of an MLP, silu(gate) up, and its gradients, in one pass each; see alignpro_kernels/layers.py.

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <array>

#include "panel_products.h"

namespace alignpro {
namespace {

using at::Tensor;

constexpr int64_t kBlock = 1024;  // elements per work item

void check(at::ArrayRef<const Tensor*> all) {
  for (const Tensor* x : all) {
    TORCH_CHECK_VALUE(x->sizes() == all[0]->sizes(), "shapes ", x->sizes(), " and ", all[0]->sizes(), " differ");
    TORCH_CHECK_TYPE(x->scalar_type() == at::kFloat, "expected float32");
  }
}

// Calls work(pointers, count) for blocks of N arrays, on as many threads as pay off. `count` is a multiple of kPanel: the last
// elements are processed in padded copies.
template <size_t N, typename Work>
void for_blocks(std::array<float*, N> arrays, int64_t elements, const Work& work) {
  at::parallel_for(0, ceil_div(elements, kBlock), std::max<int64_t>(1, kGrain / kBlock), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock, count = std::min(kBlock, elements - first), whole = count / kPanel * kPanel;
      std::array<float*, N> from = arrays;
      for (float*& x : from) x += first;
      if (whole > 0) work(from, whole);
      if (whole == count) continue;
      float copies[N][kPanel] = {};
      std::array<float*, N> padded;
      for (size_t i = 0; i < N; ++i) padded[i] = std::copy_n(from[i] + whole, count - whole, copies[i]) - (count - whole);
      work(padded, kPanel);
      for (size_t i = 0; i < N; ++i) std::copy_n(copies[i], count - whole, from[i] + whole);
    }
  });
}

float* data(const Tensor& x) { return x.mutable_data_ptr<float>(); }

// gate, up (...) float32 -> silu(gate) up
Tensor gate(const Tensor& gate, const Tensor& up) {
  const at::AutoDispatchBelowAutograd no_autograd;
  check({&gate, &up});
  const Tensor out = gate.clone(at::MemoryFormat::Contiguous), factor = up.contiguous();
  for_blocks<2>({data(out), data(factor)}, out.numel(),
                [](const auto& x, int64_t count) { cpu_kernels().panels.gate(x[0], x[1], count); });
  return out;
}

// gate, up and the gradient of silu(gate) up, (...) float32 -> the gradients of gate and up, and silu(gate) up
std::tuple<Tensor, Tensor, Tensor> gate_backward(const Tensor& gate, const Tensor& up, const Tensor& gradient) {
  const at::AutoDispatchBelowAutograd no_autograd;
  check({&gate, &up, &gradient});
  const Tensor g = gate.contiguous(), u = up.contiguous(), d = gradient.contiguous();
  const Tensor d_gate = at::empty_like(g), d_up = at::empty_like(g), inner = at::empty_like(g);
  for_blocks<6>({data(g), data(u), data(d), data(d_gate), data(d_up), data(inner)}, g.numel(), [](const auto& x, int64_t count) {
    cpu_kernels().panels.gate_backward(x[0], x[1], x[2], count, x[3], x[4], x[5]);
  });
  return {d_gate, d_up, inner};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(alignpro, m) {
  m.def("gate(Tensor gate, Tensor up) -> Tensor");
  m.def("gate_backward(Tensor gate, Tensor up, Tensor gradient) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(alignpro, CPU, m) {
  m.impl("gate", &gate);
  m.impl("gate_backward", &gate_backward);
}

}  // namespace alignpro
