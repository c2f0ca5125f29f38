#include "weight_memory.h"

#include <ATen/Functions.h>

#include <mutex>

#include "huge_pages.h"

namespace alignpro {
namespace {

using at::Tensor;

constexpr int64_t kLine = 64, kChunk = int64_t{32} << 20;

// The chunk that weights are taken from, and what is left of it. A chunk lives as long as one of its weights.
struct Chunk {
  std::mutex mutex;
  Tensor bytes;
  int64_t used = 0;
};

// Never destroyed: tensors may be freed while the process exits.
Chunk& current() {
  static Chunk* instance = new Chunk;
  return *instance;
}

Tensor bytes_of(int64_t count) {
  if (count >= kChunk / 4) {
    const Tensor own = at::empty({count}, at::kByte);
    advise_huge_pages(own.mutable_data_ptr(), count);
    return own;
  }
  Chunk& chunk = current();
  const std::lock_guard lock(chunk.mutex);
  if (chunk.bytes.defined() && chunk.bytes.storage().use_count() == 1) chunk.used = 0;  // none of its weights is left
  if (!chunk.bytes.defined() || chunk.used + count > kChunk) {
    chunk.bytes = at::empty({kChunk}, at::kByte);
    advise_huge_pages(chunk.bytes.mutable_data_ptr(), kChunk);
    chunk.used = 0;
  }
  const Tensor part = chunk.bytes.narrow(0, chunk.used, count);
  chunk.used += (count + kLine - 1) / kLine * kLine;
  return part;
}

}  // namespace

Tensor weight_memory(at::IntArrayRef sizes, at::ScalarType dtype) {
  const int64_t bytes = c10::multiply_integers(sizes) * static_cast<int64_t>(c10::elementSize(dtype));
  const Tensor part = bytes_of(bytes);
  // A storage of its own: what copies or measures storages sees this weight alone.
  return at::from_blob(part.mutable_data_ptr(), sizes, [part](void*) {}, dtype);
}

}  // namespace alignpro
