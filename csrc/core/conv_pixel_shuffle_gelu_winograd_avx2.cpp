#include "simd_avx2.h"

#include "conv_pixel_shuffle_gelu_winograd_kernels.inl"

namespace hflfnerv {

const WinogradKernels& winograd_kernels_avx2() {
  static constexpr WinogradKernels kernels{weight, conv, wgrad, weight_gradient};
  return kernels;
}

}  // namespace hflfnerv
