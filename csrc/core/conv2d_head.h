// A 3x3 convolution to three channels, as the heads of networks are, and its gradients, in float32 by definition: other
// methods have output channels as lanes, which three of them leave idle.
//
// Sums are in an order that depends on the shape alone; results do not depend on the number of threads, nor those of an
// image on the batch.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "float_types.h"

namespace hflfnerv {

// x is [batch, channels, height, width] and y [batch, 3, height, width], both channels-last; the weight is
// [3, channels, 3, 3], contiguous, and the padding 1. All sizes are at least 1. x, y and their gradients have elements of `type`,
// weight, bias and their gradients are floats.
struct HeadShape {
  std::int64_t batch, channels, height, width;
  FloatType type = FloatType::f32;
};

// bias has three floats, or is null.
void conv2d_head_fwd(const HeadShape& shape, const void* x, const float* weight, const float* bias, void* y, int threads,
                     SimdLevel level);

// The gradients of x, weight and bias for dy; those that are null are not computed.
void conv2d_head_bwd(const HeadShape& shape, const void* dy, const void* x, const float* weight, void* dx,
                     float* dweight, float* dbias, int threads, SimdLevel level);

}  // namespace hflfnerv
