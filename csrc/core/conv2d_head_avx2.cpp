#include "simd_avx2.h"

#include "conv2d_head_kernels.inl"

namespace hflfnerv {

const HeadKernels& conv2d_head_kernels_avx2() {
  static constexpr HeadKernels kernels{fwd, dgrad, wgrad};
  return kernels;
}

}  // namespace hflfnerv
