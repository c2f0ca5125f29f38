// Weights in panels, and multithreaded products with them.
#pragma once

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "cpu_kernels.h"
#include "crew.h"

namespace alignpro {

constexpr int64_t kRowChunk = 96;            // rows per work item: their products with a panel stay in L1
constexpr int64_t kDepthChunk = 192;         // inputs per partial sum, which keeps rounding errors small
constexpr int64_t kGroupFloats = 96 << 10;   // elements of x in a group of rows: they stay in L2
constexpr int64_t kMinThreadWork = 1 << 16;  // minimum multiplications per thread
constexpr int64_t kGrain = 1 << 13;          // elements of an item of row-wise work

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The number of threads that pay off for work of so many multiplications.
inline int64_t threads_for(int64_t multiplications) {
  return std::clamp<int64_t>(multiplications / kMinThreadWork, 1, at::get_num_threads());
}

// A step of a crew: work(begin, end) for ranges that make up all rows, of `width` elements.
template <typename Work>
void for_rows(Crew& crew, int64_t rows, int64_t width, const Work& work) {
  const int64_t in_item = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width));
  crew.each(ceil_div(rows, in_item), [&](int64_t item) { work(item * in_item, std::min(rows, (item + 1) * in_item)); });
}

// The elements of a tensor in bfloat16, as the kernels take them.
inline const uint16_t* bfloat16_data(const at::Tensor& x) { return reinterpret_cast<const uint16_t*>(x.const_data_ptr<at::BFloat16>()); }

// (panels, inputs, kPanel) in float32 or bfloat16
struct Panels {
  const float* wide;       // null for bfloat16
  const uint16_t* narrow;  // null for float32
  int64_t count, inputs;
  explicit Panels(const at::Tensor& packed)
      : wide(packed.scalar_type() == at::kFloat ? packed.const_data_ptr<float>() : nullptr),
        narrow(wide == nullptr ? bfloat16_data(packed) : nullptr),
        count(packed.size(0)),
        inputs(packed.size(1)) {}
  const void* at(int64_t panel) const {
    const int64_t offset = panel * inputs * kPanel;
    return wide == nullptr ? static_cast<const void*>(narrow + offset) : wide + offset;
  }
};

// The rows (rows, inputs) of products with packed weights of one dtype. Those with a weight in bfloat16 may be of rows in bfloat16,
// which `prepare` makes of them before.
class Rows {
 public:
  // The elements of memory in bfloat16 that the rows need.
  static int64_t elements(int64_t rows, int64_t inputs, bool narrow_weight) {
    return narrow_weight ? cpu_kernels().parts * rows * stride_of(inputs) : 0;
  }

  // `memory` is for `elements`.
  Rows(const float* x, int64_t rows, const Panels& weight, uint16_t* memory) : x_(x), inputs_(weight.inputs) {
    const int parts = cpu_kernels().parts;
    if (weight.narrow == nullptr || parts == 0) return;
    const int64_t stride = stride_of(inputs_);
    narrow_ = {memory, parts == 2 ? memory + rows * stride : nullptr, stride};
  }

  // Makes the rows [begin, end) of what x is now.
  void prepare(int64_t begin, int64_t end) const {
    if (narrow_.first == nullptr) return;
    for (int64_t row = begin; row < end; ++row) {
      const NarrowRows to = narrow_.at(row, 0);
      cpu_kernels().panels.narrow_rows(x_ + row * inputs_, inputs_, 1, inputs_, const_cast<uint16_t*>(to.first),
                                       const_cast<uint16_t*>(to.second));
    }
  }

  // out (rows, kPanel) = the rows from `first` on times one panel of the weight. `next` is what is multiplied afterwards, or null: a
  // panel of as many inputs.
  void multiply(int64_t first, int64_t rows, const Panels& weight, int64_t panel, float* out, const void* next) const {
    const PanelKernels& kernels = cpu_kernels().panels;
    const auto in_parts = [&](const auto* weights, int64_t longest, const auto& kernel) {
      weights += panel * inputs_ * kPanel;
      for (int64_t k = 0, depth; k < inputs_; k += depth) {
        depth = std::min(longest, inputs_ - k);
        const auto* part = weights + k * kPanel;
        kernel(k, part, depth, k > 0, k + depth < inputs_ ? part + depth * kPanel : static_cast<decltype(part)>(next));
      }
    };
    const auto with = [&](auto kernel) {
      return [this, first, rows, out, kernel](int64_t k, const auto* part, int64_t depth, bool add, const auto* next_part) {
        kernel(x_ + first * inputs_ + k, inputs_, rows, part, depth, out, kPanel, add, next_part);
      };
    };
    if (weight.wide != nullptr) {
      in_parts(weight.wide, kDepthChunk, with(kernels.multiply));
    } else if (narrow_.first == nullptr) {
      in_parts(weight.narrow, kDepthChunk, with(kernels.multiply_bfloat16));
    } else {
      in_parts(weight.narrow, kernels.narrow_depth,
               [&](int64_t k, const uint16_t* part, int64_t depth, bool add, const uint16_t* next_part) {
                 kernels.multiply_narrow(narrow_.at(first, k), rows, part, depth, out, kPanel, add, next_part);
               });
    }
  }

 private:
  // An odd number of cache lines: rows begin in different sets of the cache.
  static int64_t stride_of(int64_t inputs) {
    constexpr int64_t line = 32;  // elements
    return (ceil_div(inputs, line) | 1) * line;
  }

  const float* x_;
  int64_t inputs_;
  NarrowRows narrow_{};
};

// A step of a crew: work(first row, rows, panel, ahead) for all rows and panels. For a group of rows, a thread processes one panel
// after another, each with a few rows at a time. With the first ones it may load the next panel, if `ahead`.
template <typename Work>
void for_panels(Crew& crew, int64_t rows, int64_t panels, int64_t inputs, const Work& work) {
  if (rows == 0) return;
  const int64_t in_group = std::max(kRowChunk, kGroupFloats / inputs), groups = ceil_div(rows, in_group);
  crew.ranges(groups * panels, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / panels, first = group * rows / groups, count = (group + 1) * rows / groups - first;
      const int64_t chunks = ceil_div(count, kRowChunk), panel = i % panels;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t from = chunk * count / chunks, to = (chunk + 1) * count / chunks;
        work(first + from, to - from, panel, chunk == 0 && i + 1 < end && panel + 1 < panels);
      }
    }
  });
}

// Leaves products as they are.
struct Nothing {
  void operator()(int64_t, int64_t, int64_t, float*) const {}
};

// A step of a crew: computes x times a packed weight, for `rows` prepared rows, and calls epilogue(row, first output, outputs,
// products). Before, it calls add(first row, rows, panel, products), which may change products (rows, kPanel).
template <typename Epilogue, typename Add = Nothing>
void multiply(Crew& crew, const Rows& x, int64_t rows, const Panels& weight, int64_t outputs, const Epilogue& epilogue,
              const Add& add = {}) {
  for_panels(crew, rows, weight.count, weight.inputs, [&](int64_t first, int64_t count, int64_t panel, bool ahead) {
    alignas(64) float tile[kRowChunk * kPanel];
    x.multiply(first, count, weight, panel, tile, ahead ? weight.at(panel + 1) : nullptr);
    add(first, count, panel, tile);
    const int64_t column = panel * kPanel, width = std::min(kPanel, outputs - column);
    for (int64_t r = 0; r < count; ++r) epilogue(first + r, column, width, tile + r * kPanel);
  });
}

// A step of a crew: out (rows, outputs) = x times a packed weight, plus a bias (outputs) unless it is null
template <typename Add = Nothing>
void multiply_biased(Crew& crew, const Rows& x, int64_t rows, const Panels& weight, int64_t outputs, const float* bias, float* out,
                     const Add& add = {}) {
  const auto epilogue = [&](int64_t row, int64_t column, int64_t width, const float* product) {
    float* to = out + row * outputs + column;
    for (int64_t j = 0; j < width; ++j) to[j] = bias == nullptr ? product[j] : product[j] + bias[column + j];
  };
  multiply(crew, x, rows, weight, outputs, epilogue, add);
}

// Adds a bias (outputs), unless it is null, and what `more` adds to the products (rows, kPanel) with a panel.
template <typename Add>
struct BiasAnd {
  const float* bias;
  int64_t outputs;
  const Add& more;
  void operator()(int64_t first, int64_t count, int64_t panel, float* tile) const {
    more(first, count, panel, tile);
    if (bias == nullptr) return;
    const int64_t column = panel * kPanel, width = std::min(kPanel, outputs - column);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t j = 0; j < width; ++j) tile[r * kPanel + j] += bias[column + j];
    }
  }
};

// A step of a crew: out (rows, outputs) = silu(x gate) (x up), after add_gate and add_up have changed both products as in `multiply`
template <typename AddGate = Nothing, typename AddUp = Nothing>
void multiply_gated(Crew& crew, const Rows& x, int64_t rows, const Panels& gates, const Panels& ups, int64_t outputs, float* out,
                    const AddGate& add_gate = {}, const AddUp& add_up = {}) {
  for_panels(crew, rows, gates.count, gates.inputs, [&](int64_t first, int64_t count, int64_t panel, bool ahead) {
    alignas(64) float g[kRowChunk * kPanel], u[kRowChunk * kPanel];
    x.multiply(first, count, gates, panel, g, ups.at(panel));
    x.multiply(first, count, ups, panel, u, ahead ? gates.at(panel + 1) : nullptr);
    add_gate(first, count, panel, g);
    add_up(first, count, panel, u);
    cpu_kernels().panels.gate(g, u, count * kPanel);
    const int64_t column = panel * kPanel, width = std::min(kPanel, outputs - column);
    for (int64_t r = 0; r < count; ++r) std::copy_n(g + r * kPanel, width, out + (first + r) * outputs + column);
  });
}

// Checks that the weights of a gate and of what it multiplies are stored alike: they have the same rows.
inline void check_gate(const Panels& gate, const Panels& up) {
  TORCH_CHECK_VALUE((gate.wide == nullptr) == (up.wide == nullptr), "the weights of a gate and of what it multiplies differ in dtype");
}

}  // namespace alignpro
