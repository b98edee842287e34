// Threads, for code compiled without special flags. With OpenMP the threads are those that PyTorch uses, because both
// share libgomp; without it everything runs in the calling thread. HFLFNERV_STD_THREADS is for ThreadSanitizer, which does
// not see how OpenMP's threads wait for each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#if defined(HFLFNERV_STD_THREADS)
#include <thread>
#endif

namespace hflfnerv {

// Runs run(thread, begin, end) on contiguous parts of [0, count), at most `threads` of them. It must not throw.
template <class Run>
void parallel_parts(std::int64_t count, int threads, const Run& run) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) {
    if (count > 0) run(0, std::int64_t{0}, count);
    return;
  }
  const auto part = [&](int thread) { run(thread, count * thread / threads, count * (thread + 1) / threads); };
#if defined(HFLFNERV_STD_THREADS)
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(part, thread);
  part(0);
  for (std::thread& other : others) other.join();
#else
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static, 1)
#endif
  for (int thread = 0; thread < threads; ++thread) part(thread);
#endif
}

// Runs run(thread, item) on the items of [0, count). Each thread has a contiguous part and takes it from the front; one
// that has finished takes over the back half of the largest part left. So threads that the system slows down get less to
// do, and items still come in order nearly everywhere. It must not throw.
template <class Run>
void parallel_items(std::int64_t count, int threads, const Run& run) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) {
    for (std::int64_t item = 0; item < count; ++item) run(0, item);
    return;
  }
  struct Part {
    std::int64_t begin, end;
  };
  std::mutex mutex;
  std::vector<Part> parts;
  for (int thread = 0; thread < threads; ++thread) {
    parts.push_back({count * thread / threads, count * (thread + 1) / threads});
  }
  const auto take = [&](int thread) -> std::int64_t {
    const std::lock_guard<std::mutex> lock(mutex);
    Part& own = parts[static_cast<std::size_t>(thread)];
    if (own.begin == own.end) {
      Part* largest = &own;
      for (Part& part : parts) {
        if (part.end - part.begin > largest->end - largest->begin) largest = &part;
      }
      if (largest == &own) return -1;
      own = {largest->begin + (largest->end - largest->begin) / 2, largest->end};
      largest->end = own.begin;
    }
    return own.begin++;
  };
  parallel_parts(threads, threads, [&](int thread, std::int64_t, std::int64_t) {
    for (std::int64_t item = take(thread); item >= 0; item = take(thread)) run(thread, item);
  });
}

}  // namespace hflfnerv
