// Tests of core/parallel.h, for sanitizers: every part and every item once, by threads that do run at the same time.
#include "core/parallel.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "tests/check.h"

namespace {

using namespace hflfnerv;

void test_parts() {
  for (const std::int64_t count : {0, 1, 2, 7, 100}) {
    for (const int threads : {1, 2, 3, 8}) {
      std::vector<int> taken(static_cast<std::size_t>(count), 0);
      parallel_parts(count, threads, [&](int thread, std::int64_t begin, std::int64_t end) {
        CHECK(thread >= 0 && thread < threads && begin < end);
        for (std::int64_t i = begin; i < end; ++i) ++taken[static_cast<std::size_t>(i)];
      });
      for (const int times : taken) CHECK(times == 1);
    }
  }
}

// Whoever has the first item stays with it until all others are done: the rest of its part must go to other threads. What
// an item writes is no atomic, and neither is what a thread has for itself.
void test_items() {
  for (const std::int64_t count : {4, 9, 1000}) {
    constexpr int kThreads = 4;
    std::vector<int> taken(static_cast<std::size_t>(count), 0), own(kThreads, 0);
    std::atomic<std::int64_t> done{0};
    parallel_items(count, kThreads, [&](int thread, std::int64_t item) {
      ++taken[static_cast<std::size_t>(item)];
      ++own[static_cast<std::size_t>(thread)];
      if (item == 0) {
        for (int wait = 0; wait < 10000 && done < count - 1; ++wait) {
          std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        CHECK(done == count - 1);
      }
      ++done;
    });
    for (const int times : taken) CHECK(times == 1);
    int all = 0;
    for (const int items : own) all += items;
    CHECK(all == count);
  }
}

}  // namespace

int main() {
  test_parts();
  test_items();
  std::printf("parallel: ok\n");
  return 0;
}
