// The upsampling block, convolution to activation, on Hopper's tensor cores: bfloat16 or float16, sums in float32.
#pragma once

#include <cstdint>

#include "cuda/conv_pixel_shuffle_gelu_layout.h"

namespace hflfnerv {

enum class Activation { none, gelu, gelu_tanh };

struct ConvPixelShuffleGeluCuda {
  conv_layout::Plan plan;
  bool bfloat16;   // else float16
  Activation activation;
  const void* x;       // channels adjacent, strides as in plan.problem, multiples of 8; aligned to 16 bytes
  const void* packed;  // from conv_pixel_shuffle_gelu_cuda_pack
  const void* bias;    // [out_channels r r] in the order of the weight, or null
  void* y;             // [batch, out_height r, out_width r, y_pixel]
  void* z;             // [batch, out_height, out_width, r r out_channels] before the activation, or null
};

// These return null, or what went wrong in words.

// Whether the CUDA runtime in this build can use a device, which takes a driver as new as the runtime. The device is the
// current one afterwards.
const char* cuda_device_unavailable(int device);

// Makes a plan for a device, and the device the current one, on which the others work.
const char* conv_pixel_shuffle_gelu_cuda_plan(const conv_layout::Problem& problem, int device, conv_layout::Plan& plan);

// weight: [out_channels r r, channels, kernel_h kernel_w], two bytes an element; packed: plan.packed_elements() of them. Of a
// plan that is a gradient the weight is the block's, [channels, out_channels, kernel_h kernel_w]. What is packed for one plan
// serves those with the same columns whose problems differ in the image alone.
const char* conv_pixel_shuffle_gelu_cuda_pack(const conv_layout::Plan& plan, const void* weight,
                                              const conv_layout::WeightStrides& strides, void* packed, void* stream);

const char* conv_pixel_shuffle_gelu_cuda_fwd(const ConvPixelShuffleGeluCuda& call, void* stream);

}  // namespace hflfnerv
