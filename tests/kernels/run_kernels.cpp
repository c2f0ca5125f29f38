// Runs one of the generic kernels of csrc/cpu, or of those in ISA, without torch, so that it can be compiled for another processor:
//
//     run_kernels KERNEL SIZE... < inputs > outputs        float32 and int64 arrays, in the order in which `main` reads them
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#ifdef ISA
#include ISA
#else
#include "isa_generic.h"
#endif

#include "cpu_kernels_impl.h"
#include "emulated_amx.h"

#include "amx_multiply.h"

using namespace alignpro;

namespace {

template <typename T>
std::vector<T> read(int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  if (std::fread(values.data(), sizeof(T), values.size(), stdin) != values.size()) std::exit(2);
  return values;
}

template <typename T>
void write(const std::vector<T>& values) {
  std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

std::vector<float> zeros(int64_t count) { return std::vector<float>(static_cast<size_t>(count)); }

// x (rows, depth), or (depth, rows); a panel (depth, kPanel). Added to ones.
void run_multiply(int64_t rows, int64_t depth, bool transposed) {
  const auto x = read<float>(rows * depth), panel = read<float>(depth * kPanel);
  std::vector<float> out(static_cast<size_t>(rows * kPanel), 1.0f);
  const auto multiply = transposed ? kPanelKernels.multiply_transposed : kPanelKernels.multiply;
  multiply(x.data(), transposed ? rows : depth, rows, panel.data(), depth, out.data(), kPanel, true, nullptr);
  write(out);
}

// Values that are exact in bfloat16.
std::vector<uint16_t> narrow(const std::vector<float>& values) {
  std::vector<uint16_t> found;
  for (const float value : values) found.push_back(c10::BFloat16(value).x);
  return found;
}

// Rows in bfloat16, of one part or two, with memory for them.
struct Narrow {
  std::vector<uint16_t> first, second;
  int64_t parts, depth;
  Narrow(const std::vector<float>& x, int64_t rows, int64_t depth, int64_t parts)
      : first(x.size()), second(x.size()), parts(parts), depth(depth) {
    kPanelKernels.narrow_rows(x.data(), depth, rows, depth, first.data(), parts == 2 ? second.data() : nullptr);
  }
  NarrowRows rows() const { return {first.data(), parts == 2 ? second.data() : nullptr, depth}; }
};

// The same with a panel in bfloat16, for an even depth: input k of output j is at (k / 2, j, k % 2).
template <typename Multiply>
void run_multiply_bfloat16(int64_t rows, int64_t depth, const Multiply& multiply) {
  const auto x = read<float>(rows * depth);
  const auto weights = narrow(read<float>(depth * kPanel));
  std::vector<uint16_t> panel(weights.size());
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t j = 0; j < kPanel; ++j) {
      panel[static_cast<size_t>((k / 2 * kPanel + j) * 2 + k % 2)] = weights[static_cast<size_t>(k * kPanel + j)];
    }
  }
  std::vector<float> out(static_cast<size_t>(rows * kPanel), 1.0f);
  multiply(x, panel.data(), out.data());
  write(out);
}

using MultiplyNarrow = decltype(PanelKernels::multiply_narrow);
void run_multiply_narrow(int64_t rows, int64_t depth, int64_t parts, MultiplyNarrow multiply) {
  run_multiply_bfloat16(rows, depth, [&](const std::vector<float>& x, const uint16_t* panel, float* out) {
    const std::vector<uint16_t> next(panel, panel + depth * kPanel);
    multiply(Narrow(x, rows, depth, parts).rows(), rows, panel, depth, out, kPanel, true, next.data());
  });
}

void run_widened(int64_t rows, int64_t depth) {
  run_multiply_bfloat16(rows, depth, [&](const std::vector<float>& x, const uint16_t* panel, float* out) {
    kPanelKernels.multiply_bfloat16(x.data(), depth, rows, panel, depth, out, kPanel, true, nullptr);
  });
}

void run_dot_bfloat16(int64_t rows, int64_t outputs, int64_t depth) {
  const auto x = read<float>(rows * depth);
  const auto w = narrow(read<float>(outputs * depth));
  auto out = zeros(rows * outputs);
  kPanelKernels.dot_bfloat16(x.data(), depth, rows, w.data(), outputs, depth, out.data(), outputs);
  write(out);
}

void run_dot_narrow(int64_t rows, int64_t outputs, int64_t depth, int64_t parts, const PanelKernels& kernels) {
  const auto x = read<float>(rows * depth);
  const auto w = narrow(read<float>(outputs * depth));
  auto out = zeros(rows * outputs);
  const Narrow narrowed(x, rows, depth, parts);
  std::vector<uint16_t> first(static_cast<size_t>(kernels.dot_rows(rows) * depth)), second(first.size());
  kernels.pack_dots(narrowed.first.data(), rows, depth, first.data());
  if (parts == 2) kernels.pack_dots(narrowed.second.data(), rows, depth, second.data());
  kernels.dot_narrow({first.data(), parts == 2 ? second.data() : nullptr, depth}, rows, w.data(), outputs, depth, out.data(), outputs);
  write(out);
}

void run_project(int64_t rows, int64_t rank, int64_t depth) {
  const auto x = read<float>(rows * depth), a = read<float>(rank * depth);
  auto out = zeros(rows * rank);
  kPanelKernels.project(x.data(), rows, a.data(), rank, depth, 0.5f, out.data());
  write(out);
}

void run_pack(int64_t outputs, int64_t inputs) {
  const auto weight = read<float>(outputs * inputs);
  auto panel = zeros(inputs * kPanel);
  kPanelKernels.pack(weight.data(), inputs, outputs, inputs, panel.data());
  write(panel);
}

void run_norm(int64_t dim) {
  const auto x = read<float>(dim), weight = read<float>(dim);
  auto out = zeros(dim);
  kPanelKernels.rms_norm(x.data(), weight.data(), dim, 1e-5f, 1.0f, out.data());
  write(out);
}

void run_rotate(int64_t dim) {
  auto x = read<float>(dim);
  const auto cos = read<float>(dim), sin = read<float>(dim);
  kPanelKernels.rotate(x.data(), cos.data(), sin.data(), dim);
  write(x);
}

void run_gate(int64_t count) {
  auto gate = read<float>(count);
  const auto up = read<float>(count);
  kPanelKernels.gate(gate.data(), up.data(), count);
  write(gate);
}

// Row r sees the keys [first[r], last[r]) of pages of seven keys, in reverse order. They are attended to in two parts, which
// are merged. Writes the normalised outputs (count, dim).
void run_attend(int64_t count, int64_t dim, int64_t keys, int64_t element, float softcap) {
  constexpr int64_t page = 7;
  const int64_t stride = (dim + kLanes - 1) / kLanes * kLanes, pages = (keys + page - 1) / page;
  const auto query = read<float>(count * dim), from = read<float>(2 * keys * dim);
  const auto first = read<int64_t>(count), last = read<int64_t>(count);
  const int64_t bytes = element == 0 ? 4 : 2;
  std::vector<char> memory(static_cast<size_t>(pages * page * 2 * dim * bytes));
  std::vector<int32_t> table;
  for (int64_t i = 0; i < pages; ++i) table.push_back(static_cast<int32_t>(pages - 1 - i));
  const HeadKeys head{memory.data(), table.data(),     page, page * 2 * dim * bytes,
                      2 * dim * bytes, dim * bytes, dim,  static_cast<Element>(element)};
  for (int64_t j = 0; j < keys; ++j) {
    char* key = memory.data() + table[j / page] * head.page_stride + j % page * head.slot_stride;
    for (int64_t d = 0; d < 2 * dim; ++d) {  // values behind keys
      const float x = from[static_cast<size_t>((d / dim * keys + j) * dim + d % dim)];
      const c10::BFloat16 narrow(x);
      const c10::Half half(x);
      const void* bits = element == 0 ? static_cast<const void*>(&x) : element == 1 ? static_cast<const void*>(&narrow) : &half;
      std::memcpy(key + d * bytes, bits, static_cast<size_t>(bytes));
    }
  }
  auto padded = zeros(count * stride);
  for (int64_t r = 0; r < count; ++r) std::copy_n(query.data() + r * dim, dim, padded.data() + r * stride);
  const AttentionQueries rows{count, stride, padded.data(), first.data(), last.data(), 0.25f, softcap};
  const int64_t split = keys / 2 / kKeyBlock * kKeyBlock;
  std::vector<float> o[2], m[2], l[2];
  for (int part = 0; part < 2; ++part) {
    o[part] = zeros(count * stride);
    m[part].assign(static_cast<size_t>(count), -kInfinity);
    l[part] = zeros(count);
    void* scratch = std::aligned_alloc(64, static_cast<size_t>((kAttentionKernels.scratch(count, stride) * 4 + 63) / 64 * 64));
    kAttentionKernels.attend(head, rows, {o[part].data(), m[part].data(), l[part].data()}, part * split, part ? keys : split,
                             static_cast<float*>(scratch));
    std::free(scratch);
  }
  kAttentionKernels.merge({o[0].data(), m[0].data(), l[0].data()}, {o[1].data(), m[1].data(), l[1].data()}, count, stride);
  auto out = zeros(count * dim);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t d = 0; d < dim; ++d) {
      out[static_cast<size_t>(r * dim + d)] = o[0][static_cast<size_t>(r * stride + d)] / l[0][static_cast<size_t>(r)];
    }
  }
  write(out);
}

// Statistics of a tile with its reference, then the gradient that follows from them: alpha 1, eta 0.25, kappa 0.5.
void run_head(int64_t rows, int64_t columns, float softcap) {
  const int64_t stride = (columns + kLanes - 1) / kLanes * kLanes;
  auto logits = read<float>(rows * stride), reference = read<float>(rows * stride);
  const auto inverse_tau = read<float>(rows), bias = read<float>(stride);
  const auto target = read<int64_t>(rows);
  const LogitsTile shape{rows, columns, stride, softcap, inverse_tau.data()};
  auto sums = zeros(6 * rows), entropy = zeros(rows), kl = zeros(rows), log_s = zeros(rows), log_s_r = zeros(rows);
  float* at = sums.data();
  const Partials p{at, at + rows, at + 2 * rows, at + 3 * rows, at + 4 * rows, at + 5 * rows};
  kTileKernels.statistics(logits.data(), reference.data(), shape, bias.data(), bias.data(), p);
  for (size_t i = 0; i < static_cast<size_t>(rows); ++i) {
    log_s[i] = std::log(p.s[i]);
    log_s_r[i] = std::log(p.s_r[i]);
    entropy[i] = log_s[i] - p.a[i] / p.s[i];
    kl[i] = p.b[i] / p.s[i] - log_s[i] + log_s_r[i];
  }
  const auto row = [&](float value) { return std::vector<float>(static_cast<size_t>(rows), value); };
  const auto alpha = row(1.0f), eta = row(0.25f), kappa = row(0.5f);
  auto du = zeros(rows * stride), bias_gradient = zeros(stride);
  const Upstream up{p.m,  log_s.data(), p.m_r, log_s_r.data(), entropy.data(), kl.data(), alpha.data(), eta.data(), kappa.data()};
  kTileKernels.gradient(logits.data(), reference.data(), shape, nullptr, target.data(), up, du.data(), bias_gradient.data());
  for (const auto& values : {entropy, kl, du, bias_gradient}) write(values);
}

// The sampled columns, of a tile that starts at column 5 of the vocabulary; the last row is greedy.
void run_sample(int64_t rows, int64_t columns) {
  const int64_t stride = (columns + kLanes - 1) / kLanes * kLanes;
  auto logits = read<float>(rows * stride);
  const auto seeds = read<int64_t>(rows);
  auto sums = zeros(5 * rows);
  float* at = sums.data();
  std::fill_n(at + 3 * rows, rows, -kInfinity);
  std::vector<int64_t> index(static_cast<size_t>(rows), -1);
  bool* greedy = static_cast<bool*>(std::calloc(static_cast<size_t>(rows), sizeof(bool)));
  greedy[rows - 1] = true;
  kTileKernels.sample(logits.data(), {rows, columns, stride, 0, nullptr}, nullptr, seeds.data(), greedy, 5,
                      {at, at + rows, at + 2 * rows, nullptr, nullptr, nullptr}, {at + 3 * rows, at + 4 * rows, index.data()});
  std::free(greedy);
  write(index);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string kernel = argc > 1 ? argv[1] : "";
  std::vector<int64_t> size;
  for (int i = 2; i < argc; ++i) size.push_back(std::atoll(argv[i]));
  size.resize(5);
  if (kernel == "multiply") run_multiply(size[0], size[1], false);
  else if (kernel == "multiply_transposed") run_multiply(size[0], size[1], true);
  else if (kernel == "multiply_bfloat16") run_widened(size[0], size[1]);
  else if (kernel == "multiply_narrow") run_multiply_narrow(size[0], size[1], size[2], kPanelKernels.multiply_narrow);
  else if (kernel == "multiply_amx") run_multiply_narrow(size[0], size[1], size[2], multiply_amx);
  else if (kernel == "dot_narrow") run_dot_narrow(size[0], size[1], size[2], size[3], kPanelKernels);
  else if (kernel == "dot_amx") run_dot_narrow(size[0], size[1], size[2], size[3], kAmxKernels);
  else if (kernel == "dot_bfloat16") run_dot_bfloat16(size[0], size[1], size[2]);
  else if (kernel == "project") run_project(size[0], size[1], size[2]);
  else if (kernel == "pack") run_pack(size[0], size[1]);
  else if (kernel == "rms_norm") run_norm(size[0]);
  else if (kernel == "rotate") run_rotate(size[0]);
  else if (kernel == "gate") run_gate(size[0]);
  else if (kernel == "attend") run_attend(size[0], size[1], size[2], size[3], static_cast<float>(size[4]));
  else if (kernel == "head") run_head(size[0], size[1], static_cast<float>(size[2]));
  else if (kernel == "sample") run_sample(size[0], size[1]);
  else return 1;
  return 0;
}
