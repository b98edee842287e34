// The output stage on tensor cores: heads of up to three feature maps, tanh, their sum, clamp and rounding to 8 bits.
#pragma once

#include <cstdint>

namespace hflfnerv {

constexpr int kMostFeatures = 3;

struct OutputFeatureCuda {
  const void* x;       // [batch, rows, columns, channels], pixels `pixel` elements apart
  const void* weight;  // its head's, in the order of fragments: output_weight_elements(channels), aligned to 16 bytes
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

// A head's weight as products of 16 rows and 16 channels take it: element e of register i of lane l, for the kernel's row k and
// step s, is that of row l / 4 + 8 (i mod 2) and channel 16 s + 8 (i / 2) + 2 (l mod 4) + e. Row 3 t + c of 16 is for the
// kernel's column t and colour c; what is behind the channels or the 9 rows is zero. From the outside k, s, l, i, e.
constexpr int output_weight_elements(int channels) { return (channels + 15) / 16 * 3 * 256; }

// Returns null, or what went wrong in words. The device becomes the current one.
const char* output_stage_cuda_fwd(const OutputStageCuda& call, int device, void* stream);

}  // namespace hflfnerv
