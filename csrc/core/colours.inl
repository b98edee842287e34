// Three colours of pixels under a 3x3 kernel, as heads and the output stage compute them: the lanes of vectors are inner elements
// of a row of the kernel, which lie one after the other in memory. Included behind the Simd of one instruction set.
#pragma once

#include <cstdint>

#include "output_stage_kernels.h"
#include "registers.h"

namespace hflfnerv {
namespace {

constexpr int kBlockPixels = Simd::kLanes;       // whose sums are added up together: their colours fill three vectors
constexpr int kSharedPixels = Simd::kLanes / 2;  // that share a load of weights: as many as registers hold sums of

// Adds, lane by lane, what a row of the kernel gives to n pixels; the pixel left of the first is at `from`. Returns the next
// row's weights, which are in the order of output_vectors().
template <int n, class T>
inline __attribute__((always_inline)) const float* add_kernel_row(const T* from, std::int64_t pixel, std::int64_t steps,
                                                                  const float* weights, Simd::F (&sums)[n][kColours]) {
  for (std::int64_t k = 0; k < steps; ++k, from += Simd::kLanes, weights += kColours * Simd::kLanes) {
    Simd::F w[kColours];
    for (int c = 0; c < kColours; ++c) w[c] = Simd::load(weights + c * Simd::kLanes);
    for (int p = 0; p < n; ++p) {
      const Simd::F value = kept(Simd::load(from + p * pixel));
      for (int c = 0; c < kColours; ++c) sums[p][c] = Simd::fma(value, w[c], sums[p][c]);
    }
  }
  return weights;
}

}  // namespace
}  // namespace hflfnerv
