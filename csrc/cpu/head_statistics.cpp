// Log-probability, entropy and KL of each row, and the logits that the gradient is computed from.

#include <torch/library.h>

#include <limits>
#include <tuple>

#include "head.h"
#include "row_sums.h"

namespace alignpro {
namespace {

// -> logprob (C), entropy (C), kl (C), softmax_stats (4, C): m, log s, m_r, log s_r.
// logits: (1 or 2, tiles, C, width), filled for `head_gradient`; if absent, the logits are not stored.
std::tuple<Tensor, Tensor, Tensor, Tensor> head_statistics(
    const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
    const OptionalTensor& temperature, double softcap, const OptionalTensor& lora_hidden,
    const OptionalTensor& lora_b, const OptionalTensor& ref_hidden, const OptionalTensor& ref_weight,
    const OptionalTensor& ref_bias, const OptionalTensor& logits) {
  const at::AutoDispatchBelowAutograd no_autograd;
  const Tiling tiling = logits ? Tiling(weight.size(0), *logits) : Tiling(weight.size(0));
  const HeadInputs in = head_inputs(hidden, weight, bias, temperature, softcap, lora_hidden, lora_b, ref_hidden,
                                    ref_weight, ref_bias, tiling);
  const int64_t rows = hidden.size(0);
  const bool reference = in.ref_weight.defined();
  const Tensor sums = at::empty({reference ? 6 : 3, tiling.count, rows}, at::kFloat);
  Tensor logprob = at::empty({rows}, at::kFloat), entropy = at::empty({rows}, at::kFloat);
  Tensor kl = at::empty({reference ? rows : 0}, at::kFloat), softmax_stats = at::zeros({4, rows}, at::kFloat);
  Tensor target_logit = at::full({rows}, std::numeric_limits<float>::quiet_NaN(), at::kFloat);
  const int64_t* targets = target.const_data_ptr<int64_t>();
  float* chosen = target_logit.mutable_data_ptr<float>();

  at::parallel_for(0, tiling.count, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowAutograd no_autograd_here;
    const WeightTile weights(in.weight, tiling.width, read_narrow(in.weight));
    const WeightTile others(in.shared() ? Tensor() : in.ref_weight, tiling.width, read_narrow(in.ref_weight));
    const WeightTile lora_tiles(in.lora_b, tiling.width);
    const Tensor& other = reference ? in.ref_weight : in.weight;  // its hidden size may differ
    TileProducts products(tiling.width, in.weight.size(1), worth_packing(rows));
    TileProducts of_reference(tiling.width, other.size(1), reference && !in.shared() && worth_packing(rows));
    const int64_t block = rows_of_block(rows);
    Tensor scratch;
    if (!logits) scratch = at::empty({reference ? 2 : 1, block, tiling.width}, at::kFloat);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t start = tiling.start(tile), columns = tiling.columns(tile);
      const Tensor w = weights.at_columns(start, columns);
      const Tensor w_r = !reference ? Tensor() : in.shared() ? w : others.at_columns(start, columns);
      const Tensor b = in.lora_b.defined() ? lora_tiles.at_columns(start, columns) : Tensor();
      products.invalidate();
      of_reference.invalidate();
      for (int64_t row = 0; row < rows; row += block) {
        const int64_t count = std::min(block, rows - row);
        float* z = logits ? logits->mutable_data_ptr<float>() + tile * logits->stride(1) + row * tiling.width
                          : scratch.mutable_data_ptr<float>();
        float* z_r = !reference ? nullptr : z + (logits ? logits->stride(0) : block * tiling.width);
        products.logits(in.hidden.narrow(0, row, count), w, z, tiling.width);
        if (b.defined()) add_lora(z, count, columns, tiling.width, in.lora_hidden.narrow(0, row, count), b);
        if (reference) {
          (in.shared() ? products : of_reference).logits(in.ref_hidden.narrow(0, row, count), w_r, z_r, tiling.width);
        }
        const LogitsTile shape{count, columns, tiling.width, in.softcap, pointer(in.inverse_tau, row)};
        cpu_kernels().tiles.statistics(z, z_r, shape, pointer(in.bias, start), pointer(in.ref_bias, start),
                                  partials_at(sums.mutable_data_ptr<float>(), tiling.count, rows, reference, tile, row));
        for (int64_t i = 0; i < count; ++i) {
          const int64_t column = targets[row + i] - start;
          if (column >= 0 && column < columns) chosen[row + i] = z[i * tiling.width + column];
        }
      }
    }
  });

  float* out[4] = {logprob.mutable_data_ptr<float>(), entropy.mutable_data_ptr<float>(), kl.mutable_data_ptr<float>(),
                   softmax_stats.mutable_data_ptr<float>()};
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const RowSums r = merge_tiles(sums.const_data_ptr<float>(), tiling.count, rows, reference, i);
      out[0][i] = static_cast<float>((static_cast<double>(chosen[i]) - r.m) - r.log_s());
      out[1][i] = static_cast<float>(r.entropy());
      out[3][i] = static_cast<float>(r.m);
      out[3][rows + i] = static_cast<float>(r.log_s());
      if (!reference) continue;
      out[2][i] = static_cast<float>(r.kl());
      out[3][2 * rows + i] = static_cast<float>(r.m_r);
      out[3][3 * rows + i] = static_cast<float>(r.log_s_r());
    }
  });
  return {logprob, entropy, kl, softmax_stats};
}

// Returns (tiles, width) of stored logits for the current number of threads. If `rows` is not 0, tiles are narrow enough to
// process that many rows at once.
std::tuple<int64_t, int64_t> head_tiling(int64_t vocabulary, int64_t rows) {
  const int64_t widest = rows == 0 ? kTile : std::clamp(kTile * kRowBlock / rows / kPanel * kPanel, 4 * kPanel, kTile);
  const Tiling tiling(vocabulary, at::get_num_threads(), widest);
  return {tiling.count, tiling.width};
}

int64_t head_widest_tile() { return ceil_div(kTile, kPanel) * kPanel; }

}  // namespace

TORCH_LIBRARY_FRAGMENT(alignpro, m) {
  m.def(
      "head_statistics(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? temperature, float softcap, "
      "Tensor? lora_hidden, Tensor? lora_b, Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias, "
      "Tensor(a!)? logits) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("head_tiling(int vocabulary, int rows) -> (int, int)", &head_tiling);
  m.def("head_widest_tile() -> int", &head_widest_tile);
}

TORCH_LIBRARY_IMPL(alignpro, CPU, m) { m.impl("head_statistics", &head_statistics); }

}  // namespace alignpro
