// Root mean square normalisation of rows in one pass; see alignpro/fused_layers.py.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

namespace alignpro {
namespace {

using at::Tensor;

constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread

// x (..., D) float32, weight (D) -> x / sqrt(mean(x^2) + eps) * (weight + offset)
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset) {
  const at::AutoDispatchBelowAutograd no_autograd;
  const int64_t dim = weight.size(0);
  TORCH_CHECK_VALUE(x.size(-1) == dim, "x has rows of ", x.size(-1), " elements and weight ", dim);
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat, "x and weight must be float32");
  const Tensor rows = x.contiguous(), scales = weight.contiguous(), out = at::empty_like(rows);
  const float* w = scales.const_data_ptr<float>();
  const float add = static_cast<float>(offset);
  at::parallel_for(0, rows.numel() / dim, std::max<int64_t>(1, kGrain / dim), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* from = rows.const_data_ptr<float>() + row * dim;
      float* to = out.mutable_data_ptr<float>() + row * dim;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t d = 0; d < dim; ++d) sum += from[d] * from[d];
      const float by = static_cast<float>(1 / std::sqrt(static_cast<double>(sum) / static_cast<double>(dim) + eps));
#pragma omp simd
      for (int64_t d = 0; d < dim; ++d) to[d] = from[d] * by * (w[d] + add);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(alignpro, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> Tensor");
}

TORCH_LIBRARY_IMPL(alignpro, CPU, m) { m.impl("rms_norm", &rms_norm); }

}  // namespace alignpro
