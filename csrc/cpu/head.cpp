// The head on a CPU. The vocabulary is split into tiles, which are distributed over the threads; a tile's logits are
// computed, and reduced or turned into their gradient, while they are in the core's cache.
//
// Every sum has a fixed order: over tiles for the statistics, over threads for the gradient of the hidden states; a row of
// the weight's gradient belongs to one tile and so to one thread. Results are therefore bitwise reproducible for a fixed
// number of threads.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "head_products.h"
#include "instructions.h"
#include "memory.h"
#include "tiles.h"
#include "workspace.h"

namespace alignpro {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kTile = 320;       // columns: a tile of logits of 320 x kRowBlock floats is about half of a 1 MiB L2
constexpr int64_t kRowBlock = 384;   // rows
constexpr int64_t kSmall = 1 << 21;  // multiplications, which take about 20 us

const TileKernels& tile_kernels() {
#if defined(__x86_64__)
  switch (instructions()) {
    case Instructions::kAvx512: return tile_kernels_avx512;
    case Instructions::kAvx2: return tile_kernels_avx2;
    case Instructions::kGeneric: break;
  }
#endif
  return tile_kernels_generic;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Number of rows of a tile to process at a time, so that the blocks are of nearly equal size.
int64_t rows_of_block(int64_t rows) { return ceil_div(rows, std::max<int64_t>(1, ceil_div(rows, kRowBlock))); }

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
  Tensor low_rank_rows, low_rank_weight;          // (C, r) float32, (V, r), or undefined
  Tensor ref_hidden, ref_weight, ref_bias;        // likewise
  Tensor inverse_tau;                             // (C) float32, or undefined for 1
  float softcap;
  bool shared() const { return ref_weight.defined() && ref_weight.data_ptr() == weight.data_ptr(); }
};

Tensor widened(const Tensor& x) { return x.scalar_type() == at::kFloat ? x : x.to(at::kFloat); }

Tensor padded_bias(const OptionalTensor& bias, const Tiling& tiling) {
  if (!bias) return {};
  Tensor padded = at::zeros({tiling.count * tiling.width}, at::kFloat);
  padded.narrow(0, 0, tiling.vocabulary).copy_(*bias);
  return padded;
}

HeadInputs head_inputs(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& temperature, double softcap, const OptionalTensor& low_rank_rows,
                       const OptionalTensor& low_rank_weight, const OptionalTensor& ref_hidden,
                       const OptionalTensor& ref_weight, const OptionalTensor& ref_bias, const Tiling& tiling) {
  HeadInputs in;
  in.hidden = spread(widened(hidden));
  in.weight = weight;
  in.bias = padded_bias(bias, tiling);
  if (low_rank_weight) {
    in.low_rank_rows = widened(*low_rank_rows);
    in.low_rank_weight = *low_rank_weight;
  }
  if (ref_weight) {
    in.ref_hidden = spread(widened(*ref_hidden));
    in.ref_weight = *ref_weight;
    in.ref_bias = padded_bias(ref_bias, tiling);
  }
  if (temperature) in.inverse_tau = temperature->reciprocal();
  in.softcap = static_cast<float>(softcap);
  return in;
}

// Rows [start, start + columns) of a weight in float32; 16-bit weights are converted into a per-thread buffer.
class WeightTile {
 public:
  explicit WeightTile(const Tensor& weight, int64_t width) : weight_(weight) {
    if (weight.defined() && weight.scalar_type() != at::kFloat) buffer_ = at::empty({width, weight.size(1)}, at::kFloat);
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

const float* pointer(const Tensor& x, int64_t offset = 0) { return x.defined() ? x.const_data_ptr<float>() + offset : nullptr; }

Partials partials_at(const Tensor& sums, int64_t tile, int64_t row) {
  const auto at_row = [&](int64_t which) { return sums.mutable_data_ptr<float>() + (which * sums.size(1) + tile) * sums.size(2) + row; };
  Partials p{at_row(0), at_row(1), at_row(2), nullptr, nullptr, nullptr};
  if (sums.size(0) == 6) {
    p.m_r = at_row(3);
    p.s_r = at_row(4);
    p.b = at_row(5);
  }
  return p;
}

// Sums over tiles, in float64 and in order.
struct RowSums {
  double m = -std::numeric_limits<double>::infinity(), s = 0, a = 0, m_r = m, s_r = 0, b = 0;
  double log_s() const { return std::log(s); }
  double log_s_r() const { return std::log(s_r); }
  double entropy() const { return log_s() - a / s; }
  double kl() const { return b / s - log_s() + log_s_r(); }
};

// Merges the partial sums (3 or 6, tiles, rows) of one row.
RowSums merge(const float* data, int64_t tiles, int64_t rows, bool reference, int64_t row) {
  const auto value = [&](int64_t which, int64_t tile) { return static_cast<double>(data[(which * tiles + tile) * rows + row]); };
  RowSums r;
  for (int64_t t = 0; t < tiles; ++t) {
    r.m = std::max(r.m, value(0, t));
    if (reference) r.m_r = std::max(r.m_r, value(3, t));
  }
  for (int64_t t = 0; t < tiles; ++t) {
    // A tile with only -inf contributes nothing; its own sums are relative to 0. A NaN shows in s.
    const double shift = value(0, t) - r.m, s = value(1, t);
    const bool empty = value(0, t) == -std::numeric_limits<double>::infinity() && !std::isnan(s);
    const double scale = empty ? 0 : std::exp(shift), d = empty ? 0 : shift;
    r.s += scale * s;
    r.a += scale * (value(2, t) + d * s);
    if (!reference) continue;
    const double shift_r = value(3, t) - r.m_r, s_r = value(4, t);
    const bool empty_r = value(3, t) == -std::numeric_limits<double>::infinity() && !std::isnan(s_r);
    const double d_r = empty_r ? 0 : shift_r;
    r.s_r += empty_r ? 0 : std::exp(shift_r) * s_r;
    r.b += scale * (value(5, t) + (d - d_r) * s);
  }
  return r;
}

// -> logprob (C), entropy (C), kl (C), norms (4, C): m, log s, m_r, log s_r.
// logits: (1 or 2, tiles, C, width), filled for `head_gradient`; if absent, the logits are not stored.
std::tuple<Tensor, Tensor, Tensor, Tensor> head_statistics(
    const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
    const OptionalTensor& temperature, double softcap, const OptionalTensor& low_rank_rows,
    const OptionalTensor& low_rank_weight, const OptionalTensor& ref_hidden, const OptionalTensor& ref_weight,
    const OptionalTensor& ref_bias, const OptionalTensor& logits) {
  const at::AutoDispatchBelowAutograd no_autograd;
  const Tiling tiling = logits ? Tiling(weight.size(0), *logits) : Tiling(weight.size(0));
  const HeadInputs in = head_inputs(hidden, weight, bias, temperature, softcap, low_rank_rows, low_rank_weight, ref_hidden,
                                    ref_weight, ref_bias, tiling);
  const int64_t rows = hidden.size(0);
  const bool reference = in.ref_weight.defined();
  const Tensor sums = at::empty({reference ? 6 : 3, tiling.count, rows}, at::kFloat);
  Tensor logprob = at::empty({rows}, at::kFloat), entropy = at::empty({rows}, at::kFloat);
  Tensor kl = at::empty({reference ? rows : 0}, at::kFloat), norms = at::zeros({4, rows}, at::kFloat);
  Tensor target_logit = at::full({rows}, std::numeric_limits<float>::quiet_NaN(), at::kFloat);
  const int64_t* targets = target.const_data_ptr<int64_t>();
  float* chosen = target_logit.mutable_data_ptr<float>();

  at::parallel_for(0, tiling.count, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowAutograd no_autograd_here;
    const WeightTile weights(in.weight, tiling.width), others(in.shared() ? Tensor() : in.ref_weight, tiling.width);
    const WeightTile low_rank(in.low_rank_weight, tiling.width);
    const Tensor& other = reference ? in.ref_weight : in.weight;  // its hidden size may differ
    TileProducts products(tiling.width, in.weight.size(1), packs(rows));
    TileProducts of_reference(tiling.width, other.size(1), reference && !in.shared() && packs(rows));
    const int64_t block = rows_of_block(rows);
    Tensor scratch;
    if (!logits) scratch = at::empty({reference ? 2 : 1, block, tiling.width}, at::kFloat);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t start = tiling.start(tile), columns = tiling.columns(tile);
      const Tensor w = weights.at_columns(start, columns);
      const Tensor w_r = !reference ? Tensor() : in.shared() ? w : others.at_columns(start, columns);
      const Tensor b = in.low_rank_weight.defined() ? low_rank.at_columns(start, columns) : Tensor();
      products.forget();
      of_reference.forget();
      for (int64_t row = 0; row < rows; row += block) {
        const int64_t count = std::min(block, rows - row);
        float* z = logits ? logits->mutable_data_ptr<float>() + tile * logits->stride(1) + row * tiling.width
                          : scratch.mutable_data_ptr<float>();
        float* z_r = !reference ? nullptr : z + (logits ? logits->stride(0) : block * tiling.width);
        products.logits(in.hidden.narrow(0, row, count), w, z, tiling.width);
        if (b.defined()) {
          Tensor u = at::from_blob(z, {count, columns}, {tiling.width, 1}, at::kFloat);
          u.addmm_(in.low_rank_rows.narrow(0, row, count), b.t());
        }
        if (reference) {
          (in.shared() ? products : of_reference).logits(in.ref_hidden.narrow(0, row, count), w_r, z_r, tiling.width);
        }
        const Shape shape{count, columns, tiling.width, in.softcap, pointer(in.inverse_tau, row)};
        tile_kernels().statistics(z, z_r, shape, pointer(in.bias, start), pointer(in.ref_bias, start),
                                  partials_at(sums, tile, row));
        for (int64_t i = 0; i < count; ++i) {
          const int64_t column = targets[row + i] - start;
          if (column >= 0 && column < columns) chosen[row + i] = z[i * tiling.width + column];
        }
      }
    }
  });

  float* out[4] = {logprob.mutable_data_ptr<float>(), entropy.mutable_data_ptr<float>(), kl.mutable_data_ptr<float>(),
                   norms.mutable_data_ptr<float>()};
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const RowSums r = merge(sums.const_data_ptr<float>(), tiling.count, rows, reference, i);
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
  return {logprob, entropy, kl, norms};
}

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

void accumulate(Tensor into, const Tensor& a, const Tensor& b, bool add) {
  if (add) {
    into.addmm_(a, b);
  } else {
    at::mm_out(into, a, b);
  }
}

// Computes the gradients of a chunk from its stored logits; see alignpro_kernels/head.py. Overwrites sums unless `add`.
void head_gradient(const Tensor& logits, const Tensor& norms, const OptionalTensor& entropy, const OptionalTensor& kl,
                   const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& temperature,
                   double softcap, const OptionalTensor& low_rank_rows, const OptionalTensor& low_rank_weight,
                   const OptionalTensor& active, const OptionalTensor& alpha, const OptionalTensor& eta,
                   const OptionalTensor& kappa, const OptionalTensor& d_hidden, const OptionalTensor& d_low_rank_rows,
                   const OptionalTensor& d_weight, const OptionalTensor& d_bias, const OptionalTensor& d_low_rank,
                   bool add) {
  const at::AutoDispatchBelowAutograd no_autograd;
  const Tiling tiling(weight.size(0), logits);
  const int64_t chunk = hidden.size(0), rows = active ? active->numel() : chunk;
  const bool reference = logits.size(0) == 2 && kappa;
  const auto chosen = [&](const Tensor& x) { return widened(active ? x.index_select(0, *active) : x); };
  const Tensor inverse_tau = temperature ? temperature->reciprocal() : Tensor();
  const Tensor h = d_weight ? chosen(hidden) : Tensor();
  // A tile's logits share memory with its gradient: all of them are read before the gradient is written.
  const bool inside = d_weight && d_weight->storage().is_alias_of(logits.storage());
  const bool packed = packs(rows) && (!d_weight || d_weight->scalar_type() == at::kFloat);
  const Tensor packed_h = packed && d_weight ? pack_all_rows(h) : Tensor();
  const Tensor t = d_low_rank ? chosen(*low_rank_rows) : Tensor();
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tiling.count);
  const auto thread_sums = [&](const OptionalTensor& like) {
    return like ? at::zeros({threads, rows, like->size(1)}, at::kFloat) : Tensor();
  };
  Tensor hidden_sums = thread_sums(d_hidden), low_rank_sums = thread_sums(d_low_rank_rows);
  const Tensor bias_sums = d_bias ? at::zeros({tiling.width * tiling.count}, at::kFloat) : Tensor();

  if (d_weight && !add) prefer_large_pages(d_weight->mutable_data_ptr(), static_cast<int64_t>(d_weight->nbytes()));
  const auto value = [](const OptionalTensor& x) { return x ? x->const_data_ptr<float>() : nullptr; };
  const float* norm = norms.const_data_ptr<float>();
  const Upstream upstream{norm, norm + chunk, norm + 2 * chunk, norm + 3 * chunk, value(entropy),
                          value(kl), value(alpha), value(eta), value(kappa)};

  at::parallel_for(0, tiling.count, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowAutograd no_autograd_here;
    const int64_t thread = begin / ceil_div(tiling.count, threads);
    const WeightTile weights(d_hidden ? weight : Tensor(), tiling.width);
    const WeightTile low_rank(d_low_rank_rows ? *low_rank_weight : Tensor(), tiling.width);
    TileProducts products(tiling.width, weight.size(1), packed);
    const int64_t block = inside ? rows : rows_of_block(rows);
    const Tensor scratch = at::empty({block, tiling.width}, at::kFloat);
    std::vector<int64_t> local(chunk);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t start = tiling.start(tile), columns = tiling.columns(tile);
      const Tensor w = d_hidden ? weights.at_columns(start, columns) : Tensor();
      const Tensor b = d_low_rank_rows ? low_rank.at_columns(start, columns) : Tensor();
      products.forget();
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
        const Shape shape{count, columns, tiling.width, static_cast<float>(softcap), moved(pointer(inverse_tau))};
        tile_kernels().gradient(z + skip * tiling.width, z_r == nullptr ? nullptr : z_r + skip * tiling.width, shape,
                                active ? active->const_data_ptr<int64_t>() + row : nullptr, local.data() + skip, here,
                                scratch.mutable_data_ptr<float>(),
                                bias_sums.defined() ? bias_sums.mutable_data_ptr<float>() + start : nullptr);
        const Tensor du = scratch.narrow(0, 0, count).narrow(1, 0, columns);
        const float* du_data = scratch.const_data_ptr<float>();
        if (d_hidden) products.add_hidden_gradient(du_data, tiling.width, w, hidden_sums[thread].narrow(0, row, count));
        if (d_low_rank_rows) low_rank_sums[thread].narrow(0, row, count).addmm_(du, b);
        if (packed_h.defined()) {
          products.weight_gradient(du_data, tiling.width, packed_h.const_data_ptr<float>(), rows, row, count,
                                   d_weight->narrow(0, start, columns), add || row > 0);
        } else if (d_weight) {
          accumulate(d_weight->narrow(0, start, columns), du.t(), h.narrow(0, row, count), add || row > 0);
        }
        if (d_low_rank) accumulate(d_low_rank->narrow(0, start, columns), du.t(), t.narrow(0, row, count), add || row > 0);
      }
    }
  });

  if (d_hidden) reduce_rows(hidden_sums, active, *d_hidden);
  if (d_low_rank_rows) reduce_rows(low_rank_sums, active, *d_low_rank_rows);
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

// -> token (B), logprob (B), entropy (B). No logits are stored. A temperature of 0 is greedy; if absent, it is 1.
std::tuple<Tensor, Tensor, Tensor> head_sample(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
                                               const OptionalTensor& temperature, double softcap, const Tensor& seeds,
                                               const OptionalTensor& low_rank_rows,
                                               const OptionalTensor& low_rank_weight) {
  const at::AutoDispatchBelowAutograd no_autograd;
  const int64_t rows = hidden.size(0);
  // For a small head, waking other threads takes longer than the computation.
  const int64_t threads_wanted = rows * weight.numel() < kSmall ? 1 : at::get_num_threads();
  const Tiling tiling(weight.size(0), threads_wanted);
  const int64_t threads = std::min(threads_wanted, tiling.count);
  const HeadInputs in = head_inputs(hidden, weight, bias, {}, softcap, low_rank_rows, low_rank_weight, {}, {}, {}, tiling);
  std::vector<float> inverse_tau(rows, 1.0f);
  const std::unique_ptr<bool[]> greedy(new bool[rows]());
  if (temperature) {
    for (int64_t i = 0; i < rows; ++i) {
      const float tau = temperature->const_data_ptr<float>()[i];
      greedy[i] = tau == 0;
      if (!greedy[i]) inverse_tau[i] = 1.0f / tau;
    }
  }
  std::vector<float> sums(3 * tiling.count * rows);
  std::vector<float> noisy(threads * rows, -std::numeric_limits<float>::infinity());
  std::vector<float> logit(threads * rows, std::numeric_limits<float>::quiet_NaN());
  std::vector<int64_t> index(threads * rows);
  const auto partials = [&](int64_t tile, int64_t row) {
    const auto at_row = [&](int64_t which) { return sums.data() + (which * tiling.count + tile) * rows + row; };
    return Partials{at_row(0), at_row(1), at_row(2), nullptr, nullptr, nullptr};
  };

  const auto work = [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowAutograd no_autograd_here;
    const int64_t thread = begin / ceil_div(tiling.count, threads);
    const WeightTile weights(in.weight, tiling.width), low_rank(in.low_rank_weight, tiling.width);
    TileProducts products(tiling.width, in.weight.size(1), packs(rows));
    const int64_t block = rows_of_block(rows);
    const Tensor scratch = at::empty({block, tiling.width}, at::kFloat);
    float* z = scratch.mutable_data_ptr<float>();
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t start = tiling.start(tile), columns = tiling.columns(tile);
      const Tensor w = weights.at_columns(start, columns);
      products.forget();
      for (int64_t row = 0; row < rows; row += block) {
        const int64_t count = std::min(block, rows - row);
        products.logits(in.hidden.narrow(0, row, count), w, z, tiling.width);
        if (in.low_rank_weight.defined()) {
          Tensor u = at::from_blob(z, {count, columns}, {tiling.width, 1}, at::kFloat);
          u.addmm_(in.low_rank_rows.narrow(0, row, count), low_rank.at_columns(start, columns).t());
        }
        const Shape shape{count, columns, tiling.width, in.softcap, inverse_tau.data() + row};
        const int64_t at_row = thread * rows + row;
        tile_kernels().sample(z, shape, pointer(in.bias, start), seeds.const_data_ptr<int64_t>() + row, greedy.get() + row,
                              start, partials(tile, row),
                              Best{noisy.data() + at_row, logit.data() + at_row, index.data() + at_row});
      }
    }
  };
  if (threads == 1) {
    work(0, tiling.count);
  } else {
    at::parallel_for(0, tiling.count, 1, work);
  }

  Tensor token = at::empty({rows}, at::kLong), logprob = at::zeros({rows}, at::kFloat), entropy = at::zeros({rows}, at::kFloat);
  for (int64_t i = 0; i < rows; ++i) {
    int64_t winner = 0;
    for (int64_t t = 1; t < threads; ++t) {
      if (noisy[t * rows + i] > noisy[winner * rows + i]) winner = t;
    }
    token.mutable_data_ptr<int64_t>()[i] = index[winner * rows + i];
    if (greedy[i]) continue;
    const RowSums r = merge(sums.data(), tiling.count, rows, false, i);
    logprob.mutable_data_ptr<float>()[i] = static_cast<float>((static_cast<double>(logit[winner * rows + i]) - r.m) - r.log_s());
    entropy.mutable_data_ptr<float>()[i] = static_cast<float>(r.entropy());
  }
  return {token, logprob, entropy};
}

// Returns (tiles, width) of stored logits for the current number of threads. If `rows` is not 0, tiles are narrow enough to
// process that many rows at once.
std::tuple<int64_t, int64_t> head_tiling(int64_t vocabulary, int64_t rows) {
  const int64_t widest = rows == 0 ? kTile : std::clamp(kTile * kRowBlock / rows / kPanel * kPanel, 4 * kPanel, kTile);
  const Tiling tiling(vocabulary, at::get_num_threads(), widest);
  return {tiling.count, tiling.width};
}

int64_t head_widest_tile() { return ceil_div(kTile, kPanel) * kPanel; }

std::string head_instructions() { return tile_kernels().name; }

}  // namespace

TORCH_LIBRARY(alignpro, m) {
  m.def(
      "head_statistics(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? temperature, float softcap, "
      "Tensor? low_rank_rows, Tensor? low_rank_weight, Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias, "
      "Tensor(a!)? logits) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "head_gradient(Tensor logits, Tensor norms, Tensor? entropy, Tensor? kl, Tensor hidden, Tensor weight, Tensor target, "
      "Tensor? temperature, float softcap, Tensor? low_rank_rows, Tensor? low_rank_weight, Tensor? active, Tensor? alpha, "
      "Tensor? eta, Tensor? kappa, Tensor(a!)? d_hidden, Tensor(b!)? d_low_rank_rows, Tensor(c!)? d_weight, "
      "Tensor(d!)? d_bias, Tensor(e!)? d_low_rank, bool add) -> ()");
  m.def(
      "head_sample(Tensor hidden, Tensor weight, Tensor? bias, Tensor? temperature, float softcap, Tensor seeds, "
      "Tensor? low_rank_rows, Tensor? low_rank_weight) -> (Tensor, Tensor, Tensor)");
  m.def("head_tiling(int vocabulary, int rows) -> (int, int)", &head_tiling);
  m.def("head_widest_tile() -> int", &head_widest_tile);
  m.def("head_instructions() -> str", &head_instructions);
  m.def("workspace(int[] sizes) -> Tensor", &workspace);
  m.def("release_workspace() -> ()", &release_workspace);
}

TORCH_LIBRARY_IMPL(alignpro, CPU, m) {
  m.impl("head_statistics", &head_statistics);
  m.impl("head_gradient", &head_gradient);
  m.impl("head_sample", &head_sample);
}

}  // namespace alignpro
