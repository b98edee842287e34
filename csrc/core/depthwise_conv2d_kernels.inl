// Included behind the Simd of one instruction set; see depthwise_conv2d_kernels.h.
#include "depthwise_conv2d_kernels.h"
#include "registers.h"

namespace hflfnerv {
namespace {

using F = Simd::F;
constexpr int kLanes = Simd::kLanes;

// n results side by side, from the tile's pixel above and left of the first.
template <int n>
inline void results(const DepthwiseTile& tile, const float* x, const float* weights, F bias, float* y) {
  F sums[n];
  for (F& sum : sums) sum = bias;
  for (std::int64_t i = 0; i < tile.kernel_rows; ++i, x += tile.tile_width() * kLanes) {
    const float* from = x;
    for (std::int64_t j = 0; j < tile.kernel_columns; ++j, from += kLanes, weights += kLanes) {
      hide(from);  // neighbours take the same pixels
      const F w = Simd::load(weights);
      for (int p = 0; p < n; ++p) sums[p] = Simd::fma(Simd::load(from + p * kLanes), w, sums[p]);
    }
  }
  for (int p = 0; p < n; ++p) Simd::store(y + p * kLanes, sums[p]);
}

void conv(const DepthwiseTile& tile, const float* x, const float* weights, const float* bias, float* y) {
  const F start = Simd::load(bias);
  for (std::int64_t row = 0; row < tile.rows; ++row, x += tile.tile_width() * kLanes, y += tile.width * kLanes) {
    std::int64_t w = 0;
    for (; w + 10 <= tile.width; w += 10) results<10>(tile, x + w * kLanes, weights, start, y + w * kLanes);
    for (; w + 4 <= tile.width; w += 4) results<4>(tile, x + w * kLanes, weights, start, y + w * kLanes);
    for (; w < tile.width; ++w) results<1>(tile, x + w * kLanes, weights, start, y + w * kLanes);
  }
}

// Sums of n taps side by side.
template <int n>
inline void taps(const DepthwiseTile& tile, const float* x, const float* dy, float* sums) {
  F s[n];
  for (F& sum : s) sum = Simd::zero();
  for (std::int64_t row = 0; row < tile.rows; ++row, x += tile.tile_width() * kLanes, dy += tile.tile_width() * kLanes) {
    const float* from = x;
    for (std::int64_t w = 0; w < tile.width; ++w, from += kLanes) {
      hide(from);
      const F slope = Simd::load(dy + w * kLanes);
      for (int j = 0; j < n; ++j) s[j] = Simd::fma(Simd::load(from + j * kLanes), slope, s[j]);
    }
  }
  for (int j = 0; j < n; ++j) Simd::store(sums + j * kLanes, s[j]);
}

void wgrad(const DepthwiseTile& tile, const float* x, const float* dy, float* sums) {
  const float* const inside = dy + (tile.kernel_rows / 2 * tile.tile_width() + tile.kernel_columns / 2) * kLanes;
  for (std::int64_t i = 0; i < tile.kernel_rows; ++i, x += tile.tile_width() * kLanes) {
    std::int64_t j = 0;
    for (; j + 7 <= tile.kernel_columns; j += 7, sums += 7 * kLanes) taps<7>(tile, x + j * kLanes, inside, sums);
    for (; j + 3 <= tile.kernel_columns; j += 3, sums += 3 * kLanes) taps<3>(tile, x + j * kLanes, inside, sums);
    for (; j < tile.kernel_columns; ++j, sums += kLanes) taps<1>(tile, x + j * kLanes, inside, sums);
  }
}

}  // namespace
}  // namespace hflfnerv
