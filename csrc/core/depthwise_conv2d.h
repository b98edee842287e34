// A convolution of each channel with a kernel of its own, and its gradients, in float32 by definition.
//
// Sums are in an order that depends on the shape alone; results do not depend on the number of threads, nor those of an
// image on the batch.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace hflfnerv {

// x and y are [batch, channels, height, width], channels-last; the weight is [channels, 1, kernel_rows, kernel_columns],
// contiguous, with odd sizes of which the half is the padding. All sizes are at least 1.
struct DepthwiseShape {
  std::int64_t batch, channels, height, width, kernel_rows, kernel_columns;
};

// bias has a float for each channel, or is null.
void depthwise_conv2d_fwd(const DepthwiseShape& shape, const float* x, const float* weight, const float* bias, float* y,
                          int threads, SimdLevel level);

// The gradients of x, weight and bias for dy; those that are null are not computed.
void depthwise_conv2d_bwd(const DepthwiseShape& shape, const float* dy, const float* x, const float* weight, float* dx,
                          float* dweight, float* dbias, int threads, SimdLevel level);

}  // namespace hflfnerv
