#include "simd_avx512.h"

#include "convert_kernels.inl"

namespace hflfnerv {

const ConvertKernels& convert_kernels_avx512() {
  static constexpr ConvertKernels kernels{to_floats, from_floats};
  return kernels;
}

}  // namespace hflfnerv
