// The gradient of a convolution's weight on AMX: what conv_pixel_shuffle_gelu.cpp hands to the code compiled for it.
//
// The matrix product has output channels as rows, input channels under a tap as columns and as inner dimension the pixels of
// the result, 32 at a time: a step. What a band needs, some rows of some columns of an image, is put into the order of the
// tiles: the gradient of the result transposed, and x in pairs of pixels. Rows of both are `pitch` pixels, where the gradient
// has zeros under the columns around the band; so another tap is another address of x, in pairs that begin at even pixels
// or in those that begin at odd ones. Input channels beyond a multiple of 16 are copied for each tap, and their tiles have
// several taps.
#pragma once

#include <cstdint>

#include "planes.h"

namespace hflfnerv {

// x is [batch, height, width, in_channels], dz [batch, out_height, out_width, out_channels]; stride 1.
struct WeightGradientShape {
  std::int64_t batch, in_channels, height, width, out_channels, kernel_h, kernel_w, padding_h, padding_w;
  std::int64_t out_height() const { return height + 2 * padding_h - kernel_h + 1; }
  std::int64_t out_width() const { return width + 2 * padding_w - kernel_w + 1; }
  std::int64_t taps() const { return kernel_h * kernel_w; }
};

// 16 input channels under a tap. `pair` is the pair of pixels with which the first step begins.
struct WeightGradientColumns {
  std::int64_t group, phase, tap, pair;
};

// How the work is divided, by the shape alone. Bytes are chosen for a second cache of 2 MiB and a first one of 48 KiB.
struct WeightGradientPlan {
  explicit WeightGradientPlan(const WeightGradientShape& shape);

  WeightGradientShape shape;
  std::int64_t groups, rest;   // of 16 input channels whose tiles have one tap, and channels beyond them
  std::int64_t row_tiles;      // of products, in all, and
  std::int64_t share;          // of an item, but for the last
  std::int64_t columns, rows;  // of a band
  std::int64_t pitch;          // pixels from a row of a band to the next
  std::int64_t steps;          // of a whole band
  std::int64_t parts;          // of the bands

  std::int64_t band_rows() const { return (shape.out_height() + rows - 1) / rows; }
  std::int64_t band_columns() const { return (shape.out_width() + columns - 1) / columns; }
  std::int64_t bands() const { return shape.batch * band_rows() * band_columns(); }
  std::int64_t shares() const { return (row_tiles + share - 1) / share; }
  std::int64_t rest_tiles() const { return (rest * shape.taps() + kTile - 1) / kTile; }
  std::int64_t group_tiles() const { return groups * shape.taps(); }  // of columns
  std::int64_t column_tiles() const { return group_tiles() + rest_tiles(); }
  // Neighbours among the groups' tiles read nearly the same lines: those of one group and phase come one after the other.
  WeightGradientColumns columns_of(std::int64_t tile) const {
    const std::int64_t taps = shape.taps(), even = (shape.kernel_w + 1) / 2, odd = shape.kernel_w / 2;
    const std::int64_t phase = tile % taps < shape.kernel_h * even ? 0 : 1, of_row = phase == 0 ? even : odd;
    const std::int64_t i = tile % taps - phase * shape.kernel_h * even, ky = i / of_row, kx = i % of_row * 2 + phase;
    return {tile / taps, phase, ky * shape.kernel_w + kx, (ky * pitch + kx) / 2};
  }
  std::int64_t part_floats() const { return row_tiles * column_tiles() * kTile * kTile; }

  std::int64_t pixels() const { return (rows + shape.kernel_h - 1) * pitch; }  // of x under a band
  // Elements of a row tile's gradient, of a group's pairs in one phase, and of a channel of the rest, each in an odd number
  // of cache lines: what lies that far apart is in different sets of the cache.
  std::int64_t gradient_stride() const { return (steps * kTile | 1) * kStep; }
  std::int64_t pairs_stride() const { return ((pixels() + kStep + shape.kernel_w) / 2 | 1) * kStep; }
  std::int64_t rest_stride() const { return ((pixels() + 2 * kStep + shape.kernel_w) / kStep | 1) * kStep; }
  std::int64_t scratch_elements() const {
    return (share + rest_tiles()) * gradient_stride() + 2 * groups * pairs_stride() + rest * rest_stride();
  }
};

// What the bands [begin, end) give to the products of the `index`-th share of the rows, added to `sums`:
// [row tile][column tile][row][column]. `scratch` is aligned to cache lines and was zero before its first use.
struct WeightGradientItem {
  const BFloat16* x;
  const BFloat16* dz;
  std::int64_t begin, end, index;
  float* sums;
};
void weight_gradient_amx(const WeightGradientPlan& plan, const WeightGradientItem& item, BFloat16* scratch);

// The gradient for the output channels of a row tile: the parts' sums, rounded. `channels` are the places of all output
// channels in dweight, [out_channels][kernel_h][kernel_w][in_channels].
void weight_gradient_result_amx(const WeightGradientPlan& plan, const float* sums, const std::int64_t* channels,
                                std::int64_t tile, BFloat16* dweight);

}  // namespace hflfnerv
