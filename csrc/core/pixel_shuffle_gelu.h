// Bias, PixelShuffle and GELU in one pass, forward and backward: what hflfnerv/reference/pixel_shuffle_gelu.py defines.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "float_types.h"

namespace hflfnerv {

// x is [batch, channels r r, height, width], y is [batch, channels, height r, width r]; both contiguous, or both
// channels-last. All sizes are at least 1.
struct PixelShuffleShape {
  std::int64_t batch, channels, r, height, width;
  bool channels_last;
  std::int64_t in_channels() const { return channels * r * r; }
  std::int64_t elements() const { return batch * in_channels() * height * width; }
};

struct GeluForm {
  FloatType type;   // of x, y and their gradients
  bool tanh_form;
};

// The level to use, or SimdLevel::scalar where this machine has none: the kernels need AVX2 with FMA and F16C, or AVX-512.
SimdLevel pixel_shuffle_gelu_level();

// y = GELU(PixelShuffle(x + bias)); bias has one float per channel of x, or is null.
// Each element is computed alike wherever it lies: the result does not depend on `threads` or on the batch.
void pixel_shuffle_gelu_fwd(const PixelShuffleShape& shape, const GeluForm& form, const void* x, const float* bias, void* y,
                            int threads, SimdLevel level);

// dx = unshuffle(dy) GELU'(x + bias), and its sum over batch, rows and columns in dbias unless that is null. The order of
// the sum does not depend on `threads`.
void pixel_shuffle_gelu_bwd(const PixelShuffleShape& shape, const GeluForm& form, const void* dy, const void* x,
                            const float* bias, void* dx, float* dbias, int threads, SimdLevel level);

}  // namespace hflfnerv
