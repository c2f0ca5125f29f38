// Attention of some rows of queries to the keys of one head of one sequence, in pages. Compiled once for each instruction
// set and chosen at run time.
//
// Keys come in blocks of kKeyBlock, which begin at multiples of it counted from the sequence's first key. A row keeps
//
//     m = max of its scores so far      l = sum e^(score - m)      o = sum e^(score - m) value
//
// and a block that raises m to m' scales l and o by e^(m - m') first. A key that a row does not see enters none of its
// sums, so that a row's result is a function of its own keys alone: neither the other rows nor what lies elsewhere in the
// pages change a bit of it.
#pragma once

#include <cstdint>

namespace alignpro {

constexpr int64_t kKeyBlock = 64;

enum class Element { kFloat, kBFloat16, kHalf };

// A head's keys and values in the pages; strides are in bytes, and an entry's elements are contiguous.
struct PagedKeys {
  const char* pages;        // at the head's first key of the first page
  const int32_t* table;     // the sequence's pages
  int64_t page_size;
  int64_t page_stride;
  int64_t slot_stride;
  int64_t value_offset;     // from a key to its value
  int64_t head_dim;
  Element element;
};

// What a row keeps.
struct Sums {
  float* o;                 // (count, stride)
  float* m;                 // (count)
  float* l;                 // (count)
};

struct AttentionRows {
  int64_t count;
  int64_t stride;           // head_dim, rounded up to kLanes: what is beyond it is zero
  const float* query;       // (count, stride)
  const int64_t* first;     // (count): row r sees the keys first[r] <= j < last[r]
  const int64_t* last;
  float scale;
  float softcap;            // 0 for none
};

struct AttentionKernels {
  // Floats of scratch that `attend` needs, aligned to 64 bytes.
  int64_t (*scratch)(int64_t count, int64_t stride);
  // Takes keys [begin, end) into the sums; begin is a multiple of kKeyBlock.
  void (*attend)(const PagedKeys&, const AttentionRows&, const Sums&, int64_t begin, int64_t end, float* scratch);
  // Adds sums over other keys. A row that saw none of those stays as it is.
  void (*merge)(const Sums& into, const Sums& from, int64_t count, int64_t stride);
  // `count` elements as floats, followed by zeros up to `stride`.
  void (*widen)(const void* from, Element, float* to, int64_t count, int64_t stride);
};

constexpr int64_t kLanes = 16;  // a multiple of every instruction set's

extern const AttentionKernels attention_kernels_generic;
#if defined(__x86_64__)
extern const AttentionKernels attention_kernels_avx2;
extern const AttentionKernels attention_kernels_avx512;
#endif

}  // namespace alignpro
