// Registers the kernels of pages.cu as operators. alignpro_kernels/pages.py documents and checks the arguments.
//
// The stream comes from torch's device-independent interface, so that the library needs neither the headers nor the
// libraries of a CUDA build of torch: it builds and loads with any torch.

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include "pages.h"

namespace alignpro {
namespace {

using at::Tensor;

template <typename Work>
void launch_for(const Tensor& tensor, const Work& work, const char* name) {
  const c10::DeviceGuard device(tensor.device());
  const c10::Stream stream = c10::impl::VirtualGuardImpl(tensor.device().type()).getStream(tensor.device());
  const cudaError_t error = launch(work, static_cast<cudaStream_t>(stream.native_handle()));
  TORCH_CHECK(error == cudaSuccess, name, " could not be launched on ", tensor.device(), ": ", cudaGetErrorString(error));
}

// keys, values (T, kv_heads, head_dim); pages (n_pages, 2, page_size, kv_heads, head_dim); slots (T)
void write_kv(const Tensor& keys, const Tensor& values, const Tensor& pages, const Tensor& slots) {
  const int64_t item = pages.element_size();
  const WriteKv write{
      .keys = static_cast<const char*>(keys.const_data_ptr()),
      .values = static_cast<const char*>(values.const_data_ptr()),
      .pages = static_cast<char*>(pages.mutable_data_ptr()),
      .slots = slots.const_data_ptr<int64_t>(),
      .tokens = slots.size(0),
      .row_bytes = pages.size(3) * pages.size(4) * item,
      .keys_stride = keys.stride(0) * item,
      .values_stride = values.stride(0) * item,
      .page_stride = pages.stride(0) * item,
      .n_pages = pages.size(0),
      .page_size = pages.size(2),
  };
  launch_for(pages, write, "write_kv");
}

// arena (n_pages, page_bytes); source, destination (n)
void copy_pages(const Tensor& arena, const Tensor& source, const Tensor& destination) {
  const CopyPages copies{
      .arena = static_cast<char*>(arena.mutable_data_ptr()),
      .source = source.const_data_ptr<int64_t>(),
      .destination = destination.const_data_ptr<int64_t>(),
      .count = source.size(0),
      .n_pages = arena.size(0),
      .page_bytes = arena.size(1),
  };
  launch_for(arena, copies, "copy_pages");
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(alignpro, m) {
  m.def("write_kv(Tensor keys, Tensor values, Tensor(a!) pages, Tensor slots) -> ()");
  m.def("copy_pages(Tensor(a!) arena, Tensor source, Tensor destination) -> ()");
}

TORCH_LIBRARY_IMPL(alignpro, CUDA, m) {
  m.impl("write_kv", &write_kv);
  m.impl("copy_pages", &copy_pages);
}

}  // namespace alignpro
