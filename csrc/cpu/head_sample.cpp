// One token for each row, by Gumbel-max.

#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "head.h"
#include "row_sums.h"

namespace alignpro {
namespace {

constexpr int64_t kMinParallelWork = 1 << 21;  // multiplications, which take about 20 us

// -> token (B), logprob (B), entropy (B). No logits are stored. A temperature of 0 is greedy; if absent, it is 1.
std::tuple<Tensor, Tensor, Tensor> head_sample(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
                                               const OptionalTensor& temperature, double softcap, const Tensor& seeds,
                                               const OptionalTensor& lora_hidden,
                                               const OptionalTensor& lora_b) {
  const at::AutoDispatchBelowAutograd no_autograd;
  const int64_t rows = hidden.size(0);
  // For a small head, waking other threads takes longer than the computation.
  const int64_t threads_wanted = rows * weight.numel() < kMinParallelWork ? 1 : at::get_num_threads();
  const Tiling tiling(weight.size(0), threads_wanted);
  const int64_t threads = std::min(threads_wanted, tiling.count);
  const HeadInputs in = head_inputs(hidden, weight, bias, {}, softcap, lora_hidden, lora_b, {}, {}, {}, tiling);
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

  std::atomic<int64_t> next_thread{0};
  Crew::run(threads, [&](Crew& crew) {
    const int64_t thread = next_thread++;
    const WeightTile weights(in.weight, tiling.width, read_narrow(in.weight)), lora_tiles(in.lora_b, tiling.width);
    TileProducts products(tiling.width, in.weight.size(1), worth_packing(rows));
    const int64_t block = rows_of_block(rows);
    const Tensor scratch = at::empty({block, tiling.width}, at::kFloat);
    float* z = scratch.mutable_data_ptr<float>();
    crew.each(tiling.count, [&](int64_t tile) {
      const int64_t start = tiling.start(tile), columns = tiling.columns(tile);
      const Tensor w = weights.at_columns(start, columns);
      products.invalidate();
      for (int64_t row = 0; row < rows; row += block) {
        const int64_t count = std::min(block, rows - row);
        products.logits(in.hidden.narrow(0, row, count), w, z, tiling.width);
        if (in.lora_b.defined()) {
          add_lora(z, count, columns, tiling.width, in.lora_hidden.narrow(0, row, count), lora_tiles.at_columns(start, columns));
        }
        const LogitsTile shape{count, columns, tiling.width, in.softcap, inverse_tau.data() + row};
        const int64_t at_row = thread * rows + row;
        cpu_kernels().tiles.sample(z, shape, pointer(in.bias, start), seeds.const_data_ptr<int64_t>() + row, greedy.get() + row,
                              start, partials_at(sums.data(), tiling.count, rows, false, tile, row),
                              Best{noisy.data() + at_row, logit.data() + at_row, index.data() + at_row});
      }
    });
  });

  Tensor token = at::empty({rows}, at::kLong), logprob = at::zeros({rows}, at::kFloat), entropy = at::zeros({rows}, at::kFloat);
  for (int64_t i = 0; i < rows; ++i) {
    int64_t winner = i;
    for (int64_t at = i + rows; at < threads * rows; at += rows) {
      // Which thread had which tiles is left to chance: ties go to the lower index, as within a thread.
      if (noisy[at] > noisy[winner] || (noisy[at] == noisy[winner] && index[at] < index[winner])) winner = at;
    }
    token.mutable_data_ptr<int64_t>()[i] = index[winner];
    const RowSums r = merge_tiles(sums.data(), tiling.count, rows, false, i);
    if (greedy[i] && !std::isnan(r.s)) continue;  // a NaN has no likeliest token, and is told by the log-probability
    logprob.mutable_data_ptr<float>()[i] = static_cast<float>((static_cast<double>(logit[winner]) - r.m) - r.log_s());
    entropy.mutable_data_ptr<float>()[i] = static_cast<float>(r.entropy());
  }
  return {token, logprob, entropy};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(alignpro, m) {
  m.def(
      "head_sample(Tensor hidden, Tensor weight, Tensor? bias, Tensor? temperature, float softcap, Tensor seeds, "
      "Tensor? lora_hidden, Tensor? lora_b) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(alignpro, CPU, m) { m.impl("head_sample", &head_sample); }

}  // namespace alignpro
