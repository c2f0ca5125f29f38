#include "workspace.h"

#include <ATen/Functions.h>
#include <torch/library.h>

#include "huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>

#include <mutex>
#include <algorithm>
#include <utility>
#endif

namespace alignpro {

#if defined(__linux__)
namespace {

constexpr int64_t kPage = int64_t{2} << 20;

struct Block {
  void* start = nullptr;
  int64_t bytes = 0;
};

struct Cache {
  std::mutex mutex;
  Block block;
};

// Never destroyed: tensors may be freed while the process exits.
Cache& cache() {
  static Cache* instance = new Cache;
  return *instance;
}

void unmap(const Block& block) {
  if (block.start != nullptr) munmap(block.start, static_cast<size_t>(block.bytes));
}

// Returns a block of at least `bytes` bytes: the cached one if it is large enough, otherwise a new one.
Block allocate(int64_t bytes) {
  {
    const std::lock_guard lock(cache().mutex);
    if (cache().block.bytes >= bytes) return std::exchange(cache().block, {});
  }
  Block block{nullptr, (bytes + kPage - 1) / kPage * kPage};
  block.start = mmap(nullptr, static_cast<size_t>(block.bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK(block.start != MAP_FAILED, "there is no memory for ", bytes >> 20, " MiB of logits");
  advise_huge_pages(block.start, block.bytes);
  return block;
}

void release(Block block) {
  if (block.bytes <= kMaxCachedBytes) {
    madvise(block.start, static_cast<size_t>(block.bytes), MADV_FREE);
    const std::lock_guard lock(cache().mutex);
    if (cache().block.bytes < block.bytes) std::swap(cache().block, block);
  }
  unmap(block);
}

}  // namespace

at::Tensor workspace(at::IntArrayRef sizes) {
  const Block block = allocate(std::max<int64_t>(1, c10::multiply_integers(sizes)) * static_cast<int64_t>(sizeof(float)));
  return at::from_blob(block.start, sizes, [block](void*) { release(block); }, at::kFloat);
}

void release_workspace() {
  const std::lock_guard lock(cache().mutex);
  unmap(std::exchange(cache().block, {}));
}

#else

at::Tensor workspace(at::IntArrayRef sizes) { return at::empty(sizes, at::kFloat); }

void release_workspace() {}

#endif

TORCH_LIBRARY_FRAGMENT(alignpro, m) {
  m.def("workspace(int[] sizes) -> Tensor", &workspace);
  m.def("release_workspace() -> ()", &release_workspace);
}

}  // namespace alignpro
