// Less than a vector of elements. Included behind the Simd of one instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace hflfnerv {
namespace {

// The first n elements, n at least 0, and zeros behind them, or a whole vector where there are as many.
template <class T>
Simd::F load_some(const T* p, std::int64_t n) {
  if (n >= Simd::kLanes) return Simd::load(p);
  T some[Simd::kLanes] = {};
  std::memcpy(some, p, static_cast<std::size_t>(n) * sizeof(T));
  return Simd::load(some);
}

template <class T>
void store_some(T* p, Simd::F v, std::int64_t n) {
  if (n >= Simd::kLanes) return Simd::store(p, v);
  T some[Simd::kLanes];
  Simd::store(some, v);
  std::memcpy(p, some, static_cast<std::size_t>(n) * sizeof(T));
}

}  // namespace
}  // namespace hflfnerv
