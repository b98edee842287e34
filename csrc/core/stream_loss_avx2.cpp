#include "simd_avx2.h"

#include "stream_loss_kernels.inl"

namespace hflfnerv {

const StreamLossKernels& stream_loss_kernels_avx2() {
  static constexpr StreamLossKernels kernels{fwd, bwd};
  return kernels;
}

}  // namespace hflfnerv
