// Less than a vector of elements. Included behind the Simd of one instruction set.
#pragma once

#include <cstdint>

namespace hflfnerv {
namespace {

// The first n elements, n at least 0, and zeros behind them, or a whole vector where there are as many.
template <class T>
inline Simd::F load_some(const T* p, std::int64_t n) {
  return n >= Simd::kLanes ? Simd::load(p) : Simd::load_lanes(p, static_cast<int>(n));
}

template <class T>
inline void store_some(T* p, Simd::F v, std::int64_t n) {
  if (n >= Simd::kLanes) {
    Simd::store(p, v);
  } else {
    Simd::store_lanes(p, v, 0, static_cast<int>(n));
  }
}

}  // namespace
}  // namespace hflfnerv
