// Keys and values in pages, for use within other operators.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "attention_plan.h"
#include "crew.h"

namespace alignpro {

using OptionalTensor = std::optional<at::Tensor>;

// The fields of PagedKeys in alignpro_kernels/paged_keys.py, each as a list over the levels of a cascade.
struct CascadeLevels {
  const c10::List<OptionalTensor>& rows;
  at::TensorList cu_queries, page_tables, key_lengths, query_positions, key_starts;
};

// Attention of queries (T, H, D) to several levels of paged keys and values, planned once for all layers of one window.
class CascadePlan {
 public:
  // `pages` are those of one of the layers. A window of 0 is none.
  CascadePlan(const CascadeLevels& levels, int64_t tokens, int64_t heads, const at::Tensor& pages, int64_t window, int64_t threads);

  // Steps of a crew: writes out (T, H, D) float32 and the log-sum-exp of the scores, lse (T, H). A softcap of 0 is none. The
  // elements of a query are contiguous.
  void attend(Crew& crew, const at::Tensor& query, const at::Tensor& pages, float scale, float softcap, float* out, float* lse) const;

  int64_t multiplications() const;

 private:
  struct Planned {
    Level level;
    LevelPlan plan;
  };
  AttentionShape shape_;
  bool some_rows_;  // whether the first level is seen by some queries only
  std::vector<Planned> levels_;
  at::Tensor parts_;  // sums of parts, of one level at a time
};

// Where the keys and values of tokens are written: pages (n_pages, 2, page_size, kv_heads, head_dim).
class PageSlots {
 public:
  // slots (T) int64: a slot of all pages for each token, or -1 for none.
  PageSlots(const at::Tensor& pages, const at::Tensor& slots);
  // Copies a token's keys and values (kv_heads, head_dim), contiguous, to pages of this shape.
  void write(const at::Tensor& pages, int64_t token, const void* keys, const void* values) const;

 private:
  const int64_t* slots_;
  int64_t page_bytes_, page_size_, token_bytes_;
};

}  // namespace alignpro
