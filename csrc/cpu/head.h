// The head on a CPU. The vocabulary is split into tiles, which are distributed over the threads; a tile's logits are
// computed, and reduced or turned into their gradient, while they are in the core's cache.
//
// Every sum has a fixed order: over tiles for the statistics, over threads for the gradient of the hidden states; a row of
// the weight's gradient belongs to one tile and so to one thread. Results are therefore bitwise reproducible for a fixed
// number of threads.

#pragma once

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <optional>

#include "tile_products.h"

namespace alignpro {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kTile = 320;      // columns: a tile of logits of 320 x kRowBlock floats is about half of a 1 MiB L2
constexpr int64_t kRowBlock = 384;  // rows

// Number of rows of a tile to process at a time, so that the blocks are of nearly equal size.
inline int64_t rows_of_block(int64_t rows) { return ceil_div(rows, std::max<int64_t>(1, ceil_div(rows, kRowBlock))); }

struct Tiling {
  int64_t vocabulary, width, count;
  // Chooses tiles of nearly `widest` columns, the same number for each thread.
  explicit Tiling(int64_t vocabulary, int64_t threads = at::get_num_threads(), int64_t widest = kTile) : vocabulary(vocabulary) {
    const int64_t wanted = ceil_div(ceil_div(vocabulary, widest), threads) * threads;
    width = ceil_div(ceil_div(vocabulary, wanted), kPanel) * kPanel;
    count = ceil_div(vocabulary, width);
  }
  // Takes over the tiling of stored logits: the number of threads may have changed since.
  Tiling(int64_t vocabulary, const Tensor& logits)
      : vocabulary(vocabulary), width(logits.size(3)), count(logits.size(1)) {}
  int64_t start(int64_t tile) const { return tile * width; }
  int64_t columns(int64_t tile) const { return std::min(width, vocabulary - start(tile)); }
};

struct HeadInputs {
  Tensor hidden;                                  // (C, D) float32
  Tensor weight;                                  // (V, D)
  Tensor bias;                                    // padded, float32, or undefined
  Tensor lora_hidden, lora_b;                     // (C, r) float32, (V, r), or undefined
  Tensor ref_hidden, ref_weight, ref_bias;        // likewise
  Tensor inverse_tau;                             // (C) float32, or undefined for 1
  float softcap;
  bool shared() const { return ref_weight.defined() && ref_weight.data_ptr() == weight.data_ptr(); }
};

inline Tensor upcast(const Tensor& x) { return x.scalar_type() == at::kFloat ? x : x.to(at::kFloat); }

inline Tensor padded_bias(const OptionalTensor& bias, const Tiling& tiling) {
  if (!bias) return {};
  Tensor padded = at::zeros({tiling.count * tiling.width}, at::kFloat);
  padded.narrow(0, 0, tiling.vocabulary).copy_(*bias);
  return padded;
}

inline HeadInputs head_inputs(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& temperature, double softcap, const OptionalTensor& lora_hidden,
                       const OptionalTensor& lora_b, const OptionalTensor& ref_hidden,
                       const OptionalTensor& ref_weight, const OptionalTensor& ref_bias, const Tiling& tiling) {
  HeadInputs in;
  in.hidden = avoid_cache_aliasing(upcast(hidden));
  in.weight = weight;
  in.bias = padded_bias(bias, tiling);
  if (lora_b) {
    in.lora_hidden = upcast(*lora_hidden);
    in.lora_b = *lora_b;
  }
  if (ref_weight) {
    in.ref_hidden = avoid_cache_aliasing(upcast(*ref_hidden));
    in.ref_weight = *ref_weight;
    in.ref_bias = padded_bias(ref_bias, tiling);
  }
  if (temperature) in.inverse_tau = temperature->reciprocal();
  in.softcap = static_cast<float>(softcap);
  return in;
}

// Whether `TileProducts::logits` takes the weight as it is, in bfloat16.
inline bool read_narrow(const Tensor& weight) {
  return cpu_kernels().vectorised && weight.defined() && weight.scalar_type() == at::kBFloat16 && weight.size(1) % 2 == 0;
}

// Rows [start, start + columns) of a weight in float32; 16-bit weights are converted into a per-thread buffer unless they are
// to be read as they are.
class WeightTile {
 public:
  explicit WeightTile(const Tensor& weight, int64_t width, bool as_it_is = false) : weight_(weight) {
    if (weight.defined() && weight.scalar_type() != at::kFloat && !as_it_is) {
      buffer_ = at::empty({width, weight.size(1)}, at::kFloat);
    }
  }
  Tensor at_columns(int64_t start, int64_t columns) const {
    const Tensor rows = weight_.narrow(0, start, columns);
    if (!buffer_.defined()) return rows;
    Tensor wide = buffer_.narrow(0, 0, columns);
    wide.copy_(rows);
    return wide;
  }

 private:
  Tensor weight_, buffer_;
};

inline const float* pointer(const Tensor& x, int64_t offset = 0) {
  return x.defined() ? x.const_data_ptr<float>() + offset : nullptr;
}

// z (count, columns) with row stride `stride` += lora_hidden b^T
inline void add_lora(float* z, int64_t count, int64_t columns, int64_t stride, const Tensor& lora_hidden, const Tensor& b) {
  Tensor u = at::from_blob(z, {count, columns}, {stride, 1}, at::kFloat);
  u.addmm_(lora_hidden, b.t());
}

}  // namespace
}  // namespace alignpro
