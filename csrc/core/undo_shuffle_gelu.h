// The gradient of PixelShuffle and GELU with respect to what a convolution of ours gave them, in the layout in which it keeps
// that.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "float_types.h"

namespace hflfnerv {

// z, the convolution's result with bias, and its gradient dz are [batch, channels r r, height, width], channels-last, with the
// channels in the order (row of the shuffle, column of the shuffle, c), in which rows of dy are contiguous; dy is
// [batch, channels, height r, width r], channels-last. All sizes are at least 1. Elements are of `type`, and stored
// rounded once.
struct UndoShape {
  std::int64_t batch, channels, r, height, width;
  FloatType type;
};

// PixelShuffle's number of the n-th channel in that order.
inline std::int64_t shuffle_channel(std::int64_t channels, std::int64_t r, std::int64_t n) {
  return n % channels * r * r + n / channels;
}

// dz = GELU'(z) times dy, un-shuffled, and its sum over pixels in PixelShuffle's order, unless dbias is null. Sums are in an
// order that depends on the shape alone.
void undo_shuffle_gelu(const UndoShape& shape, bool tanh_form, const void* dy, const void* z, void* dz, float* dbias,
                       int threads, SimdLevel level);

}  // namespace hflfnerv
