#include "simd_avx512.h"

#include "orthogonalise_kernels.inl"

namespace hflfnerv {

const OrthogonaliseKernels& orthogonalise_kernels_avx512() {
  static constexpr OrthogonaliseKernels kernels{kRows, kColumns, product};
  return kernels;
}

}  // namespace hflfnerv
