// What conv2d_head.cpp hands to the code compiled for one instruction set.
//
// In the forward pass lanes are the floats of three pixels side by side, which a row of the kernel covers. In the backward pass
// they are channels of a pixel, read and written in vectors of which the last may overlap the one before, so that none ends
// behind the pixel; pixels of fewer channels than lanes are in memory with a margin of a vector behind them.
#pragma once

#include "conv2d_head.h"

namespace hflfnerv {

constexpr std::int64_t kHeadColours = 3;
constexpr std::int64_t kHeadTaps = 3;  // rows and columns of the kernel
constexpr std::int64_t kHeadProducts = kHeadTaps * kHeadTaps * kHeadColours;  // a pixel has with a value of x

// A row of y.
struct HeadOutputRow {
  FloatType type;  // of x
  std::int64_t channels, width;
  std::int64_t steps;     // vectors that a row of the kernel covers
  const float* weights;   // as output_vectors() orders them
  const void* x[kHeadTaps];  // the rows above, at and below it
  const float* bias;      // kBiasLanes
  float* y;
  void* edge;  // kHeadTaps * steps vectors of scratch
};

// A row of x and the rows of dy above, at and below it, from the pixel left of column 0 to the one right of the last.
struct HeadInputRow {
  FloatType type;  // of x and dx
  std::int64_t channels, width;
  std::int64_t vectors;       // of a pixel
  const std::int64_t* first;  // the first channel of each vector
  const float* weights;       // [vector][row of dy][column of dy][colour][lane]
  const float* dy[kHeadTaps];
  const void* x;
  void* dx;
  float* sums;  // [row of dy][column of dy][colour][channel]
};

struct HeadKernels {
  void (*fwd)(const HeadOutputRow&);   // writes y
  void (*dgrad)(const HeadInputRow&);  // writes dx
  void (*wgrad)(const HeadInputRow&);  // writes sums over the row of x times dy
};

const HeadKernels& conv2d_head_kernels_avx2();
const HeadKernels& conv2d_head_kernels_avx512();

}  // namespace hflfnerv
