// A convolution of the upsampling block made ready for AMX: its weights packed, its addresses worked out.
#pragma once

#include <vector>

#include "conv_pixel_shuffle_gelu_amx.h"
#include "memory.h"

namespace hflfnerv {

ConvOutputLayout channels_last_output(std::int64_t row_pixels, std::int64_t channels);
ConvOutputLayout planes_output(const PlanesLayout& layout);

// Channels in groups of 32 and a rest, as a convolution with that many taps wants them.
PlanesLayout split_channels(std::int64_t channels, std::int64_t taps);

struct ConvSizes {
  std::int64_t in_channels, channels, r, kernel_h, kernel_w;
};

class ConvKernel {
 public:
  // bias has one float per output channel, or is null; so is the table where there is no GELU.
  ConvKernel(const ConvSizes& sizes, const GeluTable* table, const ConvWeight& weight, const float* bias,
             const PlanesLayout& in, const ConvOutputLayout& out, int threads);
  // The plan points into this object.
  ConvKernel(const ConvKernel&) = delete;
  ConvKernel& operator=(const ConvKernel&) = delete;

  const ConvPlan& plan() const { return plan_; }

 private:
  ConvPlan plan_{};
  std::vector<std::int32_t> column_;
  std::vector<std::int64_t> steps_;
  std::vector<ConvGather> gathers_;
  std::vector<int> first_gather_, first_store_;
  std::vector<float> bias_;
  std::vector<ConvStore> stores_;
  Aligned<BFloat16> packed_;
};

}  // namespace hflfnerv
