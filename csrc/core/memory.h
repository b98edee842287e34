// Advice about memory that a kernel is going to write.
#pragma once

#include <cstddef>
#include <cstdint>

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

}  // namespace hflfnerv
