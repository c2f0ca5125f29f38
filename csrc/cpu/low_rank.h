// LoRAs on packed weights: products with low-rank factors that are added to some rows of a packed product.
#pragma once

#include <ATen/Functions.h>

#include <numeric>
#include <optional>
#include <vector>

#include "panel_products.h"

namespace alignpro {

// The rows of a pass on which LoRAs act, in ascending order.
class ActiveRows {
 public:
  // active: (A) int64, in any order; all rows if it is absent.
  ActiveRows(int64_t rows, const std::optional<at::Tensor>& active) : before_(rows + 1) {
    if (!active) {
      rows_.resize(rows);
      std::iota(rows_.begin(), rows_.end(), 0);
      std::iota(before_.begin(), before_.end(), 0);
      return;
    }
    TORCH_CHECK_VALUE(active->dim() == 1 && active->scalar_type() == at::kLong && active->is_cpu(),
                      "the active rows are ", active->scalar_type(), " of shape ", active->sizes(),
                      ": expected (A) int64 on the CPU");
    const at::Tensor list = active->contiguous();
    const int64_t* from = list.const_data_ptr<int64_t>();
    std::vector<char> acts(rows);
    for (int64_t i = 0; i < list.numel(); ++i) {
      TORCH_CHECK_VALUE(from[i] >= 0 && from[i] < rows, "active row ", from[i], " is not one of the ", rows, " rows");
      acts[from[i]] = 1;
    }
    for (int64_t row = 0; row < rows; ++row) {
      if (acts[row]) rows_.push_back(row);
      before_[row + 1] = static_cast<int64_t>(rows_.size());
    }
  }
  int64_t before(int64_t row) const { return before_[row]; }  // number of active rows before a row
  int64_t count() const { return before_.back(); }
  int64_t operator[](int64_t index) const { return rows_[index]; }

 private:
  std::vector<int64_t> rows_, before_;
};

// Adds scale (x a^T) b^T to `outputs` columns of a product, from `first` on.
struct LowRank {
  at::Tensor a, b;  // (rank, inputs), (outputs, rank), contiguous
  float scale;
  int64_t first;
};

// What LoRAs add to the active rows of one packed product, as `multiply` takes it. The other rows are not touched.
class LowRankTerm {
 public:
  static int64_t ranks(const std::vector<LowRank>& loras) {
    int64_t sum = 0;
    for (const LowRank& lora : loras) sum += lora.a.size(0);
    return sum;
  }

  // For a product of `rows` rows of the pass from `first` on. `memory` is for as many floats as there are active rows among them,
  // times the ranks of the LoRAs.
  LowRankTerm(const std::vector<LowRank>& loras, const ActiveRows& active, int64_t first, int64_t rows, float* memory)
      : loras_(loras), active_(active), first_(first), begin_(active.before(first)), count_(active.before(first + rows) - begin_),
        inner_(memory) {}

  // Computes scale x a^T for the product's rows [begin, end), of what it multiplies: x (rows, inputs).
  void prepare(const float* x, int64_t begin, int64_t end) const {
    if (loras_.empty()) return;
    const int64_t last = active_.before(first_ + end), inputs = loras_[0].a.size(1);
    for (int64_t i = active_.before(first_ + begin), run; i < last; i += run) {  // runs of adjacent rows
      const int64_t row = active_[i];
      for (run = 1; i + run < last && active_[i + run] == row + run;) ++run;
      float* to = inner_;
      for (const LowRank& lora : loras_) {
        const int64_t rank = lora.a.size(0);
        cpu_kernels().panels.project(x + (row - first_) * inputs, run, lora.a.const_data_ptr<float>(), rank, inputs, lora.scale,
                                     to + (i - begin_) * rank);
        to += count_ * rank;
      }
    }
  }

  // tile (count, kPanel) += the LoRAs' outputs, for rows from `first` on, counted from the product's first row.
  void operator()(int64_t first, int64_t count, int64_t panel, float* tile) const {
    if (loras_.empty()) return;
    const int64_t from = active_.before(first_ + first), rows = active_.before(first_ + first + count) - from;
    if (rows == 0) return;
    const float* inner = inner_;
    for (const LowRank& lora : loras_) {
      const int64_t rank = lora.a.size(0), start = panel * kPanel;
      const int64_t begin = std::max(start, lora.first), end = std::min(start + kPanel, lora.first + lora.b.size(0));
      if (begin < end) {
        alignas(64) float product[kRowChunk * kPanel], weight[kDepthChunk * kPanel];
        const float* up = lora.b.const_data_ptr<float>() + (begin - lora.first) * rank;
        for (int64_t k = 0; k < rank; k += kDepthChunk) {
          const int64_t depth = std::min(kDepthChunk, rank - k);
          cpu_kernels().panels.pack(up + k, rank, end - begin, depth, weight);
          cpu_kernels().panels.multiply(inner + (from - begin_) * rank + k, rank, rows, weight, depth, product, kPanel, k > 0, nullptr);
        }
        for (int64_t i = 0; i < rows; ++i) {
          float* to = tile + (active_[from + i] - first_ - first) * kPanel + begin - start;
          for (int64_t j = 0; j < end - begin; ++j) to[j] += product[i * kPanel + j];
        }
      }
      inner += count_ * rank;
    }
  }

 private:
  const std::vector<LowRank>& loras_;
  const ActiveRows& active_;
  int64_t first_, begin_, count_;  // the product's first row; the first of its active rows, and their number
  float* inner_;                   // (count, rank) of each LoRA: scale x a^T
};

}  // namespace alignpro
