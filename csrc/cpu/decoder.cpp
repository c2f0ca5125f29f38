// The layers of a Llama-like decoder with paged keys and values, from the embeddings to the last norm; see
// alignpro_kernels/decoder.py.

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <array>

#include "low_rank.h"
#include "paged_kv.h"
#include "panel_products.h"

namespace alignpro {
namespace {

using at::Tensor;

float* data(const Tensor& x) { return x.mutable_data_ptr<float>(); }
const float* values(const Tensor& x) { return x.const_data_ptr<float>(); }
const float* values(const OptionalTensor& x) { return x ? values(*x) : nullptr; }

// The weights of one layer; matrices are packed.
struct Layer {
  Tensor attention_norm, qkv, out, mlp_norm, gate, up, down;
  OptionalTensor qkv_bias, query_norm, key_norm, out_bias, gate_bias, up_bias, down_bias;
};

// The products of a layer, to which LoRAs may add.
enum Product { kQkv, kOut, kGate, kUp, kDown, kProducts };
using LayerLoras = std::array<std::vector<LowRank>, kProducts>;

struct Dimensions {
  int64_t tokens, dim, heads, kv_heads, head_dim, inner;
  float eps, offset;  // of the norms
  int64_t qkv() const { return (heads + 2 * kv_heads) * head_dim; }
};

void rms_norm(const Tensor& x, const Tensor& weight, const Dimensions& s, float* out) {
  const float *from = values(x), *scales = values(weight);
  for_rows(s.tokens, s.dim, [&](int64_t row) {
    cpu_kernels().panels.rms_norm(from + row * s.dim, scales, s.dim, s.eps, s.offset, out + row * s.dim);
  });
}

void rotate(const Layer& layer, const Dimensions& s, const Tensor& cos, const Tensor& sin, float* qkv) {
  const float *c = values(cos), *n = values(sin);
  const int64_t dim = cos.size(1);
  for_rows(s.tokens, s.qkv(), [&](int64_t row) {
    float* x = qkv + row * s.qkv();
    for (int64_t head = 0; head < s.heads + s.kv_heads; ++head, x += s.head_dim) {
      const OptionalTensor& norm = head < s.heads ? layer.query_norm : layer.key_norm;
      if (norm) cpu_kernels().panels.rms_norm(x, values(*norm), s.head_dim, s.eps, s.offset, x);
      cpu_kernels().panels.rotate(x, c + row * dim, n + row * dim, dim);
    }
  });
}

// x (rows, outputs) += from (rows, inputs) times a packed weight, plus a bias unless it is null and what LoRAs add
void add_product(const float* from, int64_t rows, const Tensor& packed, int64_t outputs, const float* bias,
                 const LowRankTerm& loras, float* x) {
  const auto epilogue = [&](int64_t row, int64_t column, int64_t width, const float* product) {
    float* to = x + row * outputs + column;
    for (int64_t j = 0; j < width; ++j) to[j] += product[j];
  };
  multiply(from, rows, packed, outputs, epilogue, BiasAnd<LowRankTerm>{bias, outputs, loras});
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
  const CascadeLevels levels{rows, cu_queries, page_tables, key_lengths, query_positions, key_starts};
  const Tensor x = hidden.clone(at::MemoryFormat::Contiguous), normed = at::empty_like(x);
  const int64_t of_qkv = s.tokens * s.qkv(), of_attended = s.tokens * query_width;
  const int64_t in_flight = (scratch.numel() - of_qkv - of_attended) / s.inner;
  TORCH_CHECK_VALUE(in_flight > 0 && scratch.scalar_type() == at::kFloat, "scratch has room for ", scratch.numel(),
                    " elements, which are too few");
  const Tensor qkv = scratch.narrow(0, 0, of_qkv).view({s.tokens, s.qkv()});
  const Tensor attended = scratch.narrow(0, of_qkv, of_attended).view({s.tokens, s.heads, s.head_dim});
  const Tensor lse = at::empty({s.tokens, s.heads}, x.options());
  float* inner = data(scratch) + of_qkv + of_attended;
  const auto part = [&](int64_t head, int64_t count) {
    return qkv.narrow(1, head * s.head_dim, count * s.head_dim).view({s.tokens, count, s.head_dim});
  };
  const Tensor queries = part(0, s.heads), keys = part(s.heads, s.kv_heads), value = part(s.heads + s.kv_heads, s.kv_heads);
  const std::vector<LayerLoras> loras = loras_of_layers(layers, s, lora_a, lora_b, lora_scales, lora_places);
  const ActiveRows active(s.tokens, lora_rows);
  for (int64_t l = 0; l < layers; ++l) {
    const auto extra = [&](int64_t i) -> OptionalTensor { return extras.get(7 * l + i); };
    const Layer layer{norms[2 * l],       weights[5 * l],     weights[5 * l + 1], norms[2 * l + 1], weights[5 * l + 2],
                      weights[5 * l + 3], weights[5 * l + 4], extra(0),           extra(1),         extra(2),
                      extra(3),           extra(4),           extra(5),           extra(6)};
    // What the layer's LoRAs add to a product with `from`, the inputs of `count` rows from `first` on.
    const auto added = [&](Product product, const float* from, int64_t first, int64_t count) {
      return LowRankTerm(loras[l][product], active, from, first, count);
    };
    rms_norm(x, layer.attention_norm, s, data(normed));
    multiply_biased(values(normed), s.tokens, layer.qkv, s.qkv(), values(layer.qkv_bias), data(qkv),
                    added(kQkv, values(normed), 0, s.tokens));
    rotate(layer, s, cos, sin, data(qkv));
    write_kv(keys, value, pages[l], slots);
    attend_levels(queries, pages[l], levels, scale, softcap, windows[l], attended, lse);
    add_product(values(attended), s.tokens, layer.out, s.dim, values(layer.out_bias),
                added(kOut, values(attended), 0, s.tokens), data(x));
    rms_norm(x, layer.mlp_norm, s, data(normed));
    for (int64_t first = 0; first < s.tokens; first += in_flight) {
      const int64_t count = std::min(in_flight, s.tokens - first);
      const float* from = values(normed) + first * s.dim;
      const LowRankTerm of_gate = added(kGate, from, first, count), of_up = added(kUp, from, first, count);
      multiply_gated(from, count, layer.gate, layer.up, s.inner, inner,
                     BiasAnd<LowRankTerm>{values(layer.gate_bias), s.inner, of_gate},
                     BiasAnd<LowRankTerm>{values(layer.up_bias), s.inner, of_up});
      add_product(inner, count, layer.down, s.dim, values(layer.down_bias), added(kDown, inner, first, count),
                  data(x) + first * s.dim);
    }
  }
  rms_norm(x, norms[2 * layers], s, data(normed));
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
