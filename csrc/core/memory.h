// Memory: aligned, and advice about what a kernel is going to write.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hflfnerv {

// Asks for large pages, where [p, p + size) holds some: memory that was just allocated costs a fault for each page that
// is touched first, which takes longer than writing the page.
inline void advise_large_pages(void* p, std::size_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = std::uintptr_t{1} << 21;
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(p);
  const std::uintptr_t begin = (address + kPage - 1) & ~(kPage - 1), end = (address + size) & ~(kPage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(p);
  static_cast<void>(size);
#endif
}

struct FreeAligned {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};

// Elements that begin at a cache line.
template <class T>
using Aligned = std::unique_ptr<T[], FreeAligned>;

template <class T>
Aligned<T> new_aligned(std::int64_t count) {
  const std::size_t size = static_cast<std::size_t>(count) * sizeof(T);
  T* const p = static_cast<T*>(::operator new(size, std::align_val_t(64)));
  advise_large_pages(p, size);
  return Aligned<T>(p);
}

template <class T>
Aligned<T> new_zeros(std::int64_t count) {
  Aligned<T> p = new_aligned<T>(count);
  std::memset(static_cast<void*>(p.get()), 0, static_cast<std::size_t>(count) * sizeof(T));
  return p;
}

}  // namespace hflfnerv
