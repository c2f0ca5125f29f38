// Attention to several levels of paged keys and values, for use within other operators.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>

namespace alignpro {

using OptionalTensor = std::optional<at::Tensor>;

// The fields of PagedKeys in alignpro_kernels/paged_keys.py, each as a list over the levels of a cascade.
struct CascadeLevels {
  const c10::List<OptionalTensor>& rows;
  at::TensorList cu_queries, page_tables, key_lengths, query_positions, key_starts;
};

// Writes out (T, H, D) float32 and the log-sum-exp of the scores, lse (T, H). softcap 0 and window 0 disable them.
void attend_levels(const at::Tensor& query, const at::Tensor& pages, const CascadeLevels& levels, double scale,
                   double softcap, int64_t window, const at::Tensor& out, const at::Tensor& lse);

// keys, values (T, kv_heads, head_dim); pages (n_pages, 2, page_size, kv_heads, head_dim); slots (T)
void write_kv(const at::Tensor& keys, const at::Tensor& values, const at::Tensor& pages, const at::Tensor& slots);

}  // namespace alignpro
