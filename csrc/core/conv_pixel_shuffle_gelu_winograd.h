// The upsampling block, a plain convolution, and their gradients by Winograd's method, in float32: tiles of the image and
// the weight are evaluated at the 8 x 8 points {0, 1, -1, 2, -2, 1/2, -1/2, infinity}², where a convolution is a product, and
// results are interpolated back. A product per point and tile makes 4 x 4 results of a 5 x 5 kernel, which take 25 products
// each by definition, or 6 x 6 of a 3 x 3 kernel. With 10 x 10 points, of {0, 2/5, 4/5, 5/4, 5/2, their negatives, infinity}²,
// 6 x 6 results of a 5 x 5 kernel take 2.8 products each instead of 4.
//
// Sums are in float32 in an order that depends on the shape alone; results do not depend on the number of threads, nor
// those of an image on the batch. Errors are a few times those of the sums by definition, with 10 x 10 points five times
// as large as with 8 x 8: tests/ops has the bounds.
//
// With 18 x 18 points, of {zero, the 16th roots of unity, infinity}², evaluation is a Fourier transform, 14 x 14 results of a 5 x 5
// kernel or 16 x 16 of a 3 x 3 one take 2.4 or 1.9 products each, and these are made of 16-bit integers, twice as many at a
// time. Errors are a tenth of those of bfloat16: conv_pixel_shuffle_gelu_fourier_kernels.h says why.
#pragma once

#include <cstdint>
#include <memory>

#include "cpu.h"
#include "float_types.h"
#include "gelu_table.h"

namespace hflfnerv {

// x is [batch, in_channels, height, width], the weight [channels r r, in_channels, kernel, kernel] with a kernel of 3 or 5,
// half of which is the padding, y [batch, channels, height r, width r]; all of them channels-last. z, the convolution with
// bias, and its gradient dz are [batch, channels r r, height, width], channels-last, with the channels in the order
// (row of the shuffle, column of the shuffle, c), in which rows of y are contiguous. All sizes are at least 1. `points` on
// each axis are 8, 18, or 10 with a kernel of 5, and not 18 for the gradient of the weight. x, y, z and their gradients
// have elements of `type`, everything else is float: with 16 bits, what is read is exact and what is stored is rounded
// once.
struct WinogradShape {
  std::int64_t batch, in_channels, height, width, channels, r, kernel, points;
  FloatType type = FloatType::f32;
  std::int64_t out_channels() const { return channels * r * r; }
};

// Elements of a weight evaluated at the points, for the forward pass, or for the gradient of x.
std::int64_t winograd_weight_floats(const WinogradShape& shape, bool data_gradient, SimdLevel level);
void winograd_weight(const WinogradShape& shape, bool data_gradient, const float* weight, float* points, int threads,
                     SimdLevel level);

// bias has one float per output channel of the convolution in PixelShuffle's order, or is null; z may be null.
void winograd_fwd(const WinogradShape& shape, ConvActivation activation, const void* x, const float* points, const float* bias,
                  void* y, void* z, int threads, SimdLevel level);

// Tiles that are run at once: at most, and a number of which they are best a multiple.
struct WinogradBlock {
  std::int64_t most, step;
};
WinogradBlock winograd_block(const WinogradShape& shape, SimdLevel level);

// The forward pass of one image of floats tile by tile: what y is made of is made when it is wanted.
class WinogradTiles {
 public:
  // As for winograd_fwd; the batch is 1. `row` floats lie between rows of y.
  WinogradTiles(const WinogradShape& shape, ConvActivation activation, const float* x, const float* points,
                const float* bias, std::int64_t row, SimdLevel level);
  ~WinogradTiles();
  WinogradTiles(WinogradTiles&&) noexcept;

  std::int64_t rows() const;     // of tiles
  std::int64_t columns() const;
  std::int64_t size() const;     // of a tile on each axis of y; those at the end may be smaller
  std::int64_t scratch_floats() const;
  // Tiles [begin, end) of a row of tiles, at most winograd_block() of them. y is the first pixel of the first one; `scratch` is aligned
  // to cache lines.
  void run(std::int64_t row, std::int64_t begin, std::int64_t end, float* y, float* scratch) const;

 private:
  struct Prepared;
  std::unique_ptr<Prepared> prepared_;
};

void winograd_dgrad(const WinogradShape& shape, const void* dz, const float* points, void* dx, int threads,
                    SimdLevel level);
void winograd_wgrad(const WinogradShape& shape, const void* x, const void* dz, float* dweight, int threads,
                    SimdLevel level);

}  // namespace hflfnerv
