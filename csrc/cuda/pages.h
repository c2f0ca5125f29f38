// Copies into the pages of a key-value pool: implemented in pages.cu, bound in pages_binding.cpp. Independent of torch, so
// that the kernels compile with nvcc alone.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace alignpro {

// Writes tokens' keys and values to their slots; slots outside the pool, including -1, are skipped. Sizes and strides are in
// bytes: the kernels copy bits, whatever the dtype.
struct WriteKv {
  const char* keys;
  const char* values;
  char* pages;           // (n_pages, 2, page_size, row_bytes), the three inner dimensions contiguous
  const int64_t* slots;  // (tokens): page * page_size + offset
  int64_t tokens;
  int64_t row_bytes;     // size of one token's keys, and of its values
  int64_t keys_stride, values_stride;
  int64_t page_stride;
  int64_t n_pages, page_size;
};

// Copies whole pages of an arena over others; a pair with a number outside the arena is skipped.
struct CopyPages {
  char* arena;                 // (n_pages, page_bytes)
  const int64_t* source;       // (count)
  const int64_t* destination;  // (count), disjoint from the sources
  int64_t count;
  int64_t n_pages, page_bytes;
};

// Both are asynchronous: they report errors of the launch, not of the execution.
cudaError_t launch(const WriteKv& write, cudaStream_t stream);
cudaError_t launch(const CopyPages& copy, cudaStream_t stream);

}  // namespace alignpro
