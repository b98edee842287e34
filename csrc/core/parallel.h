// Threads, for code compiled without special flags. With OpenMP the threads are those that PyTorch uses, because both
// share libgomp; without it everything runs in the calling thread.
#pragma once

#include <cstdint>

namespace hflfnerv {

// Runs run(thread, begin, end) on contiguous parts of [0, count), at most `threads` of them. It must not throw.
template <class Run>
void parallel_parts(std::int64_t count, int threads, const Run& run) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) {
    if (count > 0) run(0, std::int64_t{0}, count);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static, 1)
#endif
  for (int thread = 0; thread < threads; ++thread) {
    run(thread, count * thread / threads, count * (thread + 1) / threads);
  }
}

}  // namespace hflfnerv
