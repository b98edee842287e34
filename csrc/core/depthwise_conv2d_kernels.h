// What depthwise_conv2d.cpp hands to the code compiled for one instruction set. Lanes are channels: a vector of them at a time,
// from tiles in which the pixels of a band of rows, and of the border around it, are a vector each.
#pragma once

#include "depthwise_conv2d.h"

namespace hflfnerv {

struct DepthwiseTile {
  std::int64_t rows, width;  // of results
  std::int64_t kernel_rows, kernel_columns;
  std::int64_t tile_width() const { return width + kernel_columns - 1; }
};

struct DepthwiseKernels {
  // y [row][column] = bias + sum over taps of weights [tap] and x [row][column] of the tile; all of them vectors.
  void (*conv)(const DepthwiseTile&, const float* x, const float* weights, const float* bias, float* y);
  // sums [tap] = sum over pixels of x and dy, each in a tile with a border.
  void (*wgrad)(const DepthwiseTile&, const float* x, const float* dy, float* sums);
};

const DepthwiseKernels& depthwise_conv2d_kernels_avx2();
const DepthwiseKernels& depthwise_conv2d_kernels_avx512();

}  // namespace hflfnerv
