// The output stage on tensor cores: heads of up to three feature maps, tanh, their sum, clamp and rounding to 8 bits.
#pragma once

#include <cstdint>

namespace hflfnerv {

constexpr int kMostFeatures = 3;

struct OutputFeatureCuda {
  const void* x;       // [batch, rows, columns, channels], pixels `pixel` elements apart; aligned to 4 bytes if that is even
  const void* weight;  // its head's, in the order of fragments: output_weight_elements(channels)
  int channels, rows, columns, pixel, group;
};

struct OutputStageCuda {
  bool bfloat16;  // else float16
  bool as_bytes;  // else float32, neither clamped nor rounded
  int batch, height, width;
  int features, groups;
  OutputFeatureCuda feature[kMostFeatures];  // groups ascend
  float scales[kMostFeatures];           // of the groups
  float offset;
  const float* biases;  // [groups, 3]
  void* y;              // [batch, height, width, 3]
};

// A head's weight as products of 16 channels by 8 columns take it: element e of register i of lane l, for step s and columns
// 8 j and following, is that of channel 16 s + 8 i + 2 (l mod 4) + e and column 8 j + l / 4. Column 3 t + c of 32 is for tap t
// and colour c; what is behind the channels or the 27 columns is zero.
constexpr int output_weight_elements(int channels) { return (channels + 15) / 16 * 16 * 32; }

// Returns null, or what went wrong in words. The device becomes the current one.
const char* output_stage_cuda_fwd(const OutputStageCuda& call, int device, void* stream);

}  // namespace hflfnerv
