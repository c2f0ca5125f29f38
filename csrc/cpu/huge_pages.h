// Large pages for memory that is about to be written for the first time: one page fault per 2 MiB instead of per 4 KiB.
// The first write to a head's gradient of 519 MiB takes 0.04 s with them and 0.14 s without.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace alignpro {

// A hint, which systems without large pages ignore. It is useful for fresh memory of many pages.
inline void advise_huge_pages([[maybe_unused]] void* start, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(start) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(start) + static_cast<uintptr_t>(bytes)) / page * page;
  if (last >= first + 4 * page) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace alignpro
