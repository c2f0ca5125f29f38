// Weights in panels, and multithreaded products with them.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "cpu_kernels.h"

namespace alignpro {

constexpr int64_t kRowChunk = 96;            // rows per work item: their products with a panel stay in L1
constexpr int64_t kDepthChunk = 192;         // inputs per partial sum, which keeps rounding errors small
constexpr int64_t kGroupFloats = 96 << 10;   // elements of x in a group of rows: they stay in L2
constexpr int64_t kMinThreadWork = 1 << 16;  // minimum multiplications per thread
constexpr int64_t kGrain = 1 << 14;          // minimum elements per thread in row-wise work

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls work(row) for all rows of `width` elements, on as many threads as pay off.
template <typename Work>
void for_rows(int64_t rows, int64_t width, const Work& work) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) work(row);
  });
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
};

// The rows (rows, inputs) of a product with a packed weight, in bfloat16 where products with the weight are of such rows.
class Rows {
 public:
  Rows(const float* x, int64_t rows, const Panels& weight) : x_(x), inputs_(weight.inputs) {
    const int parts = cpu_kernels().parts;
    if (weight.narrow == nullptr || parts == 0) return;
    constexpr int64_t line = 32;  // elements
    const int64_t stride = (ceil_div(inputs_, line) | 1) * line;  // an odd number: rows begin in different sets of the cache
    memory_ = at::empty({parts, rows, stride}, at::kBFloat16);
    auto* first = static_cast<uint16_t*>(memory_.mutable_data_ptr());
    narrow_ = {first, parts == 2 ? first + rows * stride : nullptr, stride};
    for_rows(rows, inputs_, [&](int64_t row) {
      auto* second = parts == 2 ? first + (rows + row) * stride : nullptr;
      cpu_kernels().panels.narrow_rows(x + row * inputs_, inputs_, 1, inputs_, first + row * stride, second);
    });
  }

  // out (rows, kPanel) = the rows from `first` on times one panel of the weight
  void multiply(int64_t first, int64_t rows, const Panels& weight, int64_t panel, float* out) const {
    const PanelKernels& kernels = cpu_kernels().panels;
    const int64_t from = panel * inputs_ * kPanel;
    const auto in_parts = [&](const auto* weights, int64_t longest, const auto& kernel) {
      for (int64_t k = 0, depth; k < inputs_; k += depth) {
        depth = std::min(longest, inputs_ - k);
        const auto* part = weights + from + k * kPanel;
        // What comes next is in the cache already after the first rows.
        kernel(k, part, depth, k > 0, first == 0 ? part + depth * kPanel : nullptr);
      }
    };
    const auto with = [&](auto kernel) {
      return [this, first, rows, out, kernel](int64_t k, const auto* part, int64_t depth, bool add, const auto* next) {
        kernel(x_ + first * inputs_ + k, inputs_, rows, part, depth, out, kPanel, add, next);
      };
    };
    if (weight.wide != nullptr) {
      in_parts(weight.wide, kDepthChunk, with(kernels.multiply));
    } else if (narrow_.first == nullptr) {
      in_parts(weight.narrow, kDepthChunk, with(kernels.multiply_bfloat16));
    } else {
      in_parts(weight.narrow, kernels.narrow_depth,
               [&](int64_t k, const uint16_t* part, int64_t depth, bool add, const uint16_t* next) {
                 kernels.multiply_narrow(narrow_.at(first, k), rows, part, depth, out, kPanel, add, next);
               });
    }
  }

 private:
  const float* x_;
  int64_t inputs_;
  at::Tensor memory_;
  NarrowRows narrow_{};
};

// Calls work(first row, rows, panel) for all rows and panels, on as many threads as pay off. For a group of rows, a thread
// processes one panel after another, each with a few rows at a time.
template <typename Work>
void for_panels(int64_t rows, int64_t panels, int64_t inputs, const Work& work) {
  if (rows == 0) return;
  const int64_t in_group = std::max(kRowChunk, kGroupFloats / inputs), groups = ceil_div(rows, in_group);
  const int64_t work_of_one = std::max<int64_t>(1, rows / groups * inputs * kPanel);
  at::parallel_for(0, groups * panels, std::max<int64_t>(1, kMinThreadWork / work_of_one), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / panels, first = group * rows / groups, count = (group + 1) * rows / groups - first;
      const int64_t chunks = ceil_div(count, kRowChunk);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t from = chunk * count / chunks, to = (chunk + 1) * count / chunks;
        work(first + from, to - from, i % panels);
      }
    }
  });
}

// Leaves products as they are.
struct Nothing {
  void operator()(int64_t, int64_t, int64_t, float*) const {}
};

// Computes x (rows, inputs) times a packed weight and calls epilogue(row, first output, outputs, products). Before, it calls
// add(first row, rows, panel, products), which may change products (rows, kPanel).
template <typename Epilogue, typename Add = Nothing>
void multiply(const float* x, int64_t rows, const at::Tensor& packed, int64_t outputs, const Epilogue& epilogue,
              const Add& add = {}) {
  const Panels weight(packed);
  const Rows of_x(x, rows, weight);
  for_panels(rows, weight.count, weight.inputs, [&](int64_t first, int64_t count, int64_t panel) {
    alignas(64) float tile[kRowChunk * kPanel];
    of_x.multiply(first, count, weight, panel, tile);
    add(first, count, panel, tile);
    const int64_t column = panel * kPanel, width = std::min(kPanel, outputs - column);
    for (int64_t r = 0; r < count; ++r) epilogue(first + r, column, width, tile + r * kPanel);
  });
}

// out (rows, outputs) = x times a packed weight, plus a bias (outputs) unless it is null
template <typename Add = Nothing>
void multiply_biased(const float* x, int64_t rows, const at::Tensor& packed, int64_t outputs, const float* bias, float* out,
                     const Add& add = {}) {
  const auto epilogue = [&](int64_t row, int64_t column, int64_t width, const float* product) {
    float* to = out + row * outputs + column;
    for (int64_t j = 0; j < width; ++j) to[j] = bias == nullptr ? product[j] : product[j] + bias[column + j];
  };
  multiply(x, rows, packed, outputs, epilogue, add);
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

// out (rows, outputs) = silu(x gate) (x up), after add_gate and add_up have changed both products as in `multiply`
template <typename AddGate = Nothing, typename AddUp = Nothing>
void multiply_gated(const float* x, int64_t rows, const at::Tensor& gate, const at::Tensor& up, int64_t outputs, float* out,
                    const AddGate& add_gate = {}, const AddUp& add_up = {}) {
  const Panels gates(gate), ups(up);
  TORCH_CHECK_VALUE((gates.wide == nullptr) == (ups.wide == nullptr), "the weights of a gate and of what it multiplies differ in dtype");
  const Rows of_x(x, rows, gates);
  for_panels(rows, gates.count, gates.inputs, [&](int64_t first, int64_t count, int64_t panel) {
    alignas(64) float g[kRowChunk * kPanel], u[kRowChunk * kPanel];
    of_x.multiply(first, count, gates, panel, g);
    of_x.multiply(first, count, ups, panel, u);
    add_gate(first, count, panel, g);
    add_up(first, count, panel, u);
    cpu_kernels().panels.gate(g, u, count * kPanel);
    const int64_t column = panel * kPanel, width = std::min(kPanel, outputs - column);
    for (int64_t r = 0; r < count; ++r) std::copy_n(g + r * kPanel, width, out + (first + r) * outputs + column);
  });
}

}  // namespace alignpro
