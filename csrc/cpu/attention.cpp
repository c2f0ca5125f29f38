// Attention of packed queries to paged keys and values. attention_plan.h describes how the work is split over threads.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "attention_plan.h"
#include "cpu_kernels.h"
#include "paged_kv.h"

namespace alignpro {
namespace {

Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Element::kFloat;
    case at::kBFloat16: return Element::kBFloat16;
    default: return Element::kHalf;
  }
}

// Invalid values would cause out-of-bounds reads; checking them here costs almost nothing.
void check_values(const Problem& p, int64_t sequences) {
  const int64_t slots = p.page_table.size(1) * p.pages.size(2);
  TORCH_CHECK_VALUE(p.cu_queries[0] == 0 && p.cu_queries[sequences] == p.count, "cu_queries goes from ", p.cu_queries[0],
                    " to ", p.cu_queries[sequences], ": expected from 0 to the number of queries, ", p.count);
  for (int64_t r = 0; p.rows != nullptr && r < p.count; ++r) {
    TORCH_CHECK_VALUE(p.rows[r] >= 0 && p.rows[r] < p.query.size(0), "rows: number ", r, " is ", p.rows[r],
                      ", expected 0 to ", p.query.size(0) - 1);
  }
  for (int64_t s = 0; s < sequences; ++s) {
    TORCH_CHECK_VALUE(p.cu_queries[s] <= p.cu_queries[s + 1], "cu_queries: sequence ", s, " goes from ", p.cu_queries[s],
                      " to ", p.cu_queries[s + 1], ": it must not decrease");
    TORCH_CHECK_VALUE(p.key_lengths[s] >= 0 && p.key_lengths[s] <= slots, "key_lengths: sequence ", s, " has ",
                      p.key_lengths[s], " keys, expected 0 to ", slots, ", what its pages hold");
    const int32_t* table = p.page_table.const_data_ptr<int32_t>() + s * p.page_table.stride(0);
    for (int64_t i = 0; i * p.pages.size(2) < p.key_lengths[s]; ++i) {
      TORCH_CHECK_VALUE(table[i] >= 0 && table[i] < p.pages.size(0), "page_table: entry ", i, " of sequence ", s, " is ",
                        table[i], ", expected 0 to ", p.pages.size(0) - 1);
    }
  }
}

int64_t state_floats(int64_t rows, int64_t stride) { return round_up(rows * (stride + 2), kLanes); }

SoftmaxState state_at(float* memory, int64_t rows, int64_t stride) {
  return {memory, memory + rows * stride, memory + rows * (stride + 1)};
}

void clear(const SoftmaxState& sums, int64_t rows, int64_t stride) {
  std::fill(sums.o, sums.o + rows * stride, 0.0f);
  std::fill(sums.m, sums.m + rows, -std::numeric_limits<float>::infinity());
  std::fill(sums.l, sums.l + rows, 0.0f);
}

void write_rows(const Problem& p, const WorkItem& item, const SoftmaxState& sums) {
  const int64_t dim = p.head_dim(), stride = p.stride();
  float* outs = p.out.mutable_data_ptr<float>();
  float* lses = p.lse.mutable_data_ptr<float>();
  int64_t row = 0;
  for (int64_t kv_head = item.head_begin; kv_head < item.head_end; ++kv_head) {
    for (int64_t t = item.query_begin; t < item.query_end; ++t) {
      for (int64_t g = 0; g < p.group(); ++g, ++row) {
        const int64_t to = p.row(t) * p.heads() + kv_head * p.group() + g;
        const float l = sums.l[row], lse = sums.m[row] + std::log(l);
        float by = l == 0 ? 0 : 1 / l, before = 0;
        if (p.merge && lses[to] != -std::numeric_limits<float>::infinity()) {
          if (l == 0) continue;
          const float top = std::max(lses[to], lse), ours = std::exp(lse - top), theirs = std::exp(lses[to] - top);
          by *= ours / (ours + theirs);
          before = theirs / (ours + theirs);
          lses[to] = top + std::log(ours + theirs);
        } else {
          lses[to] = lse;
        }
        float* out = outs + to * dim;
        const float* o = sums.o + row * stride;
        if (before == 0) {
          for (int64_t d = 0; d < dim; ++d) out[d] = by * o[d];
        } else {
          for (int64_t d = 0; d < dim; ++d) out[d] = by * o[d] + before * out[d];
        }
      }
    }
  }
}

// A thread's memory and its processing of items. An item's rows are ordered by key-value head, query, query head.
class Worker {
 public:
  explicit Worker(const Problem& p)
      : p_(p), stride_(p.stride()), rows_(p.rows_per_item()), keys_(head_keys(p)),
        head_bytes_(p.pages.stride(3) * p.pages.element_size()),
        memory_(at::empty({rows_ * stride_ + 2 * state_floats(rows_, stride_) +
                           cpu_kernels().attention.scratch(rows_, stride_)}, at::kFloat)),
        first_(static_cast<size_t>(rows_)), last_(static_cast<size_t>(rows_)) {
    query_ = memory_.mutable_data_ptr<float>();
    sums_ = query_ + rows_ * stride_;
    scratch_ = sums_ + 2 * state_floats(rows_, stride_);
  }

  // `next` is the item to process afterwards, whose keys are prefetched, or null.
  void process(const WorkItem& item, const WorkItem* next, float* parts_memory) {
    gather(item);
    if (item.part >= 0) {
      float* at = parts_memory + item.part * state_floats(rows_, stride_);
      attend(item, next, state_at(at, rows_, stride_), item.first_part());
      return;
    }
    const SoftmaxState sums = state_at(sums_, rows_, stride_);
    const SoftmaxState part = state_at(sums_ + state_floats(rows_, stride_), rows_, stride_);
    int64_t begin = item.first_part();
    attend(item, next, sums, begin);
    for (begin += kPart; begin < item.key_end; begin += kPart) {
      attend(item, next, part, begin);
      cpu_kernels().attention.merge(sums, part, item.heads() * rows_of_head(item), stride_);
    }
    write_rows(p_, item, sums);
  }

 private:
  int64_t rows_of_head(const WorkItem& item) const { return item.queries() * p_.group(); }

  // Converts the queries to (rows, stride) floats, and collects the range of keys that each row of a head sees.
  void gather(const WorkItem& item) {
    const int64_t size = p_.query.element_size();
    const char* from = static_cast<const char*>(p_.query.const_data_ptr());
    float* to = query_;
    for (int64_t head = item.head_begin * p_.group(); head < item.head_end * p_.group(); head += p_.group()) {
      for (int64_t t = item.query_begin; t < item.query_end; ++t) {
        for (int64_t g = 0; g < p_.group(); ++g, to += stride_) {
          const int64_t at = p_.row(t) * p_.query.stride(0) + (head + g) * p_.query.stride(1);
          cpu_kernels().attention.upcast_row(from + at * size, element_of(p_.query), to, p_.head_dim(), stride_);
        }
      }
    }
    for (int64_t row = 0; row < rows_of_head(item); ++row) {
      first_[row] = p_.first[item.query_begin + row / p_.group()];
      last_[row] = p_.last[item.query_begin + row / p_.group()];
    }
  }

  // Computes attention to the part that starts at `begin`, into sums that are reset first.
  void attend(const WorkItem& item, const WorkItem* next, const SoftmaxState& sums, int64_t begin) {
    const int64_t rows = rows_of_head(item), end = std::min<int64_t>(begin + kPart, item.key_end);
    clear(sums, item.heads() * rows, stride_);
    for (int64_t key = std::max<int64_t>(begin, item.key_begin / kKeyBlock * kKeyBlock); key < end; key += kKeyBlock) {
      for (int64_t head = 0; head < item.heads(); ++head) {
        if (key + kKeyBlock < item.key_end) {
          prefetch(item, key + kKeyBlock, head, item.heads());
        } else if (next != nullptr) {
          prefetch(*next, next->key_begin / kKeyBlock * kKeyBlock, head, item.heads());
        }
        const int64_t row = head * rows;
        cpu_kernels().attention.attend(
            keys_of(item, item.head_begin + head),
            {rows, stride_, query_ + row * stride_, first_.data(), last_.data(), p_.scale, p_.softcap},
            {sums.o + row * stride_, sums.m + row, sums.l + row}, key, std::min(key + kKeyBlock, end), scratch_);
      }
    }
  }

  // Prefetches one of `shares` parts of the block at `begin` while another block is processed: the keys and values of all
  // heads, in memory order. The hardware prefetcher cannot predict where the next page is.
  void prefetch(const WorkItem& item, int64_t begin, int64_t share, int64_t shares) const {
    const int64_t end = std::min<int64_t>(begin + kKeyBlock * (share + 1) / shares, item.key_end);
    begin += kKeyBlock * share / shares;
    if (begin >= end) return;
    const HeadKeys keys = keys_of(item, item.head_begin);
    const int64_t bytes = p_.head_dim() * p_.pages.element_size();
    int64_t page = begin / keys.page_size, slot = begin % keys.page_size;
    for (; begin < end; ++begin) {
      const char* key = keys.pages + keys.table[page] * keys.page_stride + slot * keys.slot_stride;
      for (int64_t head = 0; head < item.heads(); ++head, key += head_bytes_) {
        for (int64_t i = 0; i < bytes; i += 64) {
          __builtin_prefetch(key + i, 0, 2);  // only into L2: a block of all heads exceeds L1
          __builtin_prefetch(key + keys.value_offset + i, 0, 2);
        }
      }
      if (++slot == keys.page_size) {
        slot = 0;
        ++page;
      }
    }
  }

  HeadKeys keys_of(const WorkItem& item, int64_t head) const {
    HeadKeys keys = keys_;
    keys.pages += head * head_bytes_;
    keys.table += item.sequence * p_.page_table.stride(0);
    return keys;
  }

  // Returns the keys of the first head and sequence.
  static HeadKeys head_keys(const Problem& p) {
    const auto bytes = [&](int64_t dimension) { return p.pages.stride(dimension) * p.pages.element_size(); };
    return {static_cast<const char*>(p.pages.const_data_ptr()), p.page_table.const_data_ptr<int32_t>(), p.pages.size(2),
            bytes(0), bytes(2), bytes(1), p.head_dim(), element_of(p.pages)};
  }

  const Problem& p_;
  int64_t stride_, rows_;
  HeadKeys keys_;
  int64_t head_bytes_;
  Tensor memory_;
  std::vector<int64_t> first_, last_;  // (rows of a head)
  float *query_, *sums_, *scratch_;    // (rows, stride); two sets of sums; the kernels' scratch memory
};

void run(const Problem& p, int64_t sequences) {
  const Plan plan = plan_of(p, sequences);
  const std::vector<size_t> runs = runs_of(plan.items, plan.threads == 1 ? 1 : plan.threads * kRunsPerThread);
  const int64_t rows = p.rows_per_item(), stride = p.stride(), floats = state_floats(rows, stride);
  const Tensor parts_memory = at::empty({plan.parts * floats}, at::kFloat);
  float* sums = parts_memory.mutable_data_ptr<float>();
  std::atomic<size_t> next{0};
  at::parallel_for(0, plan.threads, 1, [&](int64_t, int64_t) {
    const at::AutoDispatchBelowAutograd no_autograd;
    Worker worker(p);
    for (size_t run = next++; run + 1 < runs.size(); run = next++) {
      for (size_t i = runs[run]; i < runs[run + 1]; ++i) {
        worker.process(plan.items[i], i + 1 < runs[run + 1] ? &plan.items[i + 1] : nullptr, sums);
      }
    }
  });
  for (const Split& split : plan.splits) {
    const SoftmaxState whole = state_at(sums + split.part * floats, rows, stride);
    for (int64_t i = 1; i < split.item.parts(); ++i) {
      cpu_kernels().attention.merge(whole, state_at(sums + (split.part + i) * floats, rows, stride),
                                split.item.queries() * p.group(), stride);
    }
    write_rows(p, split.item, whole);
  }
}

Tensor unit_stride(const Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

// Writes or merges the attention of a level's queries to `out` (T, H, D) float32 and `lse` (T, H).
void attend_level(const Tensor& query, const Tensor& pages, const CascadeLevels& levels, size_t level, double scale,
                  double softcap, int64_t window, const Tensor& out, const Tensor& lse, bool merge) {
  const OptionalTensor chosen = levels.rows.get(level);
  const Tensor rows = chosen ? chosen->contiguous() : Tensor(), cu_queries = levels.cu_queries[level].contiguous();
  const Tensor lengths = levels.key_lengths[level].contiguous(), starts = levels.key_starts[level].contiguous();
  const Tensor positions = levels.query_positions[level].contiguous();
  const int64_t sequences = lengths.size(0);
  Problem p{unit_stride(query),
            pages,
            unit_stride(levels.page_tables[level]),
            positions.size(0),
            chosen ? rows.const_data_ptr<int64_t>() : nullptr,
            cu_queries.const_data_ptr<int32_t>(),
            lengths.const_data_ptr<int32_t>(),
            {},
            {},
            static_cast<float>(scale),
            static_cast<float>(softcap),
            out,
            lse,
            merge};
  check_values(p, sequences);
  find_visible(p, sequences, positions.const_data_ptr<int32_t>(), starts.const_data_ptr<int32_t>(), window);
  if (p.count > 0) run(p, sequences);
}

}  // namespace

void attend_levels(const Tensor& query, const Tensor& pages, const CascadeLevels& levels, double scale, double softcap,
                   int64_t window, const Tensor& out, const Tensor& lse) {
  const bool some_rows = levels.rows.get(0).has_value();
  if (some_rows) {
    out.zero_();
    lse.fill_(-std::numeric_limits<float>::infinity());
  }
  for (size_t level = 0; level < levels.cu_queries.size(); ++level) {
    attend_level(query, pages, levels, level, scale, softcap, window, out, lse, level > 0 || some_rows);
  }
}

namespace {

// -> out (T, H, D) in the query's dtype, lse (T, H) float32: attention to several levels, each seen by some of the queries.
// softcap 0 and window 0 disable them.
std::tuple<Tensor, Tensor> cascade_attention(const Tensor& query, const Tensor& pages, const c10::List<OptionalTensor>& rows,
                                             at::TensorList cu_queries, at::TensorList page_tables,
                                             at::TensorList key_lengths, at::TensorList query_positions,
                                             at::TensorList key_starts, double scale, double softcap, int64_t window) {
  const at::AutoDispatchBelowAutograd no_autograd;
  const Tensor out = at::empty(query.sizes(), at::kFloat), lse = at::empty({query.size(0), query.size(1)}, at::kFloat);
  attend_levels(query, pages, {rows, cu_queries, page_tables, key_lengths, query_positions, key_starts}, scale, softcap,
                window, out, lse);
  return {out.to(query.scalar_type()), lse};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(alignpro, m) {
  m.def(
      "cascade_attention(Tensor query, Tensor pages, Tensor?[] rows, Tensor[] cu_queries, Tensor[] page_tables, "
      "Tensor[] key_lengths, Tensor[] query_positions, Tensor[] key_starts, float scale, float softcap, int window) "
      "-> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(alignpro, CPU, m) { m.impl("cascade_attention", &cascade_attention); }

}  // namespace alignpro
