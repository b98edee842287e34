#include "simd_avx2.h"

#include "convert_kernels.inl"

namespace hflfnerv {

const ConvertKernels& convert_kernels_avx2() {
  static constexpr ConvertKernels kernels{to_floats, from_floats};
  return kernels;
}

}  // namespace hflfnerv
