// Products of small matrices in registers, row-major. Included behind the Simd of one instruction set.
#pragma once

#include <cstdint>

#include "registers.h"

namespace hflfnerv {
namespace {

using F = Simd::F;
constexpr int kLanes = Simd::kLanes;
constexpr int kRows = kLanes == 16 ? 12 : 6;  // of a product in registers: 24 or 12 sums

// What is multiplied: elements of a, and of b and c.
struct Floats {
  using A = float;
  using C = float;
  using Vector = F;
  static Vector zero() { return Simd::zero(); }
  static Vector set(const A* p) { return Simd::set(*p); }
  static Vector load(const C* p) { return Simd::load(p); }
  static void store(C* p, Vector v) { Simd::store(p, v); }
  static Vector add_product(Vector sum, Vector a, Vector b) { return Simd::fma(a, b, sum); }
};

// c = a b, or c += a b: kCount rows, kVectors vectors of columns. The strides of a are those of its rows and of the inner
// dimension.
template <int kCount, int kVectors, bool kAccumulate, class Of = Floats>
inline __attribute__((always_inline)) void multiply(const typename Of::A* a, std::int64_t a_row, std::int64_t a_inner,
                                                    const typename Of::C* b, std::int64_t b_inner, std::int64_t inner,
                                                    typename Of::C* c, std::int64_t c_row) {
  using Vector = typename Of::Vector;
  Vector sums[kCount][kVectors];
  for (int i = 0; i < kCount; ++i) {
    for (int v = 0; v < kVectors; ++v) sums[i][v] = kAccumulate ? Of::load(c + i * c_row + v * kLanes) : Of::zero();
  }
  constexpr int kGroup = 3;  // rows that share an address: there are fewer registers for these than rows
  const typename Of::A* rows[(kCount + kGroup - 1) / kGroup];
  for (int i = 0; i < kCount; i += kGroup) rows[i / kGroup] = a + i * a_row;
  for (std::int64_t k = 0; k < inner; ++k, b += b_inner) {
    Vector columns[kVectors];
    for (int v = 0; v < kVectors; ++v) columns[v] = Of::load(b + v * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kCount; ++i) {
      const Vector row = Of::set(rows[i / kGroup] + i % kGroup * a_row);
      for (int v = 0; v < kVectors; ++v) sums[i][v] = Of::add_product(sums[i][v], row, columns[v]);
    }
#pragma GCC unroll 12
    for (const typename Of::A*& group : rows) {
      group += a_inner;
      hide(group);
    }
  }
  for (int i = 0; i < kCount; ++i) {
    for (int v = 0; v < kVectors; ++v) Of::store(c + i * c_row + v * kLanes, sums[i][v]);
  }
}

// The same for 1 to kCount rows.
template <int kCount, int kVectors>
inline void accumulate(int rows, const float* a, std::int64_t a_row, std::int64_t a_inner, const float* b,
                       std::int64_t b_inner, std::int64_t inner, float* c, std::int64_t c_row) {
  if constexpr (kCount > 0) {
    if (rows == kCount) return multiply<kCount, kVectors, true>(a, a_row, a_inner, b, b_inner, inner, c, c_row);
    accumulate<kCount - 1, kVectors>(rows, a, a_row, a_inner, b, b_inner, inner, c, c_row);
  }
}

}  // namespace
}  // namespace hflfnerv
