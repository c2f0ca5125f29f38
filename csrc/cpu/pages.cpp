// Writes the keys and values of tokens to their slots in a paged pool. alignpro_kernels/pages.py documents the arguments
// and checks their shapes.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstring>

#include "paged_kv.h"

namespace alignpro {

using at::Tensor;

void write_kv(const Tensor& keys, const Tensor& values, const Tensor& pages, const Tensor& slots) {
  const int64_t item = pages.element_size(), size = pages.size(2), capacity = pages.size(0) * size;
  const int64_t heads = pages.size(3), head_bytes = pages.size(4) * item, row_bytes = heads * head_bytes;
  char* arena = static_cast<char*>(pages.mutable_data_ptr());
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < slots.size(0); ++t) {
    TORCH_CHECK_VALUE(slot[t] >= -1 && slot[t] < capacity, "slots: number ", t, " is ", slot[t], ", outside of -1 to ",
                      capacity - 1);
  }
  const auto write = [&](const Tensor& states, int64_t half) {
    const char* from = static_cast<const char*>(states.const_data_ptr());
    for (int64_t t = 0; t < slots.size(0); ++t) {
      if (slot[t] < 0) continue;
      char* to = arena + (slot[t] / size * pages.stride(0)) * item + (half * size + slot[t] % size) * row_bytes;
      for (int64_t head = 0; head < heads; ++head) {
        std::memcpy(to + head * head_bytes, from + (t * states.stride(0) + head * states.stride(1)) * item, head_bytes);
      }
    }
  };
  write(keys, 0);
  write(values, 1);
}

TORCH_LIBRARY_FRAGMENT(alignpro, m) { m.def("write_kv_cpu(Tensor keys, Tensor values, Tensor(a!) pages, Tensor slots) -> ()"); }

TORCH_LIBRARY_IMPL(alignpro, CPU, m) { m.impl("write_kv_cpu", &write_kv); }

}  // namespace alignpro
