// Bias, PixelShuffle and GELU in one pass over channels-last tensors of 16-bit floats, forward and backward.
#pragma once

#include <cstdint>

namespace hflfnerv {

struct PixelShuffleGeluCuda {
  bool bfloat16;   // else float16
  bool tanh_form;  // of GELU, else the exact one
  int batch, channels, r, height, width;  // channels of y; height and width of x
  const void* x;                          // [batch, height, width, channels r r], the last axis in the order (c, i, j)
  const void* bias;                       // [channels r r], or null
  void* y;                                // [batch, height r, width r, channels]
};

struct PixelShuffleGeluGradientCuda {
  PixelShuffleGeluCuda forward;  // without its y
  const void* dy;                // as y
  void* dx;                      // as x
  float* sums;                   // as many as pixel_shuffle_gelu_cuda_sums says, for the kernel's use; null without a bias
  void* dbias;                   // as the bias, or null without one
};

// These return null, or what went wrong in words. The device becomes the current one.

const char* pixel_shuffle_gelu_cuda_fwd(const PixelShuffleGeluCuda& call, int device, void* stream);
const char* pixel_shuffle_gelu_cuda_bwd(const PixelShuffleGeluGradientCuda& call, int device, void* stream);

// How many floats the gradient of the bias needs.
const char* pixel_shuffle_gelu_cuda_sums(const PixelShuffleGeluGradientCuda& call, int device, std::int64_t& count);

}  // namespace hflfnerv
