// A 3x3 convolution to at most three channels, padding 1, such as a network's head, and the way back, on tensor cores.
#pragma once

#include <cstdint>

namespace hflfnerv {

constexpr int kConv2dOutputs = 3, kConv2dChannels = 64;  // the most

struct Conv2dCuda {
  bool bfloat16;  // else float16
  int batch, channels, height, width, outputs;
  const void* x;  // channels last, [batch, height, width], pixels `pixel` elements apart
  int pixel;
  const void* weight;               // [outputs, channels, 3, 3]
  std::int64_t weight_strides[4];
};

struct Conv2dCudaForward {
  const void* bias;  // [outputs], or null
  void* y;           // channels last, dense
};

struct Conv2dCudaBackward {
  const void* dy;  // [batch, outputs, height, width]
  std::int64_t dy_strides[4];
  void* dx;  // as x, pixels `dx_pixel` apart; what lies between them, up to a multiple of 16 bytes, becomes zero. Or null
  int dx_pixel;
  void* dweight;  // null if neither it nor dbias is wanted
  std::int64_t dweight_strides[4];
  void* dbias;     // [outputs], or null
  float* partial;  // conv2d_cuda_partial_floats, null if dweight and dbias are
};

// These return null, or what went wrong in words. The device becomes the current one.
const char* conv2d_cuda_fwd(const Conv2dCuda& call, const Conv2dCudaForward& result, int device, void* stream);
const char* conv2d_cuda_partial_floats(const Conv2dCuda& call, int device, std::int64_t& floats);
const char* conv2d_cuda_bwd(const Conv2dCuda& call, const Conv2dCudaBackward& gradients, int device, void* stream);

}  // namespace hflfnerv
