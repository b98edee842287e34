// What inverted_bottleneck.cpp hands to the code compiled for AMX.
//
// Pixels are the rows of the products, some of them, a block, at once. Channels and hidden ones are padded to multiples of 32
// with zeros. A weight is packed for each product that it is in: [column tile][step][pair of inner elements][column][element
// of the pair].
#pragma once

#include <cstdint>

#include "gelu_table.h"
#include "inverted_bottleneck.h"
#include "planes.h"

namespace hflfnerv {

constexpr std::int64_t kBottleneckPixels = 256;  // of a block
constexpr std::int64_t kBottleneckSteps = kBottleneckPixels / kStep;

struct BottleneckPlan {
  BottleneckShape shape;
  BottleneckWeights weights;   // whose vectors have zeros up to the padded sizes
  const BFloat16* expand;      // W1, for the hidden channels
  const BFloat16* project;     // W2, for the result
  const BFloat16* expand_back;   // W2 times gamma, for the gradient of the hidden channels
  const BFloat16* project_back;  // W1, for that of the norm's result
  const GeluTable *gelu, *gelu_gradient;

  std::int64_t channels() const { return (shape.channels + kStep - 1) / kStep * kStep; }
  std::int64_t hidden() const { return (shape.hidden + kStep - 1) / kStep * kStep; }
  std::int64_t blocks() const { return (shape.pixels + kBottleneckPixels - 1) / kBottleneckPixels; }
  std::int64_t weight_elements() const { return channels() * hidden(); }
  // Elements of 16 bits: of the norm's result and of the hidden channels, and what the backward pass has besides.
  std::int64_t forward_elements() const { return kBottleneckPixels * (channels() + hidden()); }
  std::int64_t backward_elements() const {
    return kBottleneckPixels * (4 * channels() + 3 * hidden() + 2 * channels() + 2 * kStep);
  }
  // Of a part of the pixels: the gradients of W1, transposed, and of W2 but for gamma, in tiles [row tile][column tile], both
  // with channels as rows; then the sums for b1, gain and shift, and those of dout.
  std::int64_t sums() const { return 2 * weight_elements() + hidden() + 3 * channels(); }
};

// One block of pixels. `scratch`, aligned to cache lines, was zero before its first use.
void bottleneck_forward_amx(const BottleneckPlan& plan, const BFloat16* u, const void* x, float* out, std::int64_t block,
                            BFloat16* scratch);
// Adds to `sums`.
void bottleneck_backward_amx(const BottleneckPlan& plan, const BFloat16* u, const float* dout, BFloat16* du, float* sums,
                             std::int64_t block, BFloat16* scratch);

}  // namespace hflfnerv
