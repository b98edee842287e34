// What follows the depthwise convolution in a ConvNeXt block, on AMX:
//   out = x + gamma (W2 GELU(W1 LayerNorm(u) + b1) + b2)
// over the channels of every pixel, and its gradients, for which nothing but u is kept. Products are of bfloat16 numbers;
// sums, LayerNorm and GELU are in float32.
#pragma once

#include <cstdint>

#include "float_types.h"

namespace hflfnerv {

// u, x and out are [pixels, channels]; all sizes are at least 1. x has elements of `type`, float or bfloat16.
struct BottleneckShape {
  std::int64_t pixels, channels, hidden;
  FloatType type = FloatType::f32;
};

// Of the norm gain, shift and epsilon; w1 is [hidden, channels], w2 [channels, hidden].
struct BottleneckWeights {
  const float *gain, *shift;
  const BFloat16* w1;
  const float* b1;
  const BFloat16* w2;
  const float *b2, *gamma;
  float epsilon;
};

// All of them are written.
struct BottleneckGradients {
  float *gain, *shift, *w1, *b1, *w2, *b2, *gamma;
};

// Where amx_unavailable() is null. Each pixel is computed alike wherever it lies; sums over pixels are in an order that
// depends on the shape alone.
void inverted_bottleneck_fwd(const BottleneckShape& shape, const BottleneckWeights& weights, const BFloat16* u,
                             const void* x, float* out, int threads);
void inverted_bottleneck_bwd(const BottleneckShape& shape, const BottleneckWeights& weights, const BFloat16* u,
                             const float* dout, BFloat16* du, const BottleneckGradients& gradients, int threads);

}  // namespace hflfnerv
