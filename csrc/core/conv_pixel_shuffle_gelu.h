// The upsampling block in bfloat16, channels-last: convolution (stride 1), bias, PixelShuffle and GELU in one pass, what
// hflfnerv/reference/conv_pixel_shuffle_gelu.py defines. Products are of bfloat16 numbers, sums in float32, and the result
// is rounded once.
#pragma once

#include <cstdint>

#include "float_types.h"
#include "gelu_table.h"

namespace hflfnerv {

// x is [batch, in_channels, height, width], the weight [channels r r, in_channels, kernel_h, kernel_w], y
// [batch, channels, out_height r, out_width r], all of them channels-last. All sizes are at least 1, paddings at least 0.
struct ConvPixelShuffleShape {
  std::int64_t batch, in_channels, height, width, channels, r, kernel_h, kernel_w, padding_h, padding_w;
  std::int64_t out_channels() const { return channels * r * r; }
  std::int64_t out_height() const { return height + 2 * padding_h - kernel_h + 1; }
  std::int64_t out_width() const { return width + 2 * padding_w - kernel_w + 1; }
};

// Why this machine cannot multiply with AMX, in words, or null. The first call asks the operating system for its use.
const char* amx_unavailable();

// bias has one float per output channel of the convolution, or is null. z, what GELU is applied to, is rounded once as well,
// and may be null, as it has to be with the identity: [batch, channels r r, out_height, out_width], channels-last, with the
// channels in the order (row of the shuffle, column of the shuffle, c). Each element is computed alike wherever it lies: the
// result does not depend on `threads` or on the batch.
void conv_pixel_shuffle_gelu_fwd(const ConvPixelShuffleShape& shape, ConvActivation activation, const BFloat16* x,
                                 const BFloat16* weight, const float* bias, BFloat16* y, BFloat16* z, int threads);

// The gradients of x and of the weight from that of z, rounded once. Paddings are less than the kernel for that of x. Sums
// are in float32 in an order that depends on the shape alone. An element of x that is not finite may reach the gradient of
// any weight of its channel.
void conv_pixel_shuffle_gelu_dgrad(const ConvPixelShuffleShape& shape, const BFloat16* dz, const BFloat16* weight,
                                   BFloat16* dx, int threads);
void conv_pixel_shuffle_gelu_wgrad(const ConvPixelShuffleShape& shape, const BFloat16* x, const BFloat16* dz,
                                   BFloat16* dweight, int threads);

}  // namespace hflfnerv
