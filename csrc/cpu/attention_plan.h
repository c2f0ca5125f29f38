// How attention to one level of keys is split into work items.
//
// An item consists of some queries of one sequence and some key-value heads, with all keys or one part of them. A part has
// kPart keys, aligned relative to the sequence's first key. Each part starts from empty sums and the parts are merged in
// order, so results have the same bits whether one thread processes all parts of an item or several threads share them.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "attention_kernels.h"

namespace alignpro {

constexpr int64_t kPart = 512;           // keys, a multiple of kKeyBlock
constexpr int64_t kRows = 32;            // approximate rows per item: their queries and sums stay in L1
constexpr int64_t kRunsPerThread = 8;    // items are scheduled in runs; several per thread balance the load

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

struct AttentionShape {
  int64_t tokens, heads, kv_heads, head_dim;
  int64_t group() const { return heads / kv_heads; }
  int64_t stride() const { return round_up(head_dim, kLanes); }
  int64_t queries_per_item() const { return std::max<int64_t>(1, kRows / group()); }
  int64_t rows_per_item() const { return queries_per_item() * group(); }
};

// Which queries see which keys.
struct Level {
  at::Tensor page_table;                   // (S, max_pages)
  at::Tensor rows_of_queries, bounds, lengths;  // what the pointers below point to
  int64_t count;                           // R, the number of queries that take part
  const int64_t* rows;                     // (R): their tokens; null for all T
  const int32_t* cu_queries;               // (S + 1)
  const int32_t* key_lengths;              // (S)
  std::vector<int64_t> first, last;        // (R): a query sees the keys [first, last) of its sequence
  int64_t sequences() const { return lengths.size(0); }
  int64_t row(int64_t query) const { return rows == nullptr ? query : rows[query]; }
};

struct WorkItem {
  int32_t sequence;
  int32_t head_begin, head_end;    // key-value heads
  int32_t query_begin, query_end;
  int32_t key_begin, key_end;      // the union over its queries
  int64_t part = -1;               // index of its sums, which are merged later; -1 if it is not split
  int64_t heads() const { return head_end - head_begin; }
  int64_t queries() const { return query_end - query_begin; }
  int64_t work() const { return heads() * queries() * (1 + key_end - key_begin); }
  int64_t first_part() const { return key_begin / kPart * kPart; }
  int64_t parts() const { return (key_end - first_part() + kPart - 1) / kPart; }
};

// An item that is split into parts, which are numbered from `part`.
struct Split {
  WorkItem item;
  int64_t part;
};

struct LevelPlan {
  std::vector<WorkItem> items;
  std::vector<size_t> runs;  // starts of runs of items with nearly equal work, followed by the end of the last run
  std::vector<Split> splits;
  int64_t parts = 0;
  int64_t multiplications = 0;
};

inline void find_visible(Level& level, const int32_t* positions, const int32_t* key_starts, int64_t window) {
  level.first.resize(static_cast<size_t>(level.count));
  level.last.resize(level.first.size());
  for (int64_t s = 0; s < level.sequences(); ++s) {
    const int64_t start = key_starts[s], length = level.key_lengths[s];
    for (int64_t t = level.cu_queries[s]; t < level.cu_queries[s + 1]; ++t) {
      const int64_t after = positions[t] - start + 1;  // the first key after the query
      level.last[t] = std::clamp<int64_t>(after, 0, length);
      level.first[t] = window == 0 ? 0 : std::clamp<int64_t>(after - window, 0, level.last[t]);
    }
  }
}

inline WorkItem block_of(const Level& level, const AttentionShape& shape, int64_t sequence, int64_t begin, int64_t end) {
  int64_t first = level.key_lengths[sequence], last = 0;
  for (int64_t t = begin; t < end; ++t) {
    if (level.first[t] == level.last[t]) continue;
    first = std::min(first, level.first[t]);
    last = std::max(last, level.last[t]);
  }
  const auto int32 = [](int64_t x) { return static_cast<int32_t>(x); };
  return {int32(sequence), 0, int32(shape.kv_heads), int32(begin), int32(end), int32(std::min(first, last)), int32(last)};
}

inline std::vector<size_t> runs_of(const std::vector<WorkItem>& items, int64_t count) {
  int64_t total = 0, done = 0;
  for (const WorkItem& item : items) total += item.work();
  std::vector<size_t> starts;
  for (size_t i = 0; i < items.size(); ++i) {
    if (done * count >= total * static_cast<int64_t>(starts.size())) starts.push_back(i);
    done += items[i].work();
  }
  starts.push_back(items.size());
  return starts;
}

// With few queries, heads are processed together, since they are adjacent in memory. An item that is too long for one of `threads`
// threads is split by head, and if necessary also into parts; few items are, so the sums of parts need little memory.
inline LevelPlan plan_of(const Level& level, const AttentionShape& shape, int64_t threads) {
  std::vector<WorkItem> blocks;
  int64_t total = 0;
  for (int64_t s = 0; s < level.sequences(); ++s) {
    for (int64_t begin = level.cu_queries[s]; begin < level.cu_queries[s + 1]; begin += shape.queries_per_item()) {
      const int64_t end = std::min<int64_t>(begin + shape.queries_per_item(), level.cu_queries[s + 1]);
      blocks.push_back(block_of(level, shape, s, begin, end));
      total += blocks.back().work();
    }
  }
  LevelPlan plan;
  plan.multiplications = total * shape.group() * shape.stride();
  const auto too_long = [&](const WorkItem& item) { return threads > 1 && item.work() * threads * 4 > total; };
  for (WorkItem item : blocks) {
    int64_t heads = std::clamp<int64_t>(kRows / (item.queries() * shape.group()), 1, shape.kv_heads);
    item.head_end = static_cast<int32_t>(heads);
    if (too_long(item)) heads = 1;
    for (int64_t head = 0; head < shape.kv_heads; head += heads) {
      item.head_begin = static_cast<int32_t>(head);
      item.head_end = static_cast<int32_t>(std::min(head + heads, shape.kv_heads));
      if (!too_long(item) || item.parts() == 1) {
        plan.items.push_back(item);
        continue;
      }
      plan.splits.push_back({item, plan.parts});
      for (int64_t begin = item.first_part(); begin < item.key_end; begin += kPart) {
        WorkItem part = item;
        part.key_begin = static_cast<int32_t>(std::max<int64_t>(begin, item.key_begin));
        part.key_end = static_cast<int32_t>(std::min<int64_t>(begin + kPart, item.key_end));
        part.part = plan.parts++;
        plan.items.push_back(part);
      }
    }
  }
  plan.runs = runs_of(plan.items, threads == 1 ? 1 : threads * kRunsPerThread);
  return plan;
}

}  // namespace alignpro
