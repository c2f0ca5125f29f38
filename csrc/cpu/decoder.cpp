// The layers of a Llama-like decoder with paged keys and values, from the embeddings to the last norm; see
// alignpro_kernels/decoder.py.

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <map>

#include "low_rank.h"
#include "paged_kv.h"
#include "panel_products.h"

namespace alignpro {
namespace {

using at::Tensor;

float* data(const Tensor& x) { return x.mutable_data_ptr<float>(); }
const float* values(const Tensor& x) { return x.const_data_ptr<float>(); }
const float* values(const OptionalTensor& x) { return x ? values(*x) : nullptr; }

// The weights of one layer; vectors may be null where they are optional.
struct Layer {
  const float *attention_norm, *mlp_norm;
  Panels qkv, out, gate, up, down;
  const float *qkv_bias, *query_norm, *key_norm, *out_bias, *gate_bias, *up_bias, *down_bias;
};

// The products of a layer, to which LoRAs may add.
enum Product { kQkv, kOut, kGate, kUp, kDown, kProducts };
using LayerLoras = std::array<std::vector<LowRank>, kProducts>;

struct Dimensions {
  int64_t tokens, dim, heads, kv_heads, head_dim, inner;
  float eps, offset;  // of the norms
  int64_t qkv() const { return (heads + 2 * kv_heads) * head_dim; }
};

// Rotates a token's queries and keys, which are normed before where the layer has norms for them.
void rotate(const Layer& layer, const Dimensions& s, const float* cos, const float* sin, int64_t dim, float* token) {
  for (int64_t head = 0; head < s.heads + s.kv_heads; ++head, token += s.head_dim) {
    const float* norm = head < s.heads ? layer.query_norm : layer.key_norm;
    if (norm != nullptr) cpu_kernels().panels.rms_norm(token, norm, s.head_dim, s.eps, s.offset, token);
    cpu_kernels().panels.rotate(token, cos, sin, dim);
  }
}

// A step of a crew: x (rows, outputs) += rows times a packed weight, plus a bias unless it is null and what LoRAs add
void add_product(Crew& crew, const Rows& from, int64_t rows, const Panels& weight, int64_t outputs, const float* bias,
                 const LowRankTerm& loras, float* x) {
  const auto epilogue = [&](int64_t row, int64_t column, int64_t width, const float* product) {
    float* to = x + row * outputs + column;
    for (int64_t j = 0; j < width; ++j) to[j] += product[j];
  };
  multiply(crew, from, rows, weight, outputs, epilogue, BiasAnd<LowRankTerm>{bias, outputs, loras});
}

// Sorts LoRAs by layer and product. A place is 7 layer + projection, in the order of the checks below.
std::vector<LayerLoras> loras_of_layers(int64_t layers, const Dimensions& s, at::TensorList a, at::TensorList b,
                                        at::ArrayRef<double> scales, at::IntArrayRef places) {
  struct Projection {
    Product product;
    int64_t first, outputs, inputs;
  };
  const int64_t queries = s.heads * s.head_dim, keys = s.kv_heads * s.head_dim;
  const std::array<Projection, 7> projections{{{kQkv, 0, queries, s.dim},
                                               {kQkv, queries, keys, s.dim},
                                               {kQkv, queries + keys, keys, s.dim},
                                               {kOut, 0, s.dim, queries},
                                               {kGate, 0, s.inner, s.dim},
                                               {kUp, 0, s.inner, s.dim},
                                               {kDown, 0, s.dim, s.inner}}};
  std::vector<LayerLoras> found(layers);
  TORCH_CHECK_VALUE(b.size() == a.size() && scales.size() == a.size() && places.size() == a.size(), "LoRAs differ in number");
  for (size_t i = 0; i < a.size(); ++i) {
    TORCH_CHECK_VALUE(places[i] >= 0 && places[i] < 7 * layers, "a LoRA is on layer ", places[i] / 7, " of ", layers);
    const Projection& at = projections[places[i] % 7];
    for (const Tensor* x : {&a[i], &b[i]}) {
      TORCH_CHECK_VALUE(x->dim() == 2 && x->scalar_type() == at::kFloat && x->is_cpu(), "a LoRA is ", x->scalar_type(),
                        " of shape ", x->sizes(), " on ", x->device(), ": expected matrices in float32 on the CPU");
    }
    TORCH_CHECK_VALUE(a[i].size(1) == at.inputs && b[i].size(0) == at.outputs && b[i].size(1) == a[i].size(0) && a[i].size(0) > 0,
                      "a LoRA has factors of shapes ", a[i].sizes(), " and ", b[i].sizes(), " on a projection from ", at.inputs,
                      " to ", at.outputs, " features: they do not match");
    found[places[i] / 7][at.product].push_back({a[i].contiguous(), b[i].contiguous(), static_cast<float>(scales[i]), at.first});
  }
  return found;
}

// What is computed of the tokens of a pass, in memory that all layers share.
struct Activations {
  float *x, *normed;              // (T, D): the residual stream, and its norm
  float *qkv, *attended, *lse;    // (T, (H + 2 H') head_dim), (T, H head_dim), (T, H)
  float* inner;                   // (in_flight, I): of the MLP
  int64_t in_flight;              // tokens
  uint16_t *of_states, *of_inner; // for `Rows` of all tokens, of the width of states or of queries; and of the MLP's
  float *of_loras, *of_more;      // for `LowRankTerm`s of all tokens
};

// What all layers of a pass have in common.
struct Pass {
  const Dimensions& s;
  const std::vector<LayerLoras>& loras;
  const ActiveRows& active;
  const PageSlots& slots;
  const float *cos, *sin;
  int64_t rotated;  // elements of a head
  float scale, softcap;
};

void run_layer(Crew& crew, const Pass& pass, const Layer& layer, const LayerLoras& loras, const CascadePlan& attention, const Tensor& pages,
               const Tensor& queries, const Activations& a) {
  const Dimensions& s = pass.s;
  const int64_t query_width = s.heads * s.head_dim;
  const auto norm = [&](const float* weight, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      cpu_kernels().panels.rms_norm(a.x + row * s.dim, weight, s.dim, s.eps, s.offset, a.normed + row * s.dim);
    }
  };
  const LowRankTerm of_qkv(loras[kQkv], pass.active, 0, s.tokens, a.of_loras);
  const Rows states(a.normed, s.tokens, layer.qkv, a.of_states);
  for_rows(crew, s.tokens, s.dim, [&](int64_t begin, int64_t end) {
    norm(layer.attention_norm, begin, end);
    states.prepare(begin, end);
    of_qkv.prepare(a.normed, begin, end);
  });
  multiply_biased(crew, states, s.tokens, layer.qkv, s.qkv(), layer.qkv_bias, a.qkv, of_qkv);
  for_rows(crew, s.tokens, s.qkv(), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float *token = a.qkv + row * s.qkv(), *keys = token + query_width;
      rotate(layer, s, pass.cos + row * pass.rotated, pass.sin + row * pass.rotated, pass.rotated, token);
      pass.slots.write(pages, row, keys, keys + s.kv_heads * s.head_dim);
    }
  });
  attention.attend(crew, queries, pages, pass.scale, pass.softcap, a.attended, a.lse);
  const LowRankTerm of_out(loras[kOut], pass.active, 0, s.tokens, a.of_loras);
  const Rows attended(a.attended, s.tokens, layer.out, a.of_states);
  for_rows(crew, s.tokens, query_width, [&](int64_t begin, int64_t end) {
    attended.prepare(begin, end);
    of_out.prepare(a.attended, begin, end);
  });
  add_product(crew, attended, s.tokens, layer.out, s.dim, layer.out_bias, of_out, a.x);
  for (int64_t first = 0; first < s.tokens; first += a.in_flight) {
    const int64_t count = std::min(a.in_flight, s.tokens - first);
    const float* from = a.normed + first * s.dim;
    const LowRankTerm of_gate(loras[kGate], pass.active, first, count, a.of_loras), of_up(loras[kUp], pass.active, first, count, a.of_more);
    const Rows of_x(from, count, layer.gate, a.of_states);
    for_rows(crew, count, s.dim, [&](int64_t begin, int64_t end) {
      norm(layer.mlp_norm, first + begin, first + end);
      of_x.prepare(begin, end);
      of_gate.prepare(from, begin, end);
      of_up.prepare(from, begin, end);
    });
    multiply_gated(crew, of_x, count, layer.gate, layer.up, s.inner, a.inner, BiasAnd<LowRankTerm>{layer.gate_bias, s.inner, of_gate},
                   BiasAnd<LowRankTerm>{layer.up_bias, s.inner, of_up});
    const LowRankTerm of_down(loras[kDown], pass.active, first, count, a.of_loras);
    const Rows of_inner(a.inner, count, layer.down, a.of_inner);
    for_rows(crew, count, s.inner, [&](int64_t begin, int64_t end) {
      of_inner.prepare(begin, end);
      of_down.prepare(a.inner, begin, end);
    });
    add_product(crew, of_inner, count, layer.down, s.dim, layer.down_bias, of_down, a.x + first * s.dim);
  }
}

// hidden (T, D) -> (T, D). scratch: memory for (T, (H + 2 H') head_dim) and (T, H head_dim) floats, and for the MLP's
// intermediate activations (rows, I); its size determines how many rows are processed at a time.
Tensor decoder_stack(const Tensor& hidden, at::TensorList norms, at::TensorList weights, const c10::List<OptionalTensor>& extras,
                     const Tensor& cos, const Tensor& sin, at::TensorList pages, const Tensor& slots,
                     const c10::List<OptionalTensor>& rows, at::TensorList cu_queries, at::TensorList page_tables,
                     at::TensorList key_lengths, at::TensorList query_positions, at::TensorList key_starts, double eps,
                     double offset, double scale, double softcap, at::IntArrayRef windows, at::TensorList lora_a,
                     at::TensorList lora_b, at::ArrayRef<double> lora_scales, at::IntArrayRef lora_places,
                     const OptionalTensor& lora_rows, const Tensor& scratch) {
  const at::AutoDispatchBelowAutograd no_autograd;
  const int64_t layers = static_cast<int64_t>(pages.size());
  const int64_t head_dim = pages[0].size(4), kv_heads = pages[0].size(3), query_width = weights[1].size(1);
  const Dimensions s{hidden.size(0), hidden.size(1),      query_width / head_dim, kv_heads, head_dim, weights[4].size(1),
                static_cast<float>(eps), static_cast<float>(offset)};
  const int64_t of_qkv = s.tokens * s.qkv(), of_attended = s.tokens * query_width;
  const int64_t in_flight = std::min(s.tokens, (scratch.numel() - of_qkv - of_attended) / s.inner);
  TORCH_CHECK_VALUE(in_flight > 0 && scratch.scalar_type() == at::kFloat, "scratch has room for ", scratch.numel(),
                    " elements, which are too few");
  const Tensor queries = scratch.narrow(0, 0, of_qkv).view({s.tokens, s.qkv()}).narrow(1, 0, query_width)
                             .view({s.tokens, s.heads, s.head_dim});

  const ActiveRows active(s.tokens, lora_rows);
  const std::vector<LayerLoras> loras = loras_of_layers(layers, s, lora_a, lora_b, lora_scales, lora_places);
  int64_t ranks = 0, more_ranks = 0, multiplications = 0;
  std::vector<Layer> all;
  for (int64_t l = 0; l < layers; ++l) {
    const auto extra = [&](int64_t i) { return values(OptionalTensor(extras.get(7 * l + i))); };
    const auto packed = [&](int64_t i) { return Panels(weights[5 * l + i]); };
    all.push_back({values(norms[2 * l]), values(norms[2 * l + 1]), packed(0), packed(1), packed(2), packed(3), packed(4), extra(0), extra(1),
                   extra(2), extra(3), extra(4), extra(5), extra(6)});
    check_gate(all[l].gate, all[l].up);
    for (const Product product : {kQkv, kOut, kGate, kDown}) ranks = std::max(ranks, LowRankTerm::ranks(loras[l][product]));
    more_ranks = std::max(more_ranks, LowRankTerm::ranks(loras[l][kUp]));
    for (int64_t i = 0; i < 5; ++i) multiplications += s.tokens * weights[5 * l + i].numel();
  }
  std::map<int64_t, CascadePlan> attention;  // by window
  for (const int64_t window : windows) {
    const CascadeLevels levels{rows, cu_queries, page_tables, key_lengths, query_positions, key_starts};
    if (!attention.contains(window)) {
      attention.try_emplace(window, levels, s.tokens, s.heads, pages[0], window, at::get_num_threads());
    }
  }

  const Tensor x = hidden.clone(at::MemoryFormat::Contiguous), normed = at::empty_like(x);
  const bool any_narrow = std::any_of(weights.begin(), weights.end(), [](const Tensor& w) { return w.scalar_type() != at::kFloat; });
  const int64_t of_states = Rows::elements(s.tokens, std::max(s.dim, query_width), any_narrow);
  const Tensor narrow = at::empty({of_states + Rows::elements(in_flight, s.inner, any_narrow)}, at::kBFloat16);
  const Tensor floats = at::empty({s.tokens * s.heads + active.count() * (ranks + more_ranks)}, at::kFloat);
  auto* of_rows = static_cast<uint16_t*>(narrow.mutable_data_ptr());
  float *memory = data(scratch), *more = data(floats);
  const Activations a{data(x), data(normed), memory, memory + of_qkv, more, memory + of_qkv + of_attended, in_flight, of_rows,
                      of_rows + of_states, more + s.tokens * s.heads, more + s.tokens * s.heads + active.count() * ranks};
  const PageSlots to(pages[0], slots);
  const Pass pass{s, loras, active, to, values(cos), values(sin), cos.size(1), static_cast<float>(scale), static_cast<float>(softcap)};
  Crew::run(threads_for(multiplications), [&](Crew& crew) {
    for (int64_t l = 0; l < layers; ++l) run_layer(crew, pass, all[l], loras[l], attention.at(windows[l]), pages[l], queries, a);
    for_rows(crew, s.tokens, s.dim, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        cpu_kernels().panels.rms_norm(a.x + row * s.dim, values(norms[2 * layers]), s.dim, s.eps, s.offset, a.normed + row * s.dim);
      }
    });
  });
  return normed;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(alignpro, m) {
  m.def(
      "decoder_stack(Tensor hidden, Tensor[] norms, Tensor[] weights, Tensor?[] extras, Tensor cos, Tensor sin, "
      "Tensor[] pages, Tensor slots, Tensor?[] rows, Tensor[] cu_queries, Tensor[] page_tables, Tensor[] key_lengths, "
      "Tensor[] query_positions, Tensor[] key_starts, float eps, float offset, float scale, float softcap, int[] windows, "
      "Tensor[] lora_a, Tensor[] lora_b, float[] lora_scales, int[] lora_places, Tensor? lora_rows, Tensor(a!) scratch) -> Tensor");
}

TORCH_LIBRARY_IMPL(alignpro, CPU, m) { m.impl("decoder_stack", &decoder_stack); }

}  // namespace alignpro
