// The output stage in one pass: 3x3 head convolutions to three channels, tanh, sum of the groups, 8 bits; what
// hflfnerv/reference/output_stage.py defines. Everything is summed in float32.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "float_types.h"

namespace hflfnerv {

// x is [batch, channels, height, width], channels-last, and at least as large as the frame; the weight is
// [3, channels, 3, 3], contiguous.
struct OutputFeature {
  const void* x;
  std::int64_t channels, height, width;
  const float* weight;
  int group;
};

// frame = offset + sum over groups of scale * tanh(sum of the group's convolutions + bias), its top left height x width.
struct OutputShape {
  std::int64_t batch, height, width;
  int groups;
  const float* scales;  // of the groups
  const float* biases;  // three for each group
  float offset;
};

// `features` are in the order of their groups. `out` is [batch, height, width, 3]: bytes (clamped to [0, 1], times 255,
// rounded half to even), or floats. Features in bfloat16 are multiplied by AMX if `amx` is true, with weights rounded to
// bfloat16; otherwise vectors of the level compute in float32. A pixel is computed alike wherever it lies.
void output_stage_fwd(const OutputShape& shape, const OutputFeature* features, int count, FloatType type, void* out,
                      bool bytes, int threads, SimdLevel level, bool amx);

}  // namespace hflfnerv
