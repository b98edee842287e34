#include "simd_avx2.h"

#include "orthogonalise_kernels.inl"

namespace hflfnerv {

const OrthogonaliseKernels& orthogonalise_kernels_avx2() {
  static constexpr OrthogonaliseKernels kernels{kRows, kColumns, product};
  return kernels;
}

}  // namespace hflfnerv
