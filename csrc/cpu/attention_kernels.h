// Attention of query rows to the paged keys of one head of one sequence. Compiled once per instruction set; the version is
// chosen at run time.
//
// Keys are processed in blocks of kKeyBlock, aligned relative to the sequence's first key. Each row maintains
//
//     m = max of its scores so far      l = sum e^(score - m)      o = sum e^(score - m) value
//
// and a block that raises m to m' first scales l and o by e^(m - m'). A key that a row does not see enters none of its
// sums, so a row's result depends only on its own keys: neither other rows nor other contents of the pages change its bits.
#pragma once

#include <cstdint>

namespace alignpro {

constexpr int64_t kKeyBlock = 64;

enum class Element { kFloat, kBFloat16, kHalf };

// A head's keys and values in the pages. Strides are in bytes; the elements of a key or value are contiguous.
struct HeadKeys {
  const char* pages;        // at the head's first key of the first page
  const int32_t* table;     // the sequence's pages
  int64_t page_size;
  int64_t page_stride;
  int64_t slot_stride;
  int64_t value_offset;     // from a key to its value
  int64_t head_dim;
  Element element;
};

// The running state of each row.
struct SoftmaxState {
  float* o;                 // (count, stride)
  float* m;                 // (count)
  float* l;                 // (count)
};

struct AttentionQueries {
  int64_t count;
  int64_t stride;           // head_dim rounded up to kLanes, zero-padded
  const float* query;       // (count, stride)
  const int64_t* first;     // (count): row r sees the keys first[r] <= j < last[r]
  const int64_t* last;
  float scale;
  float softcap;            // 0 for none
};

struct AttentionKernels {
  // Number of floats of scratch memory that `attend` needs, aligned to 64 bytes.
  int64_t (*scratch)(int64_t count, int64_t stride);
  // Adds keys [begin, end) to the sums; begin is a multiple of kKeyBlock.
  void (*attend)(const HeadKeys&, const AttentionQueries&, const SoftmaxState&, int64_t begin, int64_t end, float* scratch);
  // Merges sums over other keys. A row that saw none of those keys is unchanged.
  void (*merge)(const SoftmaxState& into, const SoftmaxState& from, int64_t count, int64_t stride);
  // Converts `count` elements to floats and pads them with zeros up to `stride`.
  void (*upcast_row)(const void* from, Element, float* to, int64_t count, int64_t stride);
};

constexpr int64_t kLanes = 16;  // a multiple of the lanes of every instruction set

}  // namespace alignpro
