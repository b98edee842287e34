// Threads with memory of their own.
#pragma once

#include <algorithm>
#include <cstdint>

#include "memory.h"
#include "parallel.h"

namespace hflfnerv {

// As many threads as there are items for, one at least.
inline int threads_for(std::int64_t items, int threads) {
  return static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, items)));
}

// Floats in whole cache lines, so that what follows begins at one.
inline std::int64_t in_lines(std::int64_t floats) { return (floats + 15) / 16 * 16; }

// parallel_items, with run(scratch, item): each thread has `floats` floats, zeros at first, which begin at a cache line.
template <class Run>
void parallel_items_with_scratch(std::int64_t items, int threads, std::int64_t floats, const Run& run) {
  threads = threads_for(items, threads);
  const std::int64_t own = in_lines(floats);
  const Aligned<float> scratch = new_zeros<float>(own * threads);
  parallel_items(items, threads, [&](int thread, std::int64_t item) { run(scratch.get() + thread * own, item); });
}

}  // namespace hflfnerv
