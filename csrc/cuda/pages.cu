// Copies between tokens, slots and pages. The kernels are memory-bound: every access is as wide as the alignment allows (16
// bytes for all common geometries), adjacent lanes access adjacent addresses, and each lane has several loads in flight.
// Indices are 64-bit, since a pool may exceed 2^31 elements.

#include "pages.h"

#include <algorithm>

namespace alignpro {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kUnroll = 4;          // loads in flight per lane
constexpr int64_t kBlocks = 16384;  // more than any GPU runs at once; a grid-stride loop covers the rest

// Copies elements first, first + step, ... of `count`, as one lane of many. All loads of a round precede its stores; the
// compiler cannot reorder them by itself, because it does not know that source and destination do not overlap.
template <typename Vector>
__device__ __forceinline__ void copy(const Vector* from, Vector* to, int64_t first, int64_t step, int64_t count) {
  int64_t i = first;
  for (; i + (kUnroll - 1) * step < count; i += kUnroll * step) {
    Vector held[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) held[j] = from[i + j * step];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) to[i + j * step] = held[j];
  }
  for (; i < count; i += step) to[i] = from[i];
}

// As unsigned numbers, negative ones exceed every bound.
__device__ __forceinline__ bool inside(int64_t index, int64_t bound) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(bound);
}

// One warp per row; rows 2t and 2t + 1 are the keys and the values of token t.
template <typename Vector>
__global__ void __launch_bounds__(kThreads) write_kv_kernel(const WriteKv write) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  const int lane = threadIdx.x % kWarp;
  const int64_t vectors = write.row_bytes / static_cast<int64_t>(sizeof(Vector));
  for (int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp; row < 2 * write.tokens; row += warps) {
    const int64_t token = row / 2, which = row % 2, slot = write.slots[token];
    if (!inside(slot, write.n_pages * write.page_size)) continue;
    const int64_t page = slot / write.page_size, offset = slot % write.page_size;
    const char* from = which ? write.values + token * write.values_stride : write.keys + token * write.keys_stride;
    char* to = write.pages + page * write.page_stride + (which * write.page_size + offset) * write.row_bytes;
    copy(reinterpret_cast<const Vector*>(from), reinterpret_cast<Vector*>(to), lane, kWarp, vectors);
  }
}

// The x dimension of the grid strides over a page, the y dimension over the pages.
template <typename Vector>
__global__ void __launch_bounds__(kThreads) copy_pages_kernel(const CopyPages copies) {
  const int64_t vectors = copies.page_bytes / static_cast<int64_t>(sizeof(Vector));
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = blockIdx.y; i < copies.count; i += gridDim.y) {
    const int64_t source = copies.source[i], destination = copies.destination[i];
    if (!inside(source, copies.n_pages) || !inside(destination, copies.n_pages)) continue;
    copy(reinterpret_cast<const Vector*>(copies.arena + source * copies.page_bytes),
         reinterpret_cast<Vector*>(copies.arena + destination * copies.page_bytes), first, step, vectors);
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The address as a number; the vector width must divide all addresses, sizes and strides.
int64_t bits(const void* address) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(address)); }

// Calls `body` with a value of the widest vector type that divides `together`, the bitwise or of addresses and sizes.
template <typename Body>
void with_widest(int64_t together, const Body& body) {
  if (together % 16 == 0) {
    body(uint4{});
  } else if (together % 8 == 0) {
    body(uint2{});
  } else if (together % 4 == 0) {
    body(uint32_t{});
  } else if (together % 2 == 0) {
    body(uint16_t{});
  } else {
    body(uint8_t{});
  }
}

}  // namespace

cudaError_t launch(const WriteKv& write, cudaStream_t stream) {
  if (write.tokens == 0) return cudaSuccess;  // launching an empty grid is an error
  const int64_t together = bits(write.keys) | bits(write.values) | bits(write.pages) | write.row_bytes |
                           write.keys_stride | write.values_stride | write.page_stride;
  const int64_t blocks = ceil_div(2 * write.tokens, kThreads / kWarp);
  with_widest(together, [&](auto vector) {
    write_kv_kernel<decltype(vector)><<<static_cast<unsigned>(std::min(blocks, kBlocks)), kThreads, 0, stream>>>(write);
  });
  return cudaGetLastError();
}

cudaError_t launch(const CopyPages& copies, cudaStream_t stream) {
  if (copies.count == 0) return cudaSuccess;
  with_widest(bits(copies.arena) | copies.page_bytes, [&](auto vector) {
    const int64_t across = ceil_div(copies.page_bytes, static_cast<int64_t>(sizeof(vector)) * kThreads * kUnroll);
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(across, 512)),
                    static_cast<unsigned>(std::min<int64_t>(copies.count, 65535)));  // the maximum grid size in y
    copy_pages_kernel<decltype(vector)><<<grid, kThreads, 0, stream>>>(copies);
  });
  return cudaGetLastError();
}

}  // namespace alignpro
