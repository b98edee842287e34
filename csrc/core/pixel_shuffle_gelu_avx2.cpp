#include "simd_avx2.h"

#include "pixel_shuffle_gelu_kernels.inl"

namespace hflfnerv {

void pixel_shuffle_gelu_fwd_avx2(const PixelShuffleTask& task, std::int64_t begin, std::int64_t end, float* scratch) {
  fwd_items(task, begin, end, scratch);
}

void pixel_shuffle_gelu_bwd_avx2(const PixelShuffleTask& task, std::int64_t begin, std::int64_t end, float* scratch) {
  bwd_items(task, begin, end, scratch);
}

}  // namespace hflfnerv
