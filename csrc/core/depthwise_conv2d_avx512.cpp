#include "simd_avx512.h"

#include "depthwise_conv2d_kernels.inl"

namespace hflfnerv {

const DepthwiseKernels& depthwise_conv2d_kernels_avx512() {
  static constexpr DepthwiseKernels kernels{conv, wgrad};
  return kernels;
}

}  // namespace hflfnerv
