// The arrays of running sequences in a decode step: their order, the step's inputs, drawn tokens, pages.
// alignpro/engine/sequence_arrays.py documents the arrays and has the same operations in NumPy; no result differs in a bit.

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

#include "gumbel.h"

namespace alignpro {
namespace {

using at::Tensor;

// The columns of a sequence's row, int64 each.
enum Column : int64_t {
  kSegment, kSeedState, kCount, kLastToken, kRoom, kSlotsFrom, kMayEndAt, kDepth, kModel, kForwardModel, kSampling, kColumns
};

constexpr int64_t kNoSegment = 0;

struct Columns {
  int64_t* data;
  int64_t rows;
  explicit Columns(const Tensor& columns) : data(columns.mutable_data_ptr<int64_t>()), rows(columns.size(0)) {
    TORCH_CHECK_VALUE(columns.size(1) == kColumns && columns.is_contiguous(), "columns: expected (R, ", int64_t{kColumns}, ")");
  }
  int64_t& at(int64_t row, Column column) const { return data[row * kColumns + column]; }
};

// The elements of a contiguous tensor.
template <class T>
T* elements(const Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.is_contiguous(), "sequence arrays must be contiguous");
  return tensor.mutable_data_ptr<T>();
}

const int64_t* rows_within(const Tensor& rows, const Columns& columns) {
  const int64_t* row = elements<int64_t>(rows);
  for (int64_t i = 0; i < rows.numel(); ++i) {
    TORCH_CHECK_VALUE(row[i] >= 0 && row[i] < columns.rows, "rows: number ", i, " is ", row[i], " of ", columns.rows);
  }
  return row;
}

// Sort by key, `width` numbers each, compared from the first on. Most are in order: new ones come last.
std::vector<int64_t> sorted_places(const std::vector<int64_t>& keys, int64_t count, int64_t width) {
  const auto less = [&](int64_t a, int64_t b) {
    const int64_t *one = keys.data() + a * width, *other = keys.data() + b * width;
    return std::lexicographical_compare(one, one + width, other, other + width);
  };
  std::vector<int64_t> places(count);
  std::iota(places.begin(), places.end(), 0);
  const auto tail = std::is_sorted_until(places.begin(), places.end(), less);
  std::sort(tail, places.end(), less);
  std::inplace_merge(places.begin(), tail, places.end(), less);
  return places;
}

// Whether all have the same number in a column.
bool same_in_column(const Columns& table, const int64_t* row, int64_t count, Column column) {
  return std::all_of(row, row + count, [&](int64_t each) { return table.at(each, column) == table.at(row[0], column); });
}

using Ints = std::vector<int64_t>;

// -> rows (N) in order, paths (D, N): the segment at each depth; of each depth, the number of segments and the most pages of
// one; whether all are drawn alike.
std::tuple<Tensor, Tensor, Ints, Ints, bool> order_rows(const Tensor& columns, const Tensor& paths, const Tensor& serials,
                                              const Tensor& max_pages, const Tensor& rows) {
  const Columns table(columns);
  const int64_t *row = rows_within(rows, table), *path = elements<int64_t>(paths), *serial = elements<int64_t>(serials);
  const int64_t count = rows.numel(), stride = paths.size(1);
  int64_t depths = 0;
  for (int64_t i = 0; i < count; ++i) depths = std::max(depths, table.at(row[i], kDepth));
  std::vector<int64_t> keys(count * depths);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < depths; ++d) keys[i * depths + d] = serial[path[d * stride + row[i]]];
  }
  const std::vector<int64_t> places = sorted_places(keys, count, depths);
  const auto int64 = rows.options();
  Tensor ordered = at::empty({count}, int64), segments = at::empty({depths, count}, int64);
  Ints numbers, most_pages;
  int64_t* out = elements<int64_t>(ordered);
  for (int64_t i = 0; i < count; ++i) out[i] = row[places[i]];
  const int64_t* pages = elements<int64_t>(max_pages);
  for (int64_t d = 0; d < depths; ++d) {
    int64_t* segment = elements<int64_t>(segments) + d * count;
    int64_t number = 0, most = 0;
    for (int64_t i = 0; i < count; ++i) {
      segment[i] = path[d * stride + out[i]];
      if (i == 0 || (segment[i] != kNoSegment && segment[i] != segment[i - 1])) {
        ++number;
        most = std::max(most, pages[segment[i]]);
      }
    }
    numbers.push_back(number);
    most_pages.push_back(most);
  }
  return {ordered, segments, numbers, most_pages, same_in_column(table, out, count, kSampling)};
}

// Takes the parts of a buffer of int32, each of which begins at a multiple of 16 bytes.
class Parts {
 public:
  explicit Parts(const Tensor& memory) : at_(elements<int32_t>(memory)), end_(at_ + memory.numel()) {}
  template <class T>
  T* take(int64_t count) {
    int32_t* begin = at_;
    at_ += (count * static_cast<int64_t>(sizeof(T) / sizeof(int32_t)) + 3) / 4 * 4;
    TORCH_CHECK_VALUE(at_ <= end_, "memory: too small for a plan of this shape");
    return reinterpret_cast<T*>(begin);
  }

 private:
  int32_t *at_, *end_;
};

// As `sampler.position_seeds`.
int64_t next_seed(const Columns& table, int64_t row) {
  return static_cast<int64_t>(mix64(static_cast<uint64_t>(table.at(row, kSeedState) ^ table.at(row, kCount))) >> 1);
}

// -> the seeds of the next tokens (N).
Tensor next_seeds(const Tensor& columns, const Tensor& rows) {
  const Columns table(columns);
  const int64_t* row = rows_within(rows, table);
  Tensor seeds = at::empty_like(rows);
  std::transform(row, row + rows.numel(), elements<int64_t>(seeds), [&](int64_t each) { return next_seed(table, each); });
  return seeds;
}

// Writes the inputs of a step into `memory`, laid out as PlanBuffers says; `levels` are (segments, pages) of each level.
void fill_plan(const Tensor& columns, const Tensor& starts, const Tensor& lengths, const Tensor& pages, const Tensor& rows,
               const Tensor& paths, const Tensor& active, const Tensor& memory, int64_t padded, int64_t num_active,
               at::IntArrayRef levels) {
  const Columns table(columns);
  const int64_t *row = rows_within(rows, table), *start = elements<int64_t>(starts), *path = elements<int64_t>(paths);
  int64_t* length = elements<int64_t>(lengths);
  const int32_t* page = elements<int32_t>(pages);
  const int64_t count = rows.numel(), width = pages.size(1), depths = paths.size(0);
  TORCH_CHECK_VALUE(count <= padded && active.numel() <= num_active && static_cast<int64_t>(levels.size()) == 2 * depths,
                    "the batch does not fit in its plan");
  Parts parts(memory);
  int64_t* ids = parts.take<int64_t>(padded);
  int64_t* positions = parts.take<int64_t>(padded);
  int64_t* slots = parts.take<int64_t>(padded);
  int64_t* seeds = parts.take<int64_t>(padded);
  int64_t* actives = parts.take<int64_t>(num_active);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t drawn = table.at(row[i], kCount), output = table.at(row[i], kSegment);
    length[output] = drawn;
    ids[i] = table.at(row[i], kLastToken);
    positions[i] = start[output] + drawn - 1;
    slots[i] = table.at(row[i], kSlotsFrom) + drawn - 1;
    seeds[i] = next_seed(table, row[i]);
  }
  std::fill(ids + count, ids + padded, 0);
  std::fill(positions + count, positions + padded, 0);
  std::fill(slots + count, slots + padded, -1);
  std::fill(seeds + count, seeds + padded, 0);
  std::copy_n(elements<int64_t>(active), active.numel(), actives);
  std::fill(actives + active.numel(), actives + num_active, padded - 1);
  for (int64_t d = 0; d < depths; ++d, path += count) {
    const int64_t most = levels[2 * d], columns_of_table = levels[2 * d + 1], copied = std::min(columns_of_table, width);
    int32_t* seen_from = parts.take<int32_t>(padded);
    int32_t* bounds = parts.take<int32_t>(most + 1);
    int32_t* page_table = parts.take<int32_t>(most * columns_of_table);
    int32_t* key_lengths = parts.take<int32_t>(most);
    int32_t* key_starts = parts.take<int32_t>(most);
    int64_t segments = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t segment = path[i];
      seen_from[i] = segment == kNoSegment ? -1 : static_cast<int32_t>(positions[i]);
      if (i > 0 && (segment == kNoSegment || segment == path[i - 1])) continue;
      TORCH_CHECK_VALUE(segments < most, "the batch does not fit in its plan");
      bounds[segments] = static_cast<int32_t>(i);
      key_lengths[segments] = static_cast<int32_t>(length[segment]);
      key_starts[segments] = static_cast<int32_t>(start[segment]);
      std::memcpy(page_table + segments * columns_of_table, page + segment * width, copied * sizeof(int32_t));
      ++segments;
    }
    std::fill(seen_from + count, seen_from + padded, -1);
    std::fill(bounds + segments, bounds + most + 1, static_cast<int32_t>(padded));
  }
}

// -> the rows of those that may end, those whose kept tokens must be read before the next one, and the sum of the
// log-probabilities; if that is not finite, nothing has been added.
std::tuple<Ints, Ints, double> add_tokens(const Tensor& columns, const Tensor& kept_tokens, const Tensor& kept_logprobs,
                                          const Tensor& stop_tokens, const Tensor& rows, const Tensor& tokens,
                                          const Tensor& logprobs) {
  const Columns table(columns);
  const int64_t *row = rows_within(rows, table), *token = elements<int64_t>(tokens), *stop = elements<int64_t>(stop_tokens);
  const int64_t count = rows.numel(), kept = kept_tokens.size(1);
  TORCH_CHECK_VALUE(tokens.numel() == count && logprobs.numel() == count, "tokens: expected one per row");
  const bool single = logprobs.scalar_type() == at::kFloat;
  const float* as_float = single ? elements<float>(logprobs) : nullptr;
  const double* as_double = single ? nullptr : elements<double>(logprobs);
  const double sum = single ? std::accumulate(as_float, as_float + count, 0.0) : std::accumulate(as_double, as_double + count, 0.0);
  Ints may_end, full;
  if (!std::isfinite(sum)) return {may_end, full, sum};
  int64_t* token_ring = elements<int64_t>(kept_tokens);
  double* logprob_ring = elements<double>(kept_logprobs);
  const int64_t* stop_end = stop + stop_tokens.numel();
  for (int64_t i = 0; i < count; ++i) {
    int64_t& drawn = table.at(row[i], kCount);
    const int64_t place = row[i] * kept + drawn % kept;
    token_ring[place] = token[i];
    logprob_ring[place] = single ? as_float[i] : as_double[i];
    table.at(row[i], kLastToken) = token[i];
    ++drawn;
    if (drawn >= table.at(row[i], kMayEndAt) || std::find(stop, stop_end, token[i]) != stop_end) may_end.push_back(row[i]);
    if (drawn % kept == 0) full.push_back(row[i]);
  }
  return {may_end, full, sum};
}

// -> the rows of a model's sequences whose pages do not hold all their tokens, by the serial of their segments; whether all
// have the same model.
std::tuple<Tensor, bool> rows_without_room(const Tensor& columns, const Tensor& serials, int64_t forward_model) {
  const Columns table(columns);
  const int64_t* serial = elements<int64_t>(serials);
  Ints rows;
  for (int64_t row = 0; row < table.rows; ++row) {
    if (table.at(row, kCount) > table.at(row, kRoom) && table.at(row, kForwardModel) == forward_model) rows.push_back(row);
  }
  const auto serial_of = [&](int64_t row) { return serial[table.at(row, kSegment)]; };
  std::sort(rows.begin(), rows.end(), [&](int64_t a, int64_t b) { return serial_of(a) < serial_of(b); });
  return {at::tensor(rows, at::kLong), same_in_column(table, rows.data(), static_cast<int64_t>(rows.size()), kModel)};
}

// Gives another page, which holds `size` tokens, to each of N sequences; `pages` has room for it.
void add_pages(const Tensor& columns, const Tensor& pages, const Tensor& rows, at::IntArrayRef added, int64_t size) {
  const Columns table(columns);
  const int64_t* row = rows_within(rows, table);
  int32_t* held = elements<int32_t>(pages);
  TORCH_CHECK_VALUE(static_cast<int64_t>(added.size()) == rows.numel(), "added: expected a page per row");
  for (size_t i = 0; i < added.size(); ++i) {
    int64_t& room = table.at(row[i], kRoom);
    TORCH_CHECK_VALUE(room / size < pages.size(1), "pages: no room for another page");
    held[table.at(row[i], kSegment) * pages.size(1) + room / size] = static_cast<int32_t>(added[i]);
    table.at(row[i], kSlotsFrom) = added[i] * size - room;
    room += size;
  }
}

// -> whether N sequences are drawn alike.
bool drawn_alike(const Tensor& columns, const Tensor& rows) {
  const Columns table(columns);
  return same_in_column(table, rows_within(rows, table), rows.numel(), kSampling);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(alignpro, m) {
  m.def(
      "order_rows(Tensor columns, Tensor paths, Tensor serials, Tensor max_pages, Tensor rows) -> "
      "(Tensor, Tensor, int[], int[], bool)");
  m.def("next_seeds(Tensor columns, Tensor rows) -> Tensor");
  m.def(
      "fill_plan(Tensor columns, Tensor starts, Tensor(a!) lengths, Tensor pages, Tensor rows, Tensor paths, Tensor active, "
      "Tensor(b!) memory, int padded, int num_active, int[] levels) -> ()");
  m.def(
      "add_tokens(Tensor(a!) columns, Tensor(b!) kept_tokens, Tensor(c!) kept_logprobs, Tensor stop_tokens, Tensor rows, "
      "Tensor tokens, Tensor logprobs) -> (int[], int[], float)");
  m.def("rows_without_room(Tensor columns, Tensor serials, int forward_model) -> (Tensor, bool)");
  m.def("add_pages(Tensor(a!) columns, Tensor(b!) pages, Tensor rows, int[] added, int size) -> ()");
  m.def("drawn_alike(Tensor columns, Tensor rows) -> bool");
}

TORCH_LIBRARY_IMPL(alignpro, CPU, m) {
  m.impl("order_rows", &order_rows);
  m.impl("next_seeds", &next_seeds);
  m.impl("fill_plan", &fill_plan);
  m.impl("add_tokens", &add_tokens);
  m.impl("rows_without_room", &rows_without_room);
  m.impl("add_pages", &add_pages);
  m.impl("drawn_alike", &drawn_alike);
}

}  // namespace alignpro
