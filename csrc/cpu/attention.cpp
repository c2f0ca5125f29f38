// Attention of packed queries to paged keys and values. attention_plan.h describes how the work is split over threads.

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu_kernels.h"
#include "paged_kv.h"
#include "panel_products.h"

namespace alignpro {
namespace {

using at::Tensor;

Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Element::kFloat;
    case at::kBFloat16: return Element::kBFloat16;
    default: return Element::kHalf;
  }
}

// Invalid values would cause out-of-bounds reads; checking them here costs almost nothing.
void check_values(const Level& level, const AttentionShape& shape, const Tensor& pages) {
  const int64_t slots = level.page_table.size(1) * pages.size(2), sequences = level.sequences();
  TORCH_CHECK_VALUE(level.cu_queries[0] == 0 && level.cu_queries[sequences] == level.count, "cu_queries goes from ",
                    level.cu_queries[0], " to ", level.cu_queries[sequences], ": expected from 0 to the number of queries, ",
                    level.count);
  for (int64_t r = 0; level.rows != nullptr && r < level.count; ++r) {
    TORCH_CHECK_VALUE(level.rows[r] >= 0 && level.rows[r] < shape.tokens, "rows: number ", r, " is ", level.rows[r],
                      ", expected 0 to ", shape.tokens - 1);
  }
  for (int64_t s = 0; s < sequences; ++s) {
    TORCH_CHECK_VALUE(level.cu_queries[s] <= level.cu_queries[s + 1], "cu_queries: sequence ", s, " goes from ",
                      level.cu_queries[s], " to ", level.cu_queries[s + 1], ": it must not decrease");
    TORCH_CHECK_VALUE(level.key_lengths[s] >= 0 && level.key_lengths[s] <= slots, "key_lengths: sequence ", s, " has ",
                      level.key_lengths[s], " keys, expected 0 to ", slots, ", what its pages hold");
    const int32_t* table = level.page_table.const_data_ptr<int32_t>() + s * level.page_table.stride(0);
    for (int64_t i = 0; i * pages.size(2) < level.key_lengths[s]; ++i) {
      TORCH_CHECK_VALUE(table[i] >= 0 && table[i] < pages.size(0), "page_table: entry ", i, " of sequence ", s, " is ", table[i],
                        ", expected 0 to ", pages.size(0) - 1);
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

// Attention of queries to one layer's keys.
struct Problem {
  const AttentionShape& shape;
  const Level& level;
  const Tensor &query, &pages;             // (T, H, D), (n_pages, 2, page_size, kv_heads, D)
  float scale, softcap;
  float *out, *lse;                        // (T, H, D), (T, H)
  bool merge;                              // merge with the contents of out and lse instead of overwriting them
};

void write_rows(const Problem& p, const WorkItem& item, const SoftmaxState& sums) {
  const int64_t dim = p.shape.head_dim, stride = p.shape.stride(), group = p.shape.group();
  int64_t row = 0;
  for (int64_t kv_head = item.head_begin; kv_head < item.head_end; ++kv_head) {
    for (int64_t t = item.query_begin; t < item.query_end; ++t) {
      for (int64_t g = 0; g < group; ++g, ++row) {
        const int64_t to = p.level.row(t) * p.shape.heads + kv_head * group + g;
        const float l = sums.l[row], lse = sums.m[row] + std::log(l);
        float by = l == 0 ? 0 : 1 / l, before = 0;
        if (p.merge && p.lse[to] != -std::numeric_limits<float>::infinity()) {
          if (l == 0) continue;
          const float top = std::max(p.lse[to], lse), ours = std::exp(lse - top), theirs = std::exp(p.lse[to] - top);
          by *= ours / (ours + theirs);
          before = theirs / (ours + theirs);
          p.lse[to] = top + std::log(ours + theirs);
        } else {
          p.lse[to] = lse;
        }
        float* out = p.out + to * dim;
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

// A thread's memory for the sums and queries of items, kept from one layer to the next.
class ItemMemory {
 public:
  float* floats(int64_t count) {
    if (!memory_.defined() || memory_.numel() < count) memory_ = at::empty({count}, at::kFloat);
    return memory_.mutable_data_ptr<float>();
  }
  std::vector<int64_t> first, last;  // (rows of a head)

 private:
  Tensor memory_;
};

// A thread's processing of items. An item's rows are ordered by key-value head, query, query head.
class Worker {
 public:
  explicit Worker(const Problem& p)
      : p_(p), stride_(p.shape.stride()), rows_(p.shape.rows_per_item()), keys_(head_keys(p)),
        head_bytes_(p.pages.stride(3) * p.pages.element_size()) {
    thread_local ItemMemory memory;
    memory_ = &memory;
    memory.first.resize(static_cast<size_t>(rows_));
    memory.last.resize(static_cast<size_t>(rows_));
    query_ = memory.floats(rows_ * stride_ + 2 * state_floats(rows_, stride_) + cpu_kernels().attention.scratch(rows_, stride_));
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
  int64_t rows_of_head(const WorkItem& item) const { return item.queries() * p_.shape.group(); }

  // Converts the queries to (rows, stride) floats, and collects the range of keys that each row of a head sees.
  void gather(const WorkItem& item) {
    const int64_t size = p_.query.element_size(), group = p_.shape.group();
    const char* from = static_cast<const char*>(p_.query.const_data_ptr());
    float* to = query_;
    for (int64_t head = item.head_begin * group; head < item.head_end * group; head += group) {
      for (int64_t t = item.query_begin; t < item.query_end; ++t) {
        for (int64_t g = 0; g < group; ++g, to += stride_) {
          const int64_t at = p_.level.row(t) * p_.query.stride(0) + (head + g) * p_.query.stride(1);
          cpu_kernels().attention.upcast_row(from + at * size, element_of(p_.query), to, p_.shape.head_dim, stride_);
        }
      }
    }
    for (int64_t row = 0; row < rows_of_head(item); ++row) {
      memory_->first[row] = p_.level.first[item.query_begin + row / group];
      memory_->last[row] = p_.level.last[item.query_begin + row / group];
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
            {rows, stride_, query_ + row * stride_, memory_->first.data(), memory_->last.data(), p_.scale, p_.softcap},
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
    const int64_t bytes = p_.shape.head_dim * p_.pages.element_size();
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
    keys.table += item.sequence * p_.level.page_table.stride(0);
    return keys;
  }

  // Returns the keys of the first head and sequence.
  static HeadKeys head_keys(const Problem& p) {
    const auto bytes = [&](int64_t dimension) { return p.pages.stride(dimension) * p.pages.element_size(); };
    return {static_cast<const char*>(p.pages.const_data_ptr()), p.level.page_table.const_data_ptr<int32_t>(), p.pages.size(2),
            bytes(0), bytes(2), bytes(1), p.shape.head_dim, element_of(p.pages)};
  }

  const Problem& p_;
  int64_t stride_, rows_;
  HeadKeys keys_;
  int64_t head_bytes_;
  ItemMemory* memory_;
  float *query_, *sums_, *scratch_;    // (rows, stride); two sets of sums; the kernels' scratch memory
};

Tensor unit_stride(const Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

Level level_of(const CascadeLevels& levels, size_t index) {
  const OptionalTensor chosen = levels.rows.get(index);
  Level level{unit_stride(levels.page_tables[index]), chosen ? chosen->contiguous() : Tensor(), levels.cu_queries[index].contiguous(),
              levels.key_lengths[index].contiguous()};
  level.count = levels.query_positions[index].size(0);
  level.rows = chosen ? level.rows_of_queries.const_data_ptr<int64_t>() : nullptr;
  level.cu_queries = level.bounds.const_data_ptr<int32_t>();
  level.key_lengths = level.lengths.const_data_ptr<int32_t>();
  return level;
}

}  // namespace

CascadePlan::CascadePlan(const CascadeLevels& levels, int64_t tokens, int64_t heads, const Tensor& pages, int64_t window, int64_t threads)
    : shape_{tokens, heads, pages.size(3), pages.size(4)}, some_rows_(levels.rows.get(0).has_value()) {
  int64_t parts = 0;
  for (size_t i = 0; i < levels.cu_queries.size(); ++i) {
    Level level = level_of(levels, i);
    check_values(level, shape_, pages);
    const Tensor positions = levels.query_positions[i].contiguous(), starts = levels.key_starts[i].contiguous();
    find_visible(level, positions.const_data_ptr<int32_t>(), starts.const_data_ptr<int32_t>(), window);
    LevelPlan plan = plan_of(level, shape_, threads);
    parts = std::max(parts, plan.parts);
    levels_.push_back({std::move(level), std::move(plan)});
  }
  parts_ = at::empty({parts * state_floats(shape_.rows_per_item(), shape_.stride())}, at::kFloat);
}

int64_t CascadePlan::multiplications() const {
  int64_t sum = 0;
  for (const Planned& each : levels_) sum += each.plan.multiplications;
  return sum;
}

void CascadePlan::attend(Crew& crew, const Tensor& query, const Tensor& pages, float scale, float softcap, float* out, float* lse) const {
  if (some_rows_) {
    const int64_t of_token = shape_.heads * shape_.head_dim;
    for_rows(crew, shape_.tokens, of_token, [&](int64_t begin, int64_t end) {
      std::fill(out + begin * of_token, out + end * of_token, 0.0f);
      std::fill(lse + begin * shape_.heads, lse + end * shape_.heads, -std::numeric_limits<float>::infinity());
    });
  }
  const int64_t rows = shape_.rows_per_item(), stride = shape_.stride(), floats = state_floats(rows, stride);
  float* sums = parts_.mutable_data_ptr<float>();
  bool merge = some_rows_;
  for (const auto& [level, plan] : levels_) {
    const Problem p{shape_, level, query, pages, scale, softcap, out, lse, merge};
    Worker worker(p);
    crew.each(static_cast<int64_t>(plan.runs.size()) - 1, [&](int64_t run) {
      for (size_t i = plan.runs[run]; i < plan.runs[run + 1]; ++i) {
        worker.process(plan.items[i], i + 1 < plan.runs[run + 1] ? &plan.items[i + 1] : nullptr, sums);
      }
    });
    crew.each(static_cast<int64_t>(plan.splits.size()), [&](int64_t i) {
      const Split& split = plan.splits[i];
      const SoftmaxState whole = state_at(sums + split.part * floats, rows, stride);
      for (int64_t part = 1; part < split.item.parts(); ++part) {
        cpu_kernels().attention.merge(whole, state_at(sums + (split.part + part) * floats, rows, stride),
                                      split.item.queries() * shape_.group(), stride);
      }
      write_rows(p, split.item, whole);
    });
    merge = true;
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
  const Tensor from = unit_stride(query);
  const CascadePlan plan({rows, cu_queries, page_tables, key_lengths, query_positions, key_starts}, query.size(0), query.size(1), pages,
                         window, at::get_num_threads());
  float *to = out.mutable_data_ptr<float>(), *sums = lse.mutable_data_ptr<float>();
  Crew::run(threads_for(plan.multiplications()), [&](Crew& crew) {
    plan.attend(crew, from, pages, static_cast<float>(scale), static_cast<float>(softcap), to, sums);
  });
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
