// The gradients of a chunk of rows, from the logits that head_statistics.cpp stored.

#include <torch/library.h>

#include <vector>

#include "head.h"
#include "huge_pages.h"

namespace alignpro {
namespace {

// Sums (threads, A, D) over the threads into `into`; inactive rows get zero.
void reduce_rows(const Tensor& parts, const OptionalTensor& active, Tensor into) {
  Tensor sum = parts[0];
  for (int64_t t = 1; t < parts.size(0); ++t) sum.add_(parts[t]);
  if (!active) {
    into.copy_(sum);
    return;
  }
  into.zero_();
  into.index_copy_(0, *active, sum.to(into.scalar_type()));
}

// Packs hidden states (C, D) into panels, for `TileProducts::weight_gradient`.
Tensor pack_all_rows(const Tensor& hidden) {
  const Tensor packed = at::empty({panels_of(hidden.size(1)), hidden.size(0), kPanel}, at::kFloat);
  pack_rows(hidden.const_data_ptr<float>(), hidden.stride(0), hidden.size(0), hidden.size(1), packed.mutable_data_ptr<float>());
  return packed;
}

void accumulate(Tensor into, const Tensor& a, const Tensor& b, bool add) { at::addmm_out(into, into, a, b, add ? 1 : 0); }

// Computes the gradients of a chunk from its stored logits; see alignpro_kernels/head.py. Overwrites sums unless `add`.
void head_gradient(const Tensor& logits, const Tensor& softmax_stats, const OptionalTensor& entropy, const OptionalTensor& kl,
                   const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& temperature,
                   double softcap, const OptionalTensor& lora_hidden, const OptionalTensor& lora_b,
                   const OptionalTensor& active, const OptionalTensor& alpha, const OptionalTensor& eta,
                   const OptionalTensor& kappa, const OptionalTensor& d_hidden, const OptionalTensor& d_lora_hidden,
                   const OptionalTensor& d_weight, const OptionalTensor& d_bias, const OptionalTensor& d_lora_b,
                   bool add) {
  const at::AutoDispatchBelowAutograd no_autograd;
  const Tiling tiling(weight.size(0), logits);
  const int64_t chunk = hidden.size(0), rows = active ? active->numel() : chunk;
  const bool reference = logits.size(0) == 2 && kappa;
  const auto chosen = [&](const Tensor& x) { return upcast(active ? x.index_select(0, *active) : x); };
  const Tensor inverse_tau = temperature ? temperature->reciprocal() : Tensor();
  const Tensor h = d_weight ? chosen(hidden) : Tensor();
  // A tile's logits share memory with its gradient: all of them are read before the gradient is written.
  const bool inside = d_weight && d_weight->storage().is_alias_of(logits.storage());
  const bool packed = worth_packing(rows) && (!d_weight || d_weight->scalar_type() == at::kFloat);
  const Tensor packed_h = packed && d_weight ? pack_all_rows(h) : Tensor();
  const Tensor t = d_lora_b ? chosen(*lora_hidden) : Tensor();
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tiling.count);
  const auto thread_sums = [&](const OptionalTensor& like) {
    return like ? at::zeros({threads, rows, like->size(1)}, at::kFloat) : Tensor();
  };
  Tensor hidden_sums = thread_sums(d_hidden), lora_hidden_sums = thread_sums(d_lora_hidden);
  const Tensor bias_sums = d_bias ? at::zeros({tiling.width * tiling.count}, at::kFloat) : Tensor();

  if (d_weight && !add) advise_huge_pages(d_weight->mutable_data_ptr(), static_cast<int64_t>(d_weight->nbytes()));
  const auto value = [](const OptionalTensor& x) { return x ? x->const_data_ptr<float>() : nullptr; };
  const float* stat = softmax_stats.const_data_ptr<float>();
  const Upstream upstream{stat, stat + chunk, stat + 2 * chunk, stat + 3 * chunk, value(entropy),
                          value(kl), value(alpha), value(eta), value(kappa)};

  at::parallel_for(0, tiling.count, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowAutograd no_autograd_here;
    const int64_t thread = begin / ceil_div(tiling.count, threads);
    const WeightTile weights(d_hidden ? weight : Tensor(), tiling.width);
    const WeightTile lora_tiles(d_lora_hidden ? *lora_b : Tensor(), tiling.width);
    TileProducts products(tiling.width, weight.size(1), packed);
    const int64_t block = inside ? rows : rows_of_block(rows);
    const Tensor scratch = at::empty({block, tiling.width}, at::kFloat);
    std::vector<int64_t> local(chunk);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t start = tiling.start(tile), columns = tiling.columns(tile);
      const Tensor w = d_hidden ? weights.at_columns(start, columns) : Tensor();
      const Tensor b = d_lora_hidden ? lora_tiles.at_columns(start, columns) : Tensor();
      products.invalidate();
      const float* z = logits.const_data_ptr<float>() + tile * logits.stride(1);
      const float* z_r = reference ? z + logits.stride(0) : nullptr;
      for (int64_t i = 0; i < chunk; ++i) local[i] = target.const_data_ptr<int64_t>()[i] - start;
      for (int64_t row = 0; row < rows; row += block) {
        const int64_t count = std::min(block, rows - row);
        // Without a list of active rows, every pointer that is indexed by the chunk's rows is advanced to the block.
        const int64_t skip = active ? 0 : row;
        const auto moved = [&](const float* p) { return p == nullptr ? nullptr : p + skip; };
        const Upstream here{moved(upstream.m), moved(upstream.log_s), moved(upstream.m_r), moved(upstream.log_s_r),
                            moved(upstream.entropy), moved(upstream.kl), moved(upstream.alpha), moved(upstream.eta),
                            moved(upstream.kappa)};
        const LogitsTile shape{count, columns, tiling.width, static_cast<float>(softcap), moved(pointer(inverse_tau))};
        cpu_kernels().tiles.gradient(z + skip * tiling.width, z_r == nullptr ? nullptr : z_r + skip * tiling.width, shape,
                                active ? active->const_data_ptr<int64_t>() + row : nullptr, local.data() + skip, here,
                                scratch.mutable_data_ptr<float>(),
                                bias_sums.defined() ? bias_sums.mutable_data_ptr<float>() + start : nullptr);
        const Tensor du = scratch.narrow(0, 0, count).narrow(1, 0, columns);
        const float* du_data = scratch.const_data_ptr<float>();
        if (d_hidden) products.add_hidden_gradient(du_data, tiling.width, w, hidden_sums[thread].narrow(0, row, count));
        if (d_lora_hidden) lora_hidden_sums[thread].narrow(0, row, count).addmm_(du, b);
        if (packed_h.defined()) {
          products.weight_gradient(du_data, tiling.width, packed_h.const_data_ptr<float>(), rows, row, count,
                                   d_weight->narrow(0, start, columns), add || row > 0);
        } else if (d_weight) {
          accumulate(d_weight->narrow(0, start, columns), du.t(), h.narrow(0, row, count), add || row > 0);
        }
        if (d_lora_b) accumulate(d_lora_b->narrow(0, start, columns), du.t(), t.narrow(0, row, count), add || row > 0);
      }
    }
  });

  if (d_hidden) reduce_rows(hidden_sums, active, *d_hidden);
  if (d_lora_hidden) reduce_rows(lora_hidden_sums, active, *d_lora_hidden);
  if (d_bias) {
    const Tensor sum = bias_sums.narrow(0, 0, tiling.vocabulary);
    Tensor into = *d_bias;
    if (add) {
      into.add_(sum);
    } else {
      into.copy_(sum);
    }
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(alignpro, m) {
  m.def(
      "head_gradient(Tensor logits, Tensor softmax_stats, Tensor? entropy, Tensor? kl, Tensor hidden, Tensor weight, "
      "Tensor target, Tensor? temperature, float softcap, Tensor? lora_hidden, Tensor? lora_b, Tensor? active, Tensor? alpha, "
      "Tensor? eta, Tensor? kappa, Tensor(a!)? d_hidden, Tensor(b!)? d_lora_hidden, Tensor(c!)? d_weight, "
      "Tensor(d!)? d_bias, Tensor(e!)? d_lora_b, bool add) -> ()");
}

TORCH_LIBRARY_IMPL(alignpro, CPU, m) { m.impl("head_gradient", &head_gradient); }

}  // namespace alignpro
