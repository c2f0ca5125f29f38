// The three products of a tile of the head's weight, w (columns, D), with rows of hidden states, h (C, D):
//
//     logits (C, columns) = h w^T        d_h (C, D) += du w        d_w (columns, D) = du^T h
//
// They use panels (panel_kernels.h), into which each thread packs its tile while it is in the cache. For few rows, and on
// processors without vectorised kernels, PyTorch's BLAS is used. A w in bfloat16, for the logits alone, is not widened in
// memory: for few rows it is read as it is. Included only by head.h.
#pragma once

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "panel_products.h"

namespace alignpro {
namespace {

using at::Tensor;

constexpr int64_t kMinPackedRows = 48;  // with fewer rows, packing a tile does not pay off

inline bool worth_packing(int64_t rows) { return rows >= kMinPackedRows && cpu_kernels().vectorised; }

inline int64_t panels_of(int64_t outputs) { return ceil_div(outputs, kPanel); }

// Calls take(first, count) for chunks of a depth, of nearly equal size; all but the last are even.
template <typename Take>
void for_chunks(int64_t depth, const Take& take) {
  const int64_t chunks = ceil_div(depth, kDepthChunk);
  for (int64_t i = 0; i < chunks; ++i) {
    const auto start = [&](int64_t chunk) { return chunk == chunks ? depth : chunk * depth / chunks / 2 * 2; };
    take(start(i), start(i + 1) - start(i));
  }
}

// Rows at a stride that is a multiple of 4 KiB map to the same L1 cache sets; if so, returns a copy with another stride.
inline Tensor avoid_cache_aliasing(const Tensor& rows) {
  const int64_t dim = rows.size(1);
  if (dim * 4 % 4096 != 0 || !worth_packing(rows.size(0))) return rows;
  const Tensor copy = at::empty({rows.size(0), dim + kPanel / 2}, rows.options()).narrow(1, 0, dim);
  copy.copy_(rows);
  return copy;
}

// Packs rows (R, D) into panels along D: (panels, R, kPanel), zero-padded beyond D.
inline void pack_rows(const float* rows, int64_t stride, int64_t count, int64_t dim, float* packed) {
  for (int64_t panel = 0; panel < panels_of(dim); ++panel) {
    const int64_t first = panel * kPanel, width = std::min(kPanel, dim - first);
    for (int64_t r = 0; r < count; ++r, packed += kPanel) {
      std::copy_n(rows + r * stride + first, width, packed);
      std::fill(packed + width, packed + kPanel, 0.0f);
    }
  }
}

// The products of one tile, with a thread's memory for packing it into panels. The hidden states must not change meanwhile.
class TileProducts {
 public:
  // For tiles of at most `width` columns.
  TileProducts(int64_t width, int64_t dim, bool packed)
      : dim_(dim), packed_(packed ? at::empty({std::max(panels_of(width) * dim, panels_of(dim) * width) * kPanel}, at::kFloat)
                                  : Tensor()) {}

  // logits = h w^T, with row stride `width`; the values beyond w's columns are undefined.
  void logits(const Tensor& h, const Tensor& w, float* out, int64_t width) {
    const bool narrow = w.scalar_type() == at::kBFloat16;
    const float* x = h.const_data_ptr<float>();
    const PanelKernels& panels = cpu_kernels().panels;
    const int parts = narrow ? cpu_kernels().parts : 0;
    const bool dots = narrow && (!packed_.defined() || (parts > 0 && panels.dots_of_many));
    const NarrowRows rows = parts == 0 ? NarrowRows{} : narrowed(h, parts, dots);
    if (dots) {
      if (parts > 0) {
        panels.dot_narrow(rows, h.size(0), bfloat16_data(w), w.size(0), dim_, out, width);
      } else {
        panels.dot_bfloat16(x, h.stride(0), h.size(0), bfloat16_data(w), w.size(0), dim_, out, width);
      }
      return;
    }
    if (!packed_.defined()) {
      Tensor u = at::from_blob(out, {h.size(0), w.size(0)}, {width, 1}, at::kFloat);
      at::mm_out(u, h, w.t());
      return;
    }
    pack_columns(w);
    const void* from = packed_.const_data_ptr();
    for_chunks(dim_, [&](int64_t first, int64_t depth) {
      for (int64_t panel = 0; panel < panels_of(w.size(0)); ++panel) {
        const int64_t at = (panel * dim_ + first) * kPanel;
        float* to = out + panel * kPanel;
        const auto multiply = [&](const auto* weights, auto kernel) {
          kernel(x + first, h.stride(0), h.size(0), weights + at, depth, to, width, first > 0, nullptr);
        };
        if (parts > 0) {
          panels.multiply_narrow(rows.at(0, first), h.size(0), static_cast<const uint16_t*>(from) + at, depth, to, width, first > 0, nullptr);
        } else if (narrow) {
          multiply(static_cast<const uint16_t*>(from), panels.multiply_bfloat16);
        } else {
          multiply(static_cast<const float*>(from), panels.multiply);
        }
      }
    });
  }

  // into (C, D) += du w, for du (C, columns) with row stride `width`
  void add_hidden_gradient(const float* du, int64_t width, const Tensor& w, const Tensor& into) {
    const int64_t columns = w.size(0), count = into.size(0);
    if (!packed_.defined()) {
      into.addmm_(at::from_blob(const_cast<float*>(du), {count, columns}, {width, 1}, at::kFloat), w);
      return;
    }
    float* from = packed_.mutable_data_ptr<float>();
    if (packed_for_ != w.const_data_ptr() || by_columns_) {
      pack_rows(w.const_data_ptr<float>(), w.stride(0), columns, dim_, from);
      packed_for_ = w.const_data_ptr();
      by_columns_ = false;
    }
    float* out = into.mutable_data_ptr<float>();
    for_chunks(columns, [&](int64_t first, int64_t depth) {
      for (int64_t panel = 0; panel < panels_of(dim_); ++panel) {
        const float* weights = from + (panel * columns + first) * kPanel;
        multiply_within(panel, out, into.stride(0), count, true, [&](float* to, int64_t stride, bool add) {
          cpu_kernels().panels.multiply(du + first, width, count, weights, depth, to, stride, add, nullptr);
        });
      }
    });
  }

  // into (columns, D) (+)= du^T h, for h packed by `pack_rows` and du with row stride `width`
  void weight_gradient(const float* du, int64_t width, const float* h, int64_t rows_of_h, int64_t first_row, int64_t count,
                       const Tensor& into, bool add) {
    float* out = into.mutable_data_ptr<float>();
    const int64_t columns = into.size(0);
    for (int64_t panel = 0; panel < panels_of(dim_); ++panel) {
      for_chunks(count, [&](int64_t first, int64_t depth) {
        const float* states = h + (panel * rows_of_h + first_row + first) * kPanel;
        multiply_within(panel, out, into.stride(0), columns, add || first > 0, [&](float* to, int64_t stride, bool more) {
          cpu_kernels().panels.multiply_transposed(du + first * width, width, columns, states, depth, to, stride, more, nullptr);
        });
      });
    }
  }

  // Invalidates the packed tile: the memory of the weights now holds another one.
  void invalidate() { packed_for_ = nullptr; }

 private:
  // Rows (C, D) in bfloat16, for `dot_narrow` as that wants them. They are kept for the next tiles.
  NarrowRows narrowed(const Tensor& h, int parts, bool for_dots) {
    const PanelKernels& panels = cpu_kernels().panels;
    const int64_t size = (for_dots ? panels.dot_rows(h.size(0)) : h.size(0)) * dim_, rows = h.size(0);
    if (!narrow_.defined() || narrow_.numel() < parts * size) {
      narrow_ = at::empty({parts * size}, at::kBFloat16);
      narrow_for_ = {};
    }
    auto* first = static_cast<uint16_t*>(narrow_.mutable_data_ptr());
    auto* second = parts == 2 ? first + size : nullptr;
    const NarrowFor wanted{h.const_data_ptr(), rows, for_dots};
    if (wanted == narrow_for_) return {first, second, dim_};
    narrow_for_ = wanted;
    const auto narrow = [&](uint16_t* to, uint16_t* rest) {
      panels.narrow_rows(h.const_data_ptr<float>(), h.stride(0), rows, dim_, to, rest);
    };
    if (!for_dots) {
      narrow(first, second);
    } else {
      const Tensor plain = at::empty({parts, rows, dim_}, at::kBFloat16);
      auto* from = static_cast<uint16_t*>(plain.mutable_data_ptr());
      narrow(from, parts == 2 ? from + rows * dim_ : nullptr);
      for (int part = 0; part < parts; ++part) panels.pack_dots(from + part * rows * dim_, rows, dim_, first + part * size);
    }
    return {first, second, dim_};
  }

  void pack_columns(const Tensor& w) {
    if (packed_for_ == w.const_data_ptr() && by_columns_) return;
    float* to = packed_.mutable_data_ptr<float>();
    const int64_t words = w.scalar_type() == at::kBFloat16 ? dim_ / 2 : dim_;  // of four bytes; w is contiguous
    const float* from = static_cast<const float*>(w.const_data_ptr());
    for (int64_t panel = 0; panel < panels_of(w.size(0)); ++panel) {
      cpu_kernels().panels.pack(from + panel * kPanel * words, words, std::min(kPanel, w.size(0) - panel * kPanel), words,
                                to + panel * words * kPanel);
    }
    packed_for_ = w.const_data_ptr();
    by_columns_ = true;
  }

  // Computes one panel of outputs (rows, D); the last panel may be narrower.
  template <typename Multiply>
  void multiply_within(int64_t panel, float* out, int64_t stride, int64_t rows, bool add, const Multiply& multiply) {
    const int64_t first = panel * kPanel, width = std::min(kPanel, dim_ - first);
    if (width == kPanel) {
      multiply(out + first, stride, add);
      return;
    }
    if (!edge_.defined() || edge_.size(0) < rows) edge_ = at::empty({rows, kPanel}, at::kFloat);
    float* edge = edge_.mutable_data_ptr<float>();
    multiply(edge, kPanel, false);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = out + r * stride + first;
      for (int64_t j = 0; j < width; ++j) to[j] = add ? to[j] + edge[r * kPanel + j] : edge[r * kPanel + j];
    }
  }

  int64_t dim_;
  // What rows in bfloat16 were made of.
  struct NarrowFor {
    const void* rows = nullptr;
    int64_t count = 0;
    bool for_dots = false;
    bool operator==(const NarrowFor&) const = default;
  };

  Tensor packed_, edge_, narrow_;
  NarrowFor narrow_for_;
  const void* packed_for_ = nullptr;
  bool by_columns_ = false;
};

}  // namespace
}  // namespace alignpro
