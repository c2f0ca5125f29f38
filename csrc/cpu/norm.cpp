// RMSNorm in one pass.

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "panel_products.h"

namespace alignpro {
namespace {

using at::Tensor;

// x (..., D) float32, weight (D) -> x / sqrt(mean(x^2) + eps) * (weight + offset)
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset) {
  const at::AutoDispatchBelowAutograd no_autograd;
  const int64_t dim = weight.size(0);
  TORCH_CHECK_VALUE(x.size(-1) == dim, "x has rows of ", x.size(-1), " elements and weight ", dim);
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat, "x and weight must be float32");
  const Tensor rows = x.contiguous(), scales = weight.contiguous(), out = at::empty_like(rows);
  const float* w = scales.const_data_ptr<float>();
  const float* from = rows.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  Crew::run(threads_for(rows.numel()), [&](Crew& crew) {
    for_rows(crew, rows.numel() / dim, dim, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        cpu_kernels().panels.rms_norm(from + row * dim, w, dim, static_cast<float>(eps), static_cast<float>(offset), to + row * dim);
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(alignpro, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> Tensor");
}

TORCH_LIBRARY_IMPL(alignpro, CPU, m) { m.impl("rms_norm", &rms_norm); }

}  // namespace alignpro
