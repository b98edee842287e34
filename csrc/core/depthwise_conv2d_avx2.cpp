#include "simd_avx2.h"

#include "depthwise_conv2d_kernels.inl"

namespace hflfnerv {

const DepthwiseKernels& depthwise_conv2d_kernels_avx2() {
  static constexpr DepthwiseKernels kernels{conv, wgrad};
  return kernels;
}

}  // namespace hflfnerv
