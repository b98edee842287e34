// What stream_loss.cpp hands to the code compiled for one instruction set.
#pragma once

#include "stream_loss.h"

namespace hflfnerv {

// A row of the frame, and of the images under it.
struct StreamLossRow {
  FloatType type;
  const void *low, *high;
  const std::uint8_t* target;
  std::int64_t count;  // of values
  void *dlow, *dhigh;
  float scale;  // of the error in the gradient
};

struct StreamLossKernels {
  double (*fwd)(const StreamLossRow&);  // the sum of the squares of the errors
  void (*bwd)(const StreamLossRow&);
};

const StreamLossKernels& stream_loss_kernels_avx2();
const StreamLossKernels& stream_loss_kernels_avx512();

}  // namespace hflfnerv
