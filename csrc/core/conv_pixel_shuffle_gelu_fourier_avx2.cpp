#include "simd_avx2.h"

#include "conv_pixel_shuffle_gelu_fourier_kernels.inl"

namespace hflfnerv {

const FourierKernels& fourier_kernels_avx2() {
  static constexpr FourierKernels kernels{weight, conv};
  return kernels;
}

}  // namespace hflfnerv
