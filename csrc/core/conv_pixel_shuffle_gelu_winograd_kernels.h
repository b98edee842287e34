// What conv_pixel_shuffle_gelu_winograd.cpp hands to the code compiled for one instruction set.
//
// Channels are the lanes of vectors. Output channels come in chunks of two vectors; what belongs to a chunk lies together:
// for the weight, and for the sums of its gradient, [chunk][point][input channel][column of the chunk].
#pragma once

#include "conv_pixel_shuffle_gelu_winograd.h"
#include "gelu_table.h"

namespace hflfnerv {

constexpr std::int64_t kWinogradVectors = 2;   // of a chunk
constexpr std::int64_t kWinogradTiles = 24;    // at most, in a block: it shares one pass over the weight
constexpr std::int64_t kWinogradGradientTiles = 48;  // in one of the gradient of the weight
constexpr std::int64_t kWinogradCache = 122880;  // floats that the second cache holds beside others
constexpr std::int64_t kWinogradSums = 122880;   // those others, of the gradient of the weight

// A convolution with stride 1 and half of the kernel as padding, and what depends on the number of lanes.
struct WinogradPlan {
  std::int64_t batch, height, width, in_channels, out_channels, kernel, lanes;
  std::int64_t axis;  // points on each axis, 8, or 10 for a kernel of 5
  FloatType type;     // of images

  std::int64_t points() const { return axis * axis; }
  std::int64_t outputs() const { return axis + 1 - kernel; }  // of a tile, on each axis
  std::int64_t tile_rows() const { return (height + outputs() - 1) / outputs(); }
  std::int64_t tile_columns() const { return (width + outputs() - 1) / outputs(); }
  std::int64_t tiles() const { return batch * tile_rows() * tile_columns(); }
  std::int64_t columns() const { return kWinogradVectors * lanes; }  // of a chunk
  std::int64_t chunks() const { return (out_channels + columns() - 1) / columns(); }
  std::int64_t chunk_floats() const { return points() * in_channels * columns(); }
  std::int64_t inner() const { return (in_channels + lanes - 1) / lanes * lanes; }  // channels in whole vectors
  // Tiles of a block are products' rows: one after the other, for one point after the other, so that the products read
  // memory in its order. The last one's vectors may end behind its channels.
  std::int64_t point_floats(std::int64_t tiles) const { return odd_lines(tiles * in_channels + lanes); }
  std::int64_t gradient_floats() const { return odd_lines(gradient_block() * columns()); }
  std::int64_t product_floats() const { return odd_lines(points() * columns()); }  // results at the points for one chunk
  // In cache lines, an odd number of them: what lies that far apart is in different sets of the cache.
  static std::int64_t odd_lines(std::int64_t floats) { return ((floats + 15) / 16 | 1) * 16; }
  // Rows of a product in registers: a block is a multiple of it.
  std::int64_t rows() const { return lanes == 16 ? 12 : 6; }
  // Tiles of a block: as many as the second cache holds with their products. Inlined, so that no copy compiled for one
  // instruction set is shared with the others.
  inline __attribute__((always_inline)) std::int64_t block() const { return tiles_of(points(), kWinogradTiles); }
  // The same of the gradient of the weight, at half of the points.
  inline __attribute__((always_inline)) std::int64_t gradient_block() const {
    return tiles_of(points() / 2, kWinogradGradientTiles);
  }
  std::int64_t gradient_blocks() const { return (tiles() + gradient_block() - 1) / gradient_block(); }
  std::int64_t tiles_of(std::int64_t at_points, std::int64_t most) const {
    const std::int64_t fit = kWinogradCache / (at_points * (inner() + columns())) / rows() * rows();
    return fit < rows() ? rows() : fit < most ? fit : most;
  }
  std::int64_t tile_floats() const { return points() * point_floats(block()); }  // of a block at the points
  // Products, and a tile copied with the zeros around it.
  std::int64_t scratch_floats() const { return block() * product_floats() + points() * inner() + 16; }
  std::int64_t gradient_scratch_floats() const {
    const std::int64_t window = points() * (inner() > columns() ? inner() : columns());
    return points() / 2 * (point_floats(gradient_block()) + gradient_floats()) + window + 16;
  }
};

// Tiles [begin, end), at most plan.block() of them: evaluated in `tiles`, which has plan.tile_floats(), unless they are already,
// and from there to results for chunks [first_chunk, last_chunk).
struct WinogradPart {
  std::int64_t begin, end, first_chunk, last_chunk;
  float* tiles;
  bool evaluated;
};

// A part of the gradient of the weight: what tiles [begin, end), at most plan.gradient_block() of them, give to the sums at
// the first or the second half of the rows of points, for chunks [first_chunk, last_chunk).
struct WinogradGradient {
  const void* x;
  const void* dz;
  float* sums;
  std::int64_t begin, end, first_chunk, last_chunk;
  int half;
};

// Which weight belongs to an output and an input channel: weight + out[...] + in[...], its taps `tap` elements apart, in
// reversed order for the gradient of x.
struct WinogradWeight {
  const std::int64_t* out;
  const std::int64_t* in;
  std::int64_t tap;
  bool reversed;
};

// Lanes [first, last) of a vector of results, to `offset` after the pixel, lane by lane.
struct WinogradStore {
  int first, last;
  std::int64_t offset;
};

// Where results go: that of pixel (h, w) of the i-th image begins at element i * image + (h - first_row) * row + w * pixel.
struct WinogradOutput {
  void* y;
  std::int64_t image, first_row, row, pixel;
  const WinogradStore* stores;  // of all vectors of output channels
  const int* first_store;       // of each vector, and the end of the last
  const float* bias;            // of all columns, or null
  void* z;                      // channels-last, or null
  const GeluTable* gelu;        // null for none
};

// `scratch` has plan.scratch_floats(), or gradient_scratch_floats(), aligned to cache lines.
struct WinogradKernels {
  // Chunks [begin, end) of the weight at the points.
  void (*weight)(const WinogradPlan&, const WinogradWeight&, const float* weight, float* points, std::int64_t begin,
                 std::int64_t end);
  void (*conv)(const WinogradPlan&, const void* x, const float* points, const WinogradOutput&, const WinogradPart&,
               float* scratch);
  // Adds to the sums.
  void (*wgrad)(const WinogradPlan&, const WinogradGradient&, float* scratch);
  // The gradient of chunk `chunk` from `parts` sums, `part_floats` apart.
  void (*weight_gradient)(const WinogradPlan&, const WinogradWeight&, const float* sums, std::int64_t parts,
                          std::int64_t part_floats, float* dweight, std::int64_t chunk);
};

const WinogradKernels& winograd_kernels_avx2();
const WinogradKernels& winograd_kernels_avx512();

}  // namespace hflfnerv
