// Writes the keys and values of tokens to their slots in a paged pool. alignpro_kernels/pages.py documents the arguments
// and checks their shapes.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstring>

#include "paged_kv.h"

namespace alignpro {

using at::Tensor;

PageSlots::PageSlots(const Tensor& pages, const Tensor& slots)
    : slots_(slots.const_data_ptr<int64_t>()),
      page_bytes_(pages.stride(0) * pages.element_size()),
      page_size_(pages.size(2)),
      token_bytes_(pages.size(3) * pages.size(4) * pages.element_size()) {
  const int64_t capacity = pages.size(0) * page_size_;
  for (int64_t t = 0; t < slots.size(0); ++t) {
    TORCH_CHECK_VALUE(slots_[t] >= -1 && slots_[t] < capacity, "slots: number ", t, " is ", slots_[t], ", outside of -1 to ",
                      capacity - 1);
  }
}

void PageSlots::write(const Tensor& pages, int64_t token, const void* keys, const void* values) const {
  const int64_t slot = slots_[token];
  if (slot < 0) return;
  char* to = static_cast<char*>(pages.mutable_data_ptr()) + slot / page_size_ * page_bytes_ + slot % page_size_ * token_bytes_;
  std::memcpy(to, keys, token_bytes_);
  std::memcpy(to + page_size_ * token_bytes_, values, token_bytes_);
}

namespace {

// keys, values (T, kv_heads, head_dim), each token contiguous; pages (n_pages, 2, page_size, kv_heads, head_dim); slots (T)
void write_kv(const Tensor& keys, const Tensor& values, const Tensor& pages, const Tensor& slots) {
  const PageSlots to(pages, slots);
  const auto token = [&](const Tensor& states, int64_t t) {
    return static_cast<const char*>(states.const_data_ptr()) + t * states.stride(0) * states.element_size();
  };
  for (int64_t t = 0; t < slots.size(0); ++t) to.write(pages, t, token(keys, t), token(values, t));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(alignpro, m) { m.def("write_kv_cpu(Tensor keys, Tensor values, Tensor(a!) pages, Tensor slots) -> ()"); }

TORCH_LIBRARY_IMPL(alignpro, CPU, m) { m.impl("write_kv_cpu", &write_kv); }

}  // namespace alignpro
