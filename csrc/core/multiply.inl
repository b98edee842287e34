// Products of small matrices in registers, row-major. Included behind the Simd of one instruction set.
#pragma once

#include <cstdint>

#include "registers.h"

namespace hflfnerv {
namespace {

using F = Simd::F;
constexpr int kLanes = Simd::kLanes;
constexpr int kRows = kLanes == 16 ? 12 : 6;  // of a product in registers: 24 or 12 sums

// c = a b, or c += a b: kCount rows, kVectors vectors of columns. The strides of a are those of its rows and of the inner
// dimension.
template <int kCount, int kVectors, bool kAccumulate>
inline __attribute__((always_inline)) void multiply(const float* a, std::int64_t a_row, std::int64_t a_inner, const float* b, std::int64_t b_inner,
                     std::int64_t inner, float* c, std::int64_t c_row) {
  F sums[kCount][kVectors];
  for (int i = 0; i < kCount; ++i) {
    for (int v = 0; v < kVectors; ++v) sums[i][v] = kAccumulate ? Simd::load(c + i * c_row + v * kLanes) : Simd::zero();
  }
  constexpr int kGroup = 3;  // rows that share an address: there are fewer registers for these than rows
  const float* rows[(kCount + kGroup - 1) / kGroup];
  for (int i = 0; i < kCount; i += kGroup) rows[i / kGroup] = a + i * a_row;
  for (std::int64_t k = 0; k < inner; ++k, b += b_inner) {
    F columns[kVectors];
    for (int v = 0; v < kVectors; ++v) columns[v] = Simd::load(b + v * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kCount; ++i) {
      const float*& group = rows[i / kGroup];
      const F row = Simd::set(group[i % kGroup * a_row]);
      for (int v = 0; v < kVectors; ++v) sums[i][v] = Simd::fma(row, columns[v], sums[i][v]);
    }
#pragma GCC unroll 12
    for (const float*& group : rows) {
      group += a_inner;
      hide(group);
    }
  }
  for (int i = 0; i < kCount; ++i) {
    for (int v = 0; v < kVectors; ++v) Simd::store(c + i * c_row + v * kLanes, sums[i][v]);
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
