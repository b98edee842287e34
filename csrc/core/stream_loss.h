// The loss of frames that are made of the images of one or two streams, and its gradient, each in one pass over the images;
// what hflfnerv/reference/stream_loss.py defines. Values are computed in float32 and summed in float64, in an order that
// depends on the shape alone.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "float_types.h"

namespace hflfnerv {

// An image is [batch, 3, height, width], channels-last, and at least as large as the frame.
struct StreamImage {
  const void* x;
  std::int64_t height, width;
  void* dx;  // its gradient; in the backward pass only
};

// frame = tanh(low) / 2 + 1/2 + tanh(high), its top left height x width; high.x is null where there is none. The target is
// [batch, height, width, 3]. All sizes are at least 1, and all images of one type.
struct StreamLoss {
  std::int64_t batch, height, width;
  FloatType type;
  StreamImage low, high;
  const std::uint8_t* target;
};

// Writes the mean squared error of each frame.
void stream_loss_fwd(const StreamLoss& task, float* loss, int threads, SimdLevel level);

// Writes the gradients of the images for those of the losses; zeros outside of the frame.
void stream_loss_bwd(const StreamLoss& task, const float* dloss, int threads, SimdLevel level);

}  // namespace hflfnerv
