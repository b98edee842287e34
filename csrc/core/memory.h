// Memory: aligned, and advice about what a kernel is going to write.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hflfnerv {

constexpr std::size_t kCacheLine = 64, kLargePage = std::size_t{1} << 21;

// Asks for large pages, where [p, p + size) holds some: memory that was just allocated costs a fault for each page that
// is touched first, which takes longer than writing the page, and kernels that write to hundreds of places at once have more
// small pages in use than a processor keeps addresses of.
inline void advise_large_pages(void* p, std::size_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(p);
  const std::uintptr_t begin = (address + kLargePage - 1) / kLargePage * kLargePage;
  const std::uintptr_t end = (address + size) / kLargePage * kLargePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(p);
  static_cast<void>(size);
#endif
}

struct FreeAligned {
  void operator()(void* p) const { std::free(p); }
};

// Elements that begin at a cache line.
template <class T>
using Aligned = std::unique_ptr<T[], FreeAligned>;

// What is not much smaller than a large page is made of such, as far as the system has them.
template <class T>
Aligned<T> new_aligned(std::int64_t count) {
  const std::size_t wanted = static_cast<std::size_t>(count) * sizeof(T), unit = wanted > kLargePage / 4 ? kLargePage : kCacheLine;
  const std::size_t size = (wanted + unit - 1) / unit * unit;
  void* const p = std::aligned_alloc(unit, size > 0 ? size : unit);
  if (p == nullptr) throw std::bad_alloc();
  advise_large_pages(p, size);
  return Aligned<T>(static_cast<T*>(p));
}

template <class T>
Aligned<T> new_zeros(std::int64_t count) {
  Aligned<T> p = new_aligned<T>(count);
  std::memset(static_cast<void*>(p.get()), 0, static_cast<std::size_t>(count) * sizeof(T));
  return p;
}

}  // namespace hflfnerv
